#!/usr/bin/env python3
"""Asks a running server through the openai package, as its users do.

    pip install openai==3.57.0
    openai_client.py http://127.0.0.1:8000 [--api-key KEY] [--tokens 24]

Expects nothing of the model but that it says something: every check is of the server. Prints a line a check;
exits with 1 if one failed.
"""

import json

import openai

from checks import check, run, same


class Server:
    """The server, and what it serves."""

    def __init__(self, url, key, tokens):
        url = url.rstrip("/")
        self.url = url if url.endswith("/v1") else url + "/v1"
        self.key = key
        self.tokens = tokens
        self.client = openai.OpenAI(base_url=self.url, api_key=key or "none", max_retries=0, timeout=300)
        self.model = self.client.models.list().data[0]

    def chat(self, **options):
        """Greedy, short and without reasoning, if `options` do not say otherwise."""
        request = {
            "model": self.model.id,
            "messages": [{"role": "user", "content": "Name three colours."}],
            "temperature": 0,
            "max_tokens": self.tokens,
            "extra_body": {"chat_template_kwargs": {"thinking": False}},
        }
        return self.client.chat.completions.create(**(request | options))

    def response(self, **options):
        """The same as `chat`, of responses."""
        request = {
            "model": self.model.id,
            "input": "Name three colours.",
            "temperature": 0,
            "max_output_tokens": self.tokens,
            "reasoning": {"effort": "none"},
        }
        return request | options

    def respond(self, **options):
        return self.client.responses.create(**self.response(**options))


@check
def models(server):
    listed = server.client.models.list().data
    same(len(listed), 1, "models")
    same(server.client.models.retrieve(server.model.id).id, server.model.id, "id")
    assert server.model.max_model_len > 0 and server.model.root and server.model.owned_by


@check
def chat(server):
    reply = server.chat()
    choice = reply.choices[0]
    same((choice.message.role, choice.index), ("assistant", 0), "choice")
    assert choice.finish_reason in ("stop", "length", "tool_calls"), choice.finish_reason
    usage = reply.usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= server.tokens, usage
    same(usage.total_tokens, usage.prompt_tokens + usage.completion_tokens, "total_tokens")
    assert reply.metrics["decode_ms"] >= 0 and "speculative_decoding" in reply.metrics, reply.metrics
    same(server.chat().choices[0].message.content, choice.message.content, "the same greedy answer again")


@check
def chat_stream(server):
    whole = server.chat()
    options = {"include_usage": True}
    chunks = list(server.chat(stream=True, stream_options=options))
    same(chunks[0].choices[0].delta.role, "assistant", "first delta")
    same(chunks[-1].choices, [], "choices of the last chunk")
    same(chunks[-1].usage.completion_tokens, whole.usage.completion_tokens, "completion_tokens")
    assert chunks[-1].metrics["decode_ms"] >= 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    same(len({chunk.id for chunk in chunks}), 1, "ids")
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    same(text, whole.choices[0].message.content or "", "streamed content")
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    same(reasons, [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason], "finish reasons")


