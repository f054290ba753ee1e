"""The device planner on the CPU: whatever the batch, its plans are valid, fit and are fast."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest
from mla_decode import CostModel, _scheduler, cost
from mla_decode.planning import DEFAULT_CLUSTERS
from mla_decode.row_groups import choose_clusters
from mla_decode.words import NARROW_ROWS

from benchmarks.shapes import SHAPES, Shape, random_shapes

COST = cost.load("NVIDIA H200")
NUM_WORKERS = 132
UNTOUCHED = 0x55555555

# Columns of instructions, by instructions/layout.h.
UID, DST_OF_PARTIAL, SEQUENCE_OF_PARTIAL = 1, 2, 4
DST_OF_REDUCTION, FIRST_INPUT = 3, 5
START, END, ROW_BEGIN, NUM_MATES, MATE = 6, 7, 9, 11, 12

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
    cluster_ctas: int = 1
    group_rows: int = 64
    model: CostModel = field(default_factory=lambda: COST)

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
        "group_rows": batch.group_rows,
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
        cluster_ctas=batch.cluster_ctas,
        cost=list(batch.model.as_dict().values()),
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
        group_rows=batch.group_rows,
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
    cluster_ctas = int(rng.choice([1, 1, 2, 4, 8]))
    workers = int(rng.choice([NUM_WORKERS, NUM_WORKERS, 1, 7, 264]))
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
        workers=max(1, workers // cluster_ctas) * cluster_ctas,
        cluster_ctas=cluster_ctas,
        group_rows=next(
            rows for rows in (int(rng.choice([64, 64, 32, 16])), 64) if most * heads <= 32 * rows
        ),
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
        require_mates(batch, plan)
        assert plan.header[2] == 0


def require_mates(batch: Batch, plan: Planned) -> None:
    """Every mate has a worker to itself, a row group's are in one cluster, and none reduces."""
    partials = plan.words[plan.words[:, 0] == 1]
    counts, mates = partials[:, NUM_MATES], partials[:, MATE]
    if not counts.any():
        return
    assert batch.cluster_ctas > 1
    assert batch.split_tiles == 0
    assert len(partials) <= batch.workers
    assert plan.num_slots == 0
    assert set(counts.tolist()) <= {0, 2, 4, 8}
    assert counts.max() <= batch.cluster_ctas
    noops = int((plan.words[:, 0] == 0).sum())
    assert noops % 2 == 0
    places = noops + np.arange(len(partials))
    np.testing.assert_array_equal(plan.words[places], partials)
    np.testing.assert_array_equal(mates, places % np.maximum(counts, 1))
    assert (np.diff(counts) <= 0).all()


def test_mates_take_what_they_gain_from() -> None:
    """The longest need all of a cluster, one half as long half of it, the shortest none."""
    batch = Batch([64, 16 * 64, 7 * 64 + 1, 0, 16 * 64], 2, 64, workers=120, cluster_ctas=8)
    plan = planned(batch)
    validate(batch, plan)
    require_mates(batch, plan)
    found = plan.words[plan.words[:, 0] == 1]
    names = [UID, SEQUENCE_OF_PARTIAL, START, END, ROW_BEGIN, NUM_MATES, MATE]
    expected = [
        [uid, sequence, mate * 128, mate * 128 + 128, group * 64, 8, mate]
        for sequence, first in ((1, 2), (4, 26))
        for group in (0, 1)
        for mate in range(8)
        for uid in [first + group * 8 + mate]
    ]
    expected += [
        [18 + group * 4 + mate, 2, mate * 128, min(mate * 128 + 128, 449), group * 64, 4, mate]
        for group in (0, 1)
        for mate in range(4)
    ]
    expected += [[group, 0, 0, 64, group * 64, 0, 0] for group in (0, 1)]
    assert found[:, names].tolist() == expected


