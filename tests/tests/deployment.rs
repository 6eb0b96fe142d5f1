//! What a client sees through the proxy at the edges of an answer.

use baton_tests::client;
use baton_tests::deployment::{Deployment, Options};
use serde_json::{Value, json};

const ENGINE: &str = "dtype: float32\nmax_seq_len: 512\nkv_cache_config:\n  max_tokens: 4096\n";

async fn tiny() -> Deployment {
    let model = baton_tests::tiny_model("llama");
    let mut options = Options::new(&model, ENGINE);
    options.context_count = 1;
    Deployment::start(&options).await
}

fn text(choice: &Value) -> &str {
    choice["text"].as_str().unwrap_or_default()
}

/// An answer of one token never needs a generation server, and its text is not lost in a stream.
#[tokio::test]
async fn one_token_is_one_token() {
    let deployment = tiny().await;
    let mut body = json!({"model": "m", "prompt": "hello", "max_tokens": 1, "temperature": 0});
    let answer = client::post(&deployment.address, "/v1/completions", &body)
        .await
        .expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    assert_eq!(answer["usage"]["completion_tokens"], json!(1), "{answer}");
    assert_eq!(answer["choices"][0]["finish_reason"], json!("length"));
    body["stream"] = json!(true);
    let events = client::stream(&deployment.address, "/v1/completions", &body)
        .await
        .expect("a stream");
    let streamed: String = events
        .iter()
        .flat_map(|event| event["choices"].as_array().into_iter().flatten())
        .map(text)
        .collect();
    assert_eq!(streamed, text(&answer["choices"][0]));
    assert!(!streamed.is_empty());
}

/// Seeded sampling gives the same answer through one server and through the hand-off.
#[tokio::test]
async fn a_seed_gives_one_answer_everywhere() {
    let deployment = tiny().await;
    for seed in 0..4 {
        let body = json!({"model": "m", "prompt": "hello", "max_tokens": 24, "temperature": 1.2, "top_p": 0.95, "seed": seed,
            "presence_penalty": 0.5, "repetition_penalty": 1.1, "detokenize": false, "ignore_eos": true});
        let ids = async |address: &str| {
            let answer = client::post(address, "/v1/completions", &body)
                .await
                .expect("an answer");
            assert_eq!(answer.status, 200, "{}", answer.body);
            answer.json()["choices"][0]["token_ids"].clone()
        };
        let alone = ids(&deployment.generation.address).await;
        assert_eq!(alone.as_array().map(Vec::len), Some(24));
        assert_eq!(ids(&deployment.address).await, alone, "seed {seed}");
    }
}

/// What the proxy says about itself.
#[tokio::test]
async fn the_proxys_own_endpoints() {
    let deployment = tiny().await;
    for (path, expected) in [
        ("/version", "version"),
        ("/cluster_info", "is_ready"),
        ("/v1/models", "tiny-llama"),
        ("/prometheus/metrics", "ctx_completed_requests_total"),
    ] {
        let answer = client::get(&deployment.address, path)
            .await
            .expect("an answer");
        assert_eq!(answer.status, 200, "{path}");
        assert!(answer.body.contains(expected), "{path}: {}", answer.body);
    }
    assert_eq!(
        client::get(&deployment.address, "/nothing")
            .await
            .expect("an answer")
            .status,
        404
    );
}
