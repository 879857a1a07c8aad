"""What clients of the load test do, well and badly: each sends one request and judges what becomes of it."""

import asyncio
import json
import os

from raw import Connection, Fault, check_error, streamed_tokens, whole_tokens

WORDS = "amber cobalt crimson ebony emerald garnet golden indigo ivory jade lilac olive onyx ruby silver topaz".split()


class Prompt:
    """A request and the tokens that it gives alone."""

    def __init__(self, messages, **options):
        self.request = {
            "messages": messages,
            "temperature": 0,
            "return_token_ids": True,
            "chat_template_kwargs": {"thinking": False},
        } | options
        self.alone = None

    def body(self, **options):
        return json.dumps(self.request | options).encode()

    def stream(self):
        return self.body(stream=True, stream_options={"include_usage": True})

    def check(self, tokens):
        if self.alone is not None and tokens != self.alone:
            at = next((i for i, (a, b) in enumerate(zip(tokens, self.alone)) if a != b), min(len(tokens), len(self.alone)))
            raise Fault(f"{self.request['messages'][-1]['content'][:60]!r}: other tokens than alone from {at} on")


def prompts(count, rng):
    """Short and long prompts, of the kinds that the small model knows."""
    found = []
    for i in range(count):
        kind = i % 4
        if kind == 0:
            first = rng.randrange(2, 60)
            text, options = f"Count from {first} to {first + rng.randrange(6, 16)}.", {"max_tokens": 64}
        elif kind == 1:
            text, options = "Repeat these words: " + " ".join(rng.choices(WORDS, k=12)), {"max_tokens": 48}
        elif kind == 2:
            text, options = f"What is {rng.randrange(2, 20)} + {rng.randrange(2, 20)}?", {"max_tokens": 24}
        else:
            text = "Repeat these words: " + " ".join(rng.choices(WORDS, k=rng.randrange(150, 400)))
            options = {"max_tokens": 12, "ignore_eos": True}
        found.append(Prompt([{"role": "user", "content": text}], **options))
    return found


class Kinds:
    """Each takes a prompt, and raises a Fault if the reply is not as it must be.

    Of a load it uses `place`, `rng`, `context`; it adds to `statuses`, `gaps` (seconds between chunks with tokens of a
    stream that is read at once), `first` (seconds to the first of these).
    """

    async def steady(self, prompt):
        async with Connection(self.place) as connection:
            await connection.send("POST", "/v1/chat/completions", prompt.stream())
            reply = await connection.read()
            self.statuses[reply.status] += 1
            prompt.check(streamed_tokens(reply))
            times = reply.token_s
            self.gaps += [b - a for a, b in zip(times, times[1:])]
            self.first.append(times[0] - connection.began)

    async def whole(self, prompt):
        async with Connection(self.place) as connection:
            await connection.send("POST", "/v1/chat/completions", prompt.body())
            reply = await connection.read()
            self.statuses[reply.status] += 1
            prompt.check(whole_tokens(reply))

    async def slow(self, prompt):
        # Much to read for little to compute, through small buffers.
        body = json.loads(prompt.stream()) | {"logprobs": True, "top_logprobs": 20}
        async with Connection(self.place, slow=True) as connection:
            await connection.send("POST", "/v1/chat/completions", json.dumps(body).encode())
            reply = await connection.read(pause=self.rng.uniform(0.05, 0.3))
            self.statuses[reply.status] += 1
            prompt.check(streamed_tokens(reply))

    async def cancelled(self, prompt):
        """Goes away while it waits, during the prompt, or in the middle of the answer."""
        async with Connection(self.place) as connection:
            stream = self.rng.random() < 0.7
            body = prompt.body(stream=stream, max_tokens=400, ignore_eos=True)
            await connection.send("POST", "/v1/chat/completions", body)
            pieces = self.rng.randrange(1, 30)
            try:
                await asyncio.wait_for(connection.read(pieces_max=pieces), self.rng.uniform(0.01, 4))
            except TimeoutError:
                pass
        self.statuses["cancelled"] += 1

    async def refused(self, statuses, path, body, method="POST"):
        async with Connection(self.place) as connection:
            await connection.send(method, path, body)
            reply = await connection.read()
            self.statuses[reply.status] += 1
            check_error(reply, statuses)

    async def bad_json(self, prompt):
        body = prompt.body()
        cut = self.rng.randrange(1, len(body))
        bad = self.rng.choice([body[:cut], body[cut:], b"", b"\xff\xfe{}", b"[]", b"[" * 100_000, b'{"messages": 1e999}'])
        await self.refused((400,), "/v1/chat/completions", bad)

    async def bad_types(self, prompt):
        field, value = self.rng.choice(
            [
                ("messages", "Hi"),
                ("messages", []),
                ("messages", [{"role": "nobody", "content": "x"}]),
                ("messages", [{"role": "user", "content": 5}]),
                ("max_tokens", "many"),
                ("max_tokens", -1),
                ("temperature", "warm"),
                ("temperature", 1e300),
                ("stop", [""]),
                ("stream", "yes"),
                ("n", 10**9),
                ("logit_bias", {"x": 1}),
                ("seed", 1.5),
                ("tools", 5),
                ("response_format", 7),
                ("stream_options", []),
            ]
        )
        await self.refused((400,), "/v1/chat/completions", prompt.body(**{field: value}))

    async def bad_path(self, prompt):
        method, path, status = self.rng.choice(
            [("POST", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405), ("GET", "/v1/models/other", 404)]
        )
        await self.refused((status,), path, prompt.body(), method)

    async def bad_model(self, prompt):
        await self.refused((404,), "/v1/chat/completions", prompt.body(model="other"))

    async def too_long(self, _prompt):
        ids = [self.rng.randrange(5, 900) for _ in range(self.context + self.rng.randrange(0, 3000))]
        await self.refused((400,), "/v1/completions", json.dumps({"prompt": ids}).encode())

    async def too_large(self, _prompt):
        async with Connection(self.place) as connection:
            connection.writer.write(connection.head("POST", "/v1/completions", 1 << 40))
            reply = await connection.read()
            self.statuses[reply.status] += 1
            check_error(reply, (413,))

    async def half_sent(self, prompt):
        """A body that ends before it should: with the connection, or with this side of it."""
        body = prompt.body()
        async with Connection(self.place) as connection:
            connection.writer.write(connection.head("POST", "/v1/chat/completions", len(body)))
            connection.writer.write(body[: self.rng.randrange(0, len(body))])
            await connection.writer.drain()
            await asyncio.sleep(self.rng.uniform(0, 1))
            if self.rng.random() < 0.5:
                try:
                    connection.writer.write_eof()
                    reply = await connection.read()
                    check_error(reply, (400,))
                    self.statuses[reply.status] += 1
                    return
                except (EOFError, OSError):
                    # It may as well say nothing to somebody who has hung up.
                    pass
        self.statuses["hung up"] += 1

    async def no_http(self, _prompt):
        async with Connection(self.place) as connection:
            noise = [b"\x16\x03\x01\x02\x00\x01\x00", b"HELO x\r\n\r\n", os.urandom(300) + b"\r\n\r\n"]
            connection.writer.write(self.rng.choice(noise))
            try:
                connection.writer.write_eof()
                await asyncio.wait_for(connection.reader.read(1000), 10)
            except OSError:
                # Closed already.
                pass
        self.statuses["no HTTP"] += 1
