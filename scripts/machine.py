"""What every recorded number must come with: commit, machine, date, and how busy the machine was."""

import datetime
import os
import pathlib
import platform
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent


def describe() -> str:
    """Lines of text: commit, processor, memory, kernel, date, load."""
    git = lambda *args: subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    lscpu = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
    field = lambda name: (re.search(rf"^\s*{name}:\s*(.+)$", lscpu, re.M) or [None, "?"])[1]
    model = f"{field('Model name')} (family {field('CPU family')}, model {field('Model')})"
    memory = re.search(r"MemTotal:\s+(\d+)", pathlib.Path("/proc/meminfo").read_text())[1]
    return (
        f"commit   {commit}\n"
        f"machine  {model}, {os.cpu_count()} cores, L3 {field('L3 cache')}, {int(memory) / 2**20:.0f} GiB memory, "
        f"{platform.machine()}, Linux {platform.release()}\n"
        f"date     {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC, "
        f"load before {os.getloadavg()[0]:.1f}"
    )
