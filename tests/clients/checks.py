"""What the scripts that ask through a package share: a list of checks, run against one server, a line each."""

import argparse
import sys
import traceback

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def same(found, expected, what):
    assert found == expected, f"{what}: found {found!r}, expected {expected!r}"


def run(description, connect):
    """Runs all checks on what `connect(url, key, tokens)` gives; ends the program, with 1 if one failed."""
    arguments = argparse.ArgumentParser(description=description.splitlines()[0])
    arguments.add_argument("url")
    arguments.add_argument("--api-key")
    arguments.add_argument("--tokens", type=int, default=24)
    given = arguments.parse_args()
    server = connect(given.url, given.api_key, given.tokens)
    failed = 0
    for function in CHECKS:
        try:
            note = function(server)
            print(f"PASS {function.__name__}" + (f" ({note})" if note else ""), flush=True)
        except Exception:
            failed += 1
            print(f"FAIL {function.__name__}\n{traceback.format_exc()}", flush=True)
    print(f"{len(CHECKS) - failed} of {len(CHECKS)} passed")
    sys.exit(1 if failed else 0)
