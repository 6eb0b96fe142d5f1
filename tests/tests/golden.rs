//! Real prompts through real processes: every id and every log-probability of the independent implementations.

use baton_tests::client;
use baton_tests::deployment::{Deployment, Options, Worker};
use baton_tests::golden::{self, Item};
use serde_json::{Value, json};

/// Named in the golden file: float32 is reproducible to far better than this.
const LOGPROB_TOLERANCE: f32 = 0.001;

const FLOAT32: &str = "dtype: float32\nmax_seq_len: 2048\nmax_batch_size: 32\nkv_cache_config:\n  max_tokens: 24576\n";

/// The request of an item and its path.
fn request(item: &Item, stream: bool) -> (&'static str, Value) {
    let mut body = json!({"model": "m", "max_tokens": item.output_token_ids.len(), "temperature": 0, "stream": stream});
    if item.kind == "chat" {
        body["messages"] = item.messages.clone().unwrap_or_default();
        body["logprobs"] = json!(true);
        body["top_logprobs"] = json!(1);
        return ("/v1/chat/completions", body);
    }
    body["prompt"] = json!(item.prompt);
    body["logprobs"] = json!(1);
    ("/v1/completions", body)
}

/// Text, log-probabilities and finish reason of a choice, in either endpoint's shape.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    text: String,
    logprobs: Vec<f32>,
    finish: String,
}

impl Seen {
    fn add(&mut self, choice: &Value) {
        for text in [
            &choice["text"],
            &choice["message"]["content"],
            &choice["delta"]["content"],
        ] {
            self.text.push_str(text.as_str().unwrap_or_default());
        }
        let logprobs = &choice["logprobs"];
        let mut push = |value: &Value| {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "log-probabilities are f32 in the engine"
            )]
            self.logprobs
                .push(value.as_f64().expect("a log-probability is a number") as f32);
        };
        logprobs["token_logprobs"]
            .as_array()
            .into_iter()
            .flatten()
            .for_each(&mut push);
        logprobs["content"]
            .as_array()
            .into_iter()
            .flatten()
            .for_each(|entry| push(&entry["logprob"]));
        if let Some(reason) = choice["finish_reason"].as_str() {
            reason.clone_into(&mut self.finish);
        }
    }
}

async fn ask(address: &str, item: &Item, stream: bool) -> Seen {
    let (path, body) = request(item, stream);
    let mut seen = Seen::default();
    if stream {
        let events = client::stream(address, path, &body)
            .await
            .expect("a stream");
        events
            .iter()
            .flat_map(|event| event["choices"].as_array().into_iter().flatten())
            .for_each(|choice| seen.add(choice));
    } else {
        let answer = client::post(address, path, &body).await.expect("an answer");
        assert_eq!(answer.status, 200, "{}", answer.body);
        seen.add(&answer.json()["choices"][0]);
    }
    seen
}

/// The ids that the server wrote, from an answer that asks for them.
async fn ids(address: &str, item: &Item) -> Vec<u32> {
    let mut body = json!({
        "model": "m", "prompt": item.prompt_token_ids, "max_tokens": item.output_token_ids.len(),
        "temperature": 0, "detokenize": false,
    });
    body["logprobs"] = json!(0);
    let answer = client::post(address, "/v1/completions", &body)
        .await
        .expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.body);
    serde_json::from_value(answer.json()["choices"][0]["token_ids"].clone()).expect("token ids")
}

fn check(item: &Item, seen: &Seen) {
    let name = item.prompt.as_deref().unwrap_or("chat");
    assert_eq!(seen.text, item.text, "text of {name:?}");
    let ended = if item.output_token_ids.last() == Some(&2) {
        "stop"
    } else {
        "length"
    };
    assert_eq!(seen.finish, ended, "finish reason of {name:?}");
    // The end token's log-probability may or may not be reported.
    assert!(
        seen.logprobs.len() + 1 >= item.logprobs.len(),
        "{} log-probabilities of {name:?}",
        seen.logprobs.len()
    );
    for (index, (ours, theirs)) in seen.logprobs.iter().zip(&item.logprobs).enumerate() {
        assert!(
            (ours - theirs).abs() <= LOGPROB_TOLERANCE,
            "{name:?} token {index}: {ours}, reference {theirs}"
        );
    }
}

/// All items one after the other, streaming and not; then all at once, 16 in flight.
async fn check_all(address: &str) {
    let items = golden::smollm2();
    for item in &items {
        for stream in [false, true] {
            check(item, &ask(address, item, stream).await);
        }
        assert_eq!(
            ids(address, item).await,
            item.output_token_ids,
            "{:?}",
            item.prompt
        );
    }
    let mut tasks = tokio::task::JoinSet::new();
    for (index, item) in items.iter().cycle().take(16).cloned().enumerate() {
        let address = address.to_owned();
        tasks.spawn(async move { check(&item, &ask(&address, &item, index % 2 == 0).await) });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("a concurrent request gives the golden answer");
    }
}

#[tokio::test]
async fn one_server_gives_the_golden_answers() {
    let worker = Worker::start(&baton_tests::model(), FLOAT32).await;
    check_all(&worker.address).await;
}

