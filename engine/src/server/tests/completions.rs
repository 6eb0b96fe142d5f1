//! `/v1/completions`, whole answers.

use serde_json::{Value, json};

use super::harness::{CACHED, EOS, Scripted, ScriptedEngine, TestServer, answer, ids};

async fn saying(text: &str) -> TestServer {
    TestServer::start(ScriptedEngine::saying(text)).await
}

#[tokio::test]
async fn the_whole_object() {
    let server = saying("Hi").await;
    let mut reply = server
        .complete(json!({"model": "anything", "prompt": "Say"}))
        .await;
    let id = reply["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("cmpl-") && id.len() == 37, "{id}");
    assert!(reply["created"].as_u64().unwrap() > 1_700_000_000);
    reply["id"] = Value::Null;
    reply["created"] = Value::Null;
    let mut tokens = ids("Hi");
    tokens.push(EOS);
    assert_eq!(
        reply,
        json!({
            "id": null, "object": "text_completion", "created": null, "model": "tiny",
            "choices": [{"index": 0, "text": "Hi", "token_ids": tokens, "logprobs": null,
                "context_logits": null, "finish_reason": "stop", "stop_reason": null,
                "disaggregated_params": null, "avg_decoded_tokens_per_iter": null}],
            "usage": {"prompt_tokens": 3, "total_tokens": 6, "completion_tokens": 3,
                "prompt_tokens_details": {"cached_tokens": CACHED}},
            "prompt_token_ids": null,
        })
    );
}

#[tokio::test]
async fn prompts_in_all_four_forms() {
    let server = saying("!").await;
    let forms = [
        (json!("ab"), 1),
        (json!(["ab", "ab"]), 2),
        (json!(ids("ab")), 1),
        (json!([ids("ab"), ids("ab"), ids("ab")]), 3),
    ];
    for (prompt, count) in forms {
        let reply = server
            .complete(json!({"model": "m", "prompt": prompt, "n": 2}))
            .await;
        let choices = reply["choices"].as_array().unwrap();
        assert_eq!(choices.len(), count * 2);
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["text"], "!");
        }
        assert_eq!(server.engine.last_request().prompt, ids("ab"));
        assert_eq!(reply["usage"]["prompt_tokens"], 2 * count);
        assert_eq!(reply["usage"]["completion_tokens"], 4 * count);
    }
}

#[tokio::test]
async fn choices_are_seeded_in_order() {
    let server = saying("!").await;
    let body = json!({"model": "m", "prompt": ["a", "b"], "n": 3, "seed": 40});
    server.complete(body).await;
    let requests = server.engine.requests.lock().unwrap();
    let seeds: Vec<u64> = requests
        .iter()
        .map(|request| request.sampling.seed)
        .collect();
    assert_eq!(seeds, [40, 41, 42, 40, 41, 42]);
    let prompts: Vec<usize> = requests
        .iter()
        .map(|request| request.prompt.len())
        .collect();
    assert_eq!(prompts, [1; 6]);
    assert_eq!(requests[3].prompt, ids("b"));
}

#[tokio::test]
async fn every_sampling_field_reaches_the_engine() {
    let server = saying("!").await;
    let body = json!({"model": "m", "prompt": "abc", "temperature": 0.5, "top_p": 0.9, "top_k": 7,
        "min_p": 0.1, "repetition_penalty": 1.5, "frequency_penalty": -1, "presence_penalty": 2,
        "prompt_ignore_length": 2, "logit_bias": {"5": -100, "6": 1.5}, "seed": -1,
        "max_tokens": 9, "min_tokens": 2, "ignore_eos": true, "stop_token_ids": [7, 8],
        "logprobs": 4, "cache_salt": "tenant"});
    server.complete(body).await;
    let request = server.engine.last_request();
    let sampling = request.sampling;
    assert_eq!(request.cache_salt.as_deref(), Some("tenant"));
    assert_eq!(
        (
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p
        ),
        (0.5, 0.9, 7, 0.1)
    );
    assert_eq!(
        (
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty
        ),
        (1.5, -1.0, 2.0)
    );
    assert_eq!(sampling.logit_bias, [(5, -100.0), (6, 1.5)]);
    assert_eq!((sampling.seed, sampling.max_tokens), (u64::MAX, 9));
    assert_eq!((sampling.min_tokens, sampling.ignore_eos), (2, true));
    assert_eq!(sampling.stop_token_ids, [7, 8]);
    assert_eq!(
        (sampling.logprobs, sampling.prompt_logprobs),
        (Some(4), None)
    );
    assert_eq!(sampling.prompt_ignore_length, 2);
}

