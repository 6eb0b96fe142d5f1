//! Everything that is answered with a 400, and that each answer names the field.

use serde_json::{Value, json};

use super::harness::{ScriptedEngine, TestServer};

async fn server() -> TestServer {
    TestServer::start(ScriptedEngine::saying("x")).await
}

async fn refuse(server: &TestServer, path: &str, body: &Value, field: &str) {
    let reply = server.post(path, body).await;
    let message = reply.error(400);
    assert_eq!(reply.json()["param"], field, "{body}: {message}");
    assert!(message.starts_with(&format!("`{field}`")), "{message}");
    assert!(!message.contains('\n'), "{message}");
}

#[tokio::test]
async fn shared_fields_that_are_not_served_or_out_of_range() {
    let server = server().await;
    let cases = [
        ("use_beam_search", json!(true)),
        ("length_penalty", json!(2)),
        ("early_stopping", json!(true)),
        ("top_p_min", json!(0.5)),
        ("lora_request", json!({"lora_name": "a"})),
        ("return_context_logits", json!(true)),
        ("thinking_token_budget", json!(5)),
        ("priority", json!(0.5)),
        ("metadata", json!({"a": "b"})),
        ("store", json!(true)),
        ("service_tier", json!("flex")),
        ("response_format", json!({"type": "json_object"})),
        ("conversation_params", json!("a")),
        ("user", json!(5)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("min_p", json!(1.5)),
        ("repetition_penalty", json!(0)),
        ("frequency_penalty", json!(3)),
        ("presence_penalty", json!(-3)),
        ("n", json!(0)),
        ("n", json!(129)),
        ("best_of", json!(0)),
        ("seed", json!(1.5)),
        ("min_tokens", json!(-1)),
        ("prompt_ignore_length", json!(-1)),
        ("stop", json!("")),
        ("stop", json!(5)),
        ("stop", json!(["a", 5])),
        ("stop", json!(vec!["a"; 65])),
        ("stop_token_ids", json!([288])),
        ("stop_token_ids", json!("a")),
        ("logit_bias", json!({"288": 1})),
        ("logit_bias", json!({"a": 1})),
        ("logit_bias", json!({"5": 101})),
        ("logit_bias", json!([1])),
        ("truncate_prompt_tokens", json!(0)),
        ("echo", json!("yes")),
        ("stream", json!(1)),
        ("stream_options", json!({"include_usage": true})),
        ("detokenize", json!(0)),
        ("max_tokens", json!(0)),
        ("disaggregated_params", json!({"request_type": "sideways"})),
        (
            "disaggregated_params",
            json!({"request_type": "context_only", "extra": 1}),
        ),
        ("disaggregated_params", json!([])),
        ("max_token", json!(1)),
    ];
    for (field, value) in cases {
        let mut completion = json!({"model": "m", "prompt": "a"});
        completion[field] = value.clone();
        refuse(&server, "/v1/completions", &completion, field).await;
        let mut chat = json!({"model": "m", "messages": [{"role": "user", "content": "a"}]});
        chat[field] = value;
        refuse(&server, "/v1/chat/completions", &chat, field).await;
    }
}

#[tokio::test]
async fn neutral_values_of_what_is_not_served_are_accepted() {
    let server = server().await;
    let neutral = json!({"use_beam_search": false, "length_penalty": 1.0, "early_stopping": false,
        "top_p_min": 0.0, "lora_request": null, "return_context_logits": false,
        "thinking_token_budget": null, "priority": null, "metadata": {}, "store": false,
        "service_tier": "auto", "response_format": {"type": "text"},
        "spaces_between_special_tokens": true, "user": "u", "conversation_params": {"conversation_id": "c"}});
    let mut completion = neutral.clone();
    completion["model"] = json!("m");
    completion["prompt"] = json!("a");
    completion["suffix"] = Value::Null;
    server.complete(completion).await;
    let mut chat = neutral;
    chat["model"] = json!("m");
    chat["messages"] = json!([{"role": "user", "content": "a"}]);
    for (name, value) in [
        ("tool_choice", json!("none")),
        ("parallel_tool_calls", json!(true)),
        ("reasoning_effort", json!("low")),
        ("mm_processor_kwargs", json!({})),
        ("thinking", json!(false)),
        ("tools", json!([])),
    ] {
        chat[name] = value;
    }
    server.chat(chat).await;
}

#[tokio::test]
async fn fields_of_completions() {
    let server = server().await;
    let cases = [
        ("suffix", json!("")),
        ("logprobs", json!(21)),
        ("logprobs", json!(true)),
        ("prompt", json!(5)),
        ("prompt", json!("")),
        ("prompt", json!([])),
        ("prompt", json!(["a", 5])),
        ("prompt", json!([5, "a"])),
        ("prompt", json!([[1], "a"])),
        ("prompt", json!([-1])),
        ("prompt", json!([288])),
        ("prompt", json!([[1], [288]])),
        ("prompt", json!(vec!["a"; 257])),
        ("model", json!(5)),
        ("messages", json!([])),
    ];
    for (field, value) in cases {
        let mut body = json!({"model": "m", "prompt": "a"});
        body[field] = value;
        refuse(&server, "/v1/completions", &body, field).await;
    }
    refuse(&server, "/v1/completions", &json!({"model": "m"}), "prompt").await;
    refuse(&server, "/v1/completions", &json!({"prompt": "a"}), "model").await;
}

#[tokio::test]
async fn fields_of_chats() {
    let server = server().await;
    let cases = [
        ("messages", json!([])),
        ("messages", json!("a")),
        ("messages", json!([5])),
        ("messages", json!([{"content": "a"}])),
        ("messages", json!([{"role": "user", "content": 5}])),
        ("tool_choice", json!("auto")),
        ("tools", json!("a")),
        ("parallel_tool_calls", json!("a")),
        ("reasoning_effort", json!("high")),
        ("mm_processor_kwargs", json!({"a": 1})),
        ("media_io_kwargs", json!({"a": 1})),
        ("thinking", json!(true)),
        ("modalities", json!(["audio"])),
        ("logprobs", json!(5)),
        ("top_logprobs", json!(5)),
        ("documents", json!({})),
        ("chat_template", json!(5)),
        ("chat_template_kwargs", json!([])),
        ("chat_template_kwargs", json!({"messages": []})),
        ("prompt_token_ids", json!([288])),
        ("prompt_token_ids", json!([])),
        ("add_generation_prompt", json!("a")),
        ("prompt", json!("a")),
        ("functions", json!([])),
    ];
    for (field, value) in cases {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "a"}]});
        body[field] = value;
        refuse(&server, "/v1/chat/completions", &body, field).await;
    }
}

