"""Mates, partials that share a destination: words, checks, and the interpreter's numerics."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from mla_decode import decoding, interpreter, native, raw, timeline
from mla_decode.errors import (
    DeadlockError,
    QueueError,
    RangeError,
    ScheduleError,
    UnsupportedError,
)
from mla_decode.planning import Plan, describe
from mla_decode.queue_check import check_mates_run
from mla_decode.reference import Case, make_case
from mla_decode.trace_file import write_trace
from mla_decode.words import (
    KV_TILE,
    MAX_ROWS,
    Instruction,
    Noop,
    Partial,
    Reduction,
    decode_queue,
)

from tests.support import Launch, cut, pack, plan_of, require_attention, run_queue, same_bits

COUNTS = (2, 4, 8)
NARROW, WIDE = 16, 64  # heads: rows of a group of one new token


def gang(whole: Partial, count: int, first_uid: int) -> list[Partial]:
    """``whole`` shared by ``count`` mates, by tiles; those without a slot's uid get new ones."""
    tiles = -(-(whole.end - whole.start) // KV_TILE)
    cuts = [whole.start + i * tiles // count * KV_TILE for i in range(count)]
    return [
        replace(
            whole, uid=first_uid + i if i else whole.uid, start=s, end=e, num_mates=count, mate=i
        )
        for i, (s, e) in enumerate(pairwise([*cuts, whole.end]))
    ]


def shared(
    case: Case, count: int, gangs: int = 1, group_rows: int = MAX_ROWS
) -> tuple[list[Instruction], int]:
    """A queue in which mates do every row group, in ``gangs`` pieces; and its scratch slots."""
    longest = max(-(-length // KV_TILE) for length in case.seq_lens)
    queue, num_slots = cut(case, -(-longest // gangs), group_rows=group_rows)
    mates: list[Instruction] = []
    others: list[Instruction] = []
    for instruction in queue:
        if isinstance(instruction, Partial) and instruction.end - instruction.start > (
            (count - 1) * KV_TILE
        ):
            mates += gang(instruction, count, 5_000_000 + len(mates))
        else:
            others.append(instruction)  # too short for so many, or no partial
    return [*mates, *others], num_slots


def require_shared_attention(case: Case, count: int, gangs: int = 1) -> Launch:
    queue, num_slots = shared(case, count, gangs)
    assert any(isinstance(i, Partial) and i.num_mates == count for i in queue)
    return require_attention(run_queue(case, queue, num_slots))


# Words


@pytest.mark.parametrize("count", COUNTS)
def test_words_unpack_to_what_was_packed(count: int) -> None:
    whole = Partial(uid=3, dst_batch=-4, q_batch=0, start=64, end=700, length=900)
    mates = gang(whole, count, 100)
    words = pack(*mates)
    assert words[:, 11].tolist() == [count] * count
    assert words[:, 12].tolist() == list(range(count))
    assert not words[:, 13:].any()
    assert decode_queue(words) == mates
    assert {mate.slot for mate in mates} == {3}


def test_ordinary_partial_has_no_mates() -> None:
    words = Partial(uid=3, dst_batch=-4, q_batch=0, start=64, end=700, length=900).pack()
    assert not words[11:].any()


def test_description_names_the_mate() -> None:
    whole = Partial(uid=3, dst_batch=-4, q_batch=0, start=0, end=700, length=900)
    assert "mate" not in describe(whole)
    assert describe(gang(whole, 8, 100)[2]).endswith("-> slot 3, mate 2 of 8")


# Numerics


@pytest.mark.parametrize("heads", (NARROW, WIDE))
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("gangs", (1, 2))
def test_mates_give_attention(count: int, heads: int, gangs: int) -> None:
    """To the output, and to slots that a reduction of two gangs reads."""
    case = make_case([64 * 16 + 37], heads, 1, seed=count)
    queue, num_slots = shared(case, count, gangs)
    assert num_slots == (gangs if gangs > 1 else 0)
    assert len(queue) == gangs * count + (gangs > 1)
    launch = require_shared_attention(case, count, gangs)
    assert launch.completion_flag.tolist() == [1] * num_slots


@pytest.mark.parametrize("gangs", (1, 3))
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("tokens", (1, 5, [3, 1, 0, 16, 2]), ids=str)
def test_ragged_batches_give_attention(tokens: int | list[int], count: int, gangs: int) -> None:
    """Several row groups, mates beside ordinary partials, an empty request."""
    case = make_case([2000, 64, 1535, 700, 0], 12, tokens, seed=count)
    require_shared_attention(case, count, gangs)


@pytest.mark.parametrize("count", COUNTS)
def test_kv_heads_and_fp16_give_attention(count: int) -> None:
    case = make_case([900, 1300], 2 * NARROW, 2, h_kv=2, dtype=torch.float16)
    require_shared_attention(case, count, 2)


@pytest.mark.parametrize("gangs", (1, 2))
@pytest.mark.parametrize("heads", (NARROW, WIDE))
@pytest.mark.parametrize("count", COUNTS)
def test_sinks_scale_the_output_once_and_leave_the_lse(count: int, heads: int, gangs: int) -> None:
    """As large as they are, a sink in every mate's share would show."""
    sizes = ([1300, 700], heads, 2)
    sinks = torch.linspace(-3, 9, heads)
    with_sinks = require_shared_attention(make_case(*sizes, attn_sink=sinks), count, gangs)
    without = require_shared_attention(make_case(*sizes), count, gangs)
    assert same_bits(with_sinks.lse, without.lse)
    assert same_bits(with_sinks.o_scratch, without.o_scratch), "a sink is no part of a partial"
    assert not same_bits(with_sinks.o, without.o)


@pytest.mark.parametrize("to_slot", (False, True))
@pytest.mark.parametrize("heads", (8, NARROW))
@pytest.mark.parametrize("count", COUNTS)
def test_mate_without_a_visible_key_changes_nothing(count: int, heads: int, to_slot: bool) -> None:
    """The last mate has two positions, which the first two of four new tokens do not see."""
    length = (count - 1) * KV_TILE + 2
    case = make_case([length], heads, 4)
    dst = -1 if to_slot else 0
    mates = gang(Partial(0, dst, 0, 0, length, length), count, 100)
    assert mates[-1].end - mates[-1].start == 2
    merge = Reduction(200, 0, 0, range(1), num_rows=4 * heads)
    launch = run_queue(case, [*mates, merge] if to_slot else [*mates], int(to_slot))
    errors = launch.errors()
    assert errors.passed, errors


@pytest.mark.parametrize("count", COUNTS)
def test_mates_agree_with_a_reduction_of_the_same_ranges(count: int) -> None:
    """One merge, whoever does it: the same bits."""
    case = make_case([1000], NARROW, 2, attn_sink=torch.linspace(-2, 4, NARROW))
    mates = gang(Partial(0, 0, 0, 0, 1000, 1000), count, 100)
    apart = [replace(m, uid=i, dst_batch=-i - 1, num_mates=0, mate=0) for i, m in enumerate(mates)]
    merge = Reduction(200, 0, 0, range(count), num_rows=2 * NARROW)
    together = run_queue(case, [*mates], 0)
    reduced = run_queue(case, [*apart, merge], count)
    assert same_bits(together.o, reduced.o)
    assert same_bits(together.lse, reduced.lse)


# Interleavings


@pytest.mark.parametrize("gangs", (1, 2))
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("workers", (1, 2, 3, 8, 40))
def test_every_interleaving_agrees(workers: int, count: int, gangs: int) -> None:
    case = make_case([1400, 900, 30], NARROW, 3, attn_sink=torch.linspace(-2, 4, NARROW))
    queue, num_slots = shared(case, count, gangs)
    in_order = run_queue(case, queue, num_slots)
    errors = in_order.errors()
    assert errors.passed, errors
    for seed in (None, 0, 1, 2):
        shuffled = run_queue(case, queue, num_slots, num_workers=workers, seed=seed)
        assert same_bits(in_order.o, shuffled.o)
        assert same_bits(in_order.lse, shuffled.lse)


def test_reader_runs_after_every_mate_is_published() -> None:
    case = make_case([2000], NARROW, 1)
    queue, num_slots = shared(case, 4, 2)
    orders = set()
    for seed in range(10):
        launch = Launch.of(case, pack(*queue), num_slots)
        steps = interpreter.run(launch.arguments(), num_workers=5, seed=seed).steps
        orders.add(tuple(step.index for step in steps))
        by_index = {step.index: step for step in steps}
        reader = by_index[len(queue) - 1]
        assert all(by_index[i].published < reader.executed for i in range(len(queue) - 1))
    assert len(orders) > 1


def test_launches_on_one_workspace_share_nothing() -> None:
    case = make_case([2000], NARROW, 1)
    queue, num_slots = shared(case, 8, 2)
    launch = Launch.of(case, pack(*queue), num_slots)
    for epoch in (1, 2, 3):
        launch.poison()
        interpreter.run(launch.arguments(), num_workers=3, seed=epoch)
        assert launch.errors().passed
        assert launch.completion_flag.tolist() == [epoch] * num_slots


def test_deadlock_names_the_mate_that_is_missing() -> None:
    """Worker 1 starts with the reader; the mate that it takes next, if any, stands behind it."""
    case = make_case([130], 8, 1)
    mates = gang(Partial(0, -1, 0, 0, 130, 130), 2, 100)
    queue = pack(Noop(300), Reduction(200, 0, 0, (0,)), *mates)
    named = set()
    for seed in range(40):
        launch = Launch.of(case, queue, num_slots=1)
        try:
            interpreter.run(launch.arguments(), num_workers=2, seed=seed)
        except DeadlockError as error:
            (line,) = error.waits
            missing = [uid for uid in (0, 101) if f"uid {uid} writes it, held by worker 1" in line]
            named.update(missing)
            assert len(missing) == 1
        else:
            assert launch.errors().passed
    assert named == {0, 101}


# Checks of the words


def test_queue_of_mates_passes_the_checks() -> None:
    case = make_case([2000, 1500], NARROW, 1)
    for count in COUNTS:
        queue, num_slots = shared(case, count)
        run_queue(case, queue, num_slots)


BAD_WORDS = {  # queue position, word, value, message
    "odd number": (0, 11, 3, r"0 .*word 11 \(num_mates\): expected one of \(0, 2, 4, 8\), got 3"),
    "too many": (0, 11, 16, r"word 11 \(num_mates\): expected one of \(0, 2, 4, 8\), got 16"),
    "negative": (0, 11, -2, r"word 11 \(num_mates\): expected one of \(0, 2, 4, 8\), got -2"),
    "another number": (1, 11, 2, r"word 11 \(num_mates\): expected that many partials"),
    "too few": (3, 11, 0, r"3 .*word 12 \(mate\): expected the queue position modulo num_mates"),
    "no mate": (3, 0, 0, r"0 .*word 11 \(num_mates\): expected that many partials, neighbours"),
    "end of the queue": (3, 0, -1, r"0 .*word 11 \(num_mates\): expected that many partials"),
    "order": (2, 12, 1, r"instruction 2 .*word 12 \(mate\): expected the queue position"),
    "mate alone": (4, 12, 1, r"instruction 4 .*word 12 \(mate\): .* without mates 0, got 1"),
    "destination": (1, 2, -1, r"1 .*word 2 \(dst_batch\): expected the same as of mate 0, got -1"),
    "length": (2, 8, 999, r"2 .*word 8 \(length\): expected the same as of mate 0, got 999"),
    "rows": (2, 10, 16, r"2 .*word 10 \(num_rows\): expected the same as of mate 0, got 16"),
    "adopted": (1, 13, 1, r"1 .*word 13 \(adopted\): expected 0, as mates adopt nothing, got 1"),
    "gap": (2, 6, 576, r"2 .*word 6 \(start\): expected the end of the mate before it, got 576"),
}


@pytest.mark.parametrize("name", BAD_WORDS)
def test_bad_word_of_mates_is_named(name: str) -> None:
    index, word, value, message = BAD_WORDS[name]
    case = make_case([1000, 100], NARROW, 1)
    mates = gang(Partial(7, 0, 0, 0, 1000, 1000), 4, 100)
    words = pack(*mates, Partial(8, 1, 1, 0, 100, 100))
    words[index, word] = value
    with pytest.raises(QueueError, match=message):
        Launch.of(case, words, num_slots=1).run()


def test_mates_start_at_a_multiple_of_their_number() -> None:
    case = make_case([1000, 100], NARROW, 1)
    mates = gang(Partial(7, 0, 0, 0, 1000, 1000), 4, 100)
    words = pack(Partial(8, 1, 1, 0, 100, 100), *mates)
    with pytest.raises(QueueError, match=r"instruction 1 .*word 12 \(mate\)"):
        Launch.of(case, words, num_slots=1).run()


def test_mates_run_on_the_first_ctas_of_clusters_that_hold_them() -> None:
    mates = gang(Partial(7, 0, 0, 0, 1000, 1000), 4, 100)
    words = pack(*mates, Partial(8, 1, 1, 0, 100, 100))
    check_mates_run(words, 4, 4)
    check_mates_run(words, 8, 8)
    with pytest.raises(QueueError, match=r"0 .*\(num_mates\): expected at most 2"):
        check_mates_run(words, 4, 2)
    with pytest.raises(QueueError, match=r"3 .*\(mate\): expected mates among the first 3 "):
        check_mates_run(words, 3, 4)


def test_plan_must_have_workers_for_its_mates(tmp_path: Path) -> None:
    made = plan_with_mates(make_case([2000, 1500], NARROW, 1), 4, 1)
    assert made.cluster_ctas == 4
    for workers in (4, made.num_workers + 1):  # too few; not all in clusters
        with pytest.raises(ScheduleError, match="num_workers: expected a multiple of 4"):
            replace(made, num_workers=workers)
    path = tmp_path / "plan.json"
    made.save(path)
    document = json.loads(path.read_text())
    document["num_workers"] = 4
    path.write_text(json.dumps(document))
    with pytest.raises(ScheduleError, match="num_workers: expected a multiple of 4"):
        Plan.load(path, validate=False)


def test_plan_for_more_clusters_than_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plan_with_mates(make_case([2000, 1500], NARROW, 1), 4, 1)
    device = torch.device("cpu")
    monkeypatch.setattr(native, "max_clusters", lambda size, device: 2)
    assert decoding._grid(made, device, 132) == native.Grid(8, 4)
    monkeypatch.setattr(native, "max_clusters", lambda size, device: 1)
    with pytest.raises(UnsupportedError, match="at most 1 clusters of 4 SMs"):
        decoding._grid(made, device, 132)


def test_grid_that_cannot_run_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(native, "num_sms", lambda device: 132)
    monkeypatch.setattr(native, "max_clusters", lambda size, device: 120 // size)
    assert raw.require_grid(native.Grid(), device) == native.Grid(132)
    assert raw.require_grid(native.Grid(0, 8), device) == native.Grid(120, 8)
    assert raw.require_grid(native.Grid(16, 8), device) == native.Grid(16, 8)
    for grid, message in (
        (native.Grid(133), "num_ctas: expected at most 132"),
        (native.Grid(16, 3), "cluster_ctas: expected one of"),
        (native.Grid(12, 8), "num_ctas: expected a multiple of cluster_ctas, at most 120"),
        (native.Grid(128, 8), "num_ctas: expected a multiple of cluster_ctas, at most 120"),
    ):
        with pytest.raises(RangeError, match=message):
            raw.require_grid(grid, device)


# Plans and timelines


def plan_with_mates(case: Case, count: int, gangs: int) -> Plan:
    queue, num_slots = shared(case, count, gangs)
    size = len(queue)
    return replace(
        plan_of(case, num_workers=-(-size // count) * count),
        instructions=pack(*queue),
        num_slots=num_slots,
        worker=np.arange(size, dtype=np.int32),
        start_us=np.zeros(size, np.float64),
        end_us=np.arange(1, size + 1, dtype=np.float64),
    )


def test_mates_are_one_piece_of_a_request() -> None:
    case = make_case([2000, 1500, 0], WIDE, 2)
    assert plan_with_mates(case, 4, 1).partials_per_request() == [1, 1, 0]
    assert plan_with_mates(case, 4, 2).partials_per_request() == [2, 2, 0]


def test_table_and_trace_name_mates(tmp_path: Path) -> None:
    case = make_case([2000], NARROW, 1)
    plan = plan_with_mates(case, 8, 2)
    lines = [line for line in plan.table().splitlines() if "mate" in line]
    assert [line.split(", ")[-1] for line in lines] == [f"mate {i} of 8" for i in range(8)] * 2
    events = json.loads(write_trace(timeline.predicted(plan), tmp_path / "t.json").read_text())
    named = [e["args"]["mate"] for e in events["traceEvents"] if "mate" in e.get("args", {})]
    assert named == [f"{i} of 8" for i in range(8)] * 2


def test_mates_are_one_input_in_a_timeline() -> None:
    """The flow comes from the one that ends last."""
    case = make_case([2000], NARROW, 1)
    plan = plan_with_mates(case, 4, 2)
    assert timeline.predicted(plan).flows == ((3, 8), (7, 8))
    early = replace(plan, end_us=np.array([1, 9, 2, 3, 9.5, 4, 5, 6, 20], np.float64))
    assert timeline.predicted(early).flows == ((1, 8), (4, 8))
