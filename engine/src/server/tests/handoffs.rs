//! Context-only and generation-only requests, and that two servers write what one would.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::harness::{EOS, LEASE, ScriptedEngine, TestServer, ids};
use crate::request::RequestKind;

async fn saying(text: &str) -> TestServer {
    TestServer::start(ScriptedEngine::saying(text)).await
}

fn context_body(mut body: Value) -> Value {
    body["disaggregated_params"] = json!({"request_type": "context_only", "disagg_request_id": 99});
    body
}

/// What the proxy makes of a context answer.
fn generation_body(mut body: Value, context: &Value) -> Value {
    let mut params = context["choices"][0]["disaggregated_params"].clone();
    params["request_type"] = json!("generation_only");
    params["ctx_usage"] = context["usage"].clone();
    let prompt = if body.get("messages").is_some() {
        "prompt_token_ids"
    } else {
        "prompt"
    };
    body[prompt] = context["prompt_token_ids"].clone();
    body["disaggregated_params"] = params;
    body
}

#[tokio::test]
async fn a_context_answer_carries_all_that_the_other_side_needs() {
    let server = saying("Hello").await;
    let body = context_body(json!({"model": "m", "prompt": "ab", "logprobs": 1}));
    let reply = server.complete(body).await;
    let choice = &reply["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!("H"), &json!("not_finished"))
    );
    assert_eq!(reply["prompt_token_ids"], json!(ids("ab")));
    let first = ids("H")[0];
    assert_eq!(
        choice["disaggregated_params"],
        json!({"request_type": "context_only", "first_gen_tokens": [first],
            "first_gen_log_probs": [[{"token_id": first, "logprob": -0.25, "rank": 1},
                {"token_id": first, "logprob": -0.25, "rank": 1}]],
            "ctx_request_id": LEASE, "encoded_opaque_state": STANDARD.encode(b"opaque"),
            "draft_tokens": null, "disagg_request_id": 99, "ctx_dp_rank": null,
            "ctx_info_endpoint": null, "schedule_style": null, "ctx_usage": null,
            "conversation_id": null})
    );
    assert_eq!(
        server.engine.last_request().kind,
        RequestKind::ContextOnly {
            disagg_request_id: Some(99),
            early: false,
        }
    );
    // The lease lives on until the generation server has come.
    assert_eq!(server.engine.cancelled(), 0);
}

#[tokio::test]
async fn two_servers_write_what_one_writes() {
    let text = "é one, two. three 🦀 four";
    let server = saying(text).await;
    let variants = [
        json!({}),
        json!({"stop": [", tw"]}),
        json!({"stop": ["one"], "include_stop_str_in_output": true}),
        json!({"stop": ["é one"]}),
        json!({"max_tokens": 5}),
        json!({"logprobs": 3}),
        json!({"echo": true}),
        json!({"min_tokens": 9, "stop": [" "]}),
        json!({"skip_special_tokens": false, "include_stop_str_in_output": true}),
        json!({"stop_token_ids": ids("w")}),
    ];
    for variant in variants {
        let mut body = json!({"model": "m", "prompt": "ab"});
        for (name, value) in variant.as_object().unwrap() {
            body[name] = value.clone();
        }
        if variant.get("logprobs").is_some() {
            body["seed"] = json!(1);
        }
        let whole = server.complete(body.clone()).await;
        let context = server.complete(context_body(body.clone())).await;
        assert_eq!(
            context["choices"][0]["finish_reason"], "not_finished",
            "{variant}"
        );
        let joined = server
            .complete(generation_body(body.clone(), &context))
            .await;
        assert_eq!(joined["choices"], whole["choices"], "{variant}");
        assert_eq!(joined["usage"], whole["usage"], "{variant}");

        let mut streamed = generation_body(body, &context);
        streamed["stream"] = json!(true);
        let events = server.post("/v1/completions", &streamed).await.events();
        let streamed: String = events
            .iter()
            .filter_map(|event| event["choices"][0]["text"].as_str())
            .collect();
        assert_eq!(whole["choices"][0]["text"], streamed, "{variant}");
    }
}

