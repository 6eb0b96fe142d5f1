//! The way of a request through both phases, and what each side gets to see.

use bytes::Bytes;
use serde_json::{Value, json};

use crate::client::{exchange, post, request};
use crate::harness::{Running, options, prompt, streamed, trio, trio_with};
use crate::mock::{Mock, Script, Step, WHOLE, bytes_of, events, ticket, written};

#[tokio::test]
async fn completion_is_prefilled_here_and_written_there() {
    let trio = trio(ticket, written).await;
    let answer = trio
        .proxy
        .complete(json!({"model": "m", "prompt": ["hello"], "max_tokens": 2, "zz": {"k": [1]}}))
        .await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.text(), WHOLE);
    assert_eq!(answer.header("content-type"), "application/json");

    let context = trio.context.seen();
    assert_eq!(context.len(), 1);
    assert_eq!(context[0].path, "/v1/completions");
    let asked = context[0].json();
    assert_eq!(
        (&asked["prompt"], &asked["stream"]),
        (&json!("hello"), &json!(false))
    );
    assert_eq!(
        (&asked["max_tokens"], &asked["zz"]),
        (&json!(2), &json!({"k": [1]}))
    );
    let id = asked["disaggregated_params"]["disagg_request_id"]
        .as_u64()
        .unwrap();
    assert!((1 << 40..1 << 63).contains(&id), "{id}");

    let generation = trio.generation.seen();
    assert_eq!(generation.len(), 1);
    assert_eq!(
        generation[0].json(),
        json!({"model": "m", "max_tokens": 2, "zz": {"k": [1]}, "prompt": [11, 12, 13],
            "disaggregated_params": {"request_type": "generation_only", "first_gen_tokens": [7],
                "ctx_request_id": 41, "disagg_request_id": id, "encoded_opaque_state": "QUJD",
                "schedule_style": 0,
                "ctx_usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1,
                    "prompt_tokens_details": {"cached_tokens": 2}}}})
    );
}

#[tokio::test]
async fn chat_keeps_its_messages_and_gains_token_ids() {
    let trio = trio(ticket, written).await;
    let body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    let answer = post(trio.proxy.address, "/v1/chat/completions", body.to_string()).await;
    assert_eq!(answer.status, 200);
    let seen = trio.generation.seen().remove(0);
    assert_eq!(seen.path, "/v1/chat/completions");
    assert_eq!(seen.json()["messages"], body["messages"]);
    assert_eq!(seen.json()["prompt_token_ids"], json!([11, 12, 13]));
    assert_eq!(trio.context.seen()[0].json().get("prompt_token_ids"), None);
}

#[tokio::test]
async fn stream_arrives_byte_for_byte() {
    // Pieces that end in the middle of a character, of an event, and with comments and carriage returns between.
    let pieces: Vec<&[u8]> = vec![
        b"data: {\"choices\":[{\"text\":\"\xc3",
        b"\xa9\"}]}",
        b"\n",
        b"\n: a comment\r\n\r\ndata: {\"x\":1}\n\nda",
        b"ta: not json \x00\xff\n\n",
        b": baton-timeline {\"queue_us\":1}\n\n",
        b"data: [DONE]\n\n",
    ];
    let steps: Vec<Step> = pieces
        .iter()
        .map(|piece| Step::Send(Bytes::copy_from_slice(piece)))
        .collect();
    let expected = bytes_of(&steps);
    let trio = trio(ticket, move |_| {
        Script::events(steps.clone()).with_header("x-worker", "kept")
    })
    .await;
    let answer = trio.proxy.complete(streamed()).await;
    assert_eq!(answer.status, 200);
    assert!(answer.is_complete);
    assert_eq!(answer.body, expected);
    assert_eq!(
        answer.header("content-type"),
        "text/event-stream; charset=utf-8"
    );
    assert_eq!(answer.header("x-worker"), "kept");
}

#[tokio::test]
async fn long_stream_arrives_byte_for_byte() {
    let steps = events(5_000);
    let expected = bytes_of(&steps);
    let trio = trio(ticket, move |_| Script::events(steps.clone())).await;
    let answer = trio.proxy.complete(streamed()).await;
    assert!(answer.is_complete);
    assert_eq!(answer.body, expected);
}

