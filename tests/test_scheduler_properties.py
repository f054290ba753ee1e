"""Whatever the batch and the machine: every plan is valid and says what it will cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_decode import _scheduler
from mla_decode._scheduler import CostModel, PlanData

LENGTHS = (
    st.just(0) | st.integers(1, 300) | st.sampled_from([63, 64, 65, 4096]) | st.integers(1, 70_000)
)
HEADS = st.sampled_from([1, 3, 8, 9, 16, 32, 63, 64, 126, 128]) | st.integers(1, 128)
WORKERS = st.integers(1, 264)
GROUP_ROWS = st.sampled_from([64, 64, 32, 16])
POLICIES = st.sampled_from(_scheduler.POLICIES)

MICROSECONDS = st.floats(0.0, 100.0)
COSTS = st.builds(
    CostModel,
    launch_us=MICROSECONDS,
    instruction_us=MICROSECONDS,
    partial_fixed_us=MICROSECONDS,
    partial_next_us=MICROSECONDS,
    partial_store_kib_us=MICROSECONDS,
    partial_tile_us=MICROSECONDS,
    partial_tile_compute_us=st.floats(1e-3, 100.0),
    reduction_fixed_us=MICROSECONDS,
    reduction_next_us=MICROSECONDS,
    reduction_stamps_us=MICROSECONDS,
    reduction_kib_us=MICROSECONDS,
    dependency_us=MICROSECONDS,
)


@dataclass(frozen=True)
class Batch:
    """What plan() and validate() take: lengths ``[S]``, tokens of all or ``[S]``, outputs."""

    lens: list[int]
    heads: int
    tokens: int | list[int]
    num_kv_heads: int
    total_tokens: int
    group_rows: int

    def plan(
        self, workers: int, cost: CostModel, policy: str = "balanced", split_tiles: int = 0
    ) -> PlanData:
        return _scheduler.plan(
            self.lens,
            self.heads,
            self.tokens,
            workers,
            cost,
            policy,
            split_tiles,
            total_tokens=self.total_tokens,
            num_kv_heads=self.num_kv_heads,
            group_rows=self.group_rows,
        )

    def validate(self, plan: PlanData) -> None:
        _scheduler.validate(
            plan.instructions,
            self.lens,
            self.heads,
            self.tokens,
            plan.num_slots,
            total_tokens=self.total_tokens,
            num_kv_heads=self.num_kv_heads,
            group_rows=self.group_rows,
        )


@st.composite
def uniform_batches(draw: st.DrawFn) -> Batch:
    lens = draw(st.lists(LENGTHS, min_size=1, max_size=40))
    tokens = draw(st.integers(1, 4) | st.integers(1, 16))
    return Batch(lens, draw(HEADS), tokens, 1, tokens * len(lens), draw(GROUP_ROWS))


@st.composite
def mixed_batches(draw: st.DrawFn) -> Batch:
    kv_heads = draw(st.sampled_from([1, 1, 1, 2, 4]))
    requests = draw(st.lists(st.tuples(LENGTHS, st.integers(0, 16)), max_size=40 // kv_heads))
    lens, tokens = [n for n, _ in requests], [t for _, t in requests]
    total = sum(tokens) + draw(st.sampled_from([0, 1, 100]))
    heads, group_rows = draw(HEADS), draw(GROUP_ROWS)
    return Batch(lens * kv_heads, heads, tokens * kv_heads, kv_heads, total * kv_heads, group_rows)


BATCHES = uniform_batches() | mixed_batches()


def check_plan(plan: PlanData, batch: Batch, workers: int, cost: CostModel) -> None:
    words = plan.instructions
    batch.validate(plan)
    assert words.dtype == np.int32
    assert words.shape == (len(plan.worker), _scheduler.INSTRUCTION_WORDS)
    if len(words) == 0:
        assert plan.predicted_us == 0.0
        return

    # Slots are the first uids; the rest number on, in queue order.
    dst_word = np.where(words[:, 0] == _scheduler.OPCODE_MLA_REDUCTION, 3, 2)
    scratch = words[np.arange(len(words)), dst_word] < 0
    assert sorted(words[scratch, 1].tolist()) == list(range(plan.num_slots))
    assert words[~scratch, 1].tolist() == list(range(plan.num_slots, len(words)))

    worker, start, end, makespan = _scheduler.simulate(
        words, batch.heads, batch.tokens, workers, cost, batch.group_rows
    )
    np.testing.assert_array_equal(worker, plan.worker)
    np.testing.assert_array_equal(end, plan.end_us)
    assert np.isclose(makespan, plan.predicted_us)
    assert makespan == np.float64(makespan)
    assert np.isclose(end.max(), makespan, rtol=1e-6)
    assert (start <= end).all()

    # A worker runs one instruction at a time, in queue order; starts follow the queue.
    assert (np.diff(start) >= -1e-4 * np.maximum(1.0, start[1:])).all()
    first = min(workers, len(words))
    assert worker[:first].tolist() == list(range(first))
    for sm in range(first):
        mine = np.flatnonzero(worker == sm)
        assert (start[mine[1:]] >= end[mine[:-1]]).all()


@settings(max_examples=400, deadline=None)
@given(BATCHES, WORKERS, POLICIES, st.integers(1, 40))
def test_every_plan_is_valid(batch: Batch, workers: int, policy: str, split_tiles: int) -> None:
    cost = CostModel()
    check_plan(batch.plan(workers, cost, policy, split_tiles), batch, workers, cost)


def test_workers_that_tie_are_the_simulators() -> None:
    """Six workers are free at the same time: sums rounded in another order would part them."""
    batch = Batch([1, 3201, 11265, 13057, 14209], 63, [2, 13, 10, 7, 6], 1, 38, 64)
    cost = CostModel()
    check_plan(batch.plan(161, cost, "balanced", 1), batch, 161, cost)


@settings(max_examples=200, deadline=None)
@given(BATCHES, WORKERS, POLICIES, COSTS)
def test_every_plan_is_valid_whatever_things_cost(
    batch: Batch, workers: int, policy: str, cost: CostModel
) -> None:
    check_plan(batch.plan(workers, cost, policy, split_tiles=7), batch, workers, cost)


@settings(max_examples=100, deadline=None)
@given(BATCHES, WORKERS)
def test_a_plan_runs_on_any_number_of_workers(batch: Batch, workers: int) -> None:
    cost = CostModel()
    plan = batch.plan(132, cost)
    worker, _, end, _ = _scheduler.simulate(
        plan.instructions, batch.heads, batch.tokens, workers, cost, batch.group_rows
    )
    assert (worker >= 0).all()
    assert (worker < workers).all()
    assert np.isfinite(end).all()


@settings(max_examples=100, deadline=None)
@given(BATCHES, WORKERS)
def test_balanced_is_no_worse_than_unsplit(batch: Batch, workers: int) -> None:
    cost = CostModel()
    balanced, unsplit = batch.plan(workers, cost), batch.plan(workers, cost, "unsplit")
    assert balanced.predicted_us <= unsplit.predicted_us + 1e-6


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(LENGTHS.filter(bool), st.sampled_from([2, 4, 6, 8])), max_size=20),
    WORKERS,
    st.sampled_from([policy for policy in _scheduler.POLICIES if policy != "backward"]),
)
def test_words_depend_on_rows_not_on_how_they_divide(
    requests: list[tuple[int, int]], workers: int, policy: str
) -> None:
    lens, tokens = [n for n, _ in requests], [t for _, t in requests]
    cost = CostModel()
    many = _scheduler.plan(lens, 15, tokens, workers, cost, policy, 5)
    few = _scheduler.plan(lens, 30, [t // 2 for t in tokens], workers, cost, policy, 5)
    np.testing.assert_array_equal(many.instructions, few.instructions)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), batch=BATCHES, policy=POLICIES)
def test_a_plan_less_one_instruction_is_not_valid(
    data: st.DataObject, batch: Batch, policy: str
) -> None:
    plan = batch.plan(132, CostModel(), policy, 9)
    if len(plan.instructions) == 0:
        return
    dropped = data.draw(st.integers(0, len(plan.instructions) - 1))
    try:
        _scheduler.validate(
            np.delete(plan.instructions, dropped, axis=0),
            batch.lens,
            batch.heads,
            batch.tokens,
            plan.num_slots,
            total_tokens=batch.total_tokens,
            num_kv_heads=batch.num_kv_heads,
            group_rows=batch.group_rows,
        )
    except _scheduler.ScheduleError as error:
        opcode = plan.instructions[dropped, 0]
        expected = {
            _scheduler.OPCODE_MLA_PARTIAL: ("order", "uncovered", "unread"),  # what it adopted
            _scheduler.OPCODE_MLA_REDUCTION: ("unread", "order"),
            _scheduler.OPCODE_MLA_FILL: ("unfilled",),
        }[opcode]
        assert str(error).endswith(tuple(f"(rule: {rule})" for rule in expected))
    else:
        raise AssertionError("expected a ScheduleError")
