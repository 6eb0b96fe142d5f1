//! Bodies that nobody meant: whatever comes, the answer is a 200 or a 4xx, and the server goes on.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Map, Value, json};

use super::harness::{ScriptedEngine, TestServer};

const BODIES: usize = 10_000;

const NAMES: &[&str] = &[
    "model",
    "prompt",
    "messages",
    "prompt_token_ids",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "best_of",
    "stream",
    "stream_options",
    "stop",
    "stop_token_ids",
    "logprobs",
    "top_logprobs",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "logit_bias",
    "echo",
    "detokenize",
    "tools",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "disaggregated_params",
    "min_tokens",
    "truncate_prompt_tokens",
    "response_format",
    "suffix",
    "user",
    "nonsense",
];

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0..300_i64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        "\\{[{%] ?[a-z.()|]{0,10} ?[%}]\\}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec(("[a-z_]{1,8}", inner), 0..4)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// Near misses: a good request with some fields replaced.
fn any_request() -> impl Strategy<Value = Value> {
    let fields = prop::collection::vec((prop::sample::select(NAMES), any_json()), 0..4);
    (any::<bool>(), fields).prop_map(|(chat, fields)| {
        let mut body: Map<String, Value> = match chat {
            true => json!({"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}),
            false => json!({"model": "m", "prompt": "a", "max_tokens": 3}),
        }
        .as_object()
        .unwrap()
        .clone();
        for (name, value) in fields {
            body.insert(name.to_owned(), value);
        }
        Value::Object(body)
    })
}

fn any_body() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        6 => any_request().prop_map(|body| body.to_string().into_bytes()),
        1 => any_json().prop_map(|body| body.to_string().into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..64),
        1 => (any_request(), any::<prop::sample::Index>()).prop_map(|(body, cut)| {
            let mut bytes = body.to_string().into_bytes();
            bytes.truncate(cut.index(bytes.len()));
            bytes
        }),
    ]
}

#[tokio::test]
async fn random_bodies_never_break_the_server() {
    let server = TestServer::start(ScriptedEngine::saying("abc")).await;
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let strategy = any_body();
    let mut served = 0;
    for round in 0..BODIES {
        let body = strategy.new_tree(&mut runner).unwrap().current();
        let path = ["/v1/completions", "/v1/chat/completions"][round % 2];
        let reply = server.call("POST", path, "", &body).await;
        assert!(
            reply.status == 200 || (400..500).contains(&reply.status),
            "{}: {} for {}",
            reply.status,
            reply.body,
            String::from_utf8_lossy(&body)
        );
        if reply.status == 200 {
            served += 1;
        } else {
            reply.error(reply.status);
        }
    }
    assert!(
        served > BODIES / 50,
        "{served} of {BODIES} were good requests"
    );
    assert_eq!(server.get("/health").await.status, 200);
}
