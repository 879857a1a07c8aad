"""HTTP by hand, for clients that misbehave: one request a connection, read as slowly and as far as one likes."""

import asyncio
import json
import re
import socket
import time

# Of a chunk that has tokens; the first one has none.
TOKENS = re.compile(rb'"token_ids":\[\d')


class Fault(Exception):
    """What the server should not have done."""


class Reply:
    """Of a request: its status, headers and body, and when its pieces came."""

    def __init__(self):
        self.status = None
        self.headers = {}
        self.body = b""
        self.status_s = None
        self.pieces = 0
        # When pieces with tokens came.
        self.token_s = []


class Connection:
    """One request on a connection of its own."""

    def __init__(self, place, slow=False):
        self.place = place
        self.slow = slow
        self.reader = self.writer = None

    async def __aenter__(self):
        sock = socket.socket()
        sock.setblocking(False)
        if self.slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self.place)
            limit = 4096 if self.slow else 1 << 18
            self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=limit)
        except BaseException:
            sock.close()
            raise
        self.began = time.monotonic()
        return self

    async def __aexit__(self, *_):
        # Whatever is not read is of no interest: the server may see a reset.
        self.writer.transport.abort()

    def head(self, method, path, length):
        return (
            f"{method} {path} HTTP/1.1\r\nHost: {self.place[0]}:{self.place[1]}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    async def send(self, method, path, body=b""):
        self.began = time.monotonic()
        self.writer.write(self.head(method, path, len(body)) + body)
        await self.writer.drain()

    async def line(self):
        line = await self.reader.readline()
        if not line.endswith(b"\n"):
            raise EOFError("the connection ended")
        return line.strip()

    async def read_head(self, reply):
        words = (await self.line()).split(b" ", 2)
        if not words[0].startswith(b"HTTP/1.1"):
            raise Fault(f"status line {words!r}")
        reply.status, reply.status_s = int(words[1]), time.monotonic() - self.began
        while line := await self.line():
            name, _, value = line.partition(b":")
            reply.headers[name.decode().lower()] = value.strip().decode()

    async def pieces(self, reply):
        """The body as it comes. A body that ends before it should is an EOFError."""
        if reply.headers.get("transfer-encoding") != "chunked":
            length = int(reply.headers.get("content-length", 0))
            yield await self.reader.readexactly(length)
            return
        while length := int(await self.line(), 16):
            yield (await self.reader.readexactly(length + 2))[:-2]
        await self.line()

    async def read(self, pause=None, pieces_max=None):
        """The reply; with `pause` seconds before every piece, up to `pieces_max`."""
        reply = Reply()
        await self.read_head(reply)
        async for piece in self.pieces(reply):
            reply.pieces += 1
            reply.body += piece
            if TOKENS.search(piece):
                reply.token_s.append(time.monotonic())
            if pause:
                await asyncio.sleep(pause)
            if pieces_max and reply.pieces >= pieces_max:
                break
        return reply


def documents(reply):
    """Of a stream that was read to its end."""
    lines = reply.body.decode().split("\n\n")
    found = [line.removeprefix("data: ") for line in lines if line and not line.startswith(":")]
    if not found or found[-1] != "[DONE]":
        raise Fault(f"a stream without its end: …{reply.body[-200:]!r}")
    return [json.loads(document) for document in found[:-1]]


def streamed_tokens(reply):
    """Ids of a stream, which must agree with itself."""
    if reply.status != 200:
        raise Fault(f"status {reply.status}: {reply.body[:300]!r}")
    chunks = documents(reply)
    tokens, finish = [], None
    for chunk in chunks:
        if "error" in chunk:
            raise Fault(f"error in a stream: {chunk['error']}")
        for choice in chunk["choices"]:
            tokens += choice["token_ids"]
            finish = choice["finish_reason"] or finish
    if finish not in ("stop", "length"):
        raise Fault(f"finish reason {finish!r}")
    if chunks[-1]["usage"]["completion_tokens"] != len(tokens):
        raise Fault(f"usage {chunks[-1]['usage']}, but {len(tokens)} token ids")
    return tokens


def whole_tokens(reply):
    if reply.status != 200:
        raise Fault(f"status {reply.status}: {reply.body[:300]!r}")
    return json.loads(reply.body)["choices"][0]["token_ids"]


def check_error(reply, statuses):
    """A refusal that says why."""
    if reply.status not in statuses:
        raise Fault(f"status {reply.status}, expected {statuses}: {reply.body[:300]!r}")
    error = json.loads(reply.body)["error"]
    if not (error["message"] and error["type"]):
        raise Fault(f"an error that says nothing: {error}")
