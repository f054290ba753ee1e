"""The device planner on the CPU: whatever the batch, its plans are valid, fit and are fast."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
from mla_decode import _scheduler, cost

from benchmarks.shapes import SHAPES, random_shapes

COST = cost.load("NVIDIA H200")
CONSTANTS = list(COST.as_dict().values())
NUM_WORKERS = 132
UNTOUCHED = 0x55555555

# Columns of instructions, by instructions/layout.h.
UID, DST_OF_PARTIAL, SEQUENCE_OF_PARTIAL = 1, 2, 4
DST_OF_REDUCTION, FIRST_INPUT = 3, 5

Words = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """What is planned: lengths ``[B]``, tokens of all or ``[B]``, padding of one KV head."""

    lens: list[int]
    tokens: int | list[int] = 1
    heads: int = 16
    num_kv_heads: int = 1
    padding: int = 0
    max_seq_len: int | None = None
    split_tiles: int = 0
    workers: int = NUM_WORKERS

    @property
    def s_q(self) -> int:
        """The most tokens of a request."""
        return self.tokens if isinstance(self.tokens, int) else max(1, *self.tokens)

    @property
    def tokens_of_all(self) -> list[int]:
        """Tokens of every request."""
        return self.tokens if isinstance(self.tokens, list) else [self.tokens] * len(self.lens)

    @property
    def total_tokens(self) -> int:
        """Flat tokens of one KV head."""
        return sum(self.tokens_of_all) + self.padding

    @property
    def longest(self) -> int:
        """``max_seq_len``, or the longest length."""
        return max(self.lens) if self.max_seq_len is None else self.max_seq_len


@dataclass(frozen=True)
class Planned:
    """Instructions ``[n, 32]``, and what the header says."""

    words: Words
    num_slots: int
    header: Words


def planned(batch: Batch) -> Planned:
    """Plan, and check that everything stays within the capacity."""
    sizes = {
        "num_kv_heads": batch.num_kv_heads,
        "s_q": batch.s_q,
        "total_tokens": batch.total_tokens,
        "num_heads": batch.heads,
        "max_seq_len": batch.longest,
        "num_workers": batch.workers,
        "split_tiles": batch.split_tiles,
    }
    rows, max_slots = _scheduler.device_plan_capacity(num_requests=len(batch.lens), **sizes)
    words = np.full((rows, _scheduler.INSTRUCTION_WORDS), UNTOUCHED, np.int32)
    header = np.zeros(_scheduler.DEVICE_PLAN_HEADER_WORDS, np.int32)
    offsets = None
    if not isinstance(batch.tokens, int):
        offsets = np.cumsum([0, *batch.tokens], dtype=np.int32)
    _scheduler.device_plan(
        seq_lens=np.array(batch.lens, np.int32),
        cu_seqlens_q=offsets,
        cost=CONSTANTS,
        instructions=words,
        header=header,
        **sizes,
    )
    count, num_slots = int(header[0]), int(header[1])
    assert count + batch.workers <= rows
    assert num_slots <= max_slots
    assert (words[count : count + batch.workers, 0] == -1).all()
    assert (words[:count] != UNTOUCHED).all()
    assert (words[count + batch.workers :] == UNTOUCHED).all()
    return Planned(words[:count], num_slots, header)


def validate(batch: Batch, plan: Planned) -> None:
    """Prove the plan right for the lengths, clamped."""
    lens = np.clip(batch.lens, 0, batch.longest)
    _scheduler.validate(
        plan.words,
        np.tile(lens, batch.num_kv_heads),
        batch.heads,
        np.tile(batch.tokens_of_all, batch.num_kv_heads),
        plan.num_slots,
        total_tokens=batch.total_tokens * batch.num_kv_heads,
        num_kv_heads=batch.num_kv_heads,
    )


def random_lengths(rng: np.random.Generator, count: int, longest: int) -> npt.NDArray[np.int64]:
    """Draw equal, even, heavy-tailed, or mostly empty lengths."""
    kind = rng.integers(5)
    if kind == 0:
        return np.full(count, rng.integers(longest + 1))
    if kind == 1:
        return rng.integers(0, longest + 1, count)
    if kind == 2:
        return rng.choice([0, 1, 63, 64, 65, 128, 4096, longest], count).clip(0, longest)
    heavy = np.exp(rng.normal(np.log(longest + 1) - 3, rng.uniform(0, 2), count))
    lens = heavy.astype(np.int64).clip(0, longest)
    return lens if kind == 3 else np.where(rng.random(count) < 0.2, lens, 0)


def random_batch(rng: np.random.Generator) -> Batch:
    """Draw a batch: mostly of a few requests, now and then of up to 1024."""
    count = int(rng.integers(1, 9))
    if rng.random() < 0.4:
        count = int(2 ** rng.uniform(3, 7))
    many = rng.random() < 0.03
    if many:
        count = int(rng.integers(500, 1025))
    split_tiles = int(rng.choice([0, 0, 1, 16]))
    # Pieces of a fixed length are as many as a batch has tiles.
    longest = int(2 ** rng.uniform(0, 10 if split_tiles else 20))
    heads = int(rng.choice([1, 3, 8, 16, 16, 63, 64, 65, 126, 128, rng.integers(1, 129)]))
    most = 1 if many else int(rng.choice([1, 1, 2, 4, 16]))
    tokens: int | list[int] = most
    padding = 0
    if rng.random() < 0.4:
        tokens = rng.integers(0, most + 1, count).tolist()
        padding = int(rng.choice([0, 0, 3, 200]))
    return Batch(
        random_lengths(rng, count, longest).tolist(),
        tokens,
        heads,
        num_kv_heads=1 if rng.random() < 0.9 or many else int(rng.integers(2, 5)),
        padding=padding,
        max_seq_len=longest,
        split_tiles=split_tiles,
        workers=int(rng.choice([NUM_WORKERS, NUM_WORKERS, 1, 7, 264])),
    )


@pytest.mark.parametrize("seed", range(10))
def test_random_batches_are_planned_validly_and_within_the_capacity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        batch = random_batch(rng)
        plan = planned(batch)
        try:
            validate(batch, plan)
        except _scheduler.ScheduleError as error:
            raise AssertionError(batch) from error
        assert plan.header[2] == 0


def test_plans_are_within_a_tenth_of_the_host_planners() -> None:
    ratios = {}
    for shape in [*SHAPES.values(), *random_shapes(200, seed=7)]:
        lens, tokens = list(shape.seq_lens), shape.new_tokens
        assert isinstance(tokens, int)
        plan = planned(Batch(lens, tokens, shape.num_heads))
        makespan_us = _scheduler.simulate(plan.words, shape.num_heads, tokens, NUM_WORKERS, COST)[3]
        host = _scheduler.plan(lens, shape.num_heads, tokens, NUM_WORKERS, COST)
        ratios[shape.name] = makespan_us / host.predicted_us
    print(f"mean {np.mean(list(ratios.values())):.4f}, worst {max(ratios.values()):.4f}")
    assert {name: ratio for name, ratio in ratios.items() if ratio > 1.10} == {}
    assert np.mean(list(ratios.values())) < 1.02


@pytest.mark.parametrize("split_tiles", (0, 16))
def test_the_same_batch_has_the_same_words(split_tiles: int) -> None:
    rng = np.random.default_rng(1)
    batch = Batch(rng.integers(0, 9000, 300).tolist(), split_tiles=split_tiles, max_seq_len=9000)
    first, second = planned(batch), planned(batch)
    np.testing.assert_array_equal(first.words, second.words)
    np.testing.assert_array_equal(first.header, second.header)


@pytest.mark.parametrize("split_tiles", (0, 16))
def test_bad_lengths_are_clamped_counted_and_reported(split_tiles: int) -> None:
    batch = Batch(
        [5, 700, -1, 300, 2**31 - 1, 0, -(2**31)], max_seq_len=4096, split_tiles=split_tiles
    )
    plan = planned(batch)
    validate(batch, plan)
    assert plan.header[2:5].tolist() == [3, 2, -1]
    clamped = Batch([5, 700, 0, 300, 4096, 0, 0], max_seq_len=4096, split_tiles=split_tiles)
    good = planned(clamped)
    np.testing.assert_array_equal(plan.words, good.words)
    assert good.header[2:5].tolist() == [0, 0, 0]


def instructions_of(plan: Planned, sequence: int) -> list[list[int]]:
    """Return a sequence's instructions, sorted; slots count from its first, uids are left out."""
    words = plan.words.astype(np.int64)
    partials = words[(words[:, 0] == 1) & (words[:, SEQUENCE_OF_PARTIAL] == sequence)]
    reductions = words[(words[:, 0] == 2) & (words[:, DST_OF_REDUCTION] == sequence)]
    in_slots = partials[:, DST_OF_PARTIAL] < 0
    if in_slots.any():
        first_slot = int((-partials[in_slots, DST_OF_PARTIAL] - 1).min())
        partials[in_slots, DST_OF_PARTIAL] += first_slot
        reductions[:, FIRST_INPUT] -= first_slot
    partials[~in_slots, DST_OF_PARTIAL] = 0
    partials[:, SEQUENCE_OF_PARTIAL] = 0
    reductions[:, DST_OF_REDUCTION] = 0
    found = np.concatenate([partials, reductions])
    found[:, UID] = 0
    return sorted(found.tolist())


@pytest.mark.parametrize("heads", (16, 128))
def test_instructions_of_a_request_do_not_depend_on_the_others(heads: int) -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        # Among them those that are just long enough to be cut.
        length = int(rng.choice([1, 1024, 1025, 1100, rng.integers(1, 20_000)]))
        alone = Batch([length], 2, heads, max_seq_len=20_000, split_tiles=16)
        expected = instructions_of(planned(alone), 0)
        others = rng.integers(0, 20_000, rng.integers(1, 60)).tolist()
        place = int(rng.integers(len(others) + 1))
        lens = [*others[:place], length, *others[place:]]
        among = Batch(lens, 2, heads, max_seq_len=20_000, split_tiles=16)
        assert instructions_of(planned(among), place) == expected
