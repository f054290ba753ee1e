"""How a partial's loaders and its compute warpgroups share a ring of pages, and how the warpgroups
tell each other: models, all of whose states are visited.

The hardware lets a thread wait for the parity of an mbarrier's phase, not for its number, copies
may land in any order, and a named barrier counts whoever comes. A protocol that forgets one of
these goes wrong once in some ten thousand launches, so it is checked here and not by running it.
The rules are those of ``instructions/partial_work.cuh``, ``mla_partial.cuh`` and the two kinds of
consumers.
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


@dataclass(frozen=True)
class SeeSaw(Ring):
    """Warpgroups take tiles in turns, but each accumulates its half of all of them.

    ``readers`` are how many steps of their programs they have taken. ``turn`` is what one does for
    a tile of its own: it reads both halves, adds its half of the tile before, which is the other's,
    puts P down and gives it away. Of its own tile the first half is its half, of the other's the
    second. P has ``p_places`` places.
    """

    turn: str = ""
    p_places: int = 1

    def program(self, group: int) -> list[tuple[str, int]]:
        steps: list[tuple[str, int]] = []
        for tile in range(group, self.tiles, GROUPS):
            turn = [(kind, tile - kind.endswith("others")) for kind in self.turn.split()]
            steps += [(kind, which) for kind, which in turn if which >= 0]
        if self.tiles % GROUPS != (group + 1) % GROUPS:
            last = self.tiles - 1
            steps += [("take_others", last), ("added_others", last), ("release_others", last)]
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
            kind, tile = program[taken]
            others = self.program(1 - group)[: s.readers[1 - group]]
            step = replace(s, readers=bumped(s.readers, group))
            if kind in ("see_first", "see_second"):
                if not self.sees(s, 2 * tile + (kind == "see_second")):
                    continue
            elif kind == "take_others":  # a tile that the other warpgroup has made P of
                if ("give", tile) not in others:
                    continue
            elif kind == "put":
                self.check_place_of_p(tile, program[:taken], others)
            elif kind == "release":
                step = replace(step, empty=self.released(s.empty, 2 * tile))
            elif kind == "release_others":
                step = replace(step, empty=self.released(s.empty, 2 * tile + 1))
            after.append(step)
        return after

    def check_place_of_p(
        self, tile: int, own: list[tuple[str, int]], others: list[tuple[str, int]]
    ) -> None:
        """P takes the place of an earlier tile's, which has to have been added by then."""
        earlier = tile - self.p_places
        if earlier >= 0 and ("added_others", earlier) not in [*own, *others]:
            raise ProtocolError(f"P of tile {tile} overwrites one that is read")


ADDS_FIRST = "see_first take_others added_others release_others see_second put give release"
SCORES_ON = "see_first take_others see_second added_others release_others put give release"
NARROW_TURN = "see_first see_second take_others put added_others give release_others release"


def wide(tiles: int, turn: str = SCORES_ON, barriers: int = WIDE_RING, **more: bool) -> SeeSaw:
    return SeeSaw(tiles, WIDE_RING, barriers, turn=turn, p_places=1, **more)


def narrow(
    tiles: int, turn: str = NARROW_TURN, barriers: int = NARROW_RING, **more: bool
) -> SeeSaw:
    return SeeSaw(tiles, NARROW_RING, barriers, turn=turn, p_places=2, **more)


TILES = [1, 2, 3, 4, 5, 9, 16]


@pytest.mark.parametrize("helped", [False, True])
@pytest.mark.parametrize("tiles", TILES)
def test_every_half_tile_is_there_when_a_narrow_kernel_reads_it(tiles: int, helped: bool) -> None:
    assert narrow(tiles, helped=helped).visit_all() > 2 * tiles


@pytest.mark.parametrize("turn", [ADDS_FIRST, SCORES_ON])
@pytest.mark.parametrize("helped", [False, True])
@pytest.mark.parametrize("tiles", TILES)
def test_every_half_tile_is_there_when_a_wide_kernel_reads_it(
    tiles: int, helped: bool, turn: str
) -> None:
    assert wide(tiles, turn, helped=helped).visit_all() > 2 * tiles


def test_p_may_not_be_told_of_before_the_other_one_has_been_added() -> None:
    too_early = NARROW_TURN.replace("added_others give", "give added_others")
    with pytest.raises(ProtocolError, match="overwrites one that is read"):
        narrow(9, too_early).visit_all()


