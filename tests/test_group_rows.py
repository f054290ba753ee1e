"""Row groups of 32 or 16 rows instead of 64: words, checks, results, and who plans them when."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mla_decode
import numpy as np
import pytest
import torch
from mla_decode import _scheduler, cost, decoding, native
from mla_decode.device_plan import PlannedWords
from mla_decode.errors import QueueError, RangeError, ScheduleError, ShapeError
from mla_decode.measure import decode_case
from mla_decode.reference import Case, make_case
from mla_decode.words import GROUP_ROWS, MAX_ROWS, Partial, Reduction, group_rows_of

from tests.support import Launch, cut, pack, plan_of, require_attention, run_queue, same_bits
from tests.test_adoption import chained
from tests.test_mates import shared
from tests.test_mla import VARIANTS, decode_errors, variant

SMALL = (16, 32)
LENGTHS = [700, 1, 300, 64, 0, 130]
SIZES = [(64, 1), (16, 4), (12, 5), (128, 1), (20, 2), (9, 1)]  # heads, new tokens
ADOPTING = SIZES[:3]  # whose row groups are too many for one SM each: some are cut

_SHARED: dict[str, Callable[[Case, int], tuple[list[Any], int]]] = {
    "reductions": lambda case, rows: cut(case, 2, group_rows=rows),
    "mates": lambda case, rows: shared(case, 2, 1, rows),
    "mates and reductions": lambda case, rows: shared(case, 2, 2, rows),
    "adoption": lambda case, rows: chained(case, 2, 2, rows),
}


def require_decoded(case: Case, plan: mla_decode.Plan | mla_decode.DevicePlan) -> None:
    errors = decode_errors(case, plan=plan)
    assert errors.passed, errors


def partials(plan: mla_decode.Plan) -> list[Partial]:
    return [i for i in plan.decoded() if isinstance(i, Partial)]


# Words


def test_a_slots_rows_say_how_large_groups_are() -> None:
    assert [group_rows_of(rows) for rows in (16, 32, 64)] == [16, 32, 64]
    assert {group_rows_of(rows) for rows in (0, 1, 15, 17, 31, 33, 63)} == {64}


@pytest.mark.parametrize("group_rows", GROUP_ROWS)
@pytest.mark.parametrize("heads, tokens", SIZES)
def test_groups_begin_at_multiples_and_are_whole(heads: int, tokens: int, group_rows: int) -> None:
    plan = mla_decode.plan(LENGTHS, heads, tokens, group_rows=group_rows, validate=True)
    assert plan.group_rows == group_rows
    assert plan.slot_rows == min(group_rows, heads * tokens)
    for partial in partials(plan):
        assert partial.row_begin % group_rows == 0
        assert partial.num_rows == min(group_rows, heads * tokens - partial.row_begin)
    for merge in plan.decoded():
        if isinstance(merge, Reduction):
            rows = merge.rows(heads)
            assert rows[0] // group_rows == rows[-1] // group_rows


def test_plans_are_valid_for_their_groups_only() -> None:
    plan = mla_decode.plan([700, 65], 64, group_rows=16)
    arguments = ([700, 65], 64, 1, plan.num_slots)
    _scheduler.validate(plan.instructions, *arguments, group_rows=16)
    for group_rows in (32, 64):
        with pytest.raises(_scheduler.ScheduleError, match=r"\(rule: row(s|-group)\)$"):
            _scheduler.validate(plan.instructions, *arguments, group_rows=group_rows)


def test_no_merge_goes_across_groups() -> None:
    queue = [
        Partial(uid=i, dst_batch=-i - 1, q_batch=0, start=0, end=64, length=64, row_begin=16 * i)
        for i in range(4)
    ]
    merge = Reduction(9, 0, 0, range(4), num_rows=32)
    with pytest.raises(_scheduler.ScheduleError, match=r"one row group \(rule: row-group\)$"):
        _scheduler.validate(pack(*queue, merge), [64], 64, 1, 4, group_rows=16)


@pytest.mark.parametrize("group_rows", (0, 8, 48, 128))
def test_other_sizes_are_refused(group_rows: int) -> None:
    with pytest.raises(RangeError, match=rf"group_rows: expected one of .*got {group_rows}"):
        mla_decode.plan([64], 64, group_rows=group_rows)
    with pytest.raises(ValueError, match=rf"group_rows: expected 16, 32 or 64, got {group_rows}"):
        _scheduler.plan([64], 64, 1, 132, _scheduler.CostModel(), group_rows=group_rows)
    words = mla_decode.plan([64], 64).instructions
    with pytest.raises(ValueError, match=rf"group_rows: expected 16, 32 or 64, got {group_rows}"):
        _scheduler.simulate(words, 64, 1, 132, _scheduler.CostModel(), group_rows=group_rows)


def test_a_launch_with_slots_of_other_rows_is_refused() -> None:
    case = make_case([700], 64, 1)
    plan = plan_of(case, group_rows=16, clusters=False)
    Launch.of(case, plan.instructions, plan.num_slots, 16).run()
    with pytest.raises(QueueError, match=r"\(row_begin\): expected a first row .* of 32, got 16"):
        Launch.of(case, plan.instructions, plan.num_slots, 32).run()
    with pytest.raises(QueueError, match=r"\(row_begin\): expected a first row .* of 64, got 16"):
        Launch.of(case, plan.instructions, plan.num_slots).run()
    with pytest.raises(ShapeError, match="o_scratch: expected at least 64 rows per slot"):
        Launch.of(case, plan.instructions, plan.num_slots, 24).run()


def test_saved_plans_keep_their_groups(tmp_path: Path) -> None:
    made = mla_decode.plan([402], 128)
    for name in ("plan.json", "plan.npz"):
        made.save(tmp_path / name)
        loaded = mla_decode.Plan.load(tmp_path / name)
        assert loaded.group_rows == made.group_rows == 16
        np.testing.assert_array_equal(loaded.instructions, made.instructions)


# Results


@pytest.mark.parametrize("group_rows", SMALL)
@pytest.mark.parametrize("policy", ("balanced", "fixed", "backward", "unsplit"))
@pytest.mark.parametrize("heads, tokens", SIZES)
def test_plans_give_attention(heads: int, tokens: int, policy: str, group_rows: int) -> None:
    case = make_case(LENGTHS, heads, tokens)
    options = {"policy": policy, "split_tiles": 2 if policy == "fixed" else 0}
    plan = plan_of(case, group_rows=group_rows, **options)
    require_decoded(case, plan)


@pytest.mark.parametrize("group_rows", SMALL)
@pytest.mark.parametrize("merge", _SHARED)
@pytest.mark.parametrize("heads, tokens", [(64, 1), (12, 5)])
def test_every_kind_of_merge_gives_attention(
    heads: int, tokens: int, merge: str, group_rows: int
) -> None:
    case = make_case([500, 300], heads, tokens, attn_sink=torch.linspace(-3, 9, heads))
    queue, num_slots = _SHARED[merge](case, group_rows)
    require_attention(run_queue(case, queue, num_slots, group_rows))


@pytest.mark.parametrize("group_rows", SMALL)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_give_attention(name: str, group_rows: int) -> None:
    case = variant(name, [130, 1, 0, 700, 64, 3], 24)
    require_decoded(case, plan_of(case, group_rows=group_rows))


@pytest.mark.gpu
@pytest.mark.parametrize("group_rows", SMALL)
@pytest.mark.parametrize("lengths", [[130, 1, 0, 700, 64, 3], [9000, 40, 0, 33000, 1, 64]], ids=str)
@pytest.mark.parametrize("heads_per_kv", (24, 64, 128))
@pytest.mark.parametrize("name", VARIANTS)
def test_gpu_variants(name: str, heads_per_kv: int, lengths: list[int], group_rows: int) -> None:
    case = variant(name, lengths, heads_per_kv, "cuda")
    require_decoded(case, plan_of(case, group_rows=group_rows))


@pytest.mark.gpu
@pytest.mark.parametrize("group_rows", SMALL)
@pytest.mark.parametrize("heads, tokens", SIZES)
def test_gpu_batches_that_fill_the_sms(heads: int, tokens: int, group_rows: int) -> None:
    lengths = [700 + 64 * (i % 5) for i in range(75)]
    case = make_case(lengths, heads, tokens, device="cuda")
    plan = plan_of(case, group_rows=group_rows)
    if (heads, tokens) in ADOPTING:
        assert any(partial.adopted is not None for partial in partials(plan))
    require_decoded(case, plan)


# When the planner has them


def test_few_short_requests_are_planned_in_small_groups() -> None:
    for lengths, heads, tokens in (([402], 128, 1), ([333] * 3, 64, 1), ([500] * 2, 16, 2)):
        plan = mla_decode.plan(lengths, heads, tokens)
        assert plan.group_rows == 16
        assert "rows in groups of 16" in plan.summary()


@pytest.mark.parametrize(
    ("lengths", "heads"), [([131072], 128), ([4096] * 128, 64), ([8192] * 32, 64), ([402], 16)]
)
def test_long_and_large_batches_are_not(lengths: list[int], heads: int) -> None:
    plan = mla_decode.plan(lengths, heads)
    assert plan.group_rows == MAX_ROWS
    assert "groups" not in plan.summary()


def test_the_planner_takes_what_is_predicted_to_be_fastest() -> None:
    chosen = set()
    for tiles in range(1, 100, 7):
        lengths = [64 * tiles] * 4
        plans = [mla_decode.plan(lengths, 64, group_rows=rows) for rows in GROUP_ROWS]
        best = mla_decode.plan(lengths, 64)
        assert best.predicted_us == min(plan.predicted_us for plan in plans)
        chosen.add(best.group_rows)
    assert len(chosen) > 1


def test_a_size_that_is_no_better_does_not_hide_the_next_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Launches for groups of 64 rows are dear by this model, and for those of 32 dearer."""
    dear_by_us = {"cost": 100.0, "narrow_cost": 1000.0, "narrowest_cost": 0.0}
    model = cost.load(None, 16).as_dict()
    models = {key: model | {"launch_us": us} for key, us in dear_by_us.items()}
    model_file = tmp_path / "models.json"
    model_file.write_text(json.dumps(models), encoding="utf-8")
    monkeypatch.setenv("MLA_DECODE_COST_MODEL", str(model_file))
    batch = ([8000, 5000], 16, 3)
    us = {rows: mla_decode.plan(*batch, group_rows=rows).predicted_us for rows in GROUP_ROWS}
    assert us[16] < us[64] < us[32]
    assert mla_decode.plan(*batch).group_rows == 16


