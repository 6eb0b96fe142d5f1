//! Context and generation with two checkpoints of one model: weights of different precision, one type of KV.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use baton_tests::client;
use baton_tests::deployment::Worker;
use baton_tests::process::Baton;
use serde_json::{Value, json};

const ENGINE: &str =
    "device: cpu\nmax_seq_len: 512\ncache_transceiver_config:\n  backend: DEFAULT\n";
const HALF: &str = "kv_cache_config:\n  max_tokens: 2048\n  dtype: float16\n";
const SINGLE: &str = "kv_cache_config:\n  max_tokens: 2048\n  dtype: float32\n";

/// Several blocks of the byte-level tokenizer.
const PROMPT: &str = "The baton passes from the one who reads to the one who writes, and nothing of it is lost on the way; who reads \
    well and who writes well need not be the same, and need not think in numbers of the same size.";

/// A second checkpoint of tiny-llama: the matrices rounded to 8 bits a row, as an 8-bit quantisation does, and stored in
/// float32, where the original has bfloat16.
fn eight_bits(folder: &Path) -> PathBuf {
    let source = PathBuf::from(baton_tests::tiny_model("llama"));
    let target = folder.join("tiny-llama-8bit");
    std::fs::create_dir_all(&target).expect("a folder");
    for entry in std::fs::read_dir(&source).expect("the tiny model is in the tree") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), target.join(entry.file_name())).expect("a copy");
    }
    let config = target.join("config.json");
    let text = std::fs::read_to_string(&config).expect("a config");
    std::fs::write(&config, text.replace("bfloat16", "float32")).expect("a config");
    let weights = std::fs::read(source.join("model.safetensors")).expect("the weights");
    std::fs::write(target.join("model.safetensors"), requantised(&weights)).expect("weights");
    target
}

/// A safetensors file of bfloat16 tensors with its values rounded, in float32.
fn requantised(file: &[u8]) -> Vec<u8> {
    let size = u64::from_le_bytes(file[..8].try_into().expect("eight bytes"));
    let (header, data) = file[8..].split_at(usize::try_from(size).expect("a size"));
    let tensors: BTreeMap<String, Value> = serde_json::from_slice(header).expect("a header");
    let (mut described, mut values) = (serde_json::Map::new(), Vec::new());
    for (name, tensor) in tensors.iter().filter(|(name, _)| *name != "__metadata__") {
        assert_eq!(tensor["dtype"], "BF16", "{name}");
        let at = |index: usize| {
            let offset = tensor["data_offsets"][index].as_u64().expect("an offset");
            usize::try_from(offset).expect("an offset")
        };
        let shape: Vec<u64> = serde_json::from_value(tensor["shape"].clone()).expect("a shape");
        let mut row: Vec<f32> = data[at(0)..at(1)]
            .chunks_exact(2)
            .map(|pair| f32::from_bits(u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16))
            .collect();
        if let [_, columns] = shape[..] {
            row.chunks_mut(usize::try_from(columns).expect("a size"))
                .for_each(round_row);
        }
        let begin = values.len();
        row.iter()
            .for_each(|value| values.extend(value.to_le_bytes()));
        described.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, values.len()]}),
        );
    }
    let header = Value::Object(described).to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.into_bytes());
    out.extend(values);
    out
}

/// To the 255 levels between the row's largest value and its negative.
fn round_row(row: &mut [f32]) {
    let largest = row
        .iter()
        .fold(0.0_f32, |most, value| most.max(value.abs()));
    let step = largest / 127.0;
    if step > 0.0 {
        row.iter_mut()
            .for_each(|value| *value = (*value / step).round() * step);
    }
}

/// A context server, a generation server with another checkpoint, and the proxy before them.
struct Pair {
    context: Worker,
    generation: Worker,
    _proxy: Baton,
    address: String,
}

