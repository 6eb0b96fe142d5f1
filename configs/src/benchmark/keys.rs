//! The sections of a benchmark `config.yaml`.

use crate::llm::RawLlm;
use crate::section::kind::{Anything, Flag, FreeText, Later, Text, Whole};
use crate::section::section;

section! {
    /// What Slurm is told.
    RawJob "benchmark slurm" {}
    checked {
        /// Partition.
        partition: FreeText = "null";
        /// Account that the time is charged to.
        account: FreeText = "null";
        /// Time limit.
        job_time: Text = "\"02:00:00\"";
        /// Name of the job.
        job_name: FreeText = "null";
        /// More options of `sbatch`, as a shell would split them.
        extra_args: FreeText = "\"\"";
        /// Keep the nodes together with `--segment`; only an explicit true asks for it.
        set_segment: Flag = "null";
    }
    unserved {
        /// The batch script of the original.
        script_file: Anything = "null", Ignored "the batch script is written by `baton slurm render`";
        /// Bind the memory of each rank.
        numa_bind: Anything = "null", Ignored "give `srun_args` or `--cpu-bind` in a layout";
    }
    groups &[];
}

section! {
    /// How many instances there are, and where.
    RawHardware "hardware" {}
    checked {
        /// GPUs of a node.
        gpus_per_node: Whole<u32, 1, 1024> = "4";
        /// Context instances.
        num_ctx_servers: Whole<u32, 1, 1024> = "1";
        /// Generation instances.
        num_gen_servers: Whole<u32, 1, 1024> = "1";
    }
    unserved {}
    groups &[];
}

section! {
    /// Container, model and variables.
    RawEnvironment "benchmark environment" {}
    checked {
        /// Mounts of the container, `HOST:CONTAINER` each, between commas.
        container_mount: FreeText = "\"\"";
        /// Image of the container.
        container_image: FreeText = "\"\"";
        /// Model: a GGUF file, a Hugging Face directory, or a model id that is in the local cache.
        model_path: FreeText = "null";
        /// Directory for log files. Empty takes the run folder.
        log_dir: FreeText = "\"\"";
        /// Variables of all workers, `NAME=VALUE` each, between blanks.
        worker_env_var: FreeText = "\"\"";
        /// Variables of the proxy.
        server_env_var: FreeText = "\"\"";
        /// More variables of the context workers.
        ctx_worker_env_var: FreeText = "\"\"";
        /// More variables of the generation workers.
        gen_worker_env_var: FreeText = "\"\"";
    }
    unserved {
        /// Source of the original.
        trtllm_repo: Anything = "\"\"", Ignored "nothing is built in the job";
        /// Whether it is built.
        build_wheel: Anything = "false", Ignored "nothing is built in the job";
        /// For which devices it is built.
        cuda_architectures: Anything = "\"\"", Ignored "nothing is built in the job";
        /// What is installed instead.
        trtllm_wheel_path: Anything = "\"\"", Ignored "nothing is installed in the job";
        /// Where the original's scripts are.
        work_dir: Anything = "null", Ignored "there are no scripts; `-o` names the run folder";
    }
    groups &[];
}

section! {
    /// Engine options of both roles.
    RawWorkers "worker_config" {}
    checked {
        /// Engine options of the context instances.
        ctx: Later<RawLlm> = "{}";
        /// Engine options of the generation instances.
        gen_ as "gen": Later<RawLlm> = "{}";
    }
    unserved {}
    groups &[];
}