def test_who_asks_for_something_else_gets_groups_of_64() -> None:
    wide = cost.load(None, MAX_ROWS)
    options: list[dict[str, Any]] = [
        {"policy": "unsplit"},
        {"batch_invariant": True},
        {"cost_model": wide},
    ]
    for option in options:
        assert mla_decode.plan([402], 128, **option).group_rows == MAX_ROWS


def test_sequences_without_keys_or_tokens_count_for_nothing() -> None:
    plan = mla_decode.plan([402, 0, 500], 128, [1, 1, 0])
    assert plan.group_rows == 16
    assert mla_decode.plan([0, 0], 128).group_rows == MAX_ROWS


def test_groups_that_read_the_same_keys_are_not_in_each_others_way() -> None:
    """Four row groups of one sequence, and four sequences of one."""
    busy = _scheduler.CostModel(partial_tile_contention_us=1.0)
    together = _scheduler.plan([640], 64, 1, 4, busy, "unsplit", group_rows=16).instructions
    apart = _scheduler.plan([640] * 4, 16, 1, 4, busy, "unsplit", group_rows=16).instructions
    us = [
        _scheduler.simulate(words, heads, 1, 4, busy, group_rows=16)[3]
        for words, heads in ((together, 64), (apart, 16))
    ]
    assert us[0] < us[1]


