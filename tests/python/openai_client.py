"""Completes, chats, streams, asks for log-probabilities and provokes typed errors through the proxy.

Usage: openai_client.py BASE_URL GOLDEN_JSON
"""

import json
import sys

import openai


def main(base_url, golden_path):
    with open(golden_path, encoding="utf-8") as file:
        items = json.load(file)["items"]
    client = openai.OpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=120)
    model = client.models.list().data[0].id
    assert model, "the model list names no model"
    for check in (completes, completes_streaming, chats, chats_streaming, logprobs, choices, errors):
        check(client, model, items)
        print(check.__name__)
    print("all checks passed")


def pick(items, kind, index=0):
    return [item for item in items if item["kind"] == kind][index]


def completes(client, model, items):
    item = pick(items, "completion")
    answer = client.completions.create(model=model, prompt=item["prompt"], max_tokens=64, temperature=0)
    assert answer.choices[0].text == item["text"], answer
    assert answer.choices[0].finish_reason == "stop", answer
    assert answer.usage.prompt_tokens == len(item["prompt_token_ids"]), answer.usage
    assert answer.usage.completion_tokens == len(item["output_token_ids"]), answer.usage
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def completes_streaming(client, model, items):
    item = pick(items, "completion", 7)
    stream = client.completions.create(
        model=model, prompt=item["prompt"], max_tokens=64, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    text, usage, reason = "", None, None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.text
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage
    assert text == item["text"], text
    assert reason == "length", reason
    assert usage.completion_tokens == 64, usage
    assert usage.prompt_tokens == len(item["prompt_token_ids"]), usage


def chats(client, model, items):
    for index in range(3):
        item = pick(items, "chat", index)
        answer = client.chat.completions.create(model=model, messages=item["messages"], max_completion_tokens=64, temperature=0)
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].message.content == item["text"], answer


def chats_streaming(client, model, items):
    item = pick(items, "chat", 2)
    stream = client.chat.completions.create(model=model, messages=item["messages"], max_tokens=64, temperature=0, stream=True)
    text, reason, role = "", None, None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            role = choice.delta.role or role
            reason = choice.finish_reason or reason
    assert text == item["text"], text
    assert (role, reason) == ("assistant", "stop"), (role, reason)


def logprobs(client, model, items):
    item = pick(items, "completion")
    answer = client.completions.create(model=model, prompt=item["prompt"], max_tokens=16, temperature=0, logprobs=5)
    seen = answer.choices[0].logprobs
    for ours, theirs in zip(seen.token_logprobs, item["logprobs"]):
        assert abs(ours - theirs) < 0.001, (ours, theirs)
    for ours, theirs in zip(seen.top_logprobs, item["top5"]):
        assert abs(max(ours.values()) - theirs[0][1]) < 0.001, (ours, theirs)
    item = pick(items, "chat")
    answer = client.chat.completions.create(
        model=model, messages=item["messages"], max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    for entry, theirs in zip(answer.choices[0].logprobs.content, item["top5"]):
        assert abs(entry.logprob - theirs[0][1]) < 0.001, (entry, theirs)
        assert len(entry.top_logprobs) == 3, entry
        assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token


def choices(client, model, items):
    answer = client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, n=3, temperature=1.0, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2], answer
    again = client.completions.create(model=model, prompt="Once upon a time", max_tokens=8, n=3, temperature=1.0, seed=7)
    assert [c.text for c in answer.choices] == [c.text for c in again.choices], (answer, again)
    stopped = client.completions.create(model=model, prompt="1, 2, 3, 4,", max_tokens=32, temperature=0, stop=[" 6"])
    assert " 6" not in stopped.choices[0].text and stopped.choices[0].finish_reason == "stop", stopped


def raises(kind, call):
    try:
        call()
    except kind as error:
        assert error.message, error
        return error
    raise AssertionError(f"no {kind.__name__} was raised")


def errors(client, model, items):
    error = raises(openai.BadRequestError, lambda: client.completions.create(model=model, prompt=[5] * 5000, max_tokens=4))
    assert "5000" in error.message and "1024" in error.message, error.message
    error = raises(openai.BadRequestError, lambda: client.completions.create(model=model, prompt="a", temperature=-1))
    assert "temperature" in error.message, error.message
    error = raises(
        openai.BadRequestError, lambda: client.completions.create(model=model, prompt="a", extra_body={"no_such_field": 1})
    )
    assert "no_such_field" in error.message, error.message
    raises(openai.NotFoundError, lambda: client.embeddings.create(model=model, input="a"))


if __name__ == "__main__":
    main(*sys.argv[1:])
