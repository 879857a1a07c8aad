#!/usr/bin/env python3
"""Asks a running server through the anthropic package, as its users do.

    pip install anthropic==2.13.0
    anthropic_client.py http://127.0.0.1:8000 [--api-key KEY] [--tokens 24]

Expects nothing of the model but that it says something: every check is of the server. Prints a line a check;
exits with 1 if one failed.
"""

import json
import urllib.request

import anthropic

from checks import check, run, same

THINK = {"type": "enabled", "budget_tokens": 1024}
REASONS = ("end_turn", "max_tokens", "tool_use")


class Server:
    """The server, and what it serves."""

    def __init__(self, url, key, tokens):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.key = key
        self.tokens = tokens
        self.client = anthropic.Anthropic(base_url=self.url, api_key=key or "none", max_retries=0, timeout=300)
        request = urllib.request.Request(self.url + "/v1/models", headers={"x-api-key": key or "none"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            model = json.load(reply)["data"][0]
        self.model, self.context = model["id"], model["max_model_len"]

    def request(self, **options):
        """Greedy, short and without reasoning, if `options` do not say otherwise."""
        request = {
            "model": self.model,
            "messages": [{"role": "user", "content": "Name three colours."}],
            "temperature": 0,
            "max_tokens": self.tokens,
        }
        # The package knows temperature by what it sends, not as a parameter.
        request |= options
        request["extra_body"] = {"temperature": request.pop("temperature")} | request.get("extra_body", {})
        return request

    def message(self, **options):
        return self.client.messages.create(**self.request(**options))


def text(message):
    return "".join(block.text for block in message.content if block.type == "text")


@check
def message(server):
    reply = server.message()
    same((reply.type, reply.role, reply.model), ("message", "assistant", server.model), "message")
    assert reply.id.startswith("msg_") and reply._request_id.startswith("req_"), reply
    assert reply.stop_reason in REASONS and reply.stop_sequence is None, reply
    usage = reply.usage
    assert 0 < usage.output_tokens <= server.tokens, usage
    assert usage.input_tokens + usage.cache_read_input_tokens > 0 and usage.cache_creation_input_tokens == 0, usage
    same(text(server.message()), text(reply), "the same greedy answer again")


@check
def streams(server):
    whole = server.message()
    with server.client.messages.stream(**server.request()) as stream:
        pieces = list(stream.text_stream)
        final = stream.get_final_message()
    same("".join(pieces), text(whole), "streamed text")
    same((text(final), final.stop_reason), (text(whole), whole.stop_reason), "message of the stream")
    same(final.usage.output_tokens, whole.usage.output_tokens, "output_tokens")
    kinds = [event.type for event in server.message(stream=True)]
    same((kinds[0], kinds[-2:]), ("message_start", ["message_delta", "message_stop"]), "events")


@check
def thinking(server):
    whole = server.message(thinking=THINK)
    thought = [block for block in whole.content if block.type == "thinking"]
    with server.client.messages.stream(**server.request(thinking=THINK)) as stream:
        final = stream.get_final_message()
    same([block.model_dump() for block in final.content], [block.model_dump() for block in whole.content], "blocks")
    # What was sent goes back as it came.
    turns = [
        {"role": "user", "content": "Name three colours."},
        {"role": "assistant", "content": whole.content or "Red."},
        {"role": "user", "content": "And a fourth."},
    ]
    assert server.message(messages=turns, thinking=THINK).stop_reason in REASONS
    return None if thought else "the model did not think"


@check
def system_and_count(server):
    messages = [{"role": "user", "content": "Hi"}]
    blocks = [{"type": "text", "text": "Answer in French.", "cache_control": {"type": "ephemeral"}}]
    count = lambda **options: server.client.messages.count_tokens(model=server.model, messages=messages, **options).input_tokens
    plain = count()
    same(count(system="Answer in French."), count(system=blocks), "tokens of a system in two forms")
    assert count(system=blocks) > plain > 0
    usage = server.message(messages=messages, system=blocks).usage
    same(usage.input_tokens + usage.cache_read_input_tokens, count(system=blocks), "input tokens")


@check
def stop_sequences(server):
    whole = text(server.message())
    # From the middle of a word, most likely.
    stop = whole[len(whole) // 2 :][:3]
    if not stop.strip():
        return "the model said nothing to stop at"
    reply = server.message(stop_sequences=[stop])
    expected = (whole[: whole.index(stop)], "stop_sequence", stop)
    same((text(reply), reply.stop_reason, reply.stop_sequence), expected, "cut")
    with server.client.messages.stream(**server.request(stop_sequences=[stop])) as stream:
        final = stream.get_final_message()
    same((text(final), final.stop_reason, final.stop_sequence), expected, "cut stream")


@check
def prefill(server):
    question = {"role": "user", "content": "What is the capital of France?"}
    whole = text(server.message(messages=[question]))
    begin = whole[: whole.index(" ") if " " in whole else 0]
    if not begin:
        return "the model said no two words"
    turns = [question, {"role": "assistant", "content": begin}]
    same(begin + text(server.message(messages=turns)), whole, "an answer that was begun")


@check
def tools(server):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"name": "weather", "description": "Weather of a city", "input_schema": schema}
    question = {"role": "user", "content": "What is the weather in Paris? Use the tool."}
    options = {"messages": [question], "tools": [tool], "max_tokens": 256}
    reply = server.message(**options, tool_choice={"type": "auto"})
    calls = [block for block in reply.content if block.type == "tool_use"]
    same(bool(calls), reply.stop_reason == "tool_use", "stop_reason")
    with server.client.messages.stream(**server.request(**options)) as stream:
        final = stream.get_final_message()
    found = [(block.name, block.input) for block in final.content if block.type == "tool_use"]
    same(found, [(call.name, call.input) for call in calls], "streamed calls")
    content = [block.model_dump() for block in reply.content]
    if not calls:
        call = {"type": "tool_use", "id": "toolu_0", "name": "weather", "input": {"city": "Paris"}}
        content.append(call)
    results = [
        {"type": "tool_result", "tool_use_id": block["id"], "content": [{"type": "text", "text": "sunny"}]}
        for block in content
        if block["type"] == "tool_use"
    ]
    turns = [question, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
    total = lambda usage: usage.input_tokens + usage.cache_read_input_tokens
    again = server.message(**(options | {"messages": turns, "max_tokens": server.tokens}))
    assert total(again.usage) > total(reply.usage), "the results are not in the prompt"
    none = server.message(**options, tool_choice={"type": "none"})
    assert total(none.usage) < total(reply.usage) - 50, "the tools are in the prompt"
    return None if calls else "the model called nothing"


def refused(error, call, kind):
    """Asks that `call` raises `error`, with the API's body of `kind`."""
    try:
        call()
    except error as found:
        body = found.body
        same((body["type"], body["error"]["type"]), ("error", kind), "error")
        assert body["error"]["message"] and body["request_id"] == found.request_id, body
        return body["error"]["message"]
    raise AssertionError(f"expected {error.__name__}, found an answer")


@check
def errors(server):
    bad = "invalid_request_error"
    refused(anthropic.NotFoundError, lambda: server.message(model="no-such-model"), "not_found_error")
    refused(anthropic.BadRequestError, lambda: server.message(temperature=9), bad)
    refused(anthropic.BadRequestError, lambda: server.message(messages=[]), bad)
    refused(anthropic.BadRequestError, lambda: server.message(tool_choice={"type": "any"}), bad)
    many = [{"role": "user", "content": "a b " * (server.context + 1)}]
    assert "prompt is too long" in refused(anthropic.BadRequestError, lambda: server.message(messages=many), bad)
    # More than the context is no error.
    short = {"stop_sequences": ["e", "a", "o", " "], "max_tokens": 10 * server.context}
    with server.client.messages.stream(**server.request(**short)) as stream:
        assert stream.get_final_message().stop_reason in (*REASONS, "stop_sequence")


@check
def keys(server):
    if not server.key:
        return "the server has no key"
    other = anthropic.Anthropic(base_url=server.url, api_key=server.key + "x", max_retries=0)
    request = server.request()
    refused(anthropic.AuthenticationError, lambda: other.messages.create(**request), "authentication_error")


if __name__ == "__main__":
    run(__doc__, Server)
