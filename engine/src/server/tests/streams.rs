//! Streams: their bytes, their order, their ends.

use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use super::harness::{
    CACHED, EOS, Reply, Scripted, ScriptedEngine, TestServer, finished, ids, token, within,
};
use crate::request::{FinishReason, RequestFailure, SubmitError};

async fn saying(text: &str) -> TestServer {
    TestServer::start(ScriptedEngine::saying(text)).await
}

fn ask(extra: &Value) -> Value {
    let mut body = json!({"model": "m", "prompt": "a", "stream": true});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

async fn completion_events(server: &TestServer, extra: Value) -> Vec<Value> {
    let reply = server.post("/v1/completions", &ask(&extra)).await;
    assert!(reply.complete);
    reply.events()
}

fn text_of(events: &[Value]) -> String {
    let text = |event: &Value| event["choices"][0]["text"].as_str().map(str::to_owned);
    events.iter().filter_map(text).collect()
}

#[tokio::test]
async fn the_exact_bytes_of_a_completion_stream() {
    let server = saying("Hé").await;
    let body = ask(&json!({"stream_options": {"include_usage": true}}));
    let reply = server.post("/v1/completions", &body).await;
    assert_eq!(
        reply.header("content-type"),
        Some("text/event-stream; charset=utf-8")
    );
    let first: Value = {
        let line = reply.body.lines().next().unwrap();
        serde_json::from_str(line.strip_prefix("data: ").unwrap()).unwrap()
    };
    let (id, created) = (first["id"].as_str().unwrap(), &first["created"]);
    let (h, e) = (ids("H"), ids("é"));
    let object = |rest: String| {
        format!(
            "data: {{\"id\":\"{id}\",\"object\":\"text_completion\",\"created\":{created},\"model\":\"tiny\",{rest}}}\n\n"
        )
    };
    let choice = |text: &str, tokens: &str, finish: &str| {
        object(format!(
            "\"choices\":[{{\"index\":0,\"text\":\"{text}\",\"token_ids\":[{tokens}],\"logprobs\":null,\"context_logits\":null,\"finish_reason\":{finish},\"stop_reason\":null,\"avg_decoded_tokens_per_iter\":null}}],\"usage\":null"
        ))
    };
    let expected = [
        choice("H", &h[0].to_string(), "null"),
        choice("é", &format!("{},{}", e[0], e[1]), "null"),
        choice("", &EOS.to_string(), "\"stop\""),
        object(format!(
            "\"choices\":[],\"usage\":{{\"prompt_tokens\":1,\"total_tokens\":5,\"completion_tokens\":4,\"prompt_tokens_details\":{{\"cached_tokens\":{CACHED}}}}}"
        )),
        "data: [DONE]\n\n".to_owned(),
    ];
    assert_eq!(reply.body, expected.concat());
    assert!(reply.complete);
}

#[tokio::test]
async fn a_character_never_splits() {
    let text = "héllo 🦀 wörld 日本";
    let server = saying(text).await;
    let events = completion_events(&server, json!({})).await;
    assert_eq!(text_of(&events), text);
    assert!(!text_of(&events).contains('\u{fffd}'));
    let crab = events
        .iter()
        .find(|event| event["choices"][0]["text"] == "🦀")
        .unwrap();
    assert_eq!(crab["choices"][0]["token_ids"].as_array().unwrap().len(), 4);
}

#[tokio::test]
async fn a_chat_stream_begins_with_the_role() {
    let server = saying("Hi").await;
    let body =
        json!({"model": "m", "messages": [{"role": "user", "content": "a"}], "stream": true});
    let events = server.post("/v1/chat/completions", &body).await.events();
    let deltas: Vec<&Value> = events
        .iter()
        .map(|event| &event["choices"][0]["delta"])
        .collect();
    let delta = |role: Value, content: &str| json!({"role": role, "content": content, "reasoning_content": null, "reasoning": null, "tool_calls": []});
    assert_eq!(
        deltas,
        [
            &delta(json!("assistant"), ""),
            &delta(Value::Null, "H"),
            &delta(Value::Null, "i"),
            &delta(Value::Null, ""),
        ]
    );
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(events[3]["choices"][0]["finish_reason"], "stop");
    assert!(events.iter().all(|event| event["id"] == events[0]["id"]));
    assert!(
        events[0]["choices"][0]
            .get("disaggregated_params")
            .is_none()
    );
}

#[tokio::test]
async fn withheld_text_comes_with_its_tokens_and_logprobs() {
    let server = saying("ab. c. d").await;
    let events = completion_events(&server, json!({"stop": [". d"], "logprobs": 1})).await;
    assert_eq!(text_of(&events), "ab. c");
    for event in &events {
        let choice = &event["choices"][0];
        let tokens = choice["token_ids"].as_array().unwrap().len();
        assert_eq!(
            choice["logprobs"]["tokens"].as_array().unwrap().len(),
            tokens
        );
    }
    let last = &events.last().unwrap()["choices"][0];
    assert_eq!(
        (&last["finish_reason"], &last["stop_reason"]),
        (&json!("stop"), &json!(". d"))
    );
    let offsets: Vec<u64> = events
        .iter()
        .flat_map(|event| {
            event["choices"][0]["logprobs"]["text_offset"]
                .as_array()
                .unwrap()
        })
        .map(|offset| offset.as_u64().unwrap())
        .collect();
    assert_eq!(offsets, (0..8).collect::<Vec<u64>>());
}

#[tokio::test]
async fn several_choices_share_a_stream() {
    let server = saying("xyz").await;
    let events = completion_events(
        &server,
        json!({"n": 2, "prompt": ["a", "b"], "stream_options": {"continuous_usage_stats": true}}),
    )
    .await;
    for index in 0..4 {
        let own: Vec<Value> = events
            .iter()
            .filter(|event| event["choices"][0]["index"] == index)
            .cloned()
            .collect();
        assert_eq!(text_of(&own), "xyz");
        assert_eq!(own.last().unwrap()["choices"][0]["finish_reason"], "stop");
    }
    let counts: Vec<u64> = events
        .iter()
        .map(|event| event["usage"]["completion_tokens"].as_u64().unwrap())
        .collect();
    assert!(counts.is_sorted());
    assert_eq!(counts.last(), Some(&16));
    assert_eq!(events.last().unwrap()["choices"], json!([]));
}

#[tokio::test]
async fn echo_and_tokens_in_streams() {
    let server = saying("cd").await;
    let events = completion_events(&server, json!({"echo": true, "prompt": "ab"})).await;
    assert_eq!(text_of(&events), "abcd");
    assert_eq!(events[0]["choices"][0]["text"], "abc");
    let events = completion_events(&server, json!({"detokenize": false})).await;
    assert_eq!(text_of(&events), "");
    let tokens: Vec<&Value> = events
        .iter()
        .map(|event| &event["choices"][0]["token_ids"])
        .collect();
    let expected = [json!(ids("c")), json!(ids("d")), json!([EOS]), json!([])];
    assert!(tokens.into_iter().eq(&expected));
}

#[tokio::test]
async fn a_timeline_is_a_comment_before_the_end() {
    let server = saying("ab").await;
    let reply = server
        .call(
            "POST",
            "/v1/completions",
            "x-baton-want-timeline: 1\r\n",
            ask(&json!({})).to_string().as_bytes(),
        )
        .await;
    let comment = reply
        .body
        .split("\n\n")
        .find_map(|event| event.strip_prefix(": baton-timeline "))
        .unwrap();
    let timeline: Value = serde_json::from_str(comment).unwrap();
    assert_eq!(timeline["decode_tokens"], 2);
    assert_eq!(text_of(&reply.events()), "ab");
}

#[tokio::test]
async fn pieces_are_sent_as_they_come() {
    let (events, receiver) = mpsc::unbounded_channel();
    let receiver = std::sync::Mutex::new(Some(receiver));
    let engine =
        ScriptedEngine::new(move |_| Ok(Scripted::Live(receiver.lock().unwrap().take().unwrap())));
    let server = TestServer::start(engine).await;
    let body = ask(&json!({})).to_string();
    let mut stream = server
        .open("POST", "/v1/completions", "", body.as_bytes())
        .await;
    let mut raw = Vec::new();
    for letter in ["q", "r", "s"] {
        events.send(token(ids(letter)[0])).unwrap();
        let wanted = format!("\"text\":\"{letter}\"");
        while !String::from_utf8_lossy(&raw).contains(&wanted) {
            let read = within("a piece", stream.read_buf(&mut raw)).await.unwrap();
            assert_ne!(read, 0);
        }
    }
    events.send(finished(FinishReason::Length)).unwrap();
    within("the end", stream.read_to_end(&mut raw))
        .await
        .unwrap();
    assert_eq!(text_of(&Reply::parse(&raw).events()), "qrs");
}

#[tokio::test]
async fn a_failure_before_the_first_piece_has_a_true_status() {
    for (failure, status) in [
        (RequestFailure::Unservable("no".to_owned()), 400),
        (RequestFailure::Handoff("peer gone".to_owned()), 502),
        (RequestFailure::Engine("device lost".to_owned()), 500),
        (RequestFailure::ShuttingDown, 503),
    ] {
        let engine = ScriptedEngine::new({
            move |_| {
                Ok(Scripted::Events(vec![crate::request::Event::Failed(
                    failure.clone(),
                )]))
            }
        });
        let server = TestServer::start(engine).await;
        for stream in [true, false] {
            let body = ask(&json!({"stream": stream}));
            server.post("/v1/completions", &body).await.error(status);
        }
    }
}

#[tokio::test]
async fn a_refused_submission_cancels_its_siblings() {
    let engine = ScriptedEngine::new(|request| match request.sampling.seed {
        0..2 => Ok(Scripted::Live(mpsc::unbounded_channel().1)),
        _ => Err(SubmitError::Busy { queued: 9 }),
    });
    let server = TestServer::start(engine).await;
    let body = ask(&json!({"n": 3, "seed": 0}));
    let busy = server.post("/v1/completions", &body).await;
    assert!(busy.error(503).contains("9 waiting"));
    assert_eq!(busy.header("retry-after"), Some("1"));
    server.engine.wait_cancelled(2).await;
}

#[tokio::test]
async fn a_failure_in_the_middle_is_told_and_cut() {
    let engine = ScriptedEngine::new(|_| {
        Ok(Scripted::Events(vec![
            token(ids("a")[0]),
            crate::request::Event::Failed(RequestFailure::Engine("device lost".to_owned())),
        ]))
    });
    let server = TestServer::start(engine).await;
    let body = ask(&json!({})).to_string();
    // Kept alive by the client, so that the cut is the server's doing.
    let reply = server
        .call("POST", "/v1/completions", "", body.as_bytes())
        .await;
    assert_eq!(reply.status, 200);
    assert!(!reply.complete);
    assert!(!reply.body.contains("[DONE]"));
    let last = reply.body.trim_end().rsplit("\n\n").next().unwrap();
    let error: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(error["error"]["code"], 500);
    assert_eq!(error["error"]["message"], "engine failure: device lost");
}
