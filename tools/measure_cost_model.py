"""Measure what tools/fit_cost_model.py fits: random batches under several policies, on a GPU.

    python tools/measure_cost_model.py measurements.json [--runs 72] [--seed 0]

Lengths, heads, new tokens and the way of splitting are drawn at random; no batch of the benchmark
is among them on purpose. Times are of CUDA-graph replay, the cache read from memory.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python"))

import mla_decode  # noqa: E402
from mla_decode.measure import decode_us  # noqa: E402
from mla_decode.planning import clusters_of  # noqa: E402
from mla_decode.reference import make_case  # noqa: E402
from mla_decode.words import MAX_ROWS  # noqa: E402

MAX_TOKENS = 600_000  # of one batch: 0.7 GB of cache


def random_batch(rng: random.Random) -> dict[str, Any]:
    """One batch and a policy for it: few and many requests, short and long, even and skewed."""
    batch = round(2 ** rng.uniform(0, 7.5))
    mean = min(2 ** rng.uniform(8, 16), MAX_TOKENS / batch)
    sigma = rng.choice([0.0, 0.5, 1.0])
    lengths = [max(4, round(mean * rng.lognormvariate(-sigma * sigma / 2, sigma)))] * batch
    if sigma > 0:
        lengths = [max(4, round(mean * rng.lognormvariate(0, sigma))) for _ in range(batch)]
    policy = rng.choice(["balanced", "balanced", "unsplit", "fixed", "fixed"])
    return {
        "seq_lens": lengths,
        "num_heads": rng.choice([8, 16, 16, 32, 64, 128]),
        "new_tokens": rng.choice([1, 1, 2, 4]),
        "policy": policy,
        "split_tiles": rng.choice([1, 2, 4, 8, 16, 32]) if policy == "fixed" else 0,
    }


def measure(run: dict[str, Any]) -> dict[str, Any]:
    """Return ``run`` with its microseconds. Its queue is that of the device's present model."""
    case = make_case(
        run["seq_lens"], run["num_heads"], run["new_tokens"], device="cuda", poison=False
    )
    plan = mla_decode.plan(
        run["seq_lens"],
        run["num_heads"],
        run["new_tokens"],
        policy=run["policy"],
        split_tiles=run["split_tiles"],
        group_rows=MAX_ROWS,  # the fit plans like that
    )
    return run | {"us": decode_us(case, plan, replays=10)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("measure_cost_model: no CUDA GPU", file=sys.stderr)
        return 2
    rng = random.Random(arguments.seed)
    runs = []
    for index in range(arguments.runs):
        runs.append(measure(random_batch(rng)))
        torch.cuda.empty_cache()  # each graph keeps memory of its own
        print(f"\r{index + 1}/{arguments.runs}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    document = {
        "device": properties.name,
        "num_workers": properties.multi_processor_count,
        "clusters": clusters_of(device),
        "runs": runs,
    }
    arguments.output.write_text(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
