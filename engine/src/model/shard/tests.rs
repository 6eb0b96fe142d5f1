//! Who holds what, and which sizes are refused with which words.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::model::config::HuggingFaceConfig;
use crate::model::tests::golden_json;
use crate::page::{KvDtype, KvScale};

/// A model with so many query heads, KV heads, feed-forward columns and layers.
fn config(heads: usize, kv_heads: usize, ffn_width: usize, layers: usize) -> DecoderConfig {
    let mut raw = golden_json("tiny-llama/config.json");
    raw["num_attention_heads"] = json!(heads);
    raw["num_key_value_heads"] = json!(kv_heads);
    raw["intermediate_size"] = json!(ffn_width);
    raw["num_hidden_layers"] = json!(layers);
    HuggingFaceConfig::parse(&raw.to_string())
        .and_then(|raw| raw.decoder())
        .expect("a decoder")
}

fn smollm2() -> DecoderConfig {
    config(9, 3, 1536, 30)
}

fn grid(tensor: usize, pipeline: usize) -> Grid {
    Grid { tensor, pipeline }
}

fn refusal(config: &DecoderConfig, tensor: usize, pipeline: usize) -> String {
    let refused = check(config, grid(tensor, pipeline));
    refused.expect_err("it does not go").to_string()
}

/// Whether no rank before this one holds the same keys and values.
fn is_first_holder(config: &DecoderConfig, shard: &Shard) -> bool {
    KvPart::new(config.layers(), config.kv_heads, shard.place).copy == 0
}

#[test]
fn three_ranks_hold_a_third_each() {
    let shards = Shard::all(&smollm2(), grid(3, 1));
    let last = &shards[2];
    assert_eq!((last.heads.clone(), last.kv_heads.clone()), (6..9, 2..3));
    assert_eq!((last.ffn.clone(), last.layers.clone()), (1024..1536, 0..30));
    assert_eq!(last.vocab, 192..288);
    let own = last.config(&smollm2());
    assert_eq!((own.heads, own.kv_heads, own.vocab), (3, 1, 96));
    assert_eq!(own.width, smollm2().width);
}

#[test]
fn scales_of_kv_are_those_of_the_stages_layers() {
    let scales = (1_u8..9)
        .map(f32::from)
        .map(|key| KvScale { key, value: -key });
    let whole = DecoderConfig {
        kv_scales: scales.collect(),
        ..config(8, 4, 256, 8)
    };
    let shards = Shard::all(&whole, grid(2, 3));
    for (rank, layers) in [(0, 0..3), (1, 0..3), (5, 6..8)] {
        let own = shards[rank].config(&whole);
        assert_eq!(own.kv_scales, whole.kv_scales[layers]);
    }
    let none = Shard::all(&config(8, 4, 256, 8), grid(2, 3));
    assert!(none[5].config(&config(8, 4, 256, 8)).kv_scales.is_empty());
}

#[test]
fn neighbours_hold_the_same_kv_head_where_there_are_too_few() {
    let config = config(8, 4, 256, 8);
    let shards = Shard::all(&config, grid(8, 1));
    let held: Vec<_> = shards
        .iter()
        .map(|shard| (shard.kv_heads.clone(), is_first_holder(&config, shard)))
        .collect();
    let expected: Vec<_> = (0..8)
        .map(|rank| (rank / 2..rank / 2 + 1, rank % 2 == 0))
        .collect();
    assert_eq!(held, expected);
}

#[test]
fn stages_are_as_even_as_they_go_and_ranks_are_numbered_stage_by_stage() {
    let shards = Shard::all(&config(8, 4, 256, 8), grid(2, 3));
    let layers: Vec<_> = shards.iter().map(|shard| shard.layers.clone()).collect();
    assert_eq!(layers, [0..3, 0..3, 3..6, 3..6, 6..8, 6..8]);
    let place = shards[3].place;
    assert_eq!((place.pp, place.tp, place.rank()), (1, 1, 3));
    assert_eq!((place.stage(), place.last_stage()), (2..4, 4..6));
    let whole = PageShape {
        layers: 8,
        kv_heads: 4,
        tokens_per_block: 32,
        head_dim: 16,
        dtype: KvDtype::F16,
    };
    let page = shards[5].page(whole);
    assert_eq!((page.layers, page.kv_heads), (2, 2));
}

#[test]
fn what_does_not_divide_is_refused_with_the_sizes_that_go() {
    let config = smollm2();
    assert!(check(&config, grid(3, 30)).is_ok());
    for (tensor, pipeline, reason) in [
        (
            2,
            1,
            "tensor_parallel_size 2 does not divide 9 attention heads",
        ),
        (
            4,
            1,
            "tensor_parallel_size 4 does not divide 9 attention heads",
        ),
        (
            9,
            1,
            "tensor_parallel_size 9 does not divide the feed-forward size 1536",
        ),
        (0, 1, "tensor_parallel_size 0 must be at least 1"),
        (1, 0, "pipeline_parallel_size 0 must be at least 1"),
        (
            3,
            31,
            "pipeline_parallel_size 31 is more than the model's 30 layers",
        ),
    ] {
        assert_eq!(
            refusal(&config, tensor, pipeline),
            format!(
                "{reason}\nhint: this model goes with tensor_parallel_size 1, 3 and pipeline_parallel_size 1 to 30"
            )
        );
    }
    let odd = self::config(12, 6, 256, 2);
    assert!(refusal(&odd, 4, 1).starts_with(
        "tensor_parallel_size 4 neither divides 6 key/value heads nor is a multiple of them\n"
    ));
}

proptest! {
    #[test]
    fn the_shards_together_are_the_model(
        kv_heads in 1_usize..9,
        copies in 1_usize..4,
        more in 1_usize..4,
        fewer in any::<prop::sample::Index>(),
        repeats in any::<bool>(),
        (pipeline, extra_layers) in (1_usize..9, 0_usize..9),
    ) {
        // Either ranks divide the KV heads, or they are so many that each KV head is on several.
        let divisors: Vec<_> = (1..=kv_heads).filter(|size| kv_heads.is_multiple_of(*size)).collect();
        let tensor = if repeats { kv_heads * copies } else { *fewer.get(&divisors) };
        let (group, layers) = (copies * more, pipeline + extra_layers);
        let config = config(kv_heads * group, kv_heads, 8 * tensor, layers);
        let grid = grid(tensor, pipeline);
        prop_assert!(check(&config, grid).is_ok());
        let shards = Shard::all(&config, grid);
        let follows = |at: &mut usize, range: &Range<usize>| {
            let ok = range.start == *at && !range.is_empty();
            *at = range.end;
            ok
        };
        for stage in shards.chunks(tensor) {
            let (mut heads, mut kv, mut ffn, mut vocab) = (0, 0, 0, 0);
            for shard in stage {
                prop_assert!(follows(&mut heads, &shard.heads));
                prop_assert!(follows(&mut ffn, &shard.ffn));
                prop_assert!(follows(&mut vocab, &shard.vocab));
                prop_assert!(!is_first_holder(&config, shard) || follows(&mut kv, &shard.kv_heads));
                // Each query head finds its KV head on its own rank.
                for head in shard.heads.clone() {
                    prop_assert!(shard.kv_heads.contains(&(head / group)));
                }
            }
            prop_assert_eq!((heads, kv), (config.heads, config.kv_heads));
            prop_assert_eq!((ffn, vocab), (config.ffn_width, config.vocab));
        }
        let mut at = 0;
        for stage in shards.iter().step_by(tensor) {
            prop_assert!(follows(&mut at, &stage.layers));
        }
        prop_assert_eq!(at, layers);
    }
}