#[tokio::test]
async fn what_is_not_said_takes_the_defaults() {
    let server = saying("!").await;
    let body = json!({"model": "m", "prompt": "abc", "temperature": null, "max_tokens": null,
        "stop": null, "seed": null, "stream": null, "logit_bias": null, "n": null, "best_of": null,
        "user": "someone", "top_k": -1});
    server.complete(body).await;
    let sampling = server.engine.last_request().sampling;
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.top_k),
        (1.0, 1.0, 0)
    );
    // No limit of its own: up to the longest sequence.
    assert_eq!(sampling.max_tokens, 4096 - 3);
    let first = sampling.seed;
    server
        .complete(json!({"model": "m", "prompt": "abc"}))
        .await;
    assert_ne!(server.engine.last_request().sampling.seed, first);
}

#[tokio::test]
async fn stop_strings_cut_and_are_named() {
    let server = saying("one, two. three").await;
    let body = json!({"model": "m", "prompt": "a", "stop": ["nothing", ". t"]});
    let choice = &server.complete(body).await["choices"][0];
    assert_eq!(choice["text"], "one, two");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["stop_reason"], ". t");
    assert_eq!(choice["token_ids"], json!(ids("one, two. t")));
    server.engine.wait_cancelled(1).await;

    let body =
        json!({"model": "m", "prompt": "a", "stop": ", ", "include_stop_str_in_output": true});
    let reply = server.complete(body).await;
    assert_eq!(reply["choices"][0]["text"], "one, ");
    // The costs of a request that a stop string ended are known all the same.
    assert_eq!(reply["usage"]["completion_tokens"], 5);
    assert_eq!(
        reply["usage"]["prompt_tokens_details"]["cached_tokens"],
        CACHED
    );
}

#[tokio::test]
async fn a_stop_string_does_not_count_before_min_tokens() {
    let server = saying("a.b.c.d").await;
    let body = json!({"model": "m", "prompt": "a", "stop": ".", "min_tokens": 3});
    let choice = &server.complete(body).await["choices"][0];
    assert_eq!(choice["text"], "a.b");
}

#[tokio::test]
async fn a_stop_string_that_never_completes_is_text() {
    let server = saying("one tw").await;
    let body = json!({"model": "m", "prompt": "a", "stop": ["two"]});
    let choice = &server.complete(body).await["choices"][0];
    assert_eq!(choice["text"], "one tw");
    assert_eq!(choice["stop_reason"], Value::Null);
}

#[tokio::test]
async fn stop_tokens_end_and_are_shown_on_request() {
    let server = saying("ab;cd").await;
    let stop = ids(";")[0];
    let mut body = json!({"model": "m", "prompt": "a", "stop_token_ids": [stop]});
    let choice = &server.complete(body.clone()).await["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["stop_reason"]),
        (&json!("ab"), &json!(stop))
    );
    body["include_stop_str_in_output"] = json!(true);
    assert_eq!(server.complete(body).await["choices"][0]["text"], "ab;");
}

#[tokio::test]
async fn length_and_special_tokens() {
    let server = saying("abcdef").await;
    let body = json!({"model": "m", "prompt": "a", "max_tokens": 3});
    let choice = &server.complete(body).await["choices"][0];
    assert_eq!(
        (&choice["text"], &choice["finish_reason"]),
        (&json!("abc"), &json!("length"))
    );
    let body = json!({"model": "m", "prompt": "a", "ignore_eos": true, "max_tokens": 8,
        "skip_special_tokens": false});
    let choice = &server.complete(body).await["choices"][0];
    assert_eq!(choice["text"], "abcdef<|eos|>x");
}

#[tokio::test]
async fn without_detokenizing_there_are_tokens() {
    let server = saying("ab").await;
    let body = json!({"model": "m", "prompt": "a", "detokenize": false});
    let choice = &server.complete(body).await["choices"][0];
    assert_eq!(choice["text"], "");
    assert_eq!(choice["token_ids"], json!([ids("a")[0], ids("b")[0], EOS]));
}