@check
def chat_stream_helper(server):
    request = {"model": server.model.id, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": server.tokens}
    with server.client.chat.completions.stream(**request, temperature=0) as stream:
        kinds = {event.type for event in stream}
        assert "chunk" in kinds, kinds
        try:
            final = stream.get_final_completion()
        except openai.LengthFinishReasonError as cut:
            # The package's way to say that it was cut at max_tokens; it has read the stream to its end.
            final = cut.completion
    assert final.choices[0].finish_reason in ("stop", "length", "tool_calls"), final


@check
def token_ids(server):
    body = {"chat_template_kwargs": {"thinking": False}, "return_token_ids": True}
    whole = server.chat(extra_body=body)
    ids = whole.choices[0].token_ids
    same(len(ids), whole.usage.completion_tokens, "token ids")
    same(len(whole.prompt_token_ids), whole.usage.prompt_tokens, "prompt token ids")
    streamed = []
    for chunk in server.chat(extra_body=body, stream=True):
        streamed += chunk.choices[0].token_ids
    same(streamed, ids, "streamed token ids")


@check
def reasoning(server):
    body = {"chat_template_kwargs": {"thinking": True}}
    whole = server.chat(extra_body=body)
    thought = getattr(whole.choices[0].message, "reasoning_content", None) or ""
    details = whole.usage.completion_tokens_details
    assert (details.reasoning_tokens > 0) or not thought, whole
    deltas = [chunk.choices[0].delta for chunk in server.chat(extra_body=body, stream=True)]
    streamed = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    same(streamed, thought, "streamed reasoning")


@check
def stop_strings(server):
    text = server.chat().choices[0].message.content or ""
    # From the middle of a word, most likely.
    stop = text[len(text) // 2 :][:3]
    if not stop:
        return "the model said nothing to stop at"
    for stream in (False, True):
        reply = server.chat(stop=[stop], stream=stream)
        if stream:
            choices = [chunk.choices[0] for chunk in reply]
            content, reason = "".join(c.delta.content or "" for c in choices), choices[-1].finish_reason
        else:
            content, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
        same((content, reason), (text[: text.index(stop)], "stop"), f"cut at {stop!r}")


@check
def several(server):
    reply = server.chat(n=2, seed=5, temperature=1)
    same([choice.index for choice in reply.choices], [0, 1], "choices")
    again = server.chat(n=2, seed=5, temperature=1)
    same(
        [choice.message.content for choice in again.choices],
        [choice.message.content for choice in reply.choices],
        "the same seeds again",
    )


@check
def logprobs(server):
    reply = server.chat(logprobs=True, top_logprobs=3, max_tokens=4)
    content = reply.choices[0].logprobs.content
    same(len(content), reply.usage.completion_tokens, "entries")
    for entry in content:
        same(len(entry.top_logprobs), 3, "top_logprobs")
        # Greedy: the likeliest.
        same(entry.logprob, max(top.logprob for top in entry.top_logprobs), "logprob")
        assert entry.logprob <= 0 and entry.bytes is not None


@check
def tools(server):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "weather", "description": "Weather of a city", "parameters": schema}}
    messages = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]
    options = {"tools": [tool], "tool_choice": "auto", "parallel_tool_calls": True, "messages": messages}
    plain = server.chat(messages=messages).usage.prompt_tokens
    reply = server.chat(**options, max_tokens=256)
    assert reply.usage.prompt_tokens > plain + 50, "the tools are not in the prompt"
    same(server.chat(**(options | {"tool_choice": "none"})).usage.prompt_tokens, plain, "prompt without tools")
    calls = reply.choices[0].message.tool_calls or []
    streamed = {}
    for chunk in server.chat(**options, max_tokens=256, stream=True):
        for call in chunk.choices[0].delta.tool_calls or []:
            entry = streamed.setdefault(call.index, ["", ""])
            entry[0] += call.function.name or ""
            entry[1] += call.function.arguments or ""
    if reply.choices[0].finish_reason != "tool_calls":
        note = "the model called nothing"
    else:
        found = [[call.function.name, call.function.arguments] for call in calls]
        same([streamed[i] for i in sorted(streamed)], found, "streamed calls")
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in found)
        note = None
    # A turn with a call and its result goes back as clients send it.
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    call = {"id": "call_0", "type": "function", "function": function}
    turns = messages + [
        {"role": "assistant", "content": None, "reasoning_content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0", "content": "sunny"},
    ]
    assert server.chat(**(options | {"messages": turns})).usage.prompt_tokens > reply.usage.prompt_tokens
    return note


@check
def what_was_sent_goes_back(server):
    messages = [{"role": "user", "content": "Name three colours."}]
    body = {"chat_template_kwargs": {"thinking": True}}
    message = server.chat(extra_body=body).choices[0].message
    turns = [*messages, message, {"role": "user", "content": "And a fourth."}]
    dumped = [*messages, message.model_dump(), {"role": "user", "content": "And a fourth."}]
    prompts = [server.chat(messages=m, extra_body=body).usage.prompt_tokens for m in (turns, dumped)]
    same(prompts[0], prompts[1], "prompt tokens")


@check
def responses(server):
    reply = server.respond()
    same((reply.object, reply.model, reply.error), ("response", server.model.id, None), "response")
    assert reply.id.startswith("resp_") and reply.status in ("completed", "incomplete"), reply
    if reply.status == "incomplete":
        same(reply.incomplete_details.reason, "max_output_tokens", "reason")
    usage = reply.usage
    assert usage.input_tokens > 0 and 0 < usage.output_tokens <= server.tokens, usage
    same(usage.total_tokens, usage.input_tokens + usage.output_tokens, "total_tokens")
    same(reply.output_text, server.chat().choices[0].message.content, "the same as a chat's")


@check
def responses_stream(server):
    thinks = {"reasoning": {"effort": "high"}}
    for options in ({}, thinks):
        whole = server.respond(**options)
        events = list(server.respond(**options, stream=True))
        same([event.sequence_number for event in events], list(range(len(events))), "sequence numbers")
        same([event.type for event in events[:2]], ["response.created", "response.in_progress"], "first events")
        same(events[-1].type, f"response.{whole.status}", "last event")
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        same(text, whole.output_text, "streamed text")
        thought = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
        items = [item for item in whole.output if item.type == "reasoning"]
        same(thought, "".join(item.content[0].text for item in items), "streamed reasoning")
        same(events[-1].response.usage.output_tokens, whole.usage.output_tokens, "output_tokens")
    with server.client.responses.stream(**server.response()) as stream:
        kinds = [event.type for event in stream]
    assert "response.output_item.done" in kinds, kinds


