"""No-ops that come first, so that the SMs at work lie evenly over the GPU (scheduler/spread.h)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mla_decode import DevicePlan, Plan, _scheduler, cost, plan, synchronize
from mla_decode.measure import decode_case
from mla_decode.reference import make_case
from mla_decode.words import Noop, Partial

from benchmarks.shapes import SHAPES
from tests.support import Launch, plan_of, require_attention, same_bits
from tests.test_device_plan import UID, Batch, planned, require_mates, validate
from tests.test_group_rows import require_decoded

WORKERS = 132
NARROWEST, NARROW = (cost.load("NVIDIA H200", rows) for rows in (16, 32))


def noops(made: Plan) -> int:
    """How many begin the queue; there are no others."""
    kinds = [isinstance(instruction, Noop) for instruction in made.decoded()]
    assert kinds == sorted(kinds, reverse=True)
    return sum(kinds)


def without_noops(made: Plan) -> Plan:
    first = noops(made)
    return replace(
        made,
        instructions=made.instructions[first:],
        worker=made.worker[first:],
        start_us=made.start_us[first:],
        end_us=made.end_us[first:],
    )


# When the planner has them


@pytest.mark.parametrize("heads", (16, 32, 64))
@pytest.mark.parametrize("batch", (80, 93, 120))
def test_workers_without_a_partial_come_first(batch: int, heads: int) -> None:
    made = plan([1500] * batch, heads, policy="unsplit", num_workers=WORKERS)
    assert noops(made) == WORKERS - batch
    assert made.num_instructions == WORKERS
    assert sorted(made.worker.tolist()) == list(range(WORKERS))
    assert all(isinstance(i, Partial) for i in made.decoded()[WORKERS - batch :])


def test_the_summary_counts_them() -> None:
    made = plan([1500] * 93, 16, policy="unsplit", num_workers=WORKERS)
    assert "(93 partials, 0 reductions, 39 no-ops)" in made.summary()


@pytest.mark.parametrize(
    "lengths, heads",
    [
        pytest.param([1500] * 121, 16, id="11 idle"),
        pytest.param([1500] * 66, 16, id="half of them idle"),
        pytest.param([1500] * 50, 128, id="keys that two row groups share"),
        pytest.param([1500] * 93 + [0], 16, id="a fill"),
    ],
)
def test_no_other_queue_begins_with_noops(lengths: list[int], heads: int) -> None:
    assert noops(plan(lengths, heads, policy="unsplit", num_workers=WORKERS)) == 0


def test_queues_with_reductions_have_none() -> None:
    made = plan([64 * 40] * 50, 16, policy="fixed", split_tiles=20, num_workers=WORKERS)
    assert made.num_slots == 100
    assert noops(made) == 0


def test_pairs_of_mates_stay_in_their_clusters() -> None:
    mixed = SHAPES["B64_mix_q4_h16"]
    made = plan(list(mixed.seq_lens), mixed.num_heads, mixed.new_tokens, num_workers=WORKERS)
    first = noops(made)
    assert first >= 12
    assert first % 2 == 0
    mates = [i for i, x in enumerate(made.decoded()) if isinstance(x, Partial) and x.num_mates]
    assert mates[0] == first
    assert len(mates) > 50


def test_short_pairs_of_mates_are_not_spread() -> None:
    made = plan([500] * 52, 32, num_workers=WORKERS)
    assert made.cluster_ctas == 2
    assert WORKERS // 2 < made.num_instructions <= WORKERS - 12
    assert noops(made) == 0


@pytest.mark.parametrize("batch", (80, 93, 110))
def test_spread_tiles_are_predicted_to_take_less(batch: int) -> None:
    made = plan([2048] * batch, 16, cost_model=NARROWEST, policy="unsplit", num_workers=WORKERS)
    gathered_us = _scheduler.simulate(without_noops(made).instructions, 16, 1, WORKERS, NARROWEST)[
        3
    ]
    spread_us = _scheduler.simulate(made.instructions, 16, 1, WORKERS, NARROWEST)[3]
    assert spread_us == pytest.approx(made.predicted_us)
    assert 0.75 * gathered_us < spread_us < gathered_us


def test_device_plans_have_them_too() -> None:
    batch = Batch([1500 - i for i in range(93)], model=NARROWEST)
    made = planned(batch)
    validate(batch, made)
    assert made.words[:, 0].tolist() == [0] * 39 + [1] * 93
    assert len(set(made.words[:, UID].tolist())) == WORKERS


def test_device_plans_have_pairs_of_mates_behind_them() -> None:
    batch = Batch([1200 - i for i in range(52)], heads=32, cluster_ctas=2, model=NARROW)
    made = planned(batch)
    validate(batch, made)
    require_mates(batch, made)
    assert made.words[:, 0].tolist() == [0] * 28 + [1] * 104


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(Batch([1500] * 125, model=NARROWEST), id="7 idle"),
        pytest.param(Batch([1500] * 93 + [0], model=NARROWEST), id="a fill"),
        pytest.param(Batch([1500] * 93, [1] * 93, padding=3, model=NARROWEST), id="padding"),
        pytest.param(Batch([1500] * 50, heads=128), id="shared keys"),
    ],
)
def test_other_device_plans_do_not(batch: Batch) -> None:
    made = planned(batch)
    validate(batch, made)
    assert (made.words[:, 0] != 0).all()


# Their results


def test_interpreted() -> None:
    case = make_case([70 + 31 * i for i in range(25)], 16)
    made = plan_of(case, policy="unsplit", num_workers=40)
    assert noops(made) == 15
    launch = Launch.of_plan(case, made)
    launch.run()
    require_attention(launch)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", (16, 32, 64))
def test_gpu_noops_change_no_bit(heads: int) -> None:
    case = make_case([700 + 13 * i for i in range(93)], heads, device="cuda")
    made = plan_of(case, policy="unsplit", num_workers=WORKERS)
    assert noops(made) == 39
    expected = decode_case(case, without_noops(made))
    for _ in range(20):
        found = decode_case(case, made)
    synchronize()
    assert same_bits(found[0], expected[0])
    assert same_bits(found[1], expected[1])
    require_decoded(case, made)


@pytest.mark.gpu
def test_gpu_mates_behind_noops() -> None:
    mixed = SHAPES["B64_mix_q4_h16"]
    case = make_case(list(mixed.seq_lens), mixed.num_heads, mixed.new_tokens, device="cuda")
    made = plan_of(case, num_workers=WORKERS)
    assert noops(made) >= 12
    for _ in range(20):
        decode_case(case, made)
    synchronize()
    require_decoded(case, made)


@pytest.mark.gpu
def test_gpu_device_plans_with_noops() -> None:
    lengths = [1500 - i for i in range(93)]
    case = make_case(lengths, 16, device="cuda")
    made = DevicePlan(93, 16, max_seq_len=1500, clusters=False, num_workers=WORKERS, device="cuda")
    for _ in range(3):
        made.update(torch.tensor(lengths, dtype=torch.int32, device="cuda"))
        require_decoded(case, made)
    assert made.instructions[0, 0].item() == 0
