"""Measure what cost models are fitted to: plans of random batches, side by side, on a GPU.

    python tools/measure_cost_model.py measurements.json [--seconds 180] [--seed 0]

Each batch is planned under the present model and under some with other constants, with clusters
and without, in row groups of all sizes that the planner considers: plans among which a model has to
choose. They are timed as the benchmark times implementations, outputs checked. Every third batch
has requests of one length, which the benchmark's random ones seldom have. No named shape is drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import mla_decode  # noqa: E402
from mla_decode import cost  # noqa: E402
from mla_decode.planning import clusters_of  # noqa: E402
from mla_decode.row_groups import count_groups  # noqa: E402
from mla_decode.words import GROUP_ROWS  # noqa: E402

from benchmarks.implementations import mla_decode_by  # noqa: E402
from benchmarks.shapes import SHAPES, Shape, random_shapes  # noqa: E402
from tools.side_by_side import is_worth_planning, times_of  # noqa: E402

REPLAYS = 8
SECONDS_BETWEEN_WRITES = 20.0  # of what has been measured until then
BATCHES_OF_A_SEED = 60
OTHER_MODELS = 2  # for each size of row groups
SPREAD = 0.4  # of the logarithms of their constants
# What plans of partials, mates and reductions say nothing about, or what is known otherwise.
KNOWN = ("instruction_us", "adopt_fixed_us", "adopt_kib_us", "partial_tile_us")


def even_shape(rng: random.Random) -> Shape:
    """One batch of requests of one length."""
    batch = rng.choice([round(2 ** rng.uniform(0, 7.7)), rng.choice([32, 64, 96, 128, 132])])
    length = rng.choice([2 ** rng.randint(8, 15), round(2 ** rng.uniform(7, 15.5))])
    tokens, heads = rng.choice([1, 1, 2, 3, 4]), rng.choice([8, 16, 16, 32, 64, 128])
    return Shape(f"even_B{batch}_{length}_q{tokens}_h{heads}", (length,) * batch, tokens, heads)


def is_named(shape: Shape) -> bool:
    """Whether it is a shape of the benchmark by another name: nothing is fitted to those."""
    return replace(shape, name="") in {replace(named, name="") for named in SHAPES.values()}


def batches(seed: int) -> Iterator[Shape]:
    """Yield batches without end, other ones for every seed."""
    while True:
        rng = random.Random(seed)
        for index, shape in enumerate(random_shapes(BATCHES_OF_A_SEED, seed)):
            for each in (shape, even_shape(rng)) if index % 2 else (shape,):
                if not each.is_mixed and is_worth_planning(each) and not is_named(each):
                    yield each
        seed += 1


def other_model(model: cost.CostModel, rng: random.Random) -> cost.CostModel:
    """Return the model with constants that are larger or smaller by chance."""
    return cost.CostModel.from_dict(
        {
            name: us if name in KNOWN else us * math.exp(rng.gauss(0.0, SPREAD))
            for name, us in model.as_dict().items()
        }
    )


def ways_to_plan(
    shape: Shape, num_workers: int, device: str, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Yield arguments of `mla_decode.plan`: sizes of row groups, models, with clusters or not."""
    rows = shape.num_heads * max(shape.tokens)
    for size in GROUP_ROWS:
        groups = count_groups(np.full(len(shape.seq_lens), rows), size)
        if size < min(rows, max(GROUP_ROWS)) and 2 * groups > num_workers:
            continue  # the planner would not either
        if size > min(GROUP_ROWS) and rows <= size // 2:
            continue  # the same as with smaller ones
        model = cost.load(device, size)
        yield {"group_rows": size, "cost_model": model}
        yield {"group_rows": size, "cost_model": model, "clusters": False}
        for _ in range(OTHER_MODELS):
            yield {"group_rows": size, "cost_model": other_model(model, rng)}


def measure(
    shape: Shape, num_workers: int, device: str, rng: random.Random
) -> list[dict[str, Any]]:
    """Return a run for each plan of the batch that differs from the others."""
    ways: dict[bytes, dict[str, Any]] = {}
    plans: dict[str, mla_decode.Plan] = {}
    for way in ways_to_plan(shape, num_workers, device, rng):
        plan = mla_decode.plan(list(shape.seq_lens), shape.num_heads, shape.new_tokens, **way)
        queue = plan.instructions.tobytes() + bytes([plan.group_rows])
        if ways.setdefault(queue, way) is way:
            plans[str(len(plans))] = plan
    prepare = {name: partial(mla_decode_by, plan) for name, plan in plans.items()}
    times = times_of(shape, prepare, REPLAYS)
    return [
        {
            "batch": shape.name,
            "seq_lens": list(shape.seq_lens),
            "num_heads": shape.num_heads,
            "new_tokens": shape.new_tokens,
            "group_rows": way["group_rows"],
            "shares": way.get("clusters", True),
            "planned_by": way["cost_model"].as_dict(),
            "us": statistics.median(times[name]),
        }
        for name, way in zip(plans, ways.values(), strict=True)
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("measure_cost_model: no CUDA GPU", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    num_workers = properties.multi_processor_count
    rng = random.Random(arguments.seed)
    runs: list[dict[str, Any]] = []
    document = {
        "device": properties.name,
        "num_workers": num_workers,
        "clusters": clusters_of(device),
        "runs": runs,
    }
    written = time.monotonic()
    end = written + arguments.seconds
    for shape in batches(arguments.seed):
        if time.monotonic() > end:
            break
        runs += measure(shape, num_workers, properties.name, rng)
        print(f"\r{len(runs)} runs", end="", file=sys.stderr, flush=True)
        if time.monotonic() > written + SECONDS_BETWEEN_WRITES:
            arguments.output.write_text(json.dumps(document), encoding="utf-8")
            written = time.monotonic()
    arguments.output.write_text(json.dumps(document), encoding="utf-8")
    print(file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
