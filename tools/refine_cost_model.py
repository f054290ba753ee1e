"""Move the constants of cost models so that choosing plans by them costs little.

A model is there to choose among plans. Of a batch that was measured under several, this is what the
one that it predicts to be the fastest takes longer than the one that is. That changes by jumps, so
every plan is weighed by how close its prediction comes to the best; and how far predictions are
off counts too, and how far constants are moved, because many sets of them choose alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from mla_decode._scheduler import CostModel

Vector = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

CLOSE = 0.008  # predictions that differ by so much, relatively, count for 1 / e of the better one
ERROR_WEIGHT = 0.03  # of the rms error of predictions, against what choosing costs
CHANGE_WEIGHT = 2e-4  # of the squared logarithms of what constants are multiplied with
STEP = 0.15  # deviation of those of one step
MOST_AT_ONCE = 3  # constants


class Run(Protocol):
    """A plan that ran."""

    batch: str
    us: float | None

    def simulate(self, cost: CostModel) -> tuple[object, object, float]:
        """Predict it; the last one is the microseconds of the whole call."""


@dataclass(frozen=True)
class Score:
    """How well models do, as fractions of the time."""

    weighed: float  # what choosing costs, neighbours of the chosen plan included
    regret: float  # the same of the chosen plan alone
    rms: float  # of predictions


@dataclass(frozen=True)
class Refined:
    """The models, and what has come of it."""

    models: dict[str, CostModel]
    before: Score
    after: Score
    batches: int

    def __str__(self) -> str:
        return (
            f"choosing among the plans of {self.batches} batches costs "
            f"{100 * self.before.regret:.2f}% -> {100 * self.after.regret:.2f}%, "
            f"rms error {100 * self.before.rms:.1f}% -> {100 * self.after.rms:.1f}%"
        )


class Measured:
    """Runs of all kernels, by the batches that they are plans of."""

    def __init__(self, runs_of: Mapping[str, Sequence[Run]]) -> None:
        self.runs = [run for runs in runs_of.values() for run in runs if run.us is not None]
        self.us = np.array([run.us for run in self.runs], dtype=np.float64)
        self.kernels: dict[str, Indices] = {}
        end = 0
        for key, runs in runs_of.items():
            begin, end = end, end + sum(run.us is not None for run in runs)
            self.kernels[key] = np.arange(begin, end)
        batches: dict[str, list[int]] = {}
        for index, run in enumerate(self.runs):
            batches.setdefault(run.batch, []).append(index)
        self.batches = [np.array(own) for own in batches.values() if len(own) > 1]
        if not self.batches:
            raise ValueError("runs: expected batches that were measured under several plans")

    def predict(self, key: str, model: CostModel) -> Vector:
        """Microseconds of the runs of one kind of kernels."""
        return np.array([self.runs[index].simulate(model)[2] for index in self.kernels[key]])

    def score(self, predicted: Vector) -> Score:
        """Judge predictions of all runs."""
        logs, predicted_logs = np.log(self.us), np.log(predicted)
        weighed = regret = 0.0
        for batch in self.batches:
            above = predicted_logs[batch] - predicted_logs[batch].min()
            cost = logs[batch] - logs[batch].min()
            weights = np.exp(-above / CLOSE)
            weighed += float(weights @ cost / weights.sum())
            regret += float(cost[above.argmin()])
        errors = [
            float(np.sqrt(np.mean((predicted[own] / self.us[own] - 1.0) ** 2)))
            for own in self.kernels.values()
            if own.size
        ]
        count = len(self.batches)
        return Score(weighed / count, regret / count, float(np.mean(errors)))


def refine(
    runs_of: Mapping[str, Sequence[Run]],
    start: Mapping[str, CostModel],
    steps: int,
    seed: int = 0,
    fixed: Sequence[str] = (),
) -> Refined:
    """Try so many steps by chance and keep those that are better.

    Parameters
    ----------
    runs_of : mapping of str to sequence of Run
        Of each kind of kernels. Plans of one batch have the same ``batch``, whatever runs them.
    start : mapping of str to CostModel
        A model for each kind.
    steps, seed
        How many, and which. (6,000 runs: some twenty a second.)
    fixed : sequence of str
        Constants to leave alone; those that are 0 stay 0.

    Raises
    ------
    ValueError
        If no batch was measured under two plans.
    """
    measured = Measured(runs_of)
    rng = np.random.default_rng(seed)
    constants = {key: start[key].as_dict() for key in runs_of}
    origin = {key: dict(own) for key, own in constants.items()}
    free = {
        key: [name for name, us in own.items() if us > 0 and name not in fixed]
        for key, own in constants.items()
    }

    def changed() -> float:
        return sum(
            math.log(constants[key][name] / origin[key][name]) ** 2
            for key, names in free.items()
            for name in names
        )

    def loss(score: Score) -> float:
        return score.weighed + ERROR_WEIGHT * score.rms + CHANGE_WEIGHT * changed()

    predicted = np.concatenate([measured.predict(key, start[key]) for key in runs_of])
    before = score = measured.score(predicted)
    keys = [key for key in runs_of if free[key]]
    best = loss(score)
    for _ in range(steps if keys else 0):
        key = keys[rng.integers(len(keys))]
        kept = constants[key]
        constants[key] = dict(kept)
        count = min(len(free[key]), int(rng.integers(1, MOST_AT_ONCE + 1)))
        for name in rng.choice(free[key], count, replace=False):
            constants[key][name] *= math.exp(rng.normal(0.0, STEP))
        tried = predicted.copy()
        tried[measured.kernels[key]] = measured.predict(key, CostModel.from_dict(constants[key]))
        tried_score = measured.score(tried)
        if loss(tried_score) < best:
            predicted, score, best = tried, tried_score, loss(tried_score)
        else:
            constants[key] = kept
    models = {key: CostModel.from_dict(own) for key, own in constants.items()}
    return Refined(models, before, score, len(measured.batches))