#[tokio::test]
async fn combinations() {
    let server = server().await;
    let cases = [
        (json!({"min_tokens": 5, "max_tokens": 4}), "min_tokens"),
        (json!({"n": 3, "best_of": 2}), "best_of"),
        (json!({"n": 1, "best_of": 2, "stream": true}), "best_of"),
        (json!({"detokenize": false, "stop": "a"}), "stop"),
        (json!({"detokenize": false, "echo": true}), "echo"),
        (
            json!({"stream": true, "stream_options": []}),
            "stream_options",
        ),
        (
            json!({"stream": true, "stream_options": {"include": true}}),
            "include",
        ),
        (json!({"n": 128, "prompt": vec!["a"; 9]}), "n"),
        (
            json!({"stream": true, "disaggregated_params": {"request_type": "context_only"}}),
            "stream",
        ),
        (
            json!({"n": 2, "disaggregated_params": {"request_type": "context_only"}}),
            "n",
        ),
        (
            json!({"prompt": ["a", "b"], "disaggregated_params": {"request_type": "context_only"}}),
            "prompt",
        ),
        (
            json!({"echo": true, "logprobs": 1, "disaggregated_params": {"request_type": "context_only"}}),
            "echo",
        ),
    ];
    for (extra, field) in cases {
        let mut body = json!({"model": "m", "prompt": "a"});
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        refuse(&server, "/v1/completions", &body, field).await;
    }
}

#[tokio::test]
async fn tickets_that_no_context_server_wrote() {
    let server = server().await;
    let ticket = json!({"request_type": "generation_only", "first_gen_tokens": [5],
        "ctx_request_id": 1, "encoded_opaque_state": "b3BhcXVl"});
    let cases = [
        ("first_gen_tokens", Value::Null),
        ("first_gen_tokens", json!([])),
        ("first_gen_tokens", json!([288])),
        ("ctx_request_id", Value::Null),
        ("encoded_opaque_state", json!("not base64!")),
        ("draft_tokens", json!([1])),
        (
            "first_gen_log_probs",
            json!([[{"token_id": 6, "logprob": -1.0}]]),
        ),
        ("first_gen_log_probs", json!([[]])),
    ];
    for (field, value) in cases {
        let mut ticket = ticket.clone();
        ticket[field] = value;
        let body = json!({"model": "m", "prompt": [1, 2], "disaggregated_params": ticket});
        let field = format!("disaggregated_params.{field}");
        refuse(&server, "/v1/completions", &body, &field).await;
    }
}

#[tokio::test]
async fn a_long_prompt_is_refused_with_both_numbers() {
    let server = server().await;
    let body = json!({"model": "m", "prompt": "a".repeat(5000)});
    let message = server.post("/v1/completions", &body).await.error(400);
    assert!(
        message.contains("5000") && message.contains("4096"),
        "{message}"
    );
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "a".repeat(4095)}]});
    let message = server.post("/v1/chat/completions", &body).await.error(400);
    assert!(message.contains("4096"), "{message}");
    // One token of room is enough.
    let body = json!({"model": "m", "prompt": vec![1; 4095], "max_tokens": 100});
    server.complete(body).await;
    assert_eq!(server.engine.last_request().sampling.max_tokens, 1);
}
