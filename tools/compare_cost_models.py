"""Compare constants of the cost model by the times of the plans that they lead to, on a GPU.

    python tools/compare_cost_models.py wide mates_fixed_us=0.2 mates_fixed_us=0.2,mates_kib_us=0.02

A fit to times of whole runs does not tell terms apart that come together; what a model is for is
choosing plans. Random batches of one kind of kernels are planned under the present model and
under each variant of it; the plans that differ are timed side by side, replay by replay. Constants
chosen by some seeds want to be confirmed by others.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import mla_decode  # noqa: E402
from mla_decode import cost  # noqa: E402
from mla_decode.words import KV_TILE  # noqa: E402

from benchmarks.implementations import mla_decode_by  # noqa: E402
from benchmarks.measure import measure  # noqa: E402
from benchmarks.shapes import Shape, random_shapes  # noqa: E402

PRESENT = "present"
MIN_TILES, MAX_TILES = 4, 6000  # of a batch: below there is nothing to cut, above little to gain


@dataclass
class Gain:
    """Of one variant: times under the present model over times under it, batch by batch."""

    ratios: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.ratios:
            return "no plan differs"
        mean = math.exp(statistics.fmean(map(math.log, self.ratios)))
        low, high = min(self.ratios), max(self.ratios)
        return f"{len(self.ratios)} plans differ: {mean:.4f}, worst {low:.3f}, best {high:.3f}"


def variant(model: cost.CostModel, changes: str) -> cost.CostModel:
    """Return the model with ``name=us,...`` changed; raises ValueError for what is no constant."""
    constants = model.as_dict()
    for change in changes.split(","):
        name, _, value = change.partition("=")
        if name not in constants:
            raise ValueError(f"{changes}: expected constants of {sorted(constants)}, got {name!r}")
        constants[name] = float(value)
    return cost.CostModel.from_dict(constants)


def batches(kind: str, count: int, seed: int) -> list[Shape]:
    """Return those of ``count`` random batches that a kernel of this kind runs."""
    return [
        shape
        for shape in random_shapes(count, seed)
        if cost.kernel_of(shape.num_heads * max(shape.tokens)) == kind
        and MIN_TILES <= sum(-(-length // KV_TILE) for length in shape.seq_lens) <= MAX_TILES
    ]


def plans_of(shape: Shape, models: dict[str, cost.CostModel]) -> dict[str, mla_decode.Plan]:
    """Return the plan under each model; the same object where plans are the same."""
    seen: dict[bytes, mla_decode.Plan] = {}
    plans = {}
    for name, model in models.items():
        plan = mla_decode.plan(
            list(shape.seq_lens), shape.num_heads, shape.new_tokens, cost_model=model
        )
        plans[name] = seen.setdefault(plan.instructions.tobytes(), plan)
    return plans


def times_of(
    shape: Shape, plans: dict[str, mla_decode.Plan], replays: int
) -> dict[str, list[float]]:
    """Return microseconds of each replay, by the name of the model; RuntimeError if one is wrong.

    As the benchmark measures implementations: keys read from memory, replays that alternate,
    outputs checked. Plans that are the same are timed once.
    """
    names = {id(plan): name for name, plan in reversed(plans.items())}
    distinct = {names[id(plan)]: plan for plan in plans.values()}
    prepare = {name: partial(mla_decode_by, plan) for name, plan in distinct.items()}
    rows = measure(shape, list(distinct), replays=replays, prepare=prepare)
    for row in rows:
        if row.error:
            raise RuntimeError(f"{shape.name}, {row.impl}: {row.error}")
    torch.cuda.empty_cache()  # each graph keeps memory of its own
    us = {row.impl: row.replays_us for row in rows}
    return {name: us[names[id(plan)]] for name, plan in plans.items()}


def compare(
    shapes: list[Shape], models: dict[str, cost.CostModel], replays: int
) -> dict[str, Gain]:
    """Time the plans of each batch that differ; print a line for each and return the gains."""
    gains = {name: Gain() for name in models if name != PRESENT}
    for shape in shapes:
        plans = plans_of(shape, models)
        if len({id(plan) for plan in plans.values()}) == 1:
            continue
        times = times_of(shape, plans, replays)
        line: dict[str, float] = {}
        for name, gain in gains.items():
            if plans[name] is plans[PRESENT]:
                continue
            pairs = zip(times[PRESENT], times[name], strict=True)
            line[name] = statistics.median(before / after for before, after in pairs)
            gain.ratios.append(line[name])
        shown = "; ".join(f"{name} {ratio:.3f}" for name, ratio in line.items())
        print(f"{shape.name}: {statistics.median(times[PRESENT]):.1f} us; {shown}", flush=True)
    return gains


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=list(cost.KERNELS))
    parser.add_argument("variants", nargs="+", metavar="NAME=US[,NAME=US...]")
    parser.add_argument("--batches", type=int, default=48, help="drawn, of all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replays", type=int, default=11)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("compare_cost_models: no CUDA GPU", file=sys.stderr)
        return 2
    present = cost.load(torch.cuda.get_device_name(), cost.KERNELS[arguments.kind])
    models = {PRESENT: present} | {text: variant(present, text) for text in arguments.variants}
    shapes = batches(arguments.kind, arguments.batches, arguments.seed)
    for name, gain in compare(shapes, models, arguments.replays).items():
        print(f"{name}: {gain}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
