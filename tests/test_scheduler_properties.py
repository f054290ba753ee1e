"""Whatever the batch and the machine: every plan is valid and says what it will cost."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_decode import _scheduler
from mla_decode._scheduler import CostModel, PlanData

LENGTHS = st.lists(
    st.integers(1, 300) | st.sampled_from([63, 64, 65, 4096]) | st.integers(1, 70_000),
    min_size=1,
    max_size=40,
)
HEADS = st.sampled_from([8, 16, 32, 64, 128])
TOKENS = st.integers(1, 4)
WORKERS = st.integers(1, 264)
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
    reduction_kib_us=MICROSECONDS,
    dependency_us=MICROSECONDS,
)


def check_plan(
    plan: PlanData, lens: list[int], heads: int, tokens: int, workers: int, cost: CostModel
) -> None:
    words = plan.instructions
    _scheduler.validate(words, lens, heads, tokens, plan.num_slots)
    assert words.dtype == np.int32
    assert words.shape == (len(plan.worker), _scheduler.INSTRUCTION_WORDS)

    # Slots are the first uids, in queue order; the rest number on.
    dst_word = np.where(words[:, 0] == _scheduler.OPCODE_MLA_PARTIAL, 2, 3)
    scratch = words[np.arange(len(words)), dst_word] < 0
    assert words[scratch, 1].tolist() == list(range(plan.num_slots))
    assert words[~scratch, 1].tolist() == list(range(plan.num_slots, len(words)))

    worker, start, end, makespan = _scheduler.simulate(words, heads, tokens, workers, cost)
    np.testing.assert_array_equal(worker, plan.worker)
    np.testing.assert_allclose(end, plan.end_us, rtol=1e-5)
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


@settings(max_examples=300, deadline=None)
@given(LENGTHS, HEADS, TOKENS, WORKERS, POLICIES, st.integers(1, 40))
def test_every_plan_is_valid(
    lens: list[int], heads: int, tokens: int, workers: int, policy: str, split_tiles: int
) -> None:
    cost = CostModel()
    plan = _scheduler.plan(lens, heads, tokens, workers, cost, policy, split_tiles)
    check_plan(plan, lens, heads, tokens, workers, cost)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, HEADS, TOKENS, WORKERS, POLICIES, COSTS)
def test_every_plan_is_valid_whatever_things_cost(
    lens: list[int], heads: int, tokens: int, workers: int, policy: str, cost: CostModel
) -> None:
    plan = _scheduler.plan(lens, heads, tokens, workers, cost, policy, split_tiles=7)
    check_plan(plan, lens, heads, tokens, workers, cost)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(1, 128), st.integers(1, 9), WORKERS, POLICIES)
def test_every_plan_is_valid_whatever_the_heads(
    lens: list[int], heads: int, tokens: int, workers: int, policy: str
) -> None:
    cost = CostModel()
    plan = _scheduler.plan(lens, heads, tokens, workers, cost, policy, split_tiles=9)
    check_plan(plan, lens, heads, tokens, workers, cost)


@settings(max_examples=100, deadline=None)
@given(LENGTHS, HEADS, TOKENS, WORKERS)
def test_a_plan_runs_on_any_number_of_workers(
    lens: list[int], heads: int, tokens: int, workers: int
) -> None:
    cost = CostModel()
    plan = _scheduler.plan(lens, heads, tokens, 132, cost)
    worker, _, end, _ = _scheduler.simulate(plan.instructions, heads, tokens, workers, cost)
    assert (worker >= 0).all()
    assert (worker < workers).all()
    assert np.isfinite(end).all()


@settings(max_examples=100, deadline=None)
@given(LENGTHS, HEADS, TOKENS, WORKERS)
def test_balanced_is_no_worse_than_unsplit(
    lens: list[int], heads: int, tokens: int, workers: int
) -> None:
    cost = CostModel()
    balanced = _scheduler.plan(lens, heads, tokens, workers, cost)
    unsplit = _scheduler.plan(lens, heads, tokens, workers, cost, "unsplit")
    assert balanced.predicted_us <= unsplit.predicted_us + 1e-6
