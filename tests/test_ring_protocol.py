"""How a partial's loaders and its compute warpgroups share a ring of pages: models, all of whose
states are visited.

The hardware lets a thread wait for the parity of a barrier's phase, not for its number, and copies
may land in any order. A protocol that forgets either goes wrong once in some ten thousand launches,
so it is checked here and not by running it. The rules are those of
``instructions/partial_work.cuh``, ``mla_partial.cuh`` and the two kinds of consumers.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

NARROW_RING, WIDE_RING = 5, 4  # pages
GROUPS = 2  # warpgroups that take tiles in turns
LOADER, LAUNCHER = 0, 1


class ProtocolError(Exception):
    """Somebody went ahead too early, or nobody can go on."""


@dataclass(frozen=True)
class State:
    """Where everybody is, in half tiles or in steps of its own, and what barriers count."""

    loaders: tuple[int, ...]  # next half tile to wait for
    in_flight: frozenset[int]
    full: tuple[int, ...]  # phases that have ended
    empty: tuple[int, ...]
    readers: tuple[int, ...]


def is_over(phases_ended: int, phase: int) -> bool:
    """What a wait can see."""
    return phases_ended % 2 != phase % 2


def bumped(counts: tuple[int, ...], index: int, by: int = 1) -> tuple[int, ...]:
    return (*counts[:index], counts[index] + by, *counts[index + 1 :])


@dataclass(frozen=True)
class Ring:
    """``tiles`` tiles, two halves each, through ``places`` pages; ``barriers`` tell of arrivals.

    ``helped``: a second warp fills every other place again.
    """

    tiles: int
    places: int
    barriers: int
    helped: bool = False

    def start(self) -> State:
        return State(
            (0,) * (2 if self.helped else 1),
            frozenset(),
            (0,) * self.barriers,
            (0,) * self.places,
            self.first_readers(),
        )

    def first_readers(self) -> tuple[int, ...]:
        raise NotImplementedError

    def reads(self, s: State) -> list[State]:
        raise NotImplementedError

    def is_done(self, s: State) -> bool:
        raise NotImplementedError

    def loader_of(self, half: int) -> int:
        is_launchers = half % self.places % 2 == 1 and half >= self.places
        return LAUNCHER if self.helped and is_launchers else LOADER

    def loads(self, s: State) -> list[State]:
        after = []
        for loader, half in enumerate(s.loaders):
            if half == 2 * self.tiles:
                continue
            place, earlier = half % self.places, half // self.places - 1
            step = replace(s, loaders=bumped(s.loaders, loader))
            if self.loader_of(half) != loader:
                after.append(step)
                continue
            if earlier >= 0 and not is_over(s.empty[place], earlier):
                continue
            if earlier >= s.empty[place]:
                raise ProtocolError(f"half tile {half} overwrites one that is read")
            if s.full[half % self.barriers] != half // self.barriers:
                raise ProtocolError(f"half tile {half} counts in an unfinished phase")
            after.append(replace(step, in_flight=s.in_flight | {half}))
        return after

    def landings(self, s: State) -> list[State]:
        return [
            replace(s, in_flight=s.in_flight - {half}, full=bumped(s.full, half % self.barriers))
            for half in s.in_flight
        ]

    def sees(self, s: State, half: int) -> bool:
        """Does a reader's wait for a half tile end? It had better be there then."""
        if not is_over(s.full[half % self.barriers], half // self.barriers):
            return False
        if half >= s.loaders[self.loader_of(half)] or half in s.in_flight:
            raise ProtocolError(f"half tile {half} is read before it is there")
        return True

    def released(self, empty: tuple[int, ...], half: int) -> tuple[int, ...]:
        if half + self.places >= 2 * self.tiles:
            return empty
        return bumped(empty, half % self.places)

    def visit_all(self) -> int:
        """Return the number of states, all of them sound; raises ProtocolError."""
        todo = deque([self.start()])
        seen = set(todo)
        while todo:
            state = todo.popleft()
            after = self.loads(state) + self.landings(state) + self.reads(state)
            if not after and not self.is_done(state):
                raise ProtocolError("nobody can go on")
            for new in after:
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
        return len(seen)


class NarrowRing(Ring):
    """Warpgroups take tiles in turns; ``readers`` are their next half tiles."""

    def first_readers(self) -> tuple[int, ...]:
        return tuple(2 * group for group in range(GROUPS))

    def is_done(self, s: State) -> bool:
        return min(s.readers) >= 2 * self.tiles

    def reads(self, s: State) -> list[State]:
        """A warpgroup goes through both halves of its tile, then lets go of both."""
        after = []
        for group, half in enumerate(s.readers):
            if half >= 2 * self.tiles or not self.sees(s, half):
                continue
            is_last = half % 2 == 1
            empty = s.empty
            for each in (half - 1, half) if is_last else ():
                empty = self.released(empty, each)
            step = 2 * GROUPS - 1 if is_last else 1
            after.append(replace(s, empty=empty, readers=bumped(s.readers, group, step)))
        return after


@dataclass(frozen=True)
class WideRing(Ring):
    """Warpgroups take tiles in turns, but each accumulates its half of all of them.

    ``readers`` are how many steps of their programs they have taken. ``early``: the other's half
    tile is let go of before the second half of the own one is waited for.
    """

    early: bool = True

    def program(self, group: int) -> list[tuple[str, int]]:
        """Half tiles by the order in which they are asked for: a tile's scorer reads the first."""
        steps: list[tuple[str, int]] = []
        for tile in range(group, self.tiles, GROUPS):
            steps.append(("see", 2 * tile))
            others = [("take", tile - 1), ("release", 2 * tile - 1)] if tile > 0 else []
            second = ("see", 2 * tile + 1)
            steps += [*others, second] if self.early else [*others[:1], second, *others[1:]]
            steps += [("give", tile), ("release", 2 * tile)]
        if self.tiles % GROUPS != (group + 1) % GROUPS:
            steps += [("take", self.tiles - 1), ("release", 2 * self.tiles - 1)]
        return steps

    def first_readers(self) -> tuple[int, ...]:
        return (0,) * GROUPS

    def is_done(self, s: State) -> bool:
        return all(s.readers[group] == len(self.program(group)) for group in range(GROUPS))

    def reads(self, s: State) -> list[State]:
        after = []
        for group, taken in enumerate(s.readers):
            program = self.program(group)
            if taken == len(program):
                continue
            kind, what = program[taken]
            step = replace(s, readers=bumped(s.readers, group))
            if kind == "see" and not self.sees(s, what):
                continue
            if kind == "take":  # a tile that the other warpgroup has made P of
                others = self.program(1 - group)[: s.readers[1 - group]]
                if ("give", what) not in others:
                    continue
            if kind == "release":
                step = replace(step, empty=self.released(s.empty, what))
            after.append(step)
        return after


def narrow_barriers(ring: int) -> int:
    """As PartialPages::kFullBarriers of a narrow kernel."""
    return (ring + 3) // 4 * 4


TILES = [1, 2, 3, 4, 5, 9, 16]


@pytest.mark.parametrize("helped", [False, True])
@pytest.mark.parametrize("tiles", TILES)
def test_every_half_tile_is_there_when_a_narrow_kernel_reads_it(tiles: int, helped: bool) -> None:
    ring = NarrowRing(tiles, NARROW_RING, narrow_barriers(NARROW_RING), helped)
    assert ring.visit_all() > 2 * tiles


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("helped", [False, True])
@pytest.mark.parametrize("tiles", TILES)
def test_every_half_tile_is_there_when_a_wide_kernel_reads_it(
    tiles: int, helped: bool, early: bool
) -> None:
    assert WideRing(tiles, WIDE_RING, WIDE_RING, helped, early).visit_all() > 2 * tiles


@pytest.mark.parametrize("tiles", [5, 9, 16])
def test_one_barrier_per_place_would_not_do_in_a_narrow_kernel(tiles: int) -> None:
    with pytest.raises(ProtocolError, match="is read before it is there"):
        NarrowRing(tiles, NARROW_RING, NARROW_RING).visit_all()


@pytest.mark.parametrize(
    ("ring", "message"),
    [
        (lambda: NarrowRing(9, NARROW_RING, 4), "unfinished phase"),
        (lambda: WideRing(9, WIDE_RING, 3), "unfinished phase|nobody can go on"),
    ],
)
def test_fewer_barriers_than_places_would_not_do(ring: Callable[[], Ring], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        ring().visit_all()


def test_the_kernel_has_the_rings_of_the_models() -> None:
    source = (ROOT / "instructions" / "partial_work.cuh").read_text(encoding="utf-8")
    config = (ROOT / "megakernel" / "config.cuh").read_text(encoding="utf-8")
    pages = int(re.findall(r"kNumSmemPages = (\d+);", config)[0])
    assert "kQPages = Config::kNarrow ? 1 : 2;" in source
    assert (pages - 1, pages - 2) == (NARROW_RING, WIDE_RING)
    assert "kFullBarriers = Config::kNarrow ? (kRing + 3) / 4 * 4 : kRing;" in source
    assert "kKvFull + half_tile % kFullBarriers" in source