#[tokio::test]
async fn chats_are_handed_off_by_their_tokens() {
    let server = saying("Hello there").await;
    let body =
        json!({"model": "m", "messages": [{"role": "user", "content": "hey"}], "stop": ["re"]});
    let whole = server.chat(body.clone()).await;
    let context = server.chat(context_body(body.clone())).await;
    assert_eq!(context["choices"][0]["message"]["content"], "H");
    let joined = server.chat(generation_body(body, &context)).await;
    assert_eq!(joined["choices"], whole["choices"]);
    assert_eq!(joined["choices"][0]["message"]["content"], "Hello the");
}

#[tokio::test]
async fn the_ticket_reaches_the_engine_as_it_was() {
    let server = saying("Hello").await;
    let body = json!({"model": "m", "prompt": "ab"});
    let context = server.complete(context_body(body.clone())).await;
    server.complete(generation_body(body, &context)).await;
    let RequestKind::GenerationOnly(ticket) = server.engine.last_request().kind else {
        panic!("expected a generation-only request");
    };
    assert_eq!(
        (ticket.ctx_request_id, ticket.disagg_request_id),
        (LEASE, Some(99))
    );
    assert_eq!(ticket.opaque_state, b"opaque");
    assert_eq!(ticket.first_tokens, ids("H"));
}

#[tokio::test]
async fn a_context_phase_may_end_the_answer() {
    let ended = |text: &str, extra: Value| {
        let text = text.to_owned();
        async move {
            let server = saying(&text).await;
            let mut body = context_body(json!({"model": "m", "prompt": "ab"}));
            for (name, value) in extra.as_object().unwrap() {
                body[name] = value.clone();
            }
            let reply = server.complete(body).await;
            (reply["choices"][0].clone(), server.engine.cancelled())
        }
    };
    let (choice, _) = ended("", json!({})).await;
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!(""), &json!("stop"))
    );
    let params = &choice["disaggregated_params"];
    assert_eq!(params["first_gen_tokens"], json!([EOS]));
    assert_eq!(params["ctx_request_id"], Value::Null);
    assert_eq!(params["disagg_request_id"], 99);

    let (choice, _) = ended("abc", json!({"max_tokens": 1})).await;
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!("a"), &json!("length"))
    );

    // A stop string is beyond the engine, which keeps the KV until it is told that nobody will come.
    let (choice, cancelled) = ended("abc", json!({"stop": "a"})).await;
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!(""), &json!("stop"))
    );
    assert_eq!(choice["stop_reason"], "a");
    assert_eq!(
        choice["disaggregated_params"]["ctx_request_id"],
        Value::Null
    );
    assert_eq!(cancelled, 1);
}

#[tokio::test]
async fn the_prompt_is_counted_where_it_was_read() {
    let server = saying("Hello").await;
    let body = json!({"model": "m", "prompt": "ab"});
    let mut context = server.complete(context_body(body.clone())).await;
    context["usage"]["prompt_tokens"] = json!(20);
    context["usage"]["prompt_tokens_details"] = json!({"cached_tokens": 16});
    let mut body = generation_body(body, &context);
    let usage = server.complete(body.clone()).await["usage"].clone();
    let expected = json!({"prompt_tokens": 20, "total_tokens": 26, "completion_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 16}});
    assert_eq!(usage, expected);
    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let events = server.post("/v1/completions", &body).await.events();
    assert_eq!(events.last().unwrap()["usage"], expected);
}

#[tokio::test]
async fn both_phases_here_is_an_ordinary_request() {
    let server = saying("Hello").await;
    let body = json!({"model": "m", "prompt": "ab",
        "disaggregated_params": {"request_type": "context_and_generation"}});
    let reply = server.complete(body).await;
    assert_eq!(reply["choices"][0]["text"], "Hello");
    assert_eq!(server.engine.last_request().kind, RequestKind::Aggregated);
}
