"""Partials that adopt the result of an earlier one: interpreter, checks of words, timelines."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from mla_decode import _scheduler, interpreter, timeline
from mla_decode.errors import DeadlockError, QueueError
from mla_decode.planning import Plan, describe
from mla_decode.queue_check import check_words
from mla_decode.reference import Case, make_case
from mla_decode.trace_file import write_trace
from mla_decode.words import MAX_ROWS, Instruction, Partial, Reduction

from tests.support import Launch, cut, pack, plan_of, require_attention, run_queue, same_bits

WHOLE_CHAIN = 1 << 16  # longer than any


def halves(length: int = 300, middle: int = 128) -> tuple[Partial, Partial]:
    """A request of one row group: its last keys, to slot 0; the first, which adopt them."""
    last = Partial(uid=0, dst_batch=-1, q_batch=0, start=middle, end=length, length=length)
    return last, Partial(100, 0, 0, 0, middle, length, adopted=0)


def chained(
    case: Case, tiles: int, pieces: int, group_rows: int = MAX_ROWS
) -> tuple[list[Instruction], int]:
    """The queue of `cut`, its pieces in chains of ``pieces`` that adopt, each the next; its slots.

    A chain's first writes the output, or a slot for the reduction of several chains.
    """
    queue, num_slots = cut(case, tiles, group_rows=group_rows)
    to_slot = {i.slot: i for i in queue if isinstance(i, Partial) and i.slot is not None}
    others: list[Instruction] = []
    for instruction in queue:
        if isinstance(instruction, Reduction):
            heads = instruction.inputs[::pieces]
            for slot, behind in pairwise(instruction.inputs):
                if behind not in heads:
                    to_slot[slot] = replace(to_slot[slot], adopted=behind)
            if len(heads) > 1:
                others.append(replace(instruction, inputs=heads))
            else:
                to_slot[heads[0]] = replace(to_slot[heads[0]], dst_batch=instruction.dst_batch)
        elif instruction.slot is None:
            others.append(instruction)
    return [*reversed(to_slot.values()), *others], num_slots


# Words; that they unpack to what was packed, test_interpreter.py has


def test_slot_0_is_told_from_none() -> None:
    last, first = halves()
    assert pack(last, first)[:, 13].tolist() == [0, 1]
    assert last.inputs == ()
    assert first.inputs == (0,)


def test_description_names_the_slot() -> None:
    last, first = halves()
    assert "adopts" not in describe(last)
    assert describe(first).endswith("-> output, adopts slot 0")


# Numerics


@pytest.mark.parametrize("pieces", (2, WHOLE_CHAIN))
@pytest.mark.parametrize("tokens", (1, 5, [3, 1, 0, 16, 2]), ids=str)
def test_chains_give_attention(tokens: int | list[int], pieces: int) -> None:
    """To the output, and to slots that a reduction reads; several row groups, an empty request."""
    sinks = torch.linspace(-3, 9, 12)
    case = make_case([1000, 64, 767, 350, 0], 12, tokens, attn_sink=sinks)
    queue, num_slots = chained(case, 2, pieces)
    assert any(isinstance(i, Partial) and i.adopted is not None for i in queue)
    assert any(isinstance(i, Reduction) for i in queue) == (pieces == 2)
    _scheduler.validate(pack(*queue), case.seq_lens, case.num_heads, case.tokens, num_slots)
    require_attention(run_queue(case, queue, num_slots))


@pytest.mark.parametrize("heads, tokens", ((16, 1), (16, 4), (48, 3)))
def test_plans_that_adopt_give_attention(heads: int, tokens: int) -> None:
    case = make_case([900] * 9, heads, tokens, attn_sink=torch.linspace(-3, 9, heads))
    plan = plan_of(case, num_workers=6)
    assert any(isinstance(i, Partial) and i.adopted is not None for i in plan.decoded())
    in_order = run_queue(case, plan.decoded(), plan.num_slots)
    for seed in (None, 0, 1):
        launch = run_queue(case, plan.decoded(), plan.num_slots, num_workers=6, seed=seed)
        assert same_bits(in_order.o, require_attention(launch).o)


@pytest.mark.parametrize("tokens", (1, 4))
def test_adoption_agrees_with_a_reduction_of_the_two(tokens: int) -> None:
    """One merge, whoever does it: the same bits."""
    case = make_case([300], 16, tokens, attn_sink=torch.linspace(-2, 4, 16))
    last, first = halves()
    merge = Reduction(200, 0, 0, range(2), num_rows=16 * tokens)
    apart = replace(first, uid=1, dst_batch=-2, adopted=None)
    adopted = require_attention(run_queue(case, [last, first], 1))
    reduced = run_queue(case, [last, apart, merge], 2)
    assert same_bits(adopted.o, reduced.o)
    assert same_bits(adopted.lse, reduced.lse)


@pytest.mark.parametrize("blind", ("adopted", "own"))
def test_keys_that_a_row_does_not_see_change_nothing(blind: str) -> None:
    """The last two positions, which the first two of four new tokens do not see."""
    case = make_case([66], 8, 4)
    last, first = halves(length=66, middle=64)
    if blind == "own":
        last = replace(last, start=first.start, end=first.end)
        first = replace(first, start=64, end=66)
    require_attention(run_queue(case, [last, first], 1))


@pytest.mark.parametrize("pieces", (2, WHOLE_CHAIN))
@pytest.mark.parametrize("workers", (1, 2, 3, 8, 40))
def test_every_interleaving_agrees(workers: int, pieces: int) -> None:
    case = make_case([700, 450, 30], 16, 3, attn_sink=torch.linspace(-2, 4, 16))
    queue, num_slots = chained(case, 2, pieces)
    in_order = require_attention(run_queue(case, queue, num_slots))
    for seed in (None, 0, 1, 2):
        shuffled = run_queue(case, queue, num_slots, num_workers=workers, seed=seed)
        assert same_bits(in_order.o, shuffled.o)
        assert same_bits(in_order.lse, shuffled.lse)


def test_deadlock_names_the_slot_and_its_writer() -> None:
    last, first = halves()
    launch = Launch.of(make_case([300], 16), pack(first, last), num_slots=1)
    with pytest.raises(DeadlockError) as caught:
        interpreter.run(launch.arguments())
    assert caught.value.waits == (
        "worker 0: instruction 0 (uid 100, partial) waits for flag [slot 0] == 1, sees 0: "
        "uid 0 writes it, held by worker 0 behind its own wait",
    )


# Checks of the words; bad slots and mates are in test_bad_input.py and test_mates.py


def test_adopted_slot_with_too_few_rows_is_refused() -> None:
    """Even where the partial itself writes the output."""
    _, first = halves()
    limits = Launch.of(make_case([300], 16), pack(first), num_slots=1).arguments().limits()
    check_words(pack(first), limits)
    message = r"word 13 \(adopted\): expected rows that a scratch slot holds \(15\), got 1"
    with pytest.raises(QueueError, match=message):
        check_words(pack(first), replace(limits, slot_rows=15))


# Timelines


def test_timeline_and_trace_show_what_is_adopted(tmp_path: Path) -> None:
    """A partial has keys of its own to begin with, so it does not count as waiting."""
    case = make_case([300], 16)
    plan: Plan = replace(
        plan_of(case),
        instructions=pack(*halves()),
        num_slots=1,
        worker=np.arange(2, dtype=np.int32),
        start_us=np.zeros(2, np.float32),
        end_us=np.array([3, 4], np.float32),
    )
    drawn = timeline.predicted(plan)
    assert drawn.flows == ((0, 1),)
    assert drawn.slices[1].ready_us == 0
    events = json.loads(write_trace(drawn, tmp_path / "t.json").read_text())["traceEvents"]
    assert [e["args"]["adopts"] for e in events if "adopts" in e.get("args", {})] == ["slot 0"]
    arrow = {e["ph"]: (e["tid"], e["ts"]) for e in events if e.get("cat") == "flow"}
    assert arrow["s"] == pytest.approx((0, 3), abs=1e-2)
    assert arrow["f"] == pytest.approx((1, 3), abs=1e-2)
