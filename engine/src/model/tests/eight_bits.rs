//! Checkpoints in 8 bits, as ModelOpt exports them, give what their decoded values give; what is not served is refused by name.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use baton_configs::llm::{KvCacheDtype, LlmOptions};
use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use tempfile::TempDir;

use super::{Session, float32, golden_path};
use crate::backend::cpu::CpuBackend;
use crate::backend::e4m3;
use crate::model::load::load;

const EXPORT: &str = r#"{"producer":{"name":"modelopt","version":"0.33.0"},"quantization":{"quant_algo":"FP8",
"kv_cache_quant_algo":null,"exclude_modules":["lm_head"]}}"#;

type Tensor = (Dtype, Vec<usize>, Vec<u8>);

/// All tensors of the tiny Llama; its projections in 8 bits with their scales, and the same decoded.
fn checkpoints(each_row: bool) -> [HashMap<String, Tensor>; 2] {
    let file = fs::read(golden_path("tiny-llama").join("model.safetensors")).expect("a file");
    let whole = SafeTensors::deserialize(&file).expect("a checkpoint");
    let (mut narrow, mut wide) = (HashMap::new(), HashMap::new());
    for (name, tensor) in whole.tensors() {
        let shape = tensor.shape().to_vec();
        if !name.ends_with("proj.weight") {
            let copy = (tensor.dtype(), shape, tensor.data().to_vec());
            narrow.insert(name.clone(), copy.clone());
            wide.insert(name, copy);
            continue;
        }
        let values = floats(&tensor);
        let (rows, cols) = (shape[0], shape[1]);
        let greatest = |values: &[f32]| values.iter().fold(1e-9_f32, |most, v| most.max(v.abs()));
        let scales: Vec<f32> = if each_row {
            let rows = values.chunks_exact(cols);
            rows.map(|row| greatest(row) / e4m3::MAX).collect()
        } else {
            vec![greatest(&values) / e4m3::MAX]
        };
        let bits: Vec<u8> = values
            .iter()
            .enumerate()
            .map(|(index, value)| {
                let row = if each_row { index / cols } else { 0 };
                e4m3::encode(value / scales[row])
            })
            .collect();
        let decoded = e4m3::decode_rows(&bits, rows, &scales);
        wide.insert(
            name.clone(),
            (Dtype::F32, shape.clone(), bytes_of(&decoded)),
        );
        let scale_shape = if each_row { vec![rows] } else { Vec::new() };
        narrow.insert(
            format!("{name}_scale"),
            (Dtype::F32, scale_shape, bytes_of(&scales)),
        );
        narrow.insert(name, (Dtype::F8_E4M3, shape, bits));
    }
    [narrow, wide]
}

fn floats(tensor: &TensorView<'_>) -> Vec<f32> {
    let bytes = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&b| f32::from_le_bytes(b))
            .collect(),
        Dtype::BF16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|&b| bf16::from_le_bytes(b).to_f32())
            .collect(),
        other => panic!("the tiny checkpoint is in {other:?}"),
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn write(folder: &Path, tensors: &HashMap<String, Tensor>) {
    fs::copy(
        golden_path("tiny-llama").join("config.json"),
        folder.join("config.json"),
    )
    .expect("a copy");
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes).expect("it fits");
        (name.clone(), view)
    });
    let file = safetensors::serialize(views, None).expect("it can be written");
    fs::write(folder.join("model.safetensors"), file).expect("a file");
}

/// Logits of a short prompt, or why the folder is refused.
fn logits(folder: &Path) -> Result<Vec<Vec<f32>>, String> {
    let spec = folder.to_str().expect("UTF-8");
    let loaded = load(spec, &float32(), None, CpuBackend::new(None), &|_| ());
    let loaded = loaded.map_err(|error| error.to_string())?;
    Ok(Session::new(loaded, &float32()).feed(&[5, 6, 7, 8], 0))
}

#[test]
fn an_export_gives_what_its_decoded_values_give() {
    for each_row in [false, true] {
        let [narrow, wide] = checkpoints(each_row);
        let (exported, decoded) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        write(exported.path(), &narrow);
        fs::write(exported.path().join("hf_quant_config.json"), EXPORT).unwrap();
        write(decoded.path(), &wide);
        assert_eq!(logits(exported.path()), logits(decoded.path()));
    }
}

#[test]
fn what_an_export_lacks_or_is_not_served_is_said() {
    let [mut narrow, _] = checkpoints(false);
    let folder = TempDir::new().unwrap();
    write(folder.path(), &narrow);
    for (config, expected) in [
        (
            json!({"quantization": {"quant_algo": "NVFP4"}}),
            "`quant_algo` NVFP4",
        ),
        (json!({"producer": {}}), "hf_quant_config.json"),
    ] {
        fs::write(
            folder.path().join("hf_quant_config.json"),
            config.to_string(),
        )
        .unwrap();
        let refused = logits(folder.path()).expect_err("it is refused");
        assert!(refused.contains(expected), "{refused}");
    }
    fs::write(folder.path().join("hf_quant_config.json"), EXPORT).unwrap();
    let name = "model.layers.0.mlp.down_proj.weight_scale";
    let (dtype, _, _) = narrow[name].clone();
    for (bytes, expected) in [
        (bytes_of(&[1.0, 2.0, 3.0]), "weight_scale"),
        (bytes_of(&[-1.0]), "no positive number"),
    ] {
        let shape = vec![bytes.len() / 4];
        narrow.insert(name.to_owned(), (dtype, shape, bytes));
        write(folder.path(), &narrow);
        let refused = logits(folder.path()).expect_err("it is refused");
        assert!(refused.contains(expected), "{refused}");
    }
    narrow.remove(name);
    write(folder.path(), &narrow);
    let refused = logits(folder.path()).expect_err("it is refused");
    assert!(refused.contains(name), "{refused}");
}

