"""Compare constants of the cost model by the times of the plans that they lead to, on a GPU.

    python tools/compare_cost_models.py wide mates_fixed_us=0.2 mates_fixed_us=0.2,mates_kib_us=0.02
    python tools/compare_cost_models.py all fitted.json

A fit to times of whole runs does not tell terms apart that come together; what a model is for is
choosing plans. Random batches of one kind of kernels are planned under the present model and
under each variant of it; the plans that differ are timed side by side, replay by replay. Constants
chosen by some seeds want to be confirmed by others. With ``all`` variants are files of constants,
and batches of all kinds are planned as users have them, the size of row groups left to the planner.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

import mla_decode  # noqa: E402
from mla_decode import cost  # noqa: E402

from benchmarks.implementations import mla_decode_by  # noqa: E402
from benchmarks.shapes import Shape, random_shapes  # noqa: E402
from tools.side_by_side import Gain, is_worth_planning, note_gains, times_of  # noqa: E402

PRESENT = "present"
ALL = "all"
MODEL_FILE = "MLA_DECODE_COST_MODEL"  # environment variable, see mla_decode.cost.load
Model = cost.CostModel | Path | None  # of one kind of kernels; of all, or those of the device


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
    """Return those of ``count`` random batches that a kernel of this kind runs, or any of them."""
    return [
        shape
        for shape in random_shapes(count, seed)
        if kind in (ALL, cost.kernel_of(shape.num_heads * max(shape.tokens)))
        and is_worth_planning(shape)
    ]


@contextmanager
def model_file(path: Path) -> Iterator[None]:
    """Let plans be made by the models of a file."""
    before = os.environ.get(MODEL_FILE)
    os.environ[MODEL_FILE] = str(path)
    try:
        yield
    finally:
        if before is None:
            del os.environ[MODEL_FILE]
        else:
            os.environ[MODEL_FILE] = before


def plan_under(shape: Shape, model: Model) -> mla_decode.Plan:
    """Plan with constants, in groups of 64 rows, or by models of all kinds, as users have it."""
    new_tokens = list(shape.tokens) if shape.is_mixed else shape.new_tokens
    if isinstance(model, cost.CostModel):
        return mla_decode.plan(list(shape.seq_lens), shape.num_heads, new_tokens, cost_model=model)
    if model is None:
        return mla_decode.plan(list(shape.seq_lens), shape.num_heads, new_tokens)
    with model_file(model):
        return mla_decode.plan(list(shape.seq_lens), shape.num_heads, new_tokens)


def plans_of(shape: Shape, models: Mapping[str, Model]) -> dict[str, mla_decode.Plan]:
    """Return the plan under each model; the same object where plans are the same."""
    seen: dict[tuple[int, bytes], mla_decode.Plan] = {}
    plans = {}
    for name, model in models.items():
        plan = plan_under(shape, model)
        plans[name] = seen.setdefault((plan.group_rows, plan.instructions.tobytes()), plan)
    return plans


def compare(shapes: list[Shape], models: Mapping[str, Model], replays: int) -> dict[str, Gain]:
    """Time the plans of each batch that differ; print a line for each and return the gains.

    Plans that are the same are timed once.
    """
    gains = {name: Gain() for name in models if name != PRESENT}
    for shape in shapes:
        plans = plans_of(shape, models)
        names = {id(plan): name for name, plan in reversed(plans.items())}
        if len(names) == 1:
            continue
        prepare = {names[id(plan)]: partial(mla_decode_by, plan) for plan in plans.values()}
        times = times_of(shape, prepare, replays)
        by_model = {
            name: times[names[id(plan)]]
            for name, plan in plans.items()
            if name == PRESENT or plan is not plans[PRESENT]
        }
        note_gains(shape, by_model, PRESENT, gains)
    return gains


def models_to_compare(kind: str, variants: list[str], device: str) -> dict[str, Model]:
    """Return the present model and the variants, which are constants, or files where kind is all.

    Raises
    ------
    ValueError
        For what is no constant, or no file.
    """
    if kind != ALL:
        present = cost.load(device, cost.KERNELS[kind])
        return {PRESENT: present} | {text: variant(present, text) for text in variants}
    files = {text: Path(text) for text in variants}
    for text, path in files.items():
        if not path.is_file():
            raise ValueError(f"{text}: expected a file of constants, as {ALL} kinds are compared")
    return {PRESENT: None} | files


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=[*cost.KERNELS, ALL])
    parser.add_argument("variants", nargs="+", metavar="NAME=US[,NAME=US...] or FILE")
    parser.add_argument("--batches", type=int, default=48, help="drawn, of all kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replays", type=int, default=11)
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("compare_cost_models: no CUDA GPU", file=sys.stderr)
        return 2
    try:
        models = models_to_compare(arguments.kind, arguments.variants, torch.cuda.get_device_name())
    except ValueError as error:
        parser.error(str(error))
    shapes = batches(arguments.kind, arguments.batches, arguments.seed)
    for name, gain in compare(shapes, models, arguments.replays).items():
        print(f"{name}: {gain}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