def test_a_decode_call_without_a_plan_takes_them_too() -> None:
    case = make_case([402], 128, 1)
    assert plan_of(case).group_rows == 16
    errors = decode_errors(case)
    assert errors.passed, errors


def test_a_plan_that_breaks_its_groups_does_not_run() -> None:
    made = mla_decode.plan([402], 128)
    made.instructions[0, 10] = 8
    with pytest.raises(ScheduleError, match=r"\(rule: (rows|mates)\)"):
        made.validate()


# Launches in pairs


@pytest.mark.parametrize(
    ("heads", "sms", "pairs", "expected"),
    [
        (128, 132, 66, (132, 2)),
        (128, 131, 66, (131, 1)),  # one would be without a neighbour
        (128, 132, 65, (132, 1)),  # not all of them can be in one
        (128, 114, 57, (114, 2)),
        (64, 132, 66, (132, 1)),  # one row group: nobody reads the same keys
    ],
)
def test_row_groups_that_read_the_same_keys_run_in_pairs(
    monkeypatch: pytest.MonkeyPatch, heads: int, sms: int, pairs: int, expected: tuple[int, int]
) -> None:
    monkeypatch.setattr(native, "max_clusters", lambda size, device: pairs)
    lengths = [4096] * 128
    device = torch.device("cpu")
    assert decoding._grid(mla_decode.plan(lengths, heads), device, sms) == expected
    on_device = mla_decode.DevicePlan(128, heads, max_seq_len=4096, device="cpu")
    assert decoding._grid(on_device, device, sms) == expected
    words = PlannedWords(on_device.instructions, on_device.fit_key, on_device.num_slots, 132, 1, 64)
    assert decoding._grid(words, device, sms) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("heads, group_rows", [(128, 64), (128, 32), (96, 64), (40, 16)])
