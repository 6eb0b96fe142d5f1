//! Usage of an answer whose two halves were written by two servers: the prompt's counts are the context server's.

use baton_configs::wire::Usage;
use bytes::Bytes;
use serde::Deserialize;

use crate::object::RawObject;

#[derive(Deserialize)]
struct Counts {
    #[serde(default)]
    prompt_tokens: u64,
    #[serde(default)]
    completion_tokens: u64,
    #[serde(default)]
    prompt_tokens_details: Option<CachedTokens>,
}

#[derive(Deserialize)]
struct CachedTokens {
    #[serde(default)]
    cached_tokens: Option<u64>,
}

/// The answer with the context server's counts; the same bytes where nothing differs. Fails on what is not an object.
pub(crate) fn rewrite(answer: &Bytes, context: Option<&Usage>) -> Result<Bytes, String> {
    let mut members =
        RawObject::parse(answer).map_err(|error| format!("not a JSON object: {error}"))?;
    let (Some(context), Some(usage)) = (context, members.get_set("usage")) else {
        return Ok(answer.clone());
    };
    let (Ok(mut usage), Ok(counts)) = (
        RawObject::parse(usage.as_bytes()),
        serde_json::from_str::<Counts>(usage),
    ) else {
        return Ok(answer.clone());
    };
    let prompt_tokens = u64::from(context.prompt_tokens);
    let cached = context.prompt_tokens_details.as_ref();
    let cached = cached.map(|details| u64::from(details.cached_tokens));
    let own_cached = counts
        .prompt_tokens_details
        .and_then(|details| details.cached_tokens);
    if counts.prompt_tokens == prompt_tokens && (cached.is_none() || cached == own_cached) {
        return Ok(answer.clone());
    }
    usage.set("prompt_tokens", prompt_tokens.to_string());
    usage.set(
        "total_tokens",
        (prompt_tokens + counts.completion_tokens).to_string(),
    );
    if let Some(cached) = cached {
        let details = usage
            .get_set("prompt_tokens_details")
            .unwrap_or("{}")
            .to_owned();
        let mut details = RawObject::parse(details.as_bytes()).unwrap_or_default();
        details.set("cached_tokens", cached.to_string());
        let text = details.to_text();
        usage.set("prompt_tokens_details", text);
    }
    let usage = usage.to_text();
    members.set("usage", usage);
    Ok(members.write(&[], &[]).into())
}

#[cfg(test)]
mod tests {
    use baton_configs::wire::PromptTokensDetails;

    use super::*;

    fn context(cached: Option<u32>) -> Usage {
        Usage {
            prompt_tokens: 20,
            total_tokens: 21,
            completion_tokens: 1,
            prompt_tokens_details: cached
                .map(|cached_tokens| PromptTokensDetails { cached_tokens }),
        }
    }

    fn rewritten(answer: &'static str, cached: Option<u32>) -> String {
        let bytes = rewrite(
            &Bytes::from_static(answer.as_bytes()),
            Some(&context(cached)),
        );
        String::from_utf8(bytes.unwrap().to_vec()).unwrap()
    }

    #[test]
    fn prompt_counts_come_from_the_context_server() {
        assert_eq!(
            rewritten(
                r#"{"id":"x","usage":{"prompt_tokens":19,"total_tokens":24,"completion_tokens":5,"more":1},"z":[]}"#,
                Some(16)
            ),
            r#"{"id":"x","usage":{"prompt_tokens":20,"total_tokens":25,"completion_tokens":5,"more":1,"prompt_tokens_details":{"cached_tokens":16}},"z":[]}"#
        );
        assert_eq!(
            rewritten(
                r#"{"usage":{"prompt_tokens":20,"total_tokens":25,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":20,"y":0}}}"#,
                Some(0)
            ),
            r#"{"usage":{"prompt_tokens":20,"total_tokens":25,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":0,"y":0}}}"#
        );
    }

    #[test]
    fn equal_or_absent_usage_leaves_the_bytes_alone() {
        for answer in [
            r#"{ "usage" : {"prompt_tokens":20,"completion_tokens":5} }"#,
            r#"{ "usage" : null }"#,
            r#"{ "a" : 1 }"#,
            r#"{ "usage" : "odd" }"#,
        ] {
            assert_eq!(rewritten(answer, None), answer);
        }
        assert!(rewrite(&Bytes::from_static(b"oops"), None).is_err());
    }
}