@check
def responses_tools(server):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "additionalProperties": False}
    tool = {"type": "function", "name": "weather", "description": "Weather of a city", "parameters": schema, "strict": False}
    question = {"role": "user", "content": "What is the weather in Paris? Use the tool."}
    options = {"input": [question], "tools": [tool], "max_output_tokens": 256}
    reply = server.respond(**options)
    calls = [item for item in reply.output if item.type == "function_call"]
    done = [
        (event.name, event.arguments)
        for event in server.respond(**options, stream=True)
        if event.type == "response.function_call_arguments.done"
    ]
    same(done, [(call.name, call.arguments) for call in calls], "streamed calls")
    # Items go back as they came, with a result for every call.
    items = [item.model_dump() for item in reply.output]
    if not calls:
        arguments = '{"city": "Paris"}'
        items.append({"type": "function_call", "call_id": "call_0", "name": "weather", "arguments": arguments})
    ids = [item["call_id"] for item in items if item["type"] == "function_call"]
    items += [{"type": "function_call_output", "call_id": id, "output": "sunny"} for id in ids]
    again = server.respond(**(options | {"input": [question, *items], "max_output_tokens": server.tokens}))
    assert again.usage.input_tokens > reply.usage.input_tokens, "the results are not in the prompt"
    none = server.respond(**options, tool_choice="none").usage.input_tokens
    assert none < reply.usage.input_tokens - 50, "the tools are in the prompt"
    return None if calls else "the model called nothing"


@check
def completions(server):
    request = {"model": server.model.id, "prompt": "The capital of France", "max_tokens": 8, "temperature": 0}
    reply = server.client.completions.create(**request)
    assert reply.choices[0].finish_reason in ("stop", "length")
    chunks = list(server.client.completions.create(**request, stream=True))
    same("".join(c.choices[0].text for c in chunks), reply.choices[0].text, "streamed text")
    echo = server.client.completions.create(**request, echo=True)
    same(echo.choices[0].text, request["prompt"] + reply.choices[0].text, "echo")
    both = server.client.completions.create(**(request | {"prompt": ["One", "Two"]}))
    same([choice.index for choice in both.choices], [0, 1], "choices")


@check
def completion_logprobs(server):
    ids = [[5, 20, 30, 40, 50]]
    request = {"model": server.model.id, "prompt": ids, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    found = server.client.completions.create(**request).choices[0].logprobs
    same([len(column) for column in (found.tokens, found.token_logprobs, found.top_logprobs)], [6] * 3, "columns")
    same(found.token_logprobs[0], None, "logprob of the first token")
    assert all(logprob <= max(top.values()) for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:]))


def refused(kind, call, **expected):
    """The error of `kind` that `call` must raise."""
    try:
        call()
    except kind as error:
        body = error.body
        assert isinstance(body, dict) and body["message"] and body["type"], error
        for field, value in expected.items():
            same(body[field], value, field)
        return
    raise AssertionError(f"expected {kind.__name__}, found an answer")


@check
def errors(server):
    client = server.client
    messages = [{"role": "user", "content": "Hi"}]
    refused(openai.NotFoundError, lambda: server.chat(model="no-such-model"), code="model_not_found", param="model")
    refused(openai.BadRequestError, lambda: server.chat(temperature=9), param="temperature")
    refused(openai.BadRequestError, lambda: server.chat(messages=[]), param="messages")
    schema = {"type": "json_object"}
    refused(openai.BadRequestError, lambda: server.chat(response_format=schema), param="response_format")
    refused(openai.BadRequestError, lambda: server.chat(tools=[], tool_choice="required"), param="tool_choice")
    many = [5] * (server.model.max_model_len + 1)
    long = lambda: client.completions.create(model=server.model.id, prompt=many)
    refused(openai.BadRequestError, long, code="context_length_exceeded")
    stored = lambda: server.respond(previous_response_id="resp_0")
    refused(openai.BadRequestError, stored, code="unsupported_value", param="previous_response_id")
    # More than the context is no error.
    short = {"messages": messages, "stop": ["e", "a", "o", " "], "max_tokens": 10 * server.model.max_model_len}
    assert server.chat(**short).choices[0].finish_reason in ("stop", "length")


@check
def keys(server):
    if not server.key:
        return "the server has no key"
    other = openai.OpenAI(base_url=server.url, api_key=server.key + "x", max_retries=0)
    refused(openai.AuthenticationError, other.models.list, code="invalid_api_key")


if __name__ == "__main__":
    run(__doc__, Server)
