"""Fit the constants of a cost model to measurements, through the scheduler's simulation.

    python tools/fit_cost_model.py measurements.json --output scheduler/cost_models/NAME.json

``measurements.json``, which tools/measure_cost_model.py writes, holds the name of the device and a
list of runs::

    {"device": "NVIDIA H200", "num_workers": 132, "clusters": [[2, 66], [8, 15]], "runs": [
        {"batch": "a name", "seq_lens": [65536], "num_heads": 16, "new_tokens": 1,
         "group_rows": 64, "shares": true,          # how it was planned, or
         "planned_by": {"launch_us": 2.1, ...},
         "instructions": [[1, 0, ...], ...],        # the queue that ran, 32 words each
         "us": 28.1,                                # a whole call, and / or
         "timings_us": [[2.0, 21.5], ...]}]}        # start and end of each instruction

A run without ``instructions`` is planned anew, in groups of ``group_rows`` (64), by the constants
``planned_by`` or else by those that the fit starts from, with the device's ``clusters`` unless
``shares`` is false.

Every constant is varied by factors, so it stays positive. The residuals are relative, one per
run for ``us`` and one per instruction for ``timings_us``; the latter weigh as much as the
former together. What the measurements cannot tell stays where it was. With ``--refine`` the models
of all kernels are then moved together so that choosing among the plans of a batch costs less, see
tools/refine_cost_model.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from mla_decode import _scheduler, cost  # noqa: E402
from mla_decode._scheduler import CostModel  # noqa: E402
from mla_decode.words import MAX_ROWS  # noqa: E402

from tools import refine_cost_model  # noqa: E402

Vector = npt.NDArray[np.float64]

# A constant that is off by a factor e costs as much as all runs being off by this much.
# Small enough to bend to any data, large enough to hold what no data moves.
PRIOR_WEIGHT = 1e-3
LOG_STEP = 1e-3  # of the numerical derivative
MAX_ITERATIONS = 50
MAX_LOG_CHANGE = 1.0  # per iteration: a factor e


@dataclass(frozen=True)
class Run:
    """One measured queue."""

    instructions: npt.NDArray[np.int32]
    num_heads: int
    new_tokens: int
    num_workers: int
    us: float | None
    timings_us: Vector | None  # [n, 2]
    group_rows: int = MAX_ROWS
    batch: str = ""

    def simulate(self, cost: CostModel) -> tuple[Vector, Vector, float]:
        """Predict start and end of each instruction and of the whole call, in microseconds."""
        _, start, end, makespan = _scheduler.simulate(
            self.instructions,
            self.num_heads,
            self.new_tokens,
            self.num_workers,
            cost,
            self.group_rows,
        )
        return start, end, makespan

    def residuals(self, cost: CostModel) -> Vector:
        start, end, makespan = self.simulate(cost)
        parts = []
        if self.us is not None:
            parts.append(np.array([makespan / self.us - 1.0]))
        if self.timings_us is not None:
            predicted = np.stack([start, end], axis=1).astype(np.float64)
            scale = self.timings_us.max() * np.sqrt(predicted.size)
            parts.append(((predicted - self.timings_us) / scale).ravel())
        return np.concatenate(parts)


@dataclass(frozen=True)
class Fit:
    cost: CostModel
    rms_before: float  # of the relative error, over the runs
    rms_after: float
    uncertain: list[str]  # constants that the measurements say nothing about


def read_runs(document: dict[str, Any], base: CostModel) -> list[Run]:
    """Parse the measurements; raises ValueError naming the run."""
    runs = []
    clusters = [(int(size), int(count)) for size, count in document.get("clusters", ())]
    for i, entry in enumerate(document["runs"]):
        num_workers = int(entry.get("num_workers", document.get("num_workers", 132)))
        heads, tokens = int(entry["num_heads"]), int(entry["new_tokens"])
        group_rows = int(entry.get("group_rows", MAX_ROWS))
        if "instructions" in entry:
            instructions = np.array(entry["instructions"], dtype=np.int32)
        else:
            planned_by = entry.get("planned_by")
            plan = _scheduler.plan(
                entry["seq_lens"],
                heads,
                tokens,
                num_workers,
                CostModel.from_dict(planned_by) if planned_by else base,
                clusters=clusters if entry.get("shares", True) else [],
                group_rows=group_rows,
            )
            instructions, num_workers = plan.instructions, plan.num_workers
        timings = entry.get("timings_us")
        if timings is not None and np.shape(timings) != (len(instructions), 2):
            raise ValueError(
                f"runs[{i}].timings_us: expected shape [{len(instructions)}, 2], "
                f"got {list(np.shape(timings))}"
            )
        if timings is None and "us" not in entry:
            raise ValueError(f"runs[{i}]: expected 'us' or 'timings_us', got neither")
        us = float(entry["us"]) if "us" in entry else None
        timings_us = None if timings is None else np.array(timings, dtype=np.float64)
        batch = str(entry.get("batch", i))
        runs.append(
            Run(instructions, heads, tokens, num_workers, us, timings_us, group_rows, batch)
        )
    if not runs:
        raise ValueError("runs: expected at least one, got none")
    return runs


def fit(runs: Sequence[Run], base: CostModel, fixed: Sequence[str] = ()) -> Fit:
    """Least squares over the logarithms of the constants (Levenberg-Marquardt).

    Parameters
    ----------
    runs : sequence of Run
    base : CostModel
        Where the fit starts. A constant of 0 stays 0.
    fixed : sequence of str
        Constants to leave alone.
    """
    values = base.as_dict()
    names = [name for name, value in values.items() if value > 0 and name not in fixed]
    origin = np.log([values[name] for name in names])

    def model(logs: Vector) -> CostModel:
        return CostModel.from_dict(values | dict(zip(names, np.exp(logs).tolist(), strict=True)))

    def data_residuals(logs: Vector) -> Vector:
        cost = model(logs)
        residuals_of_all: Vector = np.concatenate([run.residuals(cost) for run in runs])
        residuals_of_all /= np.sqrt(len(runs))
        return residuals_of_all

    def residuals(logs: Vector) -> Vector:
        return np.concatenate([data_residuals(logs), PRIOR_WEIGHT * (logs - origin)])

    def jacobian(logs: Vector) -> Vector:
        steps = LOG_STEP * np.eye(len(logs))
        columns = [(residuals(logs + s) - residuals(logs - s)) / (2 * LOG_STEP) for s in steps]
        return np.stack(columns, axis=1)

    logs = origin.copy()
    current = residuals(logs)
    damping = 1e-3
    for _ in range(MAX_ITERATIONS):
        slope = jacobian(logs)
        normal = slope.T @ slope
        improved = False
        while damping < 1e6 and not improved:
            damped = normal + damping * np.diag(np.diag(normal))
            step = np.linalg.solve(damped, -slope.T @ current)
            step = np.clip(step, -MAX_LOG_CHANGE, MAX_LOG_CHANGE)
            tried = residuals(logs + step)
            improved = bool(tried @ tried < current @ current)
            damping = damping / 3 if improved else damping * 4
        if not improved:
            break
        gain = 1.0 - (tried @ tried) / (current @ current)
        logs, current = logs + step, tried
        if gain < 1e-9:
            break

    sensitivity = np.linalg.norm(jacobian(logs)[: -len(names)], axis=0)
    return Fit(
        cost=model(logs),
        rms_before=float(np.linalg.norm(data_residuals(origin))),
        rms_after=float(np.linalg.norm(data_residuals(logs))),
        uncertain=[n for n, s in zip(names, sensitivity, strict=True) if s < 10 * PRIOR_WEIGHT],
    )


def by_kernel(entries: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Split runs by the kernel that they ran in; key in the file, name, runs."""
    runs: dict[str, list[dict[str, Any]]] = {kernel: [] for kernel in cost.KERNELS}
    for entry in entries:
        rows = min(entry["num_heads"] * entry["new_tokens"], entry.get("group_rows", MAX_ROWS))
        runs[cost.kernel_of(rows)].append(entry)
    return [(cost.file_key(kernel), kernel, own) for kernel, own in runs.items() if own]


