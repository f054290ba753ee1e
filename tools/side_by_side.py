"""Variants of the product timed side by side on a GPU: what the comparing tools share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from mla_decode.words import KV_TILE

from benchmarks.case import Case
from benchmarks.implementations import Prepared
from benchmarks.measure import measure
from benchmarks.shapes import Shape

MIN_TILES, MAX_TILES = 4, 6000  # of a batch: below there is nothing to cut, above little to gain


def is_worth_planning(shape: Shape) -> bool:
    """Whether plans of the batch can differ in what they take."""
    return MIN_TILES <= sum(-(-length // KV_TILE) for length in shape.seq_lens) <= MAX_TILES


@dataclass
class Gain:
    """Of one variant: times of what it is compared with over its own, batch by batch."""

    ratios: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.ratios:
            return "nothing differs"
        mean = math.exp(statistics.fmean(map(math.log, self.ratios)))
        low, high = min(self.ratios), max(self.ratios)
        return f"{mean:.4f} over {len(self.ratios)} batches, worst {low:.3f}, best {high:.3f}"


def times_of(
    shape: Shape, prepare: Mapping[str, Callable[[Case], Prepared]], replays: int
) -> dict[str, list[float]]:
    """Return microseconds of each replay by name; RuntimeError if an output is wrong.

    As the benchmark measures implementations: keys read from memory, replays that alternate,
    outputs checked.
    """
    rows = measure(shape, list(prepare), replays=replays, prepare=prepare)
    for row in rows:
        if row.error:
            raise RuntimeError(f"{shape.name}, {row.impl}: {row.error}")
    torch.cuda.empty_cache()  # each graph keeps memory of its own
    return {row.impl: row.replays_us for row in rows}


def note_gains(
    shape: Shape, times: Mapping[str, list[float]], base: str, gains: Mapping[str, Gain]
) -> None:
    """Add to the gains of those that were timed, and print a line of them."""
    line = []
    for name, gain in gains.items():
        if name not in times:
            continue
        pairs = zip(times[base], times[name], strict=True)
        ratio = statistics.median(before / after for before, after in pairs)
        gain.ratios.append(ratio)
        line.append(f"{name} {ratio:.3f}")
    print(f"{shape.name}: {statistics.median(times[base]):.1f} us; {'; '.join(line)}", flush=True)