def test_gpu_pairs_give_the_same_bits(heads: int, group_rows: int) -> None:
    lengths = [3000 + 64 * i for i in range(60)]
    case = make_case(lengths, heads, 2, device="cuda")
    plan = plan_of(case, group_rows=group_rows, clusters=False)
    assert decoding._grid(plan, case.q.device, native.num_sms(case.q.device)).cluster_ctas == 2
    alone = Launch.of_plan(case, plan)
    alone.run()
    out, lse = decode_case(case, plan)
    mla_decode.synchronize()
    assert alone.errors().passed
    assert same_bits(out, alone.o)
    assert same_bits(lse, alone.lse)


@pytest.mark.parametrize("heads", [1, 8, 16])
def test_no_neighbour_chooses_the_kernel_of_a_batch_invariant_plan(heads: int) -> None:
    """Kernels differ in their bits, and slots tell which one runs."""
    plans = [
        mla_decode.plan([20000, *lengths], heads, [1, *tokens], batch_invariant=True)
        for lengths, tokens in (([], []), ([100], [2]), ([0], [16]))
    ]
    assert len({plan.slot_rows for plan in plans}) == 1
    own = plans[0].instructions
    assert all((plan.instructions[0, 5:11] == own[0, 5:11]).all() for plan in plans)
    uniform = mla_decode.plan([20000], heads, 1, batch_invariant=True)
    assert uniform.slot_rows == heads, "all requests of a uniform batch have as many"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ragged_batch_invariant_bits_do_not_depend_on_neighbours(device: str) -> None:
    case = make_case([5000, 90, 300], 16, [1, 3, 2], device=device)
    assert decode_errors(case, batch_invariant=True).passed

    def decode_first(requests: int) -> torch.Tensor:
        tokens = case.cu_seqlens_q[: requests + 1]
        out, _ = mla_decode.decode(
            case.q[: int(tokens[-1])],
            case.kv_cache,
            case.block_table[:requests],
            case.seq_lens[:requests],
            cu_seqlens_q=tokens,
            batch_invariant=True,
        )
        return out[:1]

    assert same_bits(decode_first(1), decode_first(3))
