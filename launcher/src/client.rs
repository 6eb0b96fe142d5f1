//! `baton client`: the sample client (COMPAT.md §14.1). All prompts at once, answers in the order of the prompts.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use baton_configs::wire::{
    RequestTimeline, TIMELINE_COMMENT, TIMELINE_HEADER, TIMELINE_REQUEST_HEADER,
};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::cli::{ClientArgs, ClientEndpoint};
use crate::exit::{Outcome, WithOutcome};
use crate::http::HttpClient;
use crate::timeline;

/// Prompts in flight at once; the original sends all, which only moves the queue into the kernel.
const IN_FLIGHT_MAX: usize = 512;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Where and how to ask.
#[derive(Debug)]
struct Target {
    base: String,
    model: String,
    args: ClientArgs,
    http: HttpClient,
}

/// One prompt's answer.
#[derive(Debug, Default)]
struct Answer {
    text: String,
    context: Option<RequestTimeline>,
    generation: Option<RequestTimeline>,
    first_token: Option<Duration>,
    total: Duration,
}

/// Runs the client.
pub(crate) async fn run(args: ClientArgs) -> anyhow::Result<Outcome> {
    let live = args.prompt.is_some();
    let prompts = prompts(&args).outcome(Outcome::Usage)?;
    let target = Arc::new(Target::new(args).await?);
    let slots = Arc::new(Semaphore::new(IN_FLIGHT_MAX));
    let mut tasks = tokio::task::JoinSet::new();
    for (index, prompt) in prompts.into_iter().enumerate() {
        let (target, slots) = (Arc::clone(&target), Arc::clone(&slots));
        tasks.spawn(async move {
            let _slot = slots.acquire_owned().await;
            let limit = Duration::from_secs(target.args.request_timeout);
            let answer = tokio::time::timeout(limit, target.ask(&prompt, live)).await;
            let answer = answer.unwrap_or_else(|_| bail!("no complete answer within {limit:?}"));
            (
                index,
                answer.with_context(|| format!("prompt {}", index + 1)),
            )
        });
    }
    let mut answers = Vec::new();
    while let Some(done) = tasks.join_next().await {
        answers.push(done.context("a client task ended early")?);
    }
    answers.sort_by_key(|(index, _)| *index);
    finish(
        &target.args,
        answers.into_iter().map(|(_, answer)| answer).collect(),
        live,
    )
}

fn finish(
    args: &ClientArgs,
    answers: Vec<anyhow::Result<Answer>>,
    live: bool,
) -> anyhow::Result<Outcome> {
    let mut texts = Vec::new();
    let mut failed = None;
    for answer in answers {
        match answer {
            Ok(answer) => {
                if args.timeline {
                    let client = timeline::ClientView {
                        first_token: answer.first_token,
                        total: answer.total,
                    };
                    print(&timeline::render(
                        answer.context.as_ref(),
                        answer.generation.as_ref(),
                        &client,
                    ))?;
                }
                texts.push(answer.text);
            }
            Err(error) => {
                tracing::error!("{error:#}");
                texts.push(String::new());
                failed.get_or_insert(error);
            }
        }
    }
    if !live {
        let text = serde_json::to_string_pretty(&texts)?;
        std::fs::write(&args.output_file, text)
            .with_context(|| format!("cannot write {}", args.output_file.display()))?;
    }
    failed.map_or(Ok(Outcome::Success), Err)
}

fn prompts(args: &ClientArgs) -> anyhow::Result<Vec<String>> {
    if let Some(prompt) = &args.prompt {
        return Ok(vec![prompt.clone()]);
    }
    let path = args.prompts_file.as_deref().unwrap_or(Path::new(""));
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_str(&text)
        .with_context(|| format!("{}: expected a JSON array of strings", path.display()))
}

fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .context("cannot write to stdout")
}

impl Target {
    async fn new(args: ClientArgs) -> anyhow::Result<Self> {
        let http = HttpClient::new(CONNECT_TIMEOUT);
        let (base, model) = match (&args.url, &args.disagg_config_file) {
            (Some(url), _) => (url.trim_end_matches('/').to_owned(), None),
            (None, Some(path)) => crate::files::client_target(path)?,
            (None, None) => bail!("neither --url nor -c was given"),
        };
        if let Some(seconds) = args.server_start_timeout {
            http.wait_for_health(&base, Duration::from_secs(seconds))
                .await
                .outcome(Outcome::TimedOut)?;
        }
        let model = match model {
            Some(model) => model,
            None => http.first_model(&base).await?,
        };
        Ok(Self {
            base,
            model,
            args,
            http,
        })
    }

