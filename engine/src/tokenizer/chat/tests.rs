//! Templates as models write them, and requests as clients send them.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::json;

use super::*;
use crate::tokenizer::tests::{built, byte_level};

fn template(source: &str) -> Result<ChatTemplate, ChatError> {
    ChatTemplate::inline(&built(&byte_level("gpt-2")), source)
}

fn render(source: &str, request: &ChatRequest<'_>) -> Result<String, ChatError> {
    template(source)?.render(request)
}

fn render_messages(source: &str, messages: &Value) -> Result<String, ChatError> {
    let messages = messages.as_array().expect("a list of messages");
    render(
        source,
        &ChatRequest {
            messages,
            ..ChatRequest::default()
        },
    )
}

#[track_caller]
fn check(source: &str, messages: &Value, expected: &str) {
    let rendered = render_messages(source, messages).expect("renders");
    assert_eq!(rendered, expected, "{source}");
}

#[test]
fn blocks_are_trimmed_as_in_transformers() {
    let source = "{% for m in messages %}\n    {% if m.role == 'user' %}\n[{{ m.content }}]\n    {% endif %}\n{% endfor %}\nend\n";
    check(
        source,
        &json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]),
        "[a]\n[b]\nend",
    );
}

#[test]
fn llama_3_style() {
    let source = "{{- bos_token }}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n{{- '<sys>' + system + '</sys>' }}\n{%- for message in messages %}\n    {{- '<' + message['role'] + '>' + message['content'] | trim + eos_token }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<assistant>' }}\n{%- endif %}";
    let messages =
        json!([{"role": "system", "content": " be brief "}, {"role": "user", "content": " hi\n"}]);
    let request = ChatRequest {
        messages: messages.as_array().expect("a list"),
        add_generation_prompt: true,
        ..ChatRequest::default()
    };
    assert_eq!(
        render(source, &request).expect("renders"),
        "<s><sys>be brief</sys><user>hi</s><assistant>"
    );
}

#[test]
fn python_methods_and_loop_controls() {
    let source = "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.content.split('</think>')[-1].lstrip('\\n').upper() }}{% if m.content.startswith('stop') %}{% break %}{% endif %}|{% endfor %}";
    let messages = json!([
        {"role": "user", "content": "<think>x</think>\n\nyes"},
        {"role": "tool", "content": "skipped"},
        {"role": "user", "content": "stop now"},
        {"role": "user", "content": "never"}]);
    check(source, &messages, "YES|STOP NOW");
    let namespace = "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + loop.index0 %}{% endfor %}{{ ns.n }} {{ messages|length }} {{ 'a' in messages[0] }} {{ messages[0].missing is defined }}";
    check(namespace, &messages, "6 4 False False");
}

#[test]
fn values_print_as_in_python() {
    let source = "{{ true }} {{ none }} {{ 1.0 }} {{ undefined_name }}|{{ messages[0].extra }}";
    let messages =
        json!([{"role": "user", "content": "", "extra": {"a": [1, "it's", null], "b": "x\n"}}]);
    check(
        source,
        &messages,
        "True None 1.0 |{'a': [1, \"it's\", None], 'b': 'x\\n'}",
    );
}

#[test]
fn tojson_is_pythons() {
    let messages =
        json!([{"role": "user", "content": "", "v": {"b": [1, 2.5, "<é>"], "a": {}, "n": null}}]);
    check(
        "{{ messages[0].v | tojson }}",
        &messages,
        r#"{"b": [1, 2.5, "<é>"], "a": {}, "n": null}"#,
    );
    check(
        "{{ messages[0].v | tojson(indent=2) }}",
        &messages,
        "{\n  \"b\": [\n    1,\n    2.5,\n    \"<é>\"\n  ],\n  \"a\": {},\n  \"n\": null\n}",
    );
    check(
        "{{ messages[0].v | tojson(ensure_ascii=true, sort_keys=true, separators=(',', ':')) }}",
        &messages,
        r#"{"a":{},"b":[1,2.5,"<\u00e9>"],"n":null}"#,
    );
    check(
        "{{ '😀' | tojson(ensure_ascii=true) }}",
        &messages,
        r#""\ud83d\ude00""#,
    );
    assert!(render_messages("{{ 1 | tojson(colour=1) }}", &messages).is_err());
}

#[test]
fn tools_documents_and_arguments() {
    let source = "{% if tools %}{{ tools | tojson }}{% endif %}{% if tools is none %}no tools{% endif %} {{ documents[0].title }} {{ enable_thinking }} {{ bos_token }}";
    let tools = json!([{"type": "function"}]);
    let documents = json!([{"title": "T"}]);
    let arguments = json!({"enable_thinking": false, "bos_token": "B"});
    let mut request = ChatRequest {
        tools: Some(&tools),
        documents: Some(&documents),
        arguments: arguments.as_object(),
        ..ChatRequest::default()
    };
    assert_eq!(
        render(source, &request).expect("renders"),
        r#"[{"type": "function"}] T False B"#
    );
    request.tools = None;
    assert_eq!(
        render(source, &request).expect("renders"),
        "no tools T False B"
    );
    let reserved = json!({"messages": []});
    request.arguments = reserved.as_object();
    let error = render(source, &request).expect_err("reserved");
    assert_eq!(
        error.to_string(),
        "chat_template_kwargs: `messages` is set by the request itself"
    );
}

