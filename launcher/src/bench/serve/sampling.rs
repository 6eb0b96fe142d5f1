//! How tokens are to be chosen, as a server is asked and as an engine is told.
//!
//! Invariant: both are asked for the same; what no flag says is left to a server's own defaults, and off in an engine.

use baton_engine::request::SamplingParams;
use serde_json::{Map, Value, json};

use crate::cli::{EndpointArg, SamplingArgs};

/// The fields of a request's body, in the names of OpenAI's API and, beyond it, of vLLM's.
pub(super) fn fields(args: &SamplingArgs, endpoint: EndpointArg) -> Map<String, Value> {
    let mut fields = Map::new();
    let mut say = |name: &str, value: Option<Value>| {
        if let Some(value) = value {
            fields.insert(name.to_owned(), value);
        }
    };
    say("temperature", Some(json!(args.temperature)));
    say("top_p", args.top_p.map(Value::from));
    say("top_k", args.top_k.map(Value::from));
    say("min_p", args.min_p.map(Value::from));
    let repetition = args.repetition_penalty.map(Value::from);
    say("repetition_penalty", repetition);
    say("frequency_penalty", args.frequency_penalty.map(Value::from));
    say("presence_penalty", args.presence_penalty.map(Value::from));
    match endpoint {
        EndpointArg::Completions => say("logprobs", args.logprobs.map(Value::from)),
        EndpointArg::Chat => {
            say("logprobs", args.logprobs.map(|_| json!(true)));
            say("top_logprobs", args.logprobs.map(Value::from));
        }
    }
    fields
}

/// The same for an engine; the rest of a request is the caller's to say.
pub(super) fn params(args: &SamplingArgs) -> SamplingParams {
    let off = SamplingParams::default();
    SamplingParams {
        temperature: args.temperature,
        top_p: args.top_p.unwrap_or(off.top_p),
        top_k: args.top_k.unwrap_or(off.top_k),
        min_p: args.min_p.unwrap_or(off.min_p),
        repetition_penalty: args.repetition_penalty.unwrap_or(off.repetition_penalty),
        frequency_penalty: args.frequency_penalty.unwrap_or(off.frequency_penalty),
        presence_penalty: args.presence_penalty.unwrap_or(off.presence_penalty),
        logprobs: args.logprobs,
        ..off
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        sampling: SamplingArgs,
    }

    fn said(words: &[&str]) -> SamplingArgs {
        let words = [&["bench"], words].concat();
        Line::try_parse_from(words).unwrap().sampling
    }

    #[test]
    fn what_is_not_said_is_not_asked_for() {
        let none = said(&[]);
        let fields = fields(&none, EndpointArg::Chat);
        assert_eq!(Value::from(fields), json!({"temperature": 0.0}));
        let greedy = SamplingParams {
            temperature: 0.0,
            ..SamplingParams::default()
        };
        assert_eq!(params(&none), greedy);
    }

    #[test]
    fn servers_and_engines_are_asked_for_the_same() {
        let all = said(&[
            "--temperature=0.5",
            "--top-p=0.75",
            "--top-k=40",
            "--min-p=0.25",
            "--repetition-penalty=1.5",
            "--frequency-penalty=-0.5",
            "--presence-penalty=1",
            "--logprobs=3",
        ]);
        let mut expected = json!({"temperature": 0.5, "top_p": 0.75, "top_k": 40, "min_p": 0.25, "repetition_penalty": 1.5,
            "frequency_penalty": -0.5, "presence_penalty": 1.0, "logprobs": 3});
        let found = fields(&all, EndpointArg::Completions);
        assert_eq!(Value::from(found), expected);
        expected["logprobs"] = json!(true);
        expected["top_logprobs"] = json!(3);
        assert_eq!(Value::from(fields(&all, EndpointArg::Chat)), expected);
        let params = params(&all);
        assert_eq!((params.top_p, params.top_k, params.min_p), (0.75, 40, 0.25));
        assert_eq!(
            (params.repetition_penalty, params.frequency_penalty),
            (1.5, -0.5)
        );
        assert_eq!((params.presence_penalty, params.logprobs), (1.0, Some(3)));
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for word in [
            "--temperature=3",
            "--top-p=0",
            "--min-p=1.5",
            "--repetition-penalty=0",
            "--presence-penalty=-3",
            "--logprobs=21",
            "--top-p=nan",
        ] {
            assert!(Line::try_parse_from(["bench", word]).is_err(), "{word}");
        }
    }
}