@pytest.mark.parametrize(
    ("ring", "message"),
    [
        (lambda: narrow(9, barriers=4), "unfinished phase"),
        (lambda: wide(9, barriers=3), "unfinished phase|nobody can go on"),
    ],
)
def test_fewer_barriers_than_places_would_not_do(ring: Callable[[], Ring], message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        ring().visit_all()


@dataclass(frozen=True)
class NamedBarriers:
    """The barriers by which two warpgroups tell each other of P and of sums, over two partials.

    A warp takes one step after the other: it arrives at a barrier, or arrives and waits there until
    as many have come as there are. ``in_step``: warps of one warpgroup meet when they have told of
    P. ``sums`` names the barrier at which a warpgroup tells of its sums.
    """

    tiles: int
    in_step: bool
    sums: Callable[[int], str]

    WARPS = 2  # of a warpgroup: more only repeat what these do
    PARTIALS = 2

    def program(self, group: int) -> list[tuple[str, str, str]]:
        """What a warp does: how, at which barrier, for what."""
        steps = []
        last = self.tiles - 1
        for partial in range(self.PARTIALS):

            def step(how: str, barrier: str, why: str, partial: int = partial) -> None:
                steps.append((how, barrier, f"{why} of partial {partial}"))

            for tile in range(group, self.tiles, GROUPS):
                if tile > 0:
                    step("wait", f"P {1 - group}", f"P {tile - 1}")
                step("arrive", f"P {group}", f"P {tile}")
                if self.in_step:
                    step("wait", f"warpgroup {group}", f"P {tile}, told")
            if last % GROUPS != group:
                step("wait", f"P {1 - group}", f"P {last}")
            step("arrive", self.sums(group), f"sums {group}")
            step("wait", self.sums(1 - group), f"sums {1 - group}")
            step("wait", "consumers", "end")
        return steps

    def visit_all(self) -> int:
        """Return the number of states, all of them sound; raises ProtocolError."""
        programs = [self.program(warp // self.WARPS) for warp in range(GROUPS * self.WARPS)]
        start = ((0,) * len(programs), frozenset[int](), frozenset[tuple[str, str, int]]())
        todo, seen = deque([start]), {start}
        while todo:
            taken, waiting, counts = todo.popleft()
            able = [
                warp
                for warp, program in enumerate(programs)
                if warp not in waiting and taken[warp] < len(program)
            ]
            if waiting and not able:
                raise ProtocolError("nobody can go on")
            for warp in able:
                how, barrier, why = programs[warp][taken[warp]]
                there = [(reason, count) for name, reason, count in counts if name == barrier]
                if any(reason != why for reason, _ in there):
                    raise ProtocolError(f"{why} and {there[0][0]} are counted together")
                count = 1 + sum(count for _, count in there)
                others = frozenset(each for each in counts if each[0] != barrier)
                now_waiting, now_taken = waiting, taken
                if how == "wait":
                    now_waiting |= {warp}
                else:
                    now_taken = bumped(taken, warp)
                if count == self.WARPS * (1 if barrier.startswith("warpgroup") else GROUPS):
                    free = {w for w in now_waiting if programs[w][taken[w]][1] == barrier}
                    now_waiting -= free
                    for other in free:
                        now_taken = bumped(now_taken, other)
                else:
                    others |= {(barrier, why, count)}
                new = (now_taken, now_waiting, others)
                if new not in seen:
                    seen.add(new)
                    todo.append(new)
        return len(seen)


@pytest.mark.parametrize("in_step", [True, False], ids=["narrow", "wide"])
@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 5])
def test_who_meets_at_a_barrier_has_come_for_the_same(tiles: int, in_step: bool) -> None:
    assert NamedBarriers(tiles, in_step, lambda group: f"sums {group}").visit_all() > 8 * tiles


@pytest.mark.parametrize("sums", [lambda group: f"P {1 - group}", lambda group: f"P {group}"])
@pytest.mark.parametrize("in_step", [True, False], ids=["narrow", "wide"])
def test_sums_cannot_be_told_of_where_p_is(in_step: bool, sums: Callable[[int], str]) -> None:
    """Who has told of the last P would be counted with those who have yet to wait for it."""
    with pytest.raises(ProtocolError, match="counted together"):
        NamedBarriers(2, in_step, sums).visit_all()


def test_the_kernels_tell_of_sums_at_barriers_of_their_own() -> None:
    def uses(file: str) -> list[tuple[str, str, str]]:
        source = (ROOT / "instructions" / file).read_text(encoding="utf-8")
        found = re.findall(r"barrier_(arrive|sync)\((\w+)\((.*?)\), kConsumerThreads\)", source)
        return sorted(found)

    assert uses("partial_work.cuh") == [("arrive", "sums_ready", "warpgroup")]
    for kind in ("narrow", "wide"):
        assert uses(f"{kind}_consumer.cuh") == [
            ("arrive", "p_ready", "group"),
            ("sync", "p_ready", "1 - group"),
            ("sync", "sums_ready", "1 - group"),
        ]


def test_the_kernel_has_the_rings_of_the_models() -> None:
    source = (ROOT / "instructions" / "partial_work.cuh").read_text(encoding="utf-8")
    config = (ROOT / "megakernel" / "config.cuh").read_text(encoding="utf-8")
    pages = int(re.findall(r"kNumSmemPages = (\d+);", config)[0])
    assert "kQPages = Config::kNarrow ? 1 : 2;" in source
    assert (pages - 1, pages - 2) == (NARROW_RING, WIDE_RING)
    assert "return kKvFull + place(half_tile);" in source
    assert "return half_tile / kRing;" in source