def report(kernel: str, base: CostModel, result: Fit) -> None:
    """Print what a fit has found."""
    print(f"{kernel} kernel", file=sys.stderr)
    for name, value in result.cost.as_dict().items():
        mark = "  (not determined by these runs)" if name in result.uncertain else ""
        print(f"{name:26} {base.as_dict()[name]:9.4f} -> {value:9.4f}{mark}", file=sys.stderr)
    before, after = 100 * result.rms_before, 100 * result.rms_after
    print(f"rms error {before:.1f}% -> {after:.1f}%", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measurements", type=Path)
    parser.add_argument("--base", type=Path, help="file to start from (default: built in)")
    parser.add_argument("--output", type=Path, help="where to write the model (default: print it)")
    parser.add_argument("--fix", nargs="*", default=[], metavar="NAME", help="constants to keep")
    parser.add_argument("--refine", type=int, default=0, metavar="STEPS", help="such as 5000")
    parser.add_argument("--seed", type=int, default=0, help="of the steps that --refine tries")
    options = parser.parse_args(arguments)

    document = json.loads(options.measurements.read_text(encoding="utf-8"))
    base = json.loads(options.base.read_text(encoding="utf-8")) if options.base else {}
    unknown = set(options.fix) - set(CostModel().as_dict())
    if unknown:
        parser.error(f"--fix: no such constant: {', '.join(sorted(unknown))}")

    fitted: dict[str, CostModel] = {}
    runs_of: dict[str, list[Run]] = {}
    notes = []
    for key, kernel, entries in by_kernel(document["runs"]):
        start = CostModel.from_dict(base.get(key, base.get("cost", {})))
        runs_of[key] = read_runs(document | {"runs": entries}, start)
        result = fit(runs_of[key], start, options.fix)
        report(kernel, start, result)
        fitted[key] = result.cost
        notes.append(f"{kernel}: {len(entries)} runs, rms error {100 * result.rms_after:.1f}%")
    if options.refine > 0:
        refined = refine_cost_model.refine(
            runs_of, fitted, options.refine, options.seed, options.fix
        )
        fitted = refined.models
        notes.append(str(refined))
        print(refined, file=sys.stderr)
    model: dict[str, Any] = {
        "device": document.get("device", "unknown"),
        "fitted_on": date.today().isoformat(),
    }
    for key, chosen in fitted.items():
        model[key] = {name: float(f"{us:.6g}") for name, us in chosen.as_dict().items()}
    model["note"] = "; ".join(notes)
    text = json.dumps(model, indent=2) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
