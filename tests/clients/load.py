#!/usr/bin/env python3
"""Loads a running server with many clients of every kind, then ten times as many at once; checks that it stays sound.

    load.py http://127.0.0.1:8000 --pid PID [--seconds 600] [--streams 64] [--overload 640] [--seed 1]

Standard library only; the server runs on this machine without keys, on the nano artifact or another small model.
Clients read fast, slowly or not to the end, and send requests that are no good. The same prompts alone give the
tokens that they must give in company. Prints a line a check; exits with 1 if one failed. The figures include what
this program itself takes of the machine.
"""

import argparse
import asyncio
import collections
import json
import os
import random
import resource
import sys
import time
import urllib.parse

sys.dont_write_bytecode = True
from kinds import WORDS, Kinds, Prompt, prompts  # noqa: E402
from raw import Connection, Fault, check_error, streamed_tokens  # noqa: E402

# Of memory, what a run may leave behind.
RSS_MB_MAX = 64
# A refusal must come within.
REFUSED_S_MAX = 1.0
# Longest that any request may take: all of an overload, one after another.
ANSWER_S_MAX = 600
# Threads for work that blocks end when they had nothing to do for ten seconds.
SETTLE_S_MAX = 20
# Files that may be open more than before: none of ours, but a connection may just be closing.
FILES_MORE_MAX = 2


