//! Logits of a checkpoint, for comparison with another implementation: `scripts/gpu/logits.py` makes checkpoints, runs this on
//! each, and judges.
//!
//! The folder that `BATON_TEST_CHECKPOINT` names has the checkpoint and `run.json`: `tokens`, how many of them are the `prompt`, how
//! many of its rows are a `chunk`, what `kv` is kept as, and the `grid`: ranks of a stage, and stages. Each token behind the prompt is a
//! step of its own. `logits.f32` gets the logits of all tokens, `[tokens, V]`. Each further rank is a process with the next GPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use baton_configs::llm::LlmOptions;
use serde_json::Value;

use super::*;
use crate::backend::SequenceSpan;
use crate::collective::RankNames;
use crate::group;
use crate::model::Model;
use crate::model::load::{ModelHeader, load};
use crate::model::shard::Grid;
use crate::page::KvDtype;
use crate::parallel::{Leading, lead};
use crate::ranks::{Fabric, FollowerSpec, LeaderRanks, RankCall};
use crate::secret::Secret;
use crate::serve::follow;

const TOKENS_PER_BLOCK: usize = 32;
const PATIENCE: Duration = Duration::from_secs(60);
/// Says to a rank's process what it is.
const FOLLOWER: &str = "BATON_TEST_FOLLOWER";
const IDENTITY: &str = "logits of a checkpoint";
const HERE: &str = "127.0.0.1";

/// A step of one sequence that wants the logits of all its rows.
fn part(tokens: &[u32], past_len: usize) -> StepBatch {
    let rows = tokens.len();
    let blocks = (past_len + rows).div_ceil(TOKENS_PER_BLOCK);
    StepBatch {
        tokens: tokens.to_vec(),
        positions: (small(past_len)..).take(rows).collect(),
        sequences: vec![SequenceSpan {
            rows: 0..rows,
            past_len,
            blocks: (0..small(blocks)).collect(),
        }],
        logit_rows: (0..rows).collect(),
    }
}

/// Processes of the ranks that follow; ended with this.
#[derive(Debug, Default)]
struct Followers(Arc<Mutex<Vec<Child>>>);

impl Followers {
    /// What has a process started for each rank that the leader calls for.
    fn ranks(&self) -> LeaderRanks {
        let (secret, started) = (Secret::generate(), Arc::clone(&self.0));
        let key = secret.to_hex();
        let start = move |call: &RankCall| {
            for rank in 1..call.size {
                let child = follower(call, rank, &key).map_err(|error| error.to_string())?;
                started.lock().unwrap().push(child);
            }
            Ok(())
        };
        LeaderRanks {
            identity: IDENTITY.to_owned(),
            secret,
            host: HERE.to_owned(),
            hosts: Vec::new(),
            join_timeout: PATIENCE,
            peer_timeout: PATIENCE,
            fabric: Fabric::Tcp,
            call: Arc::new(start),
        }
    }
}