@pytest.mark.parametrize("cluster_ctas", (2, 4, 8))
@pytest.mark.parametrize("heads", (16, 128))
def test_row_groups_have_no_more_mates_than_they_need(cluster_ctas: int, heads: int) -> None:
    """With half as many, somebody would have more tiles than the most that a mate has."""
    rng = np.random.default_rng(cluster_ctas)
    shared = 0
    for _ in range(200):
        longest = 150 * cluster_ctas
        lens = rng.integers(longest // 2, longest, rng.integers(1, 256 // cluster_ctas)).tolist()
        batch = Batch(lens, 1, heads, workers=128, cluster_ctas=cluster_ctas)
        plan = planned(batch)
        mates = {row[SEQUENCE_OF_PARTIAL]: int(row[NUM_MATES]) for row in plan.words.tolist()}
        if not any(mates.values()):
            continue
        shared += 1
        tiles = {sequence: -(-lens[sequence] // 64) for sequence in mates}
        most = max(-(-tiles[s] // max(1, count)) for s, count in mates.items())
        assert all(count == 0 or -(-tiles[s] * 2 // count) > most for s, count in mates.items())
    assert shared > 20


def test_clusters_change_nothing_where_nobody_shares() -> None:
    rng = np.random.default_rng(4)
    counts = {False: 0, True: 0}
    for _ in range(1000):
        batch = replace(random_batch(rng), workers=128, cluster_ctas=8)
        plan = planned(batch)
        alone = planned(replace(batch, cluster_ctas=1))
        partials = alone.words[alone.words[:, 0] == 1]
        assert not partials[:, [NUM_MATES, MATE]].any()
        is_shared = bool(plan.words[plan.words[:, 0] == 1][:, NUM_MATES].any())
        counts[is_shared] += 1
        if not is_shared:
            np.testing.assert_array_equal(plan.words, alone.words)
            np.testing.assert_array_equal(plan.header, alone.header)
    assert min(counts.values()) > 20


@pytest.mark.parametrize(("cluster_ctas", "workers"), [(3, 132), (16, 128), (0, 132), (8, 132)])
def test_clusters_that_no_launch_has_are_refused(cluster_ctas: int, workers: int) -> None:
    with pytest.raises(ValueError, match="cluster_ctas: expected"):
        planned(Batch([100], workers=workers, cluster_ctas=cluster_ctas))


# As without a GPU; of all sizes; of one only.
AVAILABLE = (DEFAULT_CLUSTERS, ((2, 66), (4, 30), (8, 15)), ((2, 66),), ())


@pytest.mark.parametrize("available", AVAILABLE, ids=str)
def test_plans_are_within_a_tenth_of_the_host_planners(
    available: tuple[tuple[int, int], ...],
) -> None:
    require_nearly_the_host_planners([*SHAPES.values(), *random_shapes(200, seed=7)], available)


def test_plans_of_narrow_kernels_are_within_a_tenth_of_the_host_planners() -> None:
    narrow = cost.load("NVIDIA H200", NARROW_ROWS)
    shapes = [shape for seed in range(7, 11) for shape in random_shapes(100, seed)]
    shapes = [shape for shape in shapes if rows_of(shape) <= NARROW_ROWS]
    assert len(shapes) > 100
    require_nearly_the_host_planners(shapes, DEFAULT_CLUSTERS, narrow)


def rows_of(shape: Shape) -> int:
    assert isinstance(shape.new_tokens, int)
    return shape.new_tokens * shape.num_heads


def require_nearly_the_host_planners(
    shapes: list[Shape], available: tuple[tuple[int, int], ...], model: CostModel = COST
) -> None:
    ratios = {}
    for shape in shapes:
        lens, tokens = list(shape.seq_lens), shape.new_tokens
        assert isinstance(tokens, int)
        groups = len(lens) * -(-rows_of(shape) // _scheduler.MAX_ROWS)
        size, workers = choose_clusters(groups, max(lens), NUM_WORKERS, available)
        batch = Batch(lens, tokens, shape.num_heads, workers=workers, cluster_ctas=size)
        words = planned(replace(batch, model=model)).words
        makespan_us = _scheduler.simulate(words, shape.num_heads, tokens, workers, model)[3]
        clusters = [(size, workers // size)] if size > 1 else []
        host = _scheduler.plan(lens, shape.num_heads, tokens, NUM_WORKERS, model, clusters=clusters)
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
