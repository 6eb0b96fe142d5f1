//! A request's timeline as a small table for people.

use std::fmt::Write;
use std::time::Duration;

use baton_configs::wire::RequestTimeline;

/// What the client itself measured.
#[derive(Debug)]
pub(crate) struct ClientView {
    /// From sending to the first text, streams only.
    pub(crate) first_token: Option<Duration>,
    /// From sending to the end.
    pub(crate) total: Duration,
}

fn row(out: &mut String, label: &str, micros: u64, note: &str) {
    let ms = Duration::from_micros(micros).as_secs_f64() * 1e3;
    // Writing to a String cannot fail.
    let _ = writeln!(out, "  {label:<12} {ms:>10.2} ms  {note}");
}

/// The table. `context` and `generation` are what the two workers report; one aggregated server fills only one.
pub(crate) fn render(
    context: Option<&RequestTimeline>,
    generation: Option<&RequestTimeline>,
    client: &ClientView,
) -> String {
    let mut out = String::from("\ntimeline of the request\n");
    if let Some(reader) = context.or(generation) {
        row(
            &mut out,
            "queue",
            reader.queue_us,
            "before the prompt was read",
        );
        row(&mut out, "prefill", reader.prefill_us, "reading the prompt");
    }
    let writer = generation.or(context);
    if let Some((micros, bytes)) =
        writer.and_then(|writer| writer.handoff_us.zip(writer.handoff_bytes))
    {
        let transport = writer
            .and_then(|writer| writer.handoff_transport.as_deref())
            .unwrap_or("unknown transport");
        row(
            &mut out,
            "hand-off",
            micros,
            &handoff_note(micros, bytes, transport),
        );
    }
    if let Some(first) = client.first_token {
        row(
            &mut out,
            "first token",
            micros_of(first),
            "as the client saw it",
        );
    }
    if let Some(writer) = writer.filter(|writer| writer.decode_us > 0) {
        let rate =
            f64::from(writer.decode_tokens) / Duration::from_micros(writer.decode_us).as_secs_f64();
        row(
            &mut out,
            "decode",
            writer.decode_us,
            &format!("{} tokens, {rate:.1} tokens/s", writer.decode_tokens),
        );
    }
    row(
        &mut out,
        "total",
        micros_of(client.total),
        "as the client saw it",
    );
    out
}

fn handoff_note(micros: u64, bytes: u64, transport: &str) -> String {
    #[expect(
        clippy::cast_precision_loss,
        reason = "sizes far below 2^52, shown with three digits"
    )]
    let bytes = bytes as f64;
    let rate = bytes / Duration::from_micros(micros.max(1)).as_secs_f64() / 1e9;
    format!(
        "{:.2} MB of KV over {transport}, {rate:.2} GB/s",
        bytes / 1e6
    )
}

fn micros_of(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disaggregated_request_shows_every_phase() {
        let context = RequestTimeline {
            queue_us: 300,
            prefill_us: 52_000,
            ..RequestTimeline::default()
        };
        let generation = RequestTimeline {
            handoff_us: Some(2000),
            handoff_bytes: Some(4_000_000),
            handoff_transport: Some("tcp".to_owned()),
            decode_us: 500_000,
            decode_tokens: 50,
            ..RequestTimeline::default()
        };
        let client = ClientView {
            first_token: Some(Duration::from_millis(57)),
            total: Duration::from_millis(560),
        };
        let text = render(Some(&context), Some(&generation), &client);
        let expected = "
timeline of the request
  queue              0.30 ms  before the prompt was read
  prefill           52.00 ms  reading the prompt
  hand-off           2.00 ms  4.00 MB of KV over tcp, 2.00 GB/s
  first token       57.00 ms  as the client saw it
  decode           500.00 ms  50 tokens, 100.0 tokens/s
  total            560.00 ms  as the client saw it
";
        assert_eq!(text, expected);
    }
}
