//! Engine options typed on the command line, as values that the file then covers.

use crate::llm::{ComputeDtype, Device, LoadFormat};
use crate::section::kind::name_of;
use crate::yaml::{Document, Entry, Node, Origin, Value};

/// What the command line of `baton serve` says about the engine; `None` where it says nothing.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LlmOverrides {
    /// `--dtype`.
    pub dtype: Option<ComputeDtype>,
    /// `--load_format`.
    pub load_format: Option<LoadFormat>,
    /// `--device`.
    pub device: Option<Device>,
    /// `--max_batch_size`.
    pub max_batch_size: Option<u32>,
    /// `--max_num_tokens`.
    pub max_num_tokens: Option<u32>,
    /// `--max_seq_len`.
    pub max_seq_len: Option<u32>,
    /// `--max_beam_width`.
    pub max_beam_width: Option<u32>,
    /// `--enable_chunked_prefill`.
    pub enable_chunked_prefill: Option<bool>,
    /// `--tensor_parallel_size`, `--tp_size`.
    pub tensor_parallel_size: Option<u32>,
    /// `--pipeline_parallel_size`, `--pp_size`.
    pub pipeline_parallel_size: Option<u32>,
    /// `--context_parallel_size`, `--cp_size`.
    pub context_parallel_size: Option<u32>,
    /// `--free_gpu_memory_fraction`, `--kv_cache_free_gpu_memory_fraction`.
    pub free_gpu_memory_fraction: Option<f64>,
    /// `--num_threads`.
    pub num_threads: Option<u32>,
    /// `--served_model_name`.
    pub served_model_name: Option<String>,
    /// `--chat_template`: a file or the template itself.
    pub chat_template: Option<String>,
    /// `--tokenizer`.
    pub tokenizer: Option<String>,
    /// `--backend`.
    pub backend: Option<String>,
    /// `--disagg_cluster_uri`. Unlike the others it covers what the file says (COMPAT.md §3.1).
    pub disagg_cluster_uri: Option<String>,
    /// Any other option of COMPAT.md §3.1 that has a key of the same name in the file, such as
    /// `reasoning_parser`; each is treated exactly as that key is.
    pub others: Vec<(String, String)>,
}

impl LlmOverrides {
    /// The section that a URI alone means.
    fn cluster(&self) -> Option<Node> {
        let uri = Node::text(self.disagg_cluster_uri.as_ref()?);
        Some(Node::new(Value::Map(vec![typed(
            "cluster_uri".to_owned(),
            uri,
        )])))
    }

    fn entries(&self) -> Vec<Entry> {
        let whole = |number: &u32| Node::whole(*number);
        let text = |text: &String| Node::text(text);
        let values = [
            ("dtype", self.dtype.map(|dtype| Node::text(name_of(dtype)))),
            (
                "load_format",
                self.load_format.map(|format| Node::text(name_of(format))),
            ),
            (
                "device",
                self.device.map(|device| Node::text(name_of(device))),
            ),
            ("max_batch_size", self.max_batch_size.as_ref().map(whole)),
            ("max_num_tokens", self.max_num_tokens.as_ref().map(whole)),
            ("max_seq_len", self.max_seq_len.as_ref().map(whole)),
            ("max_beam_width", self.max_beam_width.as_ref().map(whole)),
            (
                "enable_chunked_prefill",
                self.enable_chunked_prefill
                    .map(|flag| Node::new(Value::Bool(flag))),
            ),
            (
                "tensor_parallel_size",
                self.tensor_parallel_size.as_ref().map(whole),
            ),
            (
                "pipeline_parallel_size",
                self.pipeline_parallel_size.as_ref().map(whole),
            ),
            (
                "context_parallel_size",
                self.context_parallel_size.as_ref().map(whole),
            ),
            (
                "free_gpu_memory_fraction",
                self.free_gpu_memory_fraction
                    .map(|share| Node::new(Value::Number(share))),
            ),
            ("num_threads", self.num_threads.as_ref().map(whole)),
            (
                "served_model_name",
                self.served_model_name.as_ref().map(text),
            ),
            ("chat_template", self.chat_template.as_ref().map(text)),
            ("tokenizer", self.tokenizer.as_ref().map(text)),
            ("backend", self.backend.as_ref().map(text)),
            ("disagg_cluster", self.cluster()),
        ];
        let named = values
            .into_iter()
            .filter_map(|(key, node)| Some((key.to_owned(), node?)));
        let others = self
            .others
            .iter()
            .map(|(key, value)| (key.clone(), Node::text(value)));
        named
            .chain(others)
            .map(|(key, node)| typed(key, node))
            .collect()
    }
}

fn typed(key: String, node: Node) -> Entry {
    Entry {
        key,
        place: None,
        node,
        origin: Origin::CommandLine,
    }
}

/// Puts the URI into the file's section, where there is one.
fn cover_cluster_uri(entries: &mut [Entry], uri: &str) {
    let section = entries
        .iter_mut()
        .find(|entry| entry.key == "disagg_cluster");
    if let Some(Value::Map(keys)) = section.map(|entry| &mut entry.node.value) {
        keys.retain(|entry| entry.key != "cluster_uri");
        keys.push(typed("cluster_uri".to_owned(), Node::text(uri)));
    }
}

/// The file's mapping, with the command line's values for the keys that the file does not give.
pub(crate) fn merge(file: Option<&Document>, cli: &LlmOverrides) -> Document {
    let Some(document) = file else {
        return Document::from_root("command line", Node::new(Value::Map(cli.entries())));
    };
    let Value::Map(written) = &document.root().value else {
        return document.clone();
    };
    let mut entries = written.clone();
    for entry in cli.entries() {
        let given = written
            .iter()
            .any(|own| own.key == entry.key && !own.node.is_null());
        let short = entry.key == "free_gpu_memory_fraction"
            && written
                .iter()
                .any(|own| own.key == "kv_cache_free_gpu_memory_fraction");
        if !given && !short {
            entries.retain(|own| own.key != entry.key);
            entries.push(entry);
        }
    }
    if let Some(uri) = &cli.disagg_cluster_uri {
        cover_cluster_uri(&mut entries, uri);
    }
    document.with_entries(entries)
}
