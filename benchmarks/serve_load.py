"""Load on `tgq-fast serve`: many clients that ask for neighbours of items, by wrk (https://github.com/wg/wrk).

    python -m benchmarks.serve_load --json docs/results/scale/serving.json

A pool of random rows with codes is served on a loopback port by a process of its own; wrk runs on the same cores. It
must be installed (Debian: wrk). Clients ask once with a pause after each answer, which tells how long an answer takes
under a bearable load, once without, which tells how many answers the server can give, and once more so beside clients
of every hostile kind (`benchmarks.serve_hostile`), each of which must get its own status.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.environment import write_figures
from benchmarks.serve_hostile import KINDS, Hostile
from benchmarks.serving import served
from tgq_fast import ItemPool

__all__ = ["main"]

SCRIPT = """
function setup(thread) thread:set("seed", {seed}) end
function init(args) math.randomseed(seed) end
function request() return wrk.format("GET", "/api/neighbours?k=20&id=item-" .. math.random(0, {last})) end
function done(summary, latency, requests)
  local e = summary.errors
  local errors = e.connect + e.read + e.write + e.status + e.timeout
  local p50, p99, most = latency:percentile(50) / 1000, latency:percentile(99) / 1000, latency.max / 1000
  io.write(string.format("requests=%d errors=%d p50_ms=%.2f p99_ms=%.2f max_ms=%.2f per_second=%.1f\\n",
    summary.requests, errors, p50, p99, most, summary.requests / summary.duration * 1e6))
end
"""
PAUSE = "function delay() return {pause} * (0.5 + math.random()) end\n"


def make_pool(folder: Path, rows: int, dims: int) -> None:
    """Random rows of unit length, with codes."""
    vectors = torch.randn(rows, dims, generator=torch.Generator().manual_seed(0))
    with ItemPool.create(folder, dims=dims) as pool:
        pool.append([f"item-{row}" for row in range(rows)], torch.nn.functional.normalize(vectors, dim=1))
        pool.build_codes()


def load(
    wrk: str, port: int, rows: int, clients: int, seconds: int, seed: int, pause: int, folder: Path
) -> dict[str, float]:
    """One run of the load tool: requests, errors, latency in ms, answers per second.

    Args:
        pause: of a client between an answer and its next request, ms: half to one and a half of it.
    """
    script = folder / "ids.lua"
    text = SCRIPT.format(seed=seed, last=rows - 1)
    script.write_text(text + PAUSE.format(pause=pause) if pause else text)
    command = [wrk, "-t1", f"-c{clients}", f"-d{seconds}s", "--latency", "-s", str(script), f"http://127.0.0.1:{port}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: float(value) for name, value in re.findall(r"(\w+)=([0-9.]+)", said)}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--dims", type=int, default=256)
    options.add_argument("--clients", type=int, default=32)
    options.add_argument("--seconds", type=int, default=15)
    options.add_argument("--runs", type=int, default=3)
    options.add_argument("--pause", type=int, default=135, help="of each client after an answer, ms, in the paced runs")
    options.add_argument("--port", type=int, default=8123)
    options.add_argument("--json", type=Path)
    chosen = options.parse_args()
    wrk = shutil.which("wrk")
    if wrk is None:
        print("error: wrk is not installed (Debian: apt-get install wrk)", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="tgq-serve-load-") as place:
        folder = Path(place)
        make_pool(folder / "pool", chosen.rows, chosen.dims)
        with served(folder / "pool", chosen.port, stderr=subprocess.DEVNULL):
            given = (wrk, chosen.port, chosen.rows, chosen.clients)
            load(*given, 2, 0, 0, folder)  # warm
            seeds = range(1, chosen.runs + 1)
            paced = [load(*given, chosen.seconds, seed, chosen.pause, folder) for seed in seeds]
            runs = [load(*given, chosen.seconds, seed, 0, folder) for seed in seeds]
            hostile = Hostile(chosen.port)
            beside = load(*given, chosen.seconds, 0, 0, folder)
            statuses = hostile.stop()
    for name, several in (("with a pause", paced), ("without", runs), ("beside hostile clients", [beside])):
        for run in several:
            print(name, run)
    print(statuses)
    wrong = [name for name, (_, status) in KINDS.items() if set(statuses[name]) != {status}]
    errors = sum(run["errors"] for run in (*paced, *runs, beside))
    if wrong or errors:
        print(f"error: {errors:g} errors under load; another status than is due: {', '.join(wrong)}", file=sys.stderr)
        return 1
    if chosen.json is not None:
        write_figures(
            chosen.json, pool=[chosen.rows, chosen.dims], clients=chosen.clients, seconds=chosen.seconds,
            pause_ms=chosen.pause, paced=paced, runs=runs, beside_hostile=beside, hostile_got=statuses,
        )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