#[tokio::test]
async fn logprobs_are_parallel_lists() {
    let server = saying("é").await;
    let body = json!({"model": "m", "prompt": "a", "logprobs": 2});
    let reply = server.complete(body).await;
    let logprobs = &reply["choices"][0]["logprobs"];
    assert_eq!(
        logprobs["tokens"],
        json!(["\u{fffd}", "\u{fffd}", "<|eos|>"])
    );
    assert_eq!(logprobs["token_logprobs"], json!([-0.25, -0.5, -0.75]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2]));
    assert_eq!(
        logprobs["top_logprobs"][2],
        json!({"<|eos|>": -0.75, "<|im_start|>": -1.0})
    );
    let body = json!({"model": "m", "prompt": "a", "logprobs": 0});
    let reply = server.complete(body).await;
    assert_eq!(
        reply["choices"][0]["logprobs"]["top_logprobs"][2],
        json!({"<|eos|>": -0.75})
    );
}

#[tokio::test]
async fn echo_puts_the_prompt_before_the_answer() {
    let server = saying("cd").await;
    let body = json!({"model": "m", "prompt": ["ab", "<|bos|>é"], "echo": true});
    let reply = server.complete(body).await;
    assert_eq!(reply["choices"][0]["text"], "abcd");
    assert_eq!(reply["choices"][1]["text"], "<|bos|>écd");
    let body = json!({"model": "m", "prompt": "ab", "echo": true, "logprobs": 1});
    let reply = server.complete(body).await;
    let logprobs = &reply["choices"][0]["logprobs"];
    assert_eq!(logprobs["tokens"], json!(["a", "b", "c", "d", "<|eos|>"]));
    assert_eq!(
        logprobs["token_logprobs"],
        json!([null, -0.25, -0.25, -0.5, -0.75])
    );
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][1], json!({"b": -0.25}));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 3, 4]));
}

#[tokio::test]
async fn the_best_of_several_by_likelihood() {
    // Later candidates are shorter, hence likelier by the script's numbers.
    let engine = ScriptedEngine::new(|request| {
        let text = ["aaaa", "bbb", "cc", "d"][usize::try_from(request.sampling.seed).unwrap()];
        let mut tokens = ids(text);
        tokens.push(EOS);
        Ok(Scripted::Events(answer(request, &tokens)))
    });
    let server = TestServer::start(engine).await;
    let body = json!({"model": "m", "prompt": "a", "n": 2, "best_of": 4, "seed": 0});
    let reply = server.complete(body).await;
    let texts: Vec<&str> = reply["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["text"].as_str().unwrap())
        .collect();
    assert_eq!(texts, ["d", "cc"]);
    assert_eq!(reply["choices"][1]["index"], 1);
    assert_eq!(reply["choices"][0]["logprobs"], Value::Null);
    assert_eq!(reply["usage"]["completion_tokens"], 5 + 4 + 3 + 2);
}

#[tokio::test]
async fn prompts_are_cut_from_the_left_on_request() {
    let server = saying("!").await;
    let body = json!({"model": "m", "prompt": "abcdef", "truncate_prompt_tokens": 2});
    let reply = server.complete(body).await;
    assert_eq!(server.engine.last_request().prompt, ids("ef"));
    assert_eq!(reply["usage"]["prompt_tokens"], 2);
}

#[tokio::test]
async fn a_timeline_comes_when_asked_for() {
    let server = saying("ab").await;
    let body = json!({"model": "m", "prompt": "a"}).to_string();
    let with = server
        .call(
            "POST",
            "/v1/completions",
            "x-baton-want-timeline: 1\r\n",
            body.as_bytes(),
        )
        .await;
    let timeline: Value = serde_json::from_str(with.header("x-baton-timeline").unwrap()).unwrap();
    assert_eq!(
        (&timeline["queue_us"], &timeline["prefill_us"]),
        (&json!(100), &json!(2000))
    );
    assert_eq!(
        (&timeline["decode_us"], &timeline["decode_tokens"]),
        (&json!(30_000), &json!(2))
    );
    assert_eq!(timeline["handoff_us"], Value::Null);
    let without = server
        .call("POST", "/v1/completions", "", body.as_bytes())
        .await;
    assert_eq!(without.header("x-baton-timeline"), None);
}