    fn request(&self, prompt: &str) -> (&'static str, Value) {
        let args = &self.args;
        let mut body = json!({
            "model": self.model, "max_tokens": args.max_tokens, "temperature": args.temperature,
            "stream": args.streaming, "ignore_eos": args.ignore_eos,
        });
        match args.endpoint {
            ClientEndpoint::Completions => {
                body["prompt"] = json!(prompt);
                ("/v1/completions", body)
            }
            ClientEndpoint::Chat => {
                body["messages"] = json!([
                    {"role": "system", "content": "You are a helpful assistant."},
                    {"role": "user", "content": prompt},
                ]);
                ("/v1/chat/completions", body)
            }
        }
    }

    async fn ask(&self, prompt: &str, live: bool) -> anyhow::Result<Answer> {
        let started = Instant::now();
        let (path, body) = self.request(prompt);
        let wanted = [(TIMELINE_REQUEST_HEADER, "1")];
        let headers = if self.args.timeline { &wanted[..] } else { &[] };
        let response = self
            .http
            .post_json(&format!("{}{path}", self.base), headers, body.to_string())
            .await?;
        let status = response.status();
        let context = response
            .headers()
            .get(TIMELINE_HEADER)
            .and_then(|value| serde_json::from_slice(value.as_bytes()).ok());
        if !status.is_success() {
            let body = response.into_body().collect().await?.to_bytes();
            bail!(
                "status {}: {}",
                status.as_u16(),
                String::from_utf8_lossy(&body)
            );
        }
        let mut answer = Answer {
            context,
            ..Answer::default()
        };
        if self.args.streaming {
            read_stream(response.into_body(), &mut answer, started, live).await?;
        } else {
            let body = response.into_body().collect().await?.to_bytes();
            let object: Value = serde_json::from_slice(&body).context("the answer is not JSON")?;
            answer.text = choice_text(&object).to_owned();
            if live {
                print(&answer.text)?;
            }
        }
        if live {
            print("\n")?;
        }
        answer.total = started.elapsed();
        Ok(answer)
    }
}

/// Reads server-sent events until `[DONE]`; a stream that ends without it is an error.
async fn read_stream(
    mut body: Incoming,
    answer: &mut Answer,
    started: Instant,
    live: bool,
) -> anyhow::Result<()> {
    let mut pending: Vec<u8> = Vec::new();
    let mut done = false;
    while let Some(frame) = body.frame().await {
        let Ok(bytes) = frame.context("the stream broke off")?.into_data() else {
            continue;
        };
        pending.extend_from_slice(&bytes);
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            done |= stream_line(line.trim_end(), answer, started, live)?;
        }
    }
    if done {
        Ok(())
    } else {
        bail!("the stream ended before [DONE]")
    }
}

fn stream_line(
    line: &str,
    answer: &mut Answer,
    started: Instant,
    live: bool,
) -> anyhow::Result<bool> {
    if let Some(comment) = line
        .strip_prefix(": ")
        .and_then(|rest| rest.strip_prefix(TIMELINE_COMMENT))
    {
        answer.generation = serde_json::from_str(comment.trim()).ok();
        return Ok(false);
    }
    let Some(data) = line.strip_prefix("data: ") else {
        return Ok(false);
    };
    if data == "[DONE]" {
        return Ok(true);
    }
    let object: Value =
        serde_json::from_str(data).with_context(|| format!("`{data}` is not JSON"))?;
    if let Some(error) = object.get("error") {
        bail!("the server ended the stream: {error}");
    }
    let text = choice_text(&object);
    if !text.is_empty() {
        answer.first_token.get_or_insert_with(|| started.elapsed());
        answer.text.push_str(text);
        if live {
            print(text)?;
        }
    }
    Ok(false)
}

/// The first choice's text in any of the four shapes of an answer; empty when there is none.
fn choice_text(object: &Value) -> &str {
    let choice = &object["choices"][0];
    [
        &choice["text"],
        &choice["message"]["content"],
        &choice["delta"]["content"],
    ]
    .into_iter()
    .find_map(Value::as_str)
    .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_lines_of_both_endpoints_are_joined() {
        let mut answer = Answer::default();
        let now = Instant::now();
        for line in [
            r#"data: {"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
            r#"data: {"choices":[{"delta":{"content":"Pa"}}]}"#,
            r#"data: {"choices":[{"text":"ris"}]}"#,
            r#"data: {"choices":[],"usage":{}}"#,
            "",
            r#": baton-timeline {"handoff_bytes":12}"#,
        ] {
            assert!(!stream_line(line, &mut answer, now, false).unwrap());
        }
        assert!(stream_line("data: [DONE]", &mut answer, now, false).unwrap());
        assert_eq!(answer.text, "Paris");
        assert_eq!(answer.generation.unwrap().handoff_bytes, Some(12));
        assert!(answer.first_token.is_some());
    }

    #[test]
    fn an_error_event_is_an_error() {
        let line = r#"data: {"error":{"message":"gone"}}"#;
        assert!(stream_line(line, &mut Answer::default(), Instant::now(), false).is_err());
    }
}