impl Drop for Followers {
    fn drop(&mut self) {
        for child in self.0.lock().unwrap().iter_mut() {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

fn follower(call: &RankCall, rank: usize, secret: &str) -> std::io::Result<Child> {
    let patience_ms = u64::try_from(PATIENCE.as_millis()).unwrap();
    let spec = FollowerSpec {
        rank,
        size: call.size,
        leader: call.leader.clone(),
        identity: IDENTITY.to_owned(),
        secret: secret.to_owned(),
        host: HERE.to_owned(),
        hosts: Vec::new(),
        join_timeout_ms: patience_ms,
        peer_timeout_ms: patience_ms,
        fabric: Fabric::Tcp,
        num_threads: None,
    };
    let test = concat!(module_path!(), "::a_rank_that_follows");
    let (_, test) = test.split_once("::").expect("a module of a crate");
    Command::new(std::env::current_exe()?)
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env(FOLLOWER, serde_json::to_string(&spec)?)
        .env("CUDA_VISIBLE_DEVICES", rank.to_string())
        .spawn()
}

#[test]
#[ignore = "run by another test as a process of its own"]
fn a_rank_that_follows() {
    let Ok(spec) = std::env::var(FOLLOWER) else {
        return;
    };
    let spec = serde_json::from_str(&spec).unwrap();
    follow(&spec, &AtomicBool::new(false)).unwrap();
}

/// The model on as many ranks as the options ask for, each with a GPU.
fn on_ranks(backend: CudaBackend, spec: &str, options: &LlmOptions) -> (Box<dyn Model>, Followers) {
    let (followers, stop) = (Followers::default(), AtomicBool::new(false));
    let grid = Grid::of(options);
    if grid == Grid::ALONE {
        let loaded = load(spec, options, None, backend, &|_| {});
        return (loaded.unwrap().model, followers);
    }
    let ranks = followers.ranks();
    let leader = group::Leader::bind(&ranks).unwrap();
    let call = RankCall {
        leader: leader.address(),
        size: grid.size(),
        tensor_parallel: grid.tensor,
        pipeline_parallel: grid.pipeline,
    };
    (ranks.call)(&call).unwrap();
    let met = leader.gather(grid.size(), &ranks, &stop).unwrap();
    let met = group::on_fabric(met, Fabric::Tcp, PATIENCE, PATIENCE).unwrap();
    let header = ModelHeader::read(spec, options, None).unwrap();
    header.check(grid).unwrap();
    let leading = Leading {
        model: spec.to_owned(),
        revision: None,
        options,
        names: RankNames::new(&[]),
        peer_timeout: PATIENCE,
        stop: &stop,
    };
    let led = lead(met, header, &leading, |_| Ok(backend), &|_| {}).unwrap();
    (led.loaded.model, followers)
}

/// The checkpoint's options and what is asked of it.
fn run_of(folder: &Path) -> (Value, LlmOptions, KvDtype) {
    let run: Value = serde_json::from_slice(&fs::read(folder.join("run.json")).unwrap()).unwrap();
    let [tensor, pipeline] = [0, 1].map(|at| u32::try_from(number(&run["grid"][at])).unwrap());
    let options = LlmOptions {
        tensor_parallel_size: tensor,
        pipeline_parallel_size: pipeline,
        ..LlmOptions::default()
    };
    let dtype = match run["kv"].as_str() {
        Some("f16") => KvDtype::F16,
        Some("bf16") => KvDtype::Bf16,
        Some("fp8") => KvDtype::Fp8,
        other => panic!("kv is {other:?}"),
    };
    (run, options, dtype)
}

fn number(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

#[test]
#[ignore = "needs a checkpoint; see scripts/gpu/logits.py"]
fn logits_of_a_checkpoint() {
    let Some(backend) = gpu() else { return };
    let named = std::env::var_os("BATON_TEST_CHECKPOINT");
    let folder = PathBuf::from(named.expect("BATON_TEST_CHECKPOINT names a folder"));
    let (run, options, dtype) = run_of(&folder);
    let tokens = run["tokens"].as_array().unwrap();
    let tokens: Vec<u32> = tokens.iter().map(|token| small(number(token))).collect();
    let (mut model, _followers) = on_ranks(backend, folder.to_str().unwrap(), &options);
    let shape = model.shape();
    let page = PageShape {
        layers: shape.layers,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        tokens_per_block: TOKENS_PER_BLOCK,
        dtype,
    };
    let blocks = tokens.len().div_ceil(TOKENS_PER_BLOCK);
    model.allocate_pages(page, blocks).unwrap();
    let (prompt, chunk) = (number(&run["prompt"]), number(&run["chunk"]));
    let (mut out, mut past_len) = (Vec::new(), 0);
    while past_len < tokens.len() {
        let rows = if past_len < prompt {
            chunk.min(prompt - past_len)
        } else {
            1
        };
        let step = part(&tokens[past_len..past_len + rows], past_len);
        let logits = model.forward(&step).unwrap();
        let bytes = logits.values.iter().flat_map(|value| value.to_le_bytes());
        out.extend(bytes);
        past_len += rows;
    }
    fs::write(folder.join("logits.f32"), out).unwrap();
}