/// The tiny Llama with keys and values that are too large for 8 bits: queries and outputs make up for it, so that the model is the same.
/// All factors are powers of two, hence exact.
fn stretched() -> HashMap<String, Tensor> {
    let [_, mut tensors] = checkpoints(false);
    for (name, (dtype, _, bytes)) in &mut tensors {
        let factor = match name.rsplit('.').nth(1) {
            Some("q_proj") => 1.0 / KEY_SCALE,
            Some("k_proj") => KEY_SCALE,
            Some("v_proj") => VALUE_SCALE,
            Some("o_proj") => 1.0 / VALUE_SCALE,
            _ => continue,
        };
        assert_eq!(*dtype, Dtype::F32);
        let values = bytes.as_chunks().0.iter();
        let values = values.map(|&bytes| f32::from_le_bytes(bytes) * factor);
        *bytes = bytes_of(&values.collect::<Vec<_>>());
    }
    tensors
}

const KEY_SCALE: f32 = 4096.0;
const VALUE_SCALE: f32 = 65_536.0;

fn kv_in(dtype: KvCacheDtype) -> LlmOptions {
    let mut options = float32();
    options.kv_cache.dtype = dtype;
    options
}

/// As [`logits`], with pages of 8-bit elements; and the fingerprint of the model.
fn with_kv(folder: &Path, options: &LlmOptions) -> Result<(Vec<Vec<f32>>, u64), String> {
    let spec = folder.to_str().expect("UTF-8");
    let loaded = load(spec, options, None, CpuBackend::new(None), &|_| ());
    let mut session = Session::new(loaded.map_err(|error| error.to_string())?, options);
    let fingerprint = session.model.shape().fingerprint;
    let mut rows = session.feed(&[5, 6, 7, 8], 0);
    rows.extend(session.feed(&[9], 0));
    Ok((rows, fingerprint))
}

#[test]
fn scales_of_8_bit_kv_are_read_by_all_their_names() {
    let fp8 = kv_in(KvCacheDtype::Fp8);
    let folder = TempDir::new().unwrap();
    let [_, plain] = checkpoints(false);
    write(folder.path(), &plain);
    let (expected, unscaled) = with_kv(folder.path(), &fp8).unwrap();
    write(folder.path(), &stretched());
    let (clipped, same) = with_kv(folder.path(), &fp8).unwrap();
    assert_ne!(clipped, expected, "too large for 8 bits");
    assert_eq!(same, unscaled);
    for [key, value] in [
        ["k_proj.k_scale", "v_proj.v_scale"],
        ["attn.k_scale", "attn.v_scale"],
        ["k_scale", "v_scale"],
    ] {
        let mut tensors = stretched();
        for layer in 0..layers(&tensors) {
            for (name, scale) in [(key, KEY_SCALE), (value, VALUE_SCALE)] {
                let name = format!("model.layers.{layer}.self_attn.{name}");
                let scale = (Dtype::F32, Vec::new(), bytes_of(&[scale]));
                tensors.insert(name, scale);
            }
        }
        write(folder.path(), &tensors);
        let (found, scaled) = with_kv(folder.path(), &fp8).unwrap();
        assert_eq!(found, expected, "{key}");
        // Such KV is of no use to who has no scales; without 8 bits, nobody has.
        assert_ne!(scaled, unscaled);
        let wide = with_kv(folder.path(), &kv_in(KvCacheDtype::Float32)).unwrap();
        assert_eq!(wide.1, unscaled);

        let lacking = format!("model.layers.0.self_attn.{value}");
        tensors.remove(&lacking);
        write(folder.path(), &tensors);
        let refused = with_kv(folder.path(), &fp8).expect_err("it is refused");
        assert!(refused.contains("layer 0 lacks a scale"), "{refused}");
        let negative = (Dtype::F32, vec![1], bytes_of(&[-1.0]));
        tensors.insert(lacking.clone(), negative);
        write(folder.path(), &tensors);
        let refused = with_kv(folder.path(), &fp8).expect_err("it is refused");
        assert!(refused.contains(&lacking), "{refused}");
    }
    // Scales of another format.
    let other = json!({"quantization": {"quant_algo": null, "kv_cache_quant_algo": "NVFP4"}});
    let file = folder.path().join("hf_quant_config.json");
    fs::write(file, other.to_string()).unwrap();
    assert_eq!(with_kv(folder.path(), &fp8).unwrap(), (clipped, unscaled));
}

fn layers(tensors: &HashMap<String, Tensor>) -> usize {
    let norms = tensors.keys();
    norms
        .filter(|name| name.ends_with("input_layernorm.weight"))
        .count()
}