#[test]
fn content_parts_are_joined_and_others_refused() {
    let source = "{% for m in messages %}[{{ m.content }}]{% endfor %}";
    let parts = json!([
        {"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "text", "text": ""}]},
        {"role": "assistant", "content": null}, {"role": "assistant"}]);
    check(source, &parts, "[a\nb][][]");
    for (message, expected) in [
        (
            json!({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
            "messages[1]: content of type `image_url` is not supported; only text is",
        ),
        (
            json!({"role": "user", "content": [{"text": "x"}]}),
            "messages[1]: a part of the content has no `type`",
        ),
        (
            json!({"role": "user", "content": [{"type": "text"}]}),
            "messages[1]: a part of type `text` must have a `text`",
        ),
        (
            json!({"role": "user", "content": 5}),
            "messages[1]: `content` must be text or a list of parts",
        ),
        (json!({"content": "x"}), "messages[1]: `role` must be text"),
        (json!("x"), "messages[1]: expected an object"),
        (
            json!({"role": "assistant", "tool_calls": {}}),
            "messages[1]: `tool_calls` must be a list",
        ),
        (
            json!({"role": "assistant", "tool_calls": [{"function": {"arguments": "[1]"}}]}),
            "messages[1]: `arguments` of a tool call must be an object",
        ),
    ] {
        let messages = json!([{"role": "user", "content": "fine"}, message]);
        let error = render_messages(source, &messages).expect_err("refused");
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn arguments_of_tool_calls_are_objects() {
    let source =
        "{% for c in messages[0].tool_calls %}{{ c.function.arguments | tojson }};{% endfor %}";
    let call = |arguments: Value| json!({"function": {"name": "f", "arguments": arguments}});
    let calls = json!([{"role": "assistant", "tool_calls": [
        call(json!("{\"b\": 1, \"a\": 2}")), call(json!({"x": 1})), call(json!(null)), call(json!("not json"))]}]);
    check(
        source,
        &calls,
        r#"{"b": 1, "a": 2};{"x": 1};{};"not json";"#,
    );
}

#[test]
fn a_template_may_refuse() {
    let source =
        "{% macro no() %}{{ raise_exception('roles must\nalternate') }}{% endmacro %}{{ no() }}";
    let error = render_messages(source, &json!([])).expect_err("refused");
    assert!(matches!(error, ChatError::Refused { .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        "the chat template refused the messages: roles must alternate"
    );
}

#[test]
fn templates_that_fail_say_where() {
    let error = template("{% for %}").expect_err("not valid");
    assert!(matches!(error, ChatError::Syntax { .. }), "{error:?}");
    let error = render_messages("\n{{ messages[5].content }}", &json!([])).expect_err("fails");
    let text = error.to_string();
    assert!(
        text.starts_with("cannot render the chat template: ") && text.ends_with("(in default:2)"),
        "{text}"
    );
    assert!(!text.contains('\n'));
}

#[test]
fn an_endless_template_ends() {
    let source = "{% macro f() %}{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}{% endmacro %}{{ f() }}";
    let error = render_messages(source, &json!([])).expect_err("runs out");
    assert!(matches!(error, ChatError::OutOfFuel), "{error:?}");
    let recursive = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    assert!(render_messages(recursive, &json!([])).is_err());
}

#[test]
fn the_date_comes_from_the_clock() {
    let tokenizer = built(&byte_level("gpt-2"));
    let source = NamedTemplate {
        name: "default".to_owned(),
        text: "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
            .to_owned(),
    };
    let clock = || UNIX_EPOCH + Duration::from_secs(1_721_952_000);
    let template = ChatTemplate::new(&tokenizer, &[source], clock).expect("valid");
    assert_eq!(
        template.render(&ChatRequest::default()).expect("renders"),
        "26 Jul 2024"
    );
}

#[test]
fn generation_tags_are_accepted() {
    let source =
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}";
    check(source, &json!([{"role": "assistant", "content": "x"}]), "x");
}

#[test]
fn named_templates_are_chosen_as_in_transformers() {
    let tokenizer = built(&byte_level("gpt-2"));
    let named = |name: &str, text: &str| NamedTemplate {
        name: name.to_owned(),
        text: text.to_owned(),
    };
    let both = [named("default", "plain"), named("tool_use", "tools")];
    let template = ChatTemplate::new(&tokenizer, &both, SystemTime::now).expect("valid");
    let tools = json!([]);
    let with_tools = ChatRequest {
        tools: Some(&tools),
        ..ChatRequest::default()
    };
    assert_eq!(
        template.render(&ChatRequest::default()).expect("renders"),
        "plain"
    );
    assert_eq!(template.render(&with_tools).expect("renders"), "tools");
    let only = ChatTemplate::new(&tokenizer, &[named("rag", "r")], SystemTime::now).expect("valid");
    let error = only
        .render(&ChatRequest::default())
        .expect_err("no default");
    assert_eq!(
        error.to_string(),
        "the model has no chat template named `default` (it has: rag)"
    );
}

#[test]
fn without_a_template_chatting_is_refused() {
    let error = ChatTemplate::of_model(&built(&byte_level("gpt-2"))).expect_err("has none");
    assert!(matches!(error, ChatError::NoTemplate));
    assert!(
        error
            .to_string()
            .starts_with("the model has no chat template\nhint: ")
    );
    assert!(error.to_string().contains("--chat_template"));
}

#[test]
fn the_option_is_a_file_or_a_template() {
    let tokenizer = built(&byte_level("gpt-2"));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("chat.jinja");
    fs::write(&path, "from a file").expect("writes");
    let rendered = |option: &str| {
        ChatTemplate::from_option(&tokenizer, option)?.render(&ChatRequest::default())
    };
    assert_eq!(
        rendered(&path.display().to_string()).expect("reads"),
        "from a file"
    );
    assert_eq!(rendered("{{ 'inline' }}").expect("renders"), "inline");
    let error = rendered("no/such/file.jinja").expect_err("missing");
    assert!(
        error
            .to_string()
            .starts_with("cannot read chat template no/such/file.jinja: "),
        "{error}"
    );
}