#[tokio::test]
async fn usage_of_the_prompt_is_the_context_servers() {
    let trio = trio(ticket, |_| {
        let usage = json!({"prompt_tokens": 9, "total_tokens": 11, "completion_tokens": 2});
        Script::json(200, &json!({"choices": [], "usage": usage, "after": 1}))
    })
    .await;
    let answer = trio.proxy.complete(prompt()).await.json();
    assert_eq!(
        answer,
        json!({"choices": [], "after": 1, "usage": {"prompt_tokens": 3, "total_tokens": 5,
            "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 2}}})
    );
}

fn complete_at_once(_: &crate::mock::Seen) -> Script {
    Script::json(
        200,
        &json!({"id": "chatcmpl-1", "object": "chat.completion", "model": "m",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": "Yes."},
                "logprobs": null, "finish_reason": "stop", "disaggregated_params": null}],
            "usage": {"prompt_tokens": 3, "total_tokens": 4, "completion_tokens": 1},
            "prompt_token_ids": [1, 2, 3]}),
    )
}

#[tokio::test]
async fn answer_that_ends_at_the_first_token_keeps_its_text() {
    let trio = trio(complete_at_once, written).await;
    let mut body = json!({"model": "m", "messages": []});
    let whole = post(trio.proxy.address, "/v1/chat/completions", body.to_string()).await;
    assert_eq!(whole.json()["choices"][0]["message"]["content"], "Yes.");
    assert_eq!(whole.json()["choices"][0].get("disaggregated_params"), None);

    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let stream = post(trio.proxy.address, "/v1/chat/completions", body.to_string()).await;
    assert_eq!(
        stream.header("content-type"),
        "text/event-stream; charset=utf-8"
    );
    let text = stream.text();
    let chunks: Vec<Value> = text
        .strip_suffix("data: [DONE]\n\n")
        .unwrap()
        .split_terminator("\n\n")
        .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
        .collect();
    assert_eq!(chunks.len(), 4);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(chunks[1]["choices"][0]["delta"]["content"], "Yes.");
    assert_eq!(chunks[2]["choices"][0]["finish_reason"], "stop");
    assert_eq!(chunks[3]["usage"]["prompt_tokens"], 3);
    assert_eq!(chunks[3]["choices"], json!([]));
    assert!(trio.generation.seen().is_empty());
}

#[tokio::test]
async fn what_cannot_be_handed_off_is_served_whole_by_a_generation_server() {
    let trio = trio(ticket, written).await;
    for extra in [
        json!({"n": 2}),
        json!({"best_of": 4}),
        json!({"echo": true, "logprobs": 2}),
    ] {
        let mut body = prompt();
        body.as_object_mut()
            .unwrap()
            .extend(extra.as_object().unwrap().clone());
        let answer = trio.proxy.complete(body.clone()).await;
        assert_eq!(answer.text(), WHOLE);
        assert_eq!(trio.generation.seen().last().unwrap().json(), body);
    }
    assert!(trio.context.seen().is_empty());
    let mut body = streamed();
    body["n"] = json!(3);
    let answer = trio.proxy.complete(body).await;
    assert_eq!(answer.body, bytes_of(&events(3)));
}

#[tokio::test]
async fn workers_own_4xx_passes_with_its_body_and_without_retry() {
    const BODY: &str = r#"{"object":"error","message":"prompt has 9 tokens, 8 fit", "code":400}"#;
    let refuse = |_: &crate::mock::Seen| Script::text(400, "application/json", BODY);
    let at_context = trio(refuse, written).await;
    let at_generation = trio(ticket, refuse).await;
    for (trio, name) in [
        (
            &at_context,
            format!("context {}", at_context.context.address),
        ),
        (
            &at_generation,
            format!("generation {}", at_generation.generation.address),
        ),
    ] {
        for body in [prompt(), streamed()] {
            let answer = trio.proxy.complete(body).await;
            assert_eq!(answer.status, 400);
            assert_eq!(answer.text(), BODY);
            assert_eq!(answer.header("content-type"), "application/json");
            assert_eq!(answer.header("x-baton-failed-worker"), name);
        }
        assert_eq!(trio.context.seen().len(), 2);
    }
}

#[tokio::test]
async fn answer_to_a_stream_request_that_is_no_stream_keeps_its_form() {
    const BODY: &str = r#"[ "odd" ]"#;
    let trio = trio(ticket, |_| Script::text(202, "application/json", BODY)).await;
    let answer = trio.proxy.complete(streamed()).await;
    assert_eq!(
        (answer.status.as_u16(), answer.text().as_str()),
        (202, BODY)
    );
    assert_eq!(answer.header("content-type"), "application/json");
}

#[tokio::test]
async fn timelines_of_both_servers_reach_the_client() {
    let context = |seen: &crate::mock::Seen| {
        assert_eq!(seen.headers["x-baton-want-timeline"], "1");
        ticket(seen).with_header("x-baton-timeline", r#"{"queue_us":1,"prefill_us":2}"#)
    };
    let generation = |seen: &crate::mock::Seen| {
        assert_eq!(seen.headers["x-baton-want-timeline"], "1");
        let timeline =
            r#"{"handoff_us":30,"handoff_transport":"tcp","first_token_us":4,"decode_us":50}"#;
        match seen.json()["stream"] == true {
            true => written(seen),
            false => written(seen).with_header("x-baton-timeline", timeline),
        }
    };
    let trio = trio(context, generation).await;
    let ask = async |body: Value| {
        let mut request = request("POST", "/v1/completions", body.to_string());
        let headers = request.headers_mut();
        headers.insert("x-baton-want-timeline", "1".parse().unwrap());
        headers.insert("x-request-id", "abc".parse().unwrap());
        exchange(trio.proxy.address, request).await
    };
    let whole = ask(prompt()).await;
    let merged: Value = serde_json::from_str(whole.header("x-baton-timeline")).unwrap();
    assert_eq!(
        (
            &merged["queue_us"],
            &merged["prefill_us"],
            &merged["handoff_us"],
            &merged["decode_us"]
        ),
        (&json!(1), &json!(2), &json!(30), &json!(50))
    );
    assert!(merged["first_token_us"].as_u64().unwrap() > 4);
    let stream = ask(streamed()).await;
    assert_eq!(
        stream.header("x-baton-timeline"),
        r#"{"queue_us":1,"prefill_us":2}"#
    );
    assert_eq!(trio.generation.seen()[0].headers["x-request-id"], "abc");
}

#[tokio::test]
async fn chat_template_in_a_request_needs_permission() {
    let body = json!({"messages": [], "chat_template": "{{ x }}"}).to_string();
    let strict = trio(ticket, written).await;
    let answer = post(strict.proxy.address, "/v1/chat/completions", body.clone()).await;
    assert_eq!(answer.status, 400);
    assert!(answer.message().contains("chat_template is not allowed"));
    assert_eq!(answer.json()["param"], "chat_template");
    assert!(strict.context.seen().is_empty());
    let open = trio_with(ticket, written, |options| {
        options.config.allow_request_chat_template = true;
    })
    .await;
    let answer = post(open.proxy.address, "/v1/chat/completions", body).await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn conversation_reaches_both_servers() {
    let trio = trio(ticket, written).await;
    let mut request = request("POST", "/v1/completions", prompt().to_string());
    request
        .headers_mut()
        .insert("x-correlation-id", " c-1 ".parse().unwrap());
    exchange(trio.proxy.address, request).await;
    assert_eq!(trio.context.seen()[0].params()["conversation_id"], "c-1");
    assert_eq!(trio.generation.seen()[0].params()["conversation_id"], "c-1");
}

#[tokio::test]
async fn connections_to_workers_are_used_again() {
    let trio = trio(ticket, written).await;
    for index in 0..20 {
        let body = if index % 2 == 0 { prompt() } else { streamed() };
        assert_eq!(trio.proxy.complete(body).await.status, 200);
    }
    // The client may have its last byte before the worker's connection is back in the pool, and then the next request opens one
    // more. If either kind of request kept its connections, there would be ten.
    for worker in [&trio.context, &trio.generation] {
        let opened = worker.connection_count();
        assert!((1..10).contains(&opened), "{opened} for 20 requests");
    }
}

#[tokio::test]
async fn server_of_both_roles_does_not_hand_off_to_itself() {
    let both = |seen: &crate::mock::Seen| match seen.params()["request_type"] == "context_only" {
        true => ticket(seen),
        false => written(seen),
    };
    let mocks = [Mock::start(both).await, Mock::start(both).await];
    let addresses = mocks.each_ref().map(|mock| mock.address);
    let proxy = Running::ready(options(&addresses, &addresses)).await;
    for _ in 0..6 {
        let before = mocks.each_ref().map(|mock| mock.seen().len());
        assert_eq!(proxy.complete(prompt()).await.text(), WHOLE);
        let after = mocks.each_ref().map(|mock| mock.seen().len());
        assert_eq!(after, before.map(|count| count + 1));
    }
}
