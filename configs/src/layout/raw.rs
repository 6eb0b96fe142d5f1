//! The keys of a layout: tables from which reader, schema and documentation are made.

use crate::layout::job::{Fabric, StartMode};
use crate::llm::RawLlm;
use crate::section::kind::{
    Count, Flag, Later, List, OneOf, Port, Seconds, Size, StrictFlag, Sub, Text, TextMap, Whole,
};
use crate::section::section;

section! {
    /// One role's instances.
    RawRole "role" {
        /// How many instances there are. `null` is two that read prompts, or one that writes answers.
        instances: Whole<u32, 1, 1024> = "null";
        /// Engine options of this role; they cover those of the top-level `engine`, key by key.
        /// `tensor_parallel_size` and `pipeline_parallel_size` say how many ranks each instance has.
        engine: Later<RawLlm> = "{}";
        /// Environment variables of this role's processes, beside the inherited ones.
        environment: TextMap = "{}";
    }
    unserved {}
    groups &[];
}

section! {
    /// The proxy of the deployment.
    RawProxy "proxy" {
        /// Address that the proxy binds. `null` is 127.0.0.1 with `baton up`, and every address of its node on a
        /// cluster.
        hostname: Text = "null";
        /// Port that the proxy binds; 0 lets the kernel choose. `null` is 0 with `baton up`, and 8000 on a cluster.
        port: Port = "null";
        /// How often a failed call to a server is tried again, each time on another server.
        max_retries: Whole<u32, 0, 100> = "1";
        /// For how many requests timings are kept for `/perf_metrics`; 0 keeps none.
        perf_metrics_max_requests: Size = "0";
        /// Number of this proxy in request ids. `null` takes the last byte of the machine's network address.
        node_id: Whole<u8, 0, 255> = "null";
        /// Whether a request may bring its own chat template.
        allow_request_chat_template: StrictFlag = "false";
        /// How long an idle client connection is kept, in seconds.
        server_keep_alive_timeout: Seconds = "10";
        /// How long the proxy waits for the servers to come up, in seconds.
        server_start_timeout: Seconds = "180";
        /// How long one call to a server may take, in seconds.
        request_timeout: Seconds = "180";
        /// Environment variables of the proxy, beside the inherited ones. Not with `start: one_world`, where the
        /// proxy is a child of the first rank's launcher.
        environment: TextMap = "{}";
    }
    unserved {}
    groups &[];
}

section! {
    /// What Slurm is told.
    RawSlurm "slurm" {
        /// Partition. `null` takes the cluster's default.
        partition: Text = "null";
        /// Account that the time is charged to. `null` takes the user's default.
        account: Text = "null";
        /// Time limit as Slurm writes it: `minutes`, `hours:minutes:seconds`, `days-hours:minutes:seconds` and so
        /// on, in quotes. `null` takes the partition's.
        time: Text = "null";
        /// Name of the job; with `start: jobs` each job's role is added.
        job_name: Text = "baton";
        /// How many nodes the ranks may take. `null` takes what they need. With `start: jobs` this holds for each
        /// role's job.
        nodes: Whole<u32, 1, 65536> = "null";
        /// CPUs of each rank. `null` leaves it to Slurm.
        cpus_per_task: Count = "null";
        /// Take whole nodes, which nobody else uses meanwhile.
        exclusive: Flag = "false";
        /// Ask Slurm for the GPUs with `--gpus-per-node`. Off where nodes are given whole or have none.
        request_gpus: Flag = "false";
        /// Keep the nodes of a job together with `--segment`, where the cluster has topology blocks.
        segment: Flag = "false";
        /// Signal before the end of the job's time, as for `sbatch --signal`: the deployment drains then.
        signal: Text = "B:USR1@60";
        /// Whether Slurm may start the job again after a node failed. `null` takes the cluster's default.
        requeue: Flag = "null";
        /// More options of `sbatch`, one a word; they come last, so they win.
        sbatch_args: List<Text> = "[]";
        /// More options of each `srun`, one a word; they come last, so they win.
        srun_args: List<Text> = "[]";
    }
    unserved {}
    groups &[];
}

section! {
    /// The container that the ranks and the proxy run in (pyxis with enroot).
    RawContainer "container" {
        /// Image, as `--container-image` takes it.
        image: Text = "null";
        /// Mounts, `HOST:CONTAINER` or `HOST:CONTAINER:FLAGS` each. The run folder is added where none holds it.
        mounts: List<Text> = "[]";
        /// Working directory in the container. `null` takes the image's.
        workdir: Text = "null";
        /// Where the `baton` program is in the container. `null` is the same place as outside.
        baton: Text = "null";
    }
    unserved {}
    groups &[];
}

section! {
    /// A whole deployment, on one machine or as jobs of a Slurm cluster.
    RawLayout "layout" {
        /// Model: a GGUF file, a Hugging Face directory, or a model id that is in the local cache.
        model: Text = "null";
        /// Name that `/v1/models` reports. `null` takes the model's directory or file name.
        served_model_name: Text = "null";
        /// Engine options of both roles.
        engine: Later<RawLlm> = "{}";
        /// The instances that read prompts.
        context: Later<RawRole> = "{}";
        /// The instances that write answers.
        generation: Later<RawRole> = "{}";
        /// The proxy.
        proxy: Sub<RawProxy> = "{}";
        /// Directory for one log file a process. `null` leaves the choice to `baton up`, or to the run folder on a
        /// cluster.
        log_dir: Text = "null";
        /// How the ranks are started on a cluster: `one_world` is a single `srun` for all of them, `steps` is a job
        /// step for each instance, `jobs` is a job for each role and one for the proxy.
        start: OneOf<StartMode> = "one_world";
        /// Ranks that a node holds, each with a GPU of its own where there are any. Every other key of clusters
        /// needs it.
        gpus_per_node: Whole<u32, 1, 1024> = "null";
        /// Through what the ranks of an instance talk: `tcp`, where a rank that dies ends its instance only, or
        /// `mpi`, where it ends everything.
        fabric: OneOf<Fabric> = "tcp";
        /// What `srun --mpi` is given.
        mpi: Text = "pmix";
        /// Ports of the instances, `FIRST-LAST`; each gets one of its own. `null` lets each node's kernel choose.
        ports: Text = "null";
        /// The `baton` program on the nodes.
        baton: Text = "baton";
        /// Where the workers of `start: jobs` register and the proxy finds them: `http://host:port`, the proxy's
        /// own address, whose host is the node that its job is given. `null` takes address files in the run folder,
        /// which all nodes must see.
        discovery_uri: Text = "null";
        /// What Slurm is told.
        slurm: Sub<RawSlurm> = "{}";
        /// The container that the processes run in. `null` is none.
        container: Sub<RawContainer> = "null";
    }
    unserved {}
    groups &[];
}

/// The keys of a layout that only clusters need.
pub(crate) const JOB_KEYS: [&str; 9] = [
    "start",
    "gpus_per_node",
    "fabric",
    "mpi",
    "ports",
    "baton",
    "discovery_uri",
    "slurm",
    "container",
];
