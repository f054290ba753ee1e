"""How a narrow partial's loader and its warpgroups share a ring of pages: a model, all of whose
states are visited.

The hardware lets a thread wait for the parity of a barrier's phase, not for its number, and copies
may land in any order. A protocol that forgets either goes wrong once in some ten thousand launches,
so it is checked here and not by running it. The rules are those of
``instructions/partial_work.cuh``.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

RING = 5  # pages
GROUPS = 2  # warpgroups, which take tiles in turns


class ProtocolError(Exception):
    """Somebody went ahead too early, or nobody can go on."""


@dataclass(frozen=True)
class State:
    """Half tiles that were asked for, those in flight, phases that have ended, and each
    warpgroup's next half tile."""

    issued: int
    in_flight: frozenset[int]
    full: tuple[int, ...]
    empty: tuple[int, ...]
    groups: tuple[int, ...]


def is_over(phases_ended: int, phase: int) -> bool:
    """What a wait can see."""
    return phases_ended % 2 != phase % 2


def bumped(counts: tuple[int, ...], index: int) -> tuple[int, ...]:
    return (*counts[:index], counts[index] + 1, *counts[index + 1 :])


@dataclass(frozen=True)
class Ring:
    """``tiles`` tiles, two halves each, through ``places`` pages; ``barriers`` tell of arrivals."""

    tiles: int
    places: int
    barriers: int

    def start(self) -> State:
        first = tuple(2 * group for group in range(GROUPS))
        return State(0, frozenset(), (0,) * self.barriers, (0,) * self.places, first)

    def loads(self, s: State) -> list[State]:
        half, place = s.issued, s.issued % self.places
        if half == 2 * self.tiles:
            return []
        earlier = half // self.places - 1
        if earlier >= 0 and not is_over(s.empty[place], earlier):
            return []
        if earlier >= s.empty[place]:
            raise ProtocolError(f"half tile {half} overwrites one that is read")
        if s.full[half % self.barriers] != half // self.barriers:
            raise ProtocolError(f"half tile {half} counts in an unfinished phase")
        return [replace(s, issued=half + 1, in_flight=s.in_flight | {half})]

    def landings(self, s: State) -> list[State]:
        return [
            replace(s, in_flight=s.in_flight - {half}, full=bumped(s.full, half % self.barriers))
            for half in s.in_flight
        ]

    def reads(self, s: State) -> list[State]:
        """A warpgroup goes through both halves of its tile, then lets go of both."""
        after = []
        for group, half in enumerate(s.groups):
            if half >= 2 * self.tiles or not is_over(
                s.full[half % self.barriers], half // self.barriers
            ):
                continue
            if half >= s.issued or half in s.in_flight:
                raise ProtocolError(f"half tile {half} is read before it is there")
            is_last = half % 2 == 1
            empty = s.empty
            for released in (half - 1, half) if is_last else ():
                if released + self.places < 2 * self.tiles:
                    empty = bumped(empty, released % self.places)
            step = 2 * GROUPS - 1 if is_last else 1
            groups = (*s.groups[:group], half + step, *s.groups[group + 1 :])
            after.append(replace(s, empty=empty, groups=groups))
        return after

    def visit_all(self) -> int:
        """Return the number of states, all of them sound; raises ProtocolError."""
        todo = deque([self.start()])
        seen = set(todo)
        while todo:
            state = todo.popleft()
            after = self.loads(state) + self.landings(state) + self.reads(state)
            if not after and min(state.groups) < 2 * self.tiles:
                raise ProtocolError("nobody can go on")
            for new in after:
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
        return len(seen)


def full_barriers(ring: int) -> int:
    """As PartialPages::kFullBarriers."""
    return (ring + 3) // 4 * 4


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5, 9, 16, 21])
def test_every_half_tile_is_there_when_it_is_read(tiles: int) -> None:
    assert Ring(tiles, RING, full_barriers(RING)).visit_all() > 2 * tiles


@pytest.mark.parametrize("tiles", [5, 9, 16])
def test_one_barrier_per_place_would_not_do(tiles: int) -> None:
    with pytest.raises(ProtocolError, match="is read before it is there"):
        Ring(tiles, RING, RING).visit_all()


def test_fewer_barriers_than_places_would_not_do() -> None:
    with pytest.raises(ProtocolError, match="unfinished phase"):
        Ring(9, RING, 4).visit_all()


def test_the_kernel_has_the_ring_of_the_model() -> None:
    source = (ROOT / "instructions" / "partial_work.cuh").read_text(encoding="utf-8")
    config = (ROOT / "megakernel" / "config.cuh").read_text(encoding="utf-8")
    pages = int(re.findall(r"kNumSmemPages = (\d+);", config)[0])
    assert "kQPages = Config::kNarrow ? 1 : 2;" in source
    assert pages - 1 == RING
    assert "kFullBarriers = (kRing + 3) / 4 * 4;" in source
    assert "kKvFull + half_tile % kFullBarriers" in source
