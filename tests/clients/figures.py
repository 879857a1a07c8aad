#!/usr/bin/env python3
"""Reads what a client wrote, checks it, and prints the figure that matters; exits with 1 and the reason otherwise.

    figures.py llama-benchy RESULT.json
    figures.py tool-eval-bench RESULT.json
    figures.py spec-bench REPORT.md METRICS_BEFORE METRICS_AFTER
    figures.py lm-eval GENERATE.json CHOOSE.json
    figures.py aiperf EXPORT.json
"""

import json
import pathlib
import re
import sys

# How a scenario fails that says something about the server and nothing about the model.
INFRASTRUCTURE = {"timeout", "connection_error", "server_error"}
# Right answers of the nano model, whose own reference gives all.
RIGHT_MIN = 0.8
# The counters and what a client works out of the replies are rounded to a tenth of a percent.
RATE_ERROR_MAX = 0.001


def same(found, expected, what):
    if found != expected:
        sys.exit(f"{what}: found {found!r}, expected {expected!r}")


def read(path):
    return json.loads(pathlib.Path(path).read_text())


def llama_benchy(path):
    result = read(path)
    figures = []
    for run in result["benchmarks"]:
        place = f"d{run['context_size']} c{run['concurrency']}" + (" load" if run["is_context_prefill_phase"] else "")
        decode, first = run["tg_throughput"]["mean"], run["e2e_ttft"]["mean"]
        if not (decode > 0 and first > 0):
            sys.exit(f"{place}: no speed: {run}")
        # One time to the first answer and one speed a request: with --exact-tg none may end early.
        same(len(run["e2e_ttft"]["values"]) % run["concurrency"], 0, f"{place}: requests")
        figures.append(f"{place} tg {decode:.0f}/s ttft {first:.0f} ms")
    first_pp = result["benchmarks"][0]
    expected = first_pp["prompt_size"] / first_pp["e2e_ttft"]["mean"] * 1e3
    # The client takes the first chunk of any kind for the end of the prompt.
    if first_pp["pp_throughput"]["mean"] > 3 * expected:
        figures.append(
            f"prefill speed is no measurement: {first_pp['pp_throughput']['mean']:.0f}/s, by the first token {expected:.0f}/s"
        )
    print("; ".join(figures))


def tool_eval_bench(path):
    result = read(path)
    same(result["status"], "completed", "status")
    scenarios = result["scores"]["scenario_results"]
    same(len(scenarios), result["total_scenarios"], "scenarios")
    # tool_choice "required" is refused here, and the scenario about it left out by the client itself.
    asked = [s for s in scenarios if "tool_choice" not in s.get("diagnostics", {})]
    broken = [s["scenario_id"] for s in asked if s.get("failure_kind") in INFRASTRUCTURE]
    same(broken, [], "scenarios that failed because of the server")
    same([s["scenario_id"] for s in asked if not s.get("completion_tokens")], [], "scenarios without an answer")
    calls = sum(len(s["tool_calls_made"]) for s in scenarios)
    tokens = sum(s.get("total_tokens", 0) for s in asked)
    print(f"{len(asked)} scenarios, {calls} tool calls, {tokens} tokens, score {result['final_score']}")


def counters(path):
    lines = pathlib.Path(path).read_text().split("\n")
    found = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in found}


def spec_bench(path, before, after):
    report = pathlib.Path(path).read_text()
    before, after = counters(before), counters(after)

    def grown(name):
        found = [key for key in after if key.split("{")[0] == name]
        return [after[key] - before.get(key, 0) for key in found]

    steps, drafted, accepted = (
        sum(grown(f"spec_decode_num_{name}_total")) for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    if not drafted:
        sys.exit("nothing was drafted: the server needs --draft")
    source = re.search(r"Acceptance Source\*\*: (.*)", report)
    same(source and source[1], "per-request response metrics (exact)", "acceptance source")
    # By place in the draft, as the client sums it over the replies and as the server counts it.
    told = [float(rate) / 100 for rate in re.findall(r"^\| \d+ \| ([0-9.]+)% \|$", report, re.M)]
    reached, counted = steps, []
    for hits in grown("spec_decode_num_accepted_tokens_per_pos_total"):
        counted.append((hits, reached))
        reached = hits
    # A place is reached less often where a draft was shorter: the client knows how long each was, the counters do not.
    if abs(told[0] - counted[0][0] / counted[0][1]) > RATE_ERROR_MAX:
        sys.exit(f"accepted at place 0: the client found {told}, the counters say {counted}")
    same(sum(hits for hits, _ in counted), accepted, "accepted drafts by place, all together")
    places = ", ".join(f"{rate:.1%}" for rate in told)
    print(f"{accepted:.0f} of {drafted:.0f} drafts accepted in {steps:.0f} steps; by place {places}")


def lm_eval(generate, choose):
    generated = read(generate)["results"]["nano_generate"]["exact_match,none"]
    chosen = read(choose)["results"]["nano_choose"]["acc,none"]
    if min(generated, chosen) < RIGHT_MIN:
        sys.exit(f"exact_match {generated}, acc {chosen}: expected at least {RIGHT_MIN}")
    print(f"generated answers right {generated:.0%}, likeliest continuation right {chosen:.0%}")


def aiperf(path):
    result = read(path)
    same((result["is_complete"], result["was_cancelled"], result["error_summary"]), (True, False, []), "run")
    same(result["request_error_rate"]["avg"], 0.0, "request error rate")
    first, rate = result["time_to_first_token"]["avg"], result["output_token_throughput"]["avg"]
    between = result["inter_token_latency"]["avg"]
    count = result["request_count"]["avg"]
    print(f"{count:.0f} requests, ttft {first:.0f} ms, {between:.1f} ms between tokens, {rate:.0f} tokens/s")


def main():
    name, *arguments = sys.argv[1:]
    {f.__name__.replace("_", "-"): f for f in (llama_benchy, tool_eval_bench, spec_bench, lm_eval, aiperf)}[name](*arguments)


if __name__ == "__main__":
    main()