class Load(Kinds):
    # How often what happens.
    MIX = (
        [("steady", 40), ("whole", 10), ("cancelled", 22), ("slow", 8), ("bad_json", 4), ("bad_types", 4), ("bad_path", 2)]
        + [("bad_model", 1), ("too_long", 2), ("too_large", 2), ("half_sent", 4), ("no_http", 1)]
    )

    def __init__(self, place, pid, context, rng):
        self.place, self.pid, self.context, self.rng = place, pid, context, rng
        self.prompts = prompts(24, rng)
        self.faults = []
        self.forget()

    def forget(self):
        """All figures so far; not the faults."""
        self.statuses = collections.Counter()
        self.gaps, self.first, self.looks, self.held_s = [], [], [], []
        self.most = collections.Counter()

    async def one(self):
        names, weights = zip(*self.MIX)
        kind = self.rng.choices(names, weights)[0]
        await self.guarded(kind, getattr(self, kind)(self.rng.choice(self.prompts)))

    async def guarded(self, kind, doing):
        try:
            await asyncio.wait_for(doing, ANSWER_S_MAX)
        except Exception as error:
            self.faults.append(f"{kind}: {type(error).__name__}: {error}")

    async def client(self, until):
        while time.monotonic() < until:
            await self.one()

    async def look(self, interval, until):
        """Whoever watches over the server is answered at any time."""
        while time.monotonic() < until:
            began = time.monotonic()
            try:
                gauges = await asyncio.wait_for(self.metrics(), 30)
                for name in ("num_requests_running", "num_requests_waiting", "kv_cache_tokens"):
                    self.most[name] = max(self.most[name], int(gauges[name]))
                self.looks.append(time.monotonic() - began)
            except Exception as error:
                self.faults.append(f"metrics: {type(error).__name__}: {error}")
            await asyncio.sleep(interval)

    async def held(self, start, until):
        """Sends the beginning of a request, then nothing; whoever does that is in nobody's way."""
        async with Connection(self.place) as connection:
            connection.writer.write(start)
            await connection.writer.drain()
            try:
                await asyncio.wait_for(connection.reader.read(1), until - time.monotonic())
                self.held_s.append(time.monotonic() - connection.began)
            except TimeoutError:
                pass

    async def run(self, streams, seconds):
        until = time.monotonic() + seconds
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
        holding = [self.held(start, until) for start in (b"", b"POST /v1", head, head + b"\r\n{") for _ in range(2)]
        clients = [self.client(until) for _ in range(streams)]
        await asyncio.gather(*clients, *holding, self.look(0.5, until))

    async def get(self, path):
        async with Connection(self.place) as connection:
            await connection.send("GET", path)
            reply = await connection.read()
            if reply.status != 200:
                raise Fault(f"{path}: status {reply.status}")
            return reply.body.decode()

    async def metrics(self):
        lines = (line.rsplit(" ", 1) for line in (await self.get("/metrics")).splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    # The process.

    def process(self):
        with open(f"/proc/{self.pid}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return {
            "rss_mb": int(fields["VmRSS"].split()[0]) / 1024,
            "threads": int(fields["Threads"]),
            "files": len(os.listdir(f"/proc/{self.pid}/fd")),
        }

    async def settled(self):
        """The process once its gauges are zero and its threads and files have not changed for a while."""
        until = time.monotonic() + SETTLE_S_MAX
        last, since = None, time.monotonic()
        while time.monotonic() < until:
            await asyncio.sleep(0.5)
            now = self.process()
            now = (now["threads"], now["files"])
            if now != last:
                last, since = now, time.monotonic()
            if time.monotonic() - since > 12:
                break
        gauges = await self.metrics()
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_tokens")
        return self.process() | {name: int(gauges[name]) for name in names}

    async def overload(self, count):
        """All at once: refused, or answered as if there were nobody else. Seconds to each refusal, and to each end."""
        refusals, finished = [], []

        async def one(prompt):
            async with Connection(self.place) as connection:
                await connection.send("POST", "/v1/chat/completions", prompt.stream())
                reply = await connection.read()
                self.statuses[reply.status] += 1
                if reply.status != 429:
                    prompt.check(streamed_tokens(reply))
                    finished.append(time.monotonic() - connection.began)
                    return
                refusals.append(reply.status_s)
                check_error(reply, (429,))
                if int(reply.headers.get("retry-after", 0)) < 1:
                    raise Fault(f"refused without Retry-After: {reply.headers}")

        watch = asyncio.create_task(self.look(0.5, float("inf")))
        chosen = self.rng.choices(self.prompts, k=count)
        await asyncio.gather(*(self.guarded("overload", one(prompt)) for prompt in chosen))
        watch.cancel()
        return refusals, finished

    async def flood(self, count):
        """All at once with long prompts; those that are accepted hang up. Seconds to each refusal."""
        refusals = []
        text = " ".join(self.rng.choices(WORDS, k=self.context * 6 // 10))
        body = Prompt([{"role": "user", "content": text}], max_tokens=4).stream()

        async def one():
            async with Connection(self.place) as connection:
                await connection.send("POST", "/v1/chat/completions", body)
                reply = await connection.read(pieces_max=1)
                self.statuses[reply.status] += 1
                if reply.status == 429:
                    refusals.append(reply.status_s)
                elif reply.status != 200:
                    raise Fault(f"status {reply.status}: {reply.body[:300]!r}")

        await asyncio.gather(*(self.guarded("flood", one()) for _ in range(count)))
        return refusals


def quantiles(seconds):
    seconds = sorted(seconds)
    if not seconds:
        return "none"
    at = lambda part: seconds[min(len(seconds) - 1, int(part * len(seconds)))] * 1e3
    return f"p50 {at(0.5):.0f} p99 {at(0.99):.0f} max {at(1):.0f} ms"


class Report:
    def __init__(self):
        self.failed = 0

    def check(self, name, good, figures):
        self.failed += not good
        print(f"{'PASS' if good else 'FAIL'} {name}: {figures}", flush=True)

    def faults(self, name, faults, figures):
        self.check(name, not faults, figures)
        for fault, count in collections.Counter(faults).most_common(10):
            print(f"     {count} x {fault}", flush=True)

    def process(self, name, before, after):
        for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_tokens"):
            self.check(f"{name}: {gauge}", after[gauge] == 0, f"{after[gauge]} at rest")
        grown = after["rss_mb"] - before["rss_mb"]
        figures = f"{before['rss_mb']:.0f} MB before, {after['rss_mb']:.0f} MB after"
        self.check(f"{name}: memory", grown <= RSS_MB_MAX, figures)
        figures = f"{before['threads']} before, {after['threads']} after"
        self.check(f"{name}: threads", after["threads"] <= before["threads"], figures)
        figures = f"{before['files']} before, {after['files']} after"
        self.check(f"{name}: open files", after["files"] <= before["files"] + FILES_MORE_MAX, figures)




async def check(given, report):
    url = urllib.parse.urlsplit(given.url)
    place = (url.hostname, url.port or 80)
    load = Load(place, given.pid, 0, random.Random(given.seed))
    model = json.loads(await load.get("/v1/models"))["data"][0]
    load.context = model["max_model_len"]
    print(f"seed {given.seed}, {model['id']} with {load.context} tokens of context, process {given.pid}", flush=True)

    began = time.monotonic()
    for prompt in load.prompts:
        async with Connection(place) as connection:
            await connection.send("POST", "/v1/chat/completions", prompt.stream())
            prompt.alone = streamed_tokens(await connection.read())
    tokens = sum(len(prompt.alone) for prompt in load.prompts)
    print(f"alone: {len(load.prompts)} prompts, {tokens} tokens in {time.monotonic() - began:.1f} s", flush=True)

    warm_s = max(15, given.seconds / 10)
    await load.run(given.streams, warm_s)
    before = await load.settled()
    print(f"warmed up for {warm_s:.0f} s: {before}", flush=True)
    load.forget()

    await load.run(given.streams, given.seconds)
    name = f"{given.streams} streams for {given.seconds:.0f} s"
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(load.statuses.items(), key=str))
    report.faults(f"{name}: answers", load.faults, f"{len(load.faults)} faults; {statuses}")
    report.check(f"{name}: gaps between a stream's chunks", bool(load.gaps), quantiles(load.gaps))
    report.check(f"{name}: first chunk, queue included", bool(load.first), quantiles(load.first))
    report.check(f"{name}: /metrics", bool(load.looks), f"{quantiles(load.looks)}; at most {dict(load.most)}")
    closed = ", ".join(f"{s:.0f}" for s in load.held_s) or "none"
    print(f"     half a request, then nothing: closed after s: {closed} (of 8)", flush=True)
    report.process(name, before, await load.settled())

    load.forget()
    load.faults = []
    began = time.monotonic()
    refusals, finished = await load.overload(given.overload)
    seconds = time.monotonic() - began
    name = f"{given.overload} at once"
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(load.statuses.items()))
    report.faults(f"{name}: answers", load.faults, f"{len(load.faults)} faults in {seconds:.0f} s; {statuses}")
    late = sum(s > REFUSED_S_MAX for s in refusals)
    report.check(f"{name}: refusals", refusals and not late, f"{quantiles(refusals)}; {late} after more than 1 s")
    report.check(f"{name}: finished as alone", bool(finished), f"{len(finished)}, {quantiles(finished)}")
    report.check(f"{name}: /metrics", bool(load.looks), f"{quantiles(load.looks)}; at most {dict(load.most)}")
    report.process(name, before, await load.settled())

    load.forget()
    load.faults = []
    refusals = await load.flood(given.overload)
    name = f"{given.overload} long prompts at once"
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(load.statuses.items()))
    report.faults(f"{name}: answers", load.faults, f"{len(load.faults)} faults; {statuses}")
    late = sum(s > REFUSED_S_MAX for s in refusals)
    report.check(f"{name}: refusals", refusals and not late, f"{quantiles(refusals)}; {late} after more than 1 s")
    # The first time the allocator keeps what it took; what grows the second time would grow for ever.
    kept = await load.settled()
    await load.flood(given.overload)
    report.process(f"{name}, again", kept, await load.settled())
    with open(f"/proc/{given.pid}/status") as file:
        most = next(line.split()[1] for line in file if line.startswith("VmHWM"))
    print(f"     memory: {before['rss_mb']:.0f} MB before the first of these, {int(most) // 1024} MB at most", flush=True)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("url")
    arguments.add_argument("--pid", type=int, required=True, help="the server's process")
    arguments.add_argument("--seconds", type=float, default=600)
    arguments.add_argument("--streams", type=int, default=64)
    arguments.add_argument("--overload", type=int, default=640, help="more than running and waiting ones together")
    arguments.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    given = arguments.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    report = Report()
    asyncio.run(check(given, report))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