#[tokio::test]
async fn the_deployment_gives_the_golden_answers() {
    let model = baton_tests::model();
    let deployment = Deployment::start(&Options::new(&model, FLOAT32)).await;
    check_all(&deployment.address).await;
    let state = client::get(&deployment.generation.address, "/prometheus/metrics")
        .await
        .expect("metrics")
        .body;
    let moved = state
        .lines()
        .find(|line| line.starts_with("baton_kv_received_bytes_total"));
    assert!(
        moved.is_some_and(|line| !line.ends_with(" 0")),
        "no KV has travelled:\n{state}"
    );
}

/// The fast default answers the same through one server and through the deployment, bit for bit.
#[tokio::test]
async fn the_fast_default_is_equal_through_one_server_and_the_deployment() {
    let model = baton_tests::model();
    let options = "max_seq_len: 2048\nkv_cache_config:\n  max_tokens: 16384\n";
    let worker = Worker::start(&model, options).await;
    let deployment = Deployment::start(&Options::new(&model, options)).await;
    for item in golden::smollm2() {
        let alone = ask(&worker.address, &item, false).await;
        let through = ask(&deployment.address, &item, true).await;
        assert_eq!(alone.text, through.text);
        assert_eq!(alone.finish, through.finish);
        for (a, b) in alone.logprobs.iter().zip(&through.logprobs) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
    }
}

/// Teacher-forced: how far the fast default is from float32.
#[tokio::test]
async fn the_fast_default_is_close_to_float32() {
    let worker = Worker::start(
        &baton_tests::model(),
        "max_seq_len: 2048\nkv_cache_config:\n  max_tokens: 4096\n",
    )
    .await;
    let (mut sum, mut count, mut agreed) = (0.0_f64, 0_u32, 0_u32);
    for item in golden::smollm2() {
        let prompt: Vec<u32> = item
            .prompt_token_ids
            .iter()
            .chain(&item.output_token_ids)
            .copied()
            .collect();
        let body = json!({"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": 1,
            "ignore_eos": true});
        let answer = client::post(&worker.address, "/v1/completions", &body)
            .await
            .expect("an answer");
        assert_eq!(answer.status, 200, "{}", answer.body);
        let logprobs = &answer.json()["choices"][0]["logprobs"];
        for (index, theirs) in item.logprobs.iter().enumerate() {
            let at = item.prompt_token_ids.len() + index;
            let ours = logprobs["token_logprobs"][at]
                .as_f64()
                .expect("a log-probability");
            let best = logprobs["top_logprobs"][at]
                .as_object()
                .expect("alternatives");
            let best = best
                .values()
                .filter_map(Value::as_f64)
                .fold(f64::MIN, f64::max);
            sum += (ours - f64::from(*theirs)).abs();
            count += 1;
            agreed += u32::from(ours >= best);
        }
    }
    let (mean, agreement) = (sum / f64::from(count), f64::from(agreed) / f64::from(count));
    assert!(mean <= 0.030, "mean |delta log-probability| {mean}");
    assert!(agreement >= 0.975, "argmax agrees at {agreement}");
}

#[tokio::test]
async fn hugging_face_directories_give_the_golden_answers() {
    for (family, items) in golden::tiny() {
        let engine = "dtype: float32\nmax_seq_len: 512\nkv_cache_config:\n  max_tokens: 4096\n";
        let model = baton_tests::tiny_model(&family);
        let mut options = Options::new(&model, engine);
        options.context_count = 1;
        let deployment = Deployment::start(&options).await;
        for item in items {
            // Where two tokens are this close, either may be chosen, and everything after it parts.
            if item.min_margin > LOGPROB_TOLERANCE {
                let wanted = &item.output_token_ids;
                assert_eq!(
                    &ids(&deployment.address, &item).await,
                    wanted,
                    "{family} {:?}",
                    item.prompt
                );
                assert_eq!(
                    &ids(&deployment.generation.address, &item).await,
                    wanted,
                    "{family} {:?}",
                    item.prompt
                );
            }
            check_teacher_forced(&deployment.generation.address, &family, &item).await;
        }
    }
}

async fn check_teacher_forced(address: &str, family: &str, item: &Item) {
    let prompt: Vec<u32> = item
        .prompt_token_ids
        .iter()
        .chain(&item.output_token_ids)
        .copied()
        .collect();
    let body = json!({"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": true, "logprobs": 0,
        "ignore_eos": true});
    let answer = client::post(address, "/v1/completions", &body)
        .await
        .expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.body);
    let logprobs = &answer.json()["choices"][0]["logprobs"]["token_logprobs"];
    for (index, theirs) in item.logprobs.iter().enumerate() {
        let ours = logprobs[item.prompt_token_ids.len() + index]
            .as_f64()
            .expect("a log-probability");
        let gap = (ours - f64::from(*theirs)).abs();
        assert!(
            gap <= f64::from(LOGPROB_TOLERANCE),
            "{family} token {index}: {ours}, reference {theirs}"
        );
    }
}