impl Pair {
    async fn start(context: (&str, &str), generation: (&str, &str)) -> Self {
        let options = |kv: &str| format!("{ENGINE}{kv}");
        let context = Worker::start(context.0, &options(context.1)).await;
        let generation = Worker::start(generation.0, &options(generation.1)).await;
        let config = format!(
            "hostname: 127.0.0.1\nport: 0\ncontext_servers: {{num_instances: 1, urls: [\"{}\"]}}\ngeneration_servers: {{num_instances: 1, urls: [\"{}\"]}}\n",
            context.address, generation.address
        );
        let arguments = ["disaggregated", "-c", "@/disagg_config.yaml"];
        let mut proxy = Baton::start_with(&[("disagg_config.yaml", &config)], &arguments, &[]);
        let address = proxy.ready().await;
        Self {
            context,
            generation,
            _proxy: proxy,
            address,
        }
    }

    /// What the generation server has counted.
    async fn fetched(&self) -> [u64; 2] {
        let state = self.generation.state().await;
        ["handoffs_fetched_total", "handoffs_prefilled_again_total"]
            .map(|name| state["engineStats"][name].as_u64().expect("a counter"))
    }
}

/// Ids of a greedy answer.
async fn ids(address: &str, max_tokens: u32) -> Vec<u64> {
    let body = json!({"model": "m", "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "detokenize": false});
    let answer = client::post(address, "/v1/completions", &body)
        .await
        .expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.body);
    let ids = answer.json()["choices"][0]["token_ids"].clone();
    serde_json::from_value(ids).expect("token ids")
}

/// The context's weights choose the first token, the generation's all others, and no prompt is read twice: so the answer is
/// neither's own.
#[tokio::test]
async fn weights_of_two_precisions_serve_one_request() {
    let folder = tempfile::tempdir().expect("a folder");
    let original = baton_tests::tiny_model("llama");
    let rounded = eight_bits(folder.path()).to_string_lossy().into_owned();
    for (context, generation) in [(&original, &rounded), (&rounded, &original)] {
        let pair = Pair::start((context, HALF), (generation, HALF)).await;
        let together = ids(&pair.address, 24).await;
        assert_eq!(together.len(), 24);
        assert_eq!(
            pair.fetched().await,
            [1, 0],
            "the kv came and was used as it is"
        );
        let alone = ids(&pair.context.address, 1).await;
        assert_eq!(
            together[..1],
            alone[..],
            "the first token is the context server's"
        );
        assert_eq!(
            ids(&pair.address, 24).await,
            together,
            "the same answer again"
        );
    }
}

/// The two checkpoints differ: else the test above would prove nothing.
#[tokio::test]
async fn the_two_checkpoints_do_not_answer_alike() {
    let folder = tempfile::tempdir().expect("a folder");
    let rounded = eight_bits(folder.path()).to_string_lossy().into_owned();
    let options = format!("{ENGINE}{HALF}");
    let original = Worker::start(&baton_tests::tiny_model("llama"), &options).await;
    let rounded = Worker::start(&rounded, &options).await;
    let body =
        json!({"model": "m", "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "logprobs": 1});
    let mut seen = Vec::new();
    for worker in [&original, &rounded] {
        let answer = client::post(&worker.address, "/v1/completions", &body).await;
        let answer = answer.expect("an answer").json();
        let logprob = &answer["choices"][0]["logprobs"]["token_logprobs"][0];
        seen.push(logprob.as_f64().expect("a log-probability"));
    }
    let apart = (seen[0] - seen[1]).abs();
    assert!(apart > 1e-4 && apart < 0.5, "{seen:?}");
}

/// KV of another type is refused with both values named, before any of it moves.
#[tokio::test]
async fn kv_of_another_type_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let original = baton_tests::tiny_model("llama");
    let rounded = eight_bits(folder.path()).to_string_lossy().into_owned();
    let pair = Pair::start((&original, HALF), (&rounded, SINGLE)).await;
    let body = json!({"model": "m", "prompt": PROMPT, "max_tokens": 8, "temperature": 0});
    let answer = client::post(&pair.address, "/v1/completions", &body)
        .await
        .expect("an answer");
    assert_eq!(answer.status, 400, "{}", answer.body);
    let reason = "kv layouts differ: kv dtype float32 here, float16 there";
    assert_eq!(answer.json()["error"]["message"], reason);
    assert_eq!(pair.fetched().await[0], 0);
}
