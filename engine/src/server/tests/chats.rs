//! `/v1/chat/completions`, whole answers.

use serde_json::{Value, json};

use super::harness::{EOS, ScriptedEngine, TestServer, ids, service, tokenizer};

async fn saying(text: &str) -> TestServer {
    TestServer::start(ScriptedEngine::saying(text)).await
}

fn hello() -> Value {
    json!([{"role": "user", "content": "Hello"}])
}

#[tokio::test]
async fn the_whole_object() {
    let server = saying("Hi").await;
    let mut reply = server
        .chat(json!({"model": "m", "messages": hello()}))
        .await;
    assert!(reply["id"].as_str().unwrap().starts_with("chatcmpl-"));
    reply["id"] = Value::Null;
    reply["created"] = Value::Null;
    let mut tokens = ids("Hi");
    tokens.push(EOS);
    let prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(server.engine.last_request().prompt, ids(prompt));
    let prompt_tokens = ids(prompt).len();
    assert_eq!(
        reply,
        json!({
            "id": null, "object": "chat.completion", "created": null, "model": "tiny",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi",
                "reasoning_content": null, "reasoning": null, "tool_calls": []},
                "token_ids": tokens, "logprobs": null, "finish_reason": "stop",
                "stop_reason": null, "disaggregated_params": null,
                "avg_decoded_tokens_per_iter": null}],
            "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens + 3,
                "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 3}},
            "prompt_token_ids": null,
        })
    );
}

#[tokio::test]
async fn token_ids_pass_the_template_by() {
    let server = saying("Hi").await;
    let body = json!({"model": "m", "messages": hello(), "prompt_token_ids": [1, 2, 3]});
    server.chat(body).await;
    assert_eq!(server.engine.last_request().prompt, [1, 2, 3]);
}

#[tokio::test]
async fn content_parts_and_kwargs_reach_the_template() {
    let server = saying("Hi").await;
    let body = json!({"model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
        "chat_template": "{{ greeting }}|{{ messages[0]['content'] }}|{{ tools|length }}",
        "chat_template_kwargs": {"greeting": "hey"},
        "tools": [{"type": "function", "function": {"name": "f"}}]});
    server.chat(body).await;
    let prompt = server.engine.last_request().prompt;
    assert_eq!(tokenizer().decode(&prompt, false), "hey|a\nb|1");
}

#[tokio::test]
async fn what_a_template_refuses_is_a_400() {
    let server = saying("Hi").await;
    let with =
        |template: &str| json!({"model": "m", "messages": hello(), "chat_template": template});
    let syntax = server.post("/v1/chat/completions", &with("{% if %}")).await;
    assert!(syntax.error(400).starts_with("`chat_template`: "));
    let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    let endless = server.post("/v1/chat/completions", &with(endless)).await;
    assert!(endless.error(400).contains("did not end"));
    let raised = server
        .post(
            "/v1/chat/completions",
            &with("{{ raise_exception('no user') }}"),
        )
        .await;
    assert!(raised.error(400).contains("no user"));
    let image =
        json!({"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]});
    let image = server.post("/v1/chat/completions", &image).await;
    assert!(image.error(400).contains("image_url"));

    let bare = TestServer::loading(ScriptedEngine::saying("Hi")).await;
    bare.app.open(service(&bare.engine, false));
    let body = json!({"model": "m", "messages": hello()});
    let without = bare.post("/v1/chat/completions", &body).await.error(400);
    assert!(without.contains("no chat template"), "{without}");
    assert!(!without.contains('\n'));
}

#[tokio::test]
async fn logprobs_are_one_object_a_token() {
    let server = saying("é").await;
    let body = json!({"model": "m", "messages": hello(), "logprobs": true, "top_logprobs": 1});
    let reply = server.chat(body).await;
    let content = &reply["choices"][0]["logprobs"]["content"];
    assert_eq!(
        content[0],
        json!({"token": "\u{fffd}", "logprob": -0.25, "bytes": [0xc3],
            "top_logprobs": [{"token": "\u{fffd}", "logprob": -0.25, "bytes": [0xc3]}]})
    );
    assert_eq!(content[1]["bytes"], json!([0xa9]));
    assert_eq!(content.as_array().unwrap().len(), 3);
    let body = json!({"model": "m", "messages": hello(), "logprobs": true});
    let reply = server.chat(body).await;
    assert_eq!(
        reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"],
        json!([])
    );
}

#[tokio::test]
async fn echo_goes_on_with_the_last_message() {
    let server = saying(" world").await;
    let messages = json!([{"role": "assistant", "content": "Hello"}]);
    let body = json!({"model": "m", "messages": messages, "echo": true});
    let reply = server.chat(body).await;
    assert_eq!(reply["choices"][0]["message"]["content"], "Hello world");
    let body =
        json!({"model": "m", "messages": hello(), "echo": true, "add_generation_prompt": false});
    let reply = server.chat(body).await;
    assert_eq!(reply["choices"][0]["message"]["role"], "user");
    assert_eq!(reply["choices"][0]["message"]["content"], "Hello world");
    let body = json!({"model": "m", "messages": hello(), "echo": true});
    let reply = server.chat(body).await;
    assert_eq!(reply["choices"][0]["message"]["content"], " world");
}

#[tokio::test]
async fn both_names_of_max_tokens() {
    let server = saying("abcdef").await;
    for name in ["max_tokens", "max_completion_tokens"] {
        let mut body = json!({"model": "m", "messages": hello()});
        body[name] = json!(2);
        let reply = server.chat(body).await;
        assert_eq!(reply["choices"][0]["message"]["content"], "ab");
        assert_eq!(reply["choices"][0]["finish_reason"], "length");
    }
    let body =
        json!({"model": "m", "messages": hello(), "max_tokens": 2, "max_completion_tokens": 3});
    let both = server.post("/v1/chat/completions", &body).await;
    assert!(both.error(400).contains("`max_tokens`"));
}

#[tokio::test]
async fn a_large_conversation_is_read_elsewhere_and_answered_alike() {
    let server = saying("Hi").await;
    let long = "x".repeat(3900);
    let messages =
        json!([{"role": "user", "content": long}, {"role": "user", "content": "y".repeat(90)}]);
    let body = json!({"model": "m", "messages": messages, "user": "z".repeat(300)});
    let reply = server.chat(body).await;
    assert_eq!(reply["choices"][0]["message"]["content"], "Hi");
}
