"""The interpreter: real numerics, every legal interleaving, epochs, and deadlocks as such."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import mla_decode
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_decode import interpreter
from mla_decode.errors import DeadlockError, QueueError, RangeError
from mla_decode.reference import Case, make_case
from mla_decode.words import (
    GROUP_ROWS,
    MAX_ROWS,
    Fill,
    Instruction,
    Noop,
    Partial,
    Reduction,
    decode_words,
)

from tests.support import Launch, cut, pack, plan_of, same_bits

EPOCH_WORD = interpreter.STATE_EPOCH


def split_in_two(
    length: int = 130, *, request: int = 0, first_uid: int = 0
) -> tuple[Partial, Partial, Reduction]:
    """A request of one token in two partials and the reduction that merges them."""
    a, b = first_uid, first_uid + 1
    return (
        Partial(uid=a, dst_batch=-a - 1, q_batch=request, start=0, end=64, length=length),
        Partial(uid=b, dst_batch=-b - 1, q_batch=request, start=64, end=length, length=length),
        Reduction(uid=first_uid + 2, dst_batch=request, dst_seq=0, inputs=(a, b)),
    )


def run_cut(case: Case, tiles: int = 1, **options: Any) -> Launch:
    """A case computed by a queue that cuts it every ``tiles`` tiles."""
    queue, num_slots = cut(case, tiles, **options)
    launch = Launch.of(case, pack(*queue), num_slots)
    launch.run()
    return launch


# Words


@pytest.mark.parametrize(
    "instruction",
    [
        Noop(uid=3),
        Partial(uid=1, dst_batch=-2, q_batch=7, start=64, end=130, length=131, row_begin=64),
        Partial(uid=1, dst_batch=7, q_batch=7, start=64, end=130, length=131, adopted=0),
        Partial(uid=1, dst_batch=-2, q_batch=7, start=64, end=130, length=131, adopted=5),
        Reduction(uid=5, dst_batch=2, dst_seq=3, inputs=(4, 2, 9), head_begin=8, num_rows=7),
        Reduction(uid=5, dst_batch=-6, dst_seq=0, inputs=tuple(range(27)), col_begin=448),
        Reduction(uid=5, dst_batch=2, dst_seq=0, inputs=range(3, 9, 2), row_offset=70, num_rows=5),
        Reduction(uid=5, dst_batch=2, dst_seq=0, inputs=range(65536), num_cols=512),
        Reduction(uid=5, dst_batch=2, dst_seq=1, inputs=range(8, 9), head_begin=255, num_rows=255),
        Fill(uid=2**31 - 1, token_begin=7, token_end=16),
    ],
    ids=str,
)
def test_words_unpack_to_what_was_packed(instruction: Instruction) -> None:
    words = instruction.pack()
    assert decode_words(words) == instruction
    assert type(getattr(decode_words(words), "inputs", None)) is type(
        getattr(instruction, "inputs", None)
    )


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 4, r"word 0: expected an opcode \(-1, 0, 1, 2, 3\), got 4"),
        (2, 27, "word 2: 28 inputs, a reduction lists 27"),
        (6, 0, "word 6: expected 1 to 65536 inputs, got 0"),
        (6, 65537, "word 6: expected 1 to 65536 inputs, got 65537"),
        (7, 0, "word 7: expected a step of at least 1, got 0"),
    ],
)
def test_words_that_mean_nothing_are_refused(word: int, value: int, message: str) -> None:
    listed = word == 2
    words = Reduction(0, 0, 0, (1,) if listed else range(1, 5)).pack()
    words[word] = value
    with pytest.raises(QueueError, match=message):
        decode_words(words)


def test_rows_of_instructions() -> None:
    """12 heads: 64 rows are not a whole number of tokens."""
    group = Partial(uid=0, dst_batch=0, q_batch=0, start=0, end=64, length=64, row_begin=64)
    assert group.rows(12, 12 * 16) == range(64, 128)
    assert group.rows(12, 12 * 6) == range(64, 72)
    assert Reduction(0, 0, dst_seq=2, inputs=(1,)).rows(12) == range(24, 36)
    assert Reduction(0, 0, dst_seq=2, inputs=(1,), head_begin=4).rows(12) == range(28, 36)
    sliced = Reduction(0, 0, 0, range(2), num_rows=9, row_offset=70)
    assert sliced.rows(12) == range(70, 79)


# Numerics


def test_hand_made_queue_gives_attention() -> None:
    case = make_case([130], 16, 1)
    launch = Launch.of(case, pack(*split_in_two(), Noop(uid=3)), num_slots=2)
    launch.run()
    errors = launch.errors()
    assert errors.passed, errors


def test_reduction_tree_in_slices_gives_attention() -> None:
    """Two levels; slices of heads and of columns, each with a slot of its own."""
    case = make_case([256], 16, 1)
    partials = [
        Partial(uid=i, dst_batch=-i - 1, q_batch=0, start=64 * i, end=64 * i + 64, length=256)
        for i in range(4)
    ]
    level, final, slot = [], [], 4
    for head in (0, 8):
        for column in (0, 256):
            piece = {"head_begin": head, "num_rows": 8, "col_begin": column, "num_cols": 256}
            for pair in ((0, 1), (2, 3)):
                level.append(Reduction(slot, -slot - 1, 0, pair, **piece))
                slot += 1
            final.append(Reduction(100 + slot, 0, 0, (slot - 2, slot - 1), **piece))
    launch = Launch.of(case, pack(*partials, *level, *final), num_slots=slot)
    launch.run()
    errors = launch.errors()
    assert errors.passed, errors


def test_row_groups_cover_128_heads() -> None:
    case = make_case([100], 128, 1)
    groups = [
        Partial(
            uid=i, dst_batch=0, q_batch=0, start=0, end=100, length=100, row_begin=r, num_rows=n
        )
        for i, (r, n) in enumerate([(0, 64), (64, 0)])
    ]
    launch = Launch.of(case, pack(*groups), num_slots=0)
    launch.run()
    errors = launch.errors()
    assert errors.passed, errors


def test_token_without_a_visible_key_is_zero_and_inf() -> None:
    """Length 1 with 4 new tokens: the first three see nothing, alone and through a merge."""
    case = make_case([1], 8, 4)
    through_merge = [
        Partial(uid=0, dst_batch=-1, q_batch=0, start=0, end=1, length=1),
        *(Reduction(uid=1 + t, dst_batch=0, dst_seq=t, inputs=(0,)) for t in range(4)),
    ]
    for queue in (
        [Partial(uid=0, dst_batch=0, q_batch=0, start=0, end=1, length=1)],
        through_merge,
    ):
        launch = Launch.of(case, pack(*queue), num_slots=1)
        launch.run()
        assert bool((launch.o[:, :3] == 0).all())
        assert bool((launch.lse[:, :, :3] == torch.inf).all())
        errors = launch.errors()
        assert errors.passed, errors


def test_end_mark_ends_the_queue() -> None:
    case = make_case([130], 16, 1)
    words = pack(*split_in_two(), Noop(uid=3))
    words[2, 0] = -1
    launch = Launch.of(case, words, num_slots=2)
    launch.run()
    assert bool(launch.o.isnan().all()), "the reduction after the end mark ran"
    assert launch.timings[:, 0].tolist() == [1, 1, 0, 0]


def test_one_key_too_many_reads_the_poison() -> None:
    """Proves the trap: a queue that is one token too long does read NaN."""
    case = make_case([100], 8, 1)
    for length, poisoned in ((100, False), (101, True)):
        queue = pack(Partial(uid=0, dst_batch=0, q_batch=0, start=0, end=length, length=length))
        launch = Launch.of(case, queue, num_slots=0)
        launch.run()
        assert bool(launch.o.isnan().any()) == poisoned


@pytest.mark.parametrize("csr", (False, True))
def test_block_id_inside_the_length_is_checked(csr: bool) -> None:
    case = make_case([64, 130], 8, 1, csr=csr)
    table = case.block_table if case.kv_indptr is None else case.block_table[case.kv_indptr[1] :]
    (table if csr else table[1])[2] = 1000
    with pytest.raises(RangeError, match=r"request 1, block 2: expected 0 to \d+, got 1000"):
        run_cut(case)


@pytest.mark.parametrize("runs", (True, False))
@pytest.mark.parametrize("column_slices", (1, 8))
@pytest.mark.parametrize("num_heads", (1, 6, 16, 77, 128))
def test_both_forms_of_reductions_give_attention(
    num_heads: int, column_slices: int, runs: bool
) -> None:
    case = make_case([300, 64, 65], num_heads, 3, seed=num_heads)
    errors = run_cut(case, runs=runs, column_slices=column_slices).errors()
    assert errors.passed, errors


def test_long_run_of_inputs_is_merged() -> None:
    case = make_case([64 * 300 + 1], 8, 2)
    launch = run_cut(case)
    errors = launch.errors()
    assert errors.passed, errors


@pytest.mark.parametrize("h_kv", (1, 2, 3))
@pytest.mark.parametrize("tokens", (1, 5, [3, 1, 0, 16, 2]), ids=str)
def test_kv_heads_and_ragged_tokens_give_attention(tokens: int | list[int], h_kv: int) -> None:
    case = make_case([130, 1, 64, 200, 0], 6 * h_kv, tokens, h_kv=h_kv, seed=h_kv)
    errors = run_cut(case).errors()
    assert errors.passed, errors


@pytest.mark.parametrize("csr", (False, True))
@pytest.mark.parametrize("block_size", (1, 7, 16, 48, 64, 256))
def test_any_block_size_gives_attention(block_size: int, csr: bool) -> None:
    case = make_case([130, 0, 47, 49, 300], 4, 2, block_size, csr=csr)
    errors = run_cut(case, tiles=2).errors()
    assert errors.passed, errors


def test_token_sees_all_keys_without_causal() -> None:
    case = make_case([130, 2, 64], 8, 4, causal=False)
    launch = run_cut(case)
    errors = launch.errors()
    assert errors.passed, errors
    masked = run_cut(make_case([130, 2, 64], 8, 4))
    assert not same_bits(launch.o[:, 0], masked.o[:, 0])
    assert same_bits(launch.o[:, 3], masked.o[:, 3]), "the last token sees all keys either way"
    assert bool(launch.lse.isfinite().all()), "length 2 has 4 tokens, and all see both keys"


@pytest.mark.parametrize("causal", (True, False))
def test_fp16_gives_attention(causal: bool) -> None:
    """fp16 keeps 3 more bits than bf16, so the errors are about 8 times smaller."""
    case = make_case([300, 65, 0], 16, 2, dtype=torch.float16, causal=causal)
    launch = run_cut(case)
    assert launch.o.dtype == torch.float16
    errors = launch.errors()
    assert errors.passed, errors
    assert errors.rel_err < 5e-4


@pytest.mark.parametrize("lse_empty", (math.inf, -math.inf))
@pytest.mark.parametrize("lse_base", (math.e, 2.0))
@pytest.mark.parametrize("tokens", (2, [2, 3, 1]), ids=str)
def test_lse_has_the_base_and_the_empty_value_asked_for(
    tokens: int | list[int], lse_base: float, lse_empty: float
) -> None:
    lengths = [130, 0, 1]
    case = make_case(lengths, 8, tokens, lse_base=lse_base, lse_empty=lse_empty)
    launch = run_cut(case)
    errors = launch.errors()
    assert errors.passed, errors
    natural = run_cut(make_case(lengths, 8, tokens))
    seen = natural.lse.isfinite()
    assert bool(seen.any()) and not bool(seen.all())
    assert bool((launch.lse[~seen] == lse_empty).all())
    torch.testing.assert_close(launch.lse[seen] * math.log(lse_base), natural.lse[seen])


@pytest.mark.parametrize("stride", ("dense", "padded"))
def test_lse_is_written_through_its_strides(stride: str) -> None:
    case = make_case([130, 0], 8, 2)
    queue, num_slots = cut(case, 1)
    launch = Launch.of(case, pack(*queue), num_slots)
    wide = torch.full((8, 2, 2, 3), -7.0).permute(1, 0, 2, 3)
    launch.tensors["lse"] = wide[..., 1] if stride == "padded" else launch.lse.contiguous()
    launch.run()
    assert launch.errors().passed
    if stride == "padded":
        assert bool((wide[..., ::2] == -7).all()), "written beside the lse"


@pytest.mark.parametrize("h_kv", (1, 2))
def test_lse_by_sequences_or_by_tokens_is_the_same(h_kv: int) -> None:
    """``[S, s_q, G]`` and ``[h_kv * T, G]`` of uniform tokens, empty requests among them."""
    case = make_case([130, 0, 5], 4 * h_kv, 3, h_kv=h_kv)
    queue, num_slots = cut(case, 1)
    found = []
    for shape in ((3 * h_kv, 3, 4), (9 * h_kv, 4)):
        launch = Launch.of(case, pack(*queue), num_slots)
        arguments = replace(launch.arguments(), lse=torch.full(shape, math.nan))
        arguments.check()
        interpreter.run(arguments)
        found.append(arguments.lse.flatten())
    assert not found[0].isnan().any()
    assert same_bits(*found)


# Sinks


@pytest.mark.parametrize("h_kv", (1, 2))
@pytest.mark.parametrize("tiles", (1, 8))
def test_sinks_scale_the_output_and_leave_the_lse(tiles: int, h_kv: int) -> None:
    """Written by partials (8 tiles) and by reductions (1 tile); different for every head."""
    sinks = torch.linspace(-3, 9, 8 * h_kv)
    sizes = ([300, 65, 1, 0], 8 * h_kv, 2)
    with_sinks = run_cut(make_case(*sizes, h_kv=h_kv, attn_sink=sinks), tiles)
    without = run_cut(make_case(*sizes, h_kv=h_kv), tiles)
    errors = with_sinks.errors()
    assert errors.passed, errors
    assert same_bits(with_sinks.lse, without.lse)
    assert same_bits(with_sinks.o_scratch, without.o_scratch), "a sink is no part of a partial"
    assert not same_bits(with_sinks.o, without.o)


@pytest.mark.parametrize("tiles", (1, 8))
def test_infinite_sinks_give_zero_or_nothing(tiles: int) -> None:
    sizes = ([300, 65, 1, 0], 8, 4)
    sinks = [math.inf, -math.inf] * 4
    launch = run_cut(make_case(*sizes, attn_sink=sinks), tiles)
    without = run_cut(make_case(*sizes), tiles)
    assert bool((launch.o[:, :, ::2] == 0).all())
    assert same_bits(launch.o[:, :, 1::2], without.o[:, :, 1::2])
    assert same_bits(launch.lse, without.lse)
    assert launch.errors().passed


def test_a_launch_builds_no_graph() -> None:
    case = make_case([130, 65], 8)
    sink = torch.nn.Parameter(torch.zeros(8))
    launch = run_cut(replace(case, attn_sink=sink))
    expected = run_cut(replace(case, attn_sink=sink.detach()))
    assert not launch.o.requires_grad
    assert not launch.o_scratch.requires_grad
    assert same_bits(launch.o, expected.o)


def test_autocast_changes_nothing() -> None:
    case = make_case([130, 65], 8)
    expected = run_cut(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        launch = run_cut(case)
    assert same_bits(launch.o, expected.o)
    assert same_bits(launch.lse, expected.lse)


# Fills


@pytest.mark.parametrize("h_kv", (1, 2))
def test_empty_requests_and_padding_are_filled(h_kv: int) -> None:
    case = make_case(
        [0, 130, 0], 4 * h_kv, [2, 3, 1], h_kv=h_kv, padding_tokens=5, lse_empty=-math.inf
    )
    launch = run_cut(case)
    errors = launch.errors()
    assert errors.passed, errors
    out, lse = launch.result()
    for tokens in (slice(0, 2), slice(5, 11)):
        assert bool((out[tokens] == 0).all())
        assert bool((lse[tokens] == -math.inf).all())
    assert bool((out[2:5] != 0).any())


def test_fill_writes_its_tokens_alone() -> None:
    case = make_case([0, 64, 0], 8, 2)
    launch = Launch.of(case, pack(Fill(uid=0, token_begin=1, token_end=3)), num_slots=0)
    launch.run()
    written = ~launch.o.view(6, 8, 512).isnan()
    assert written[:, 0, 0].tolist() == [False, True, True, False, False, False]
    assert torch.equal(written, written[:, :1, :1].expand_as(written))
    assert launch.lse.isnan().transpose(1, 2).reshape(6, 8)[:, 0].tolist() == [
        not filled for filled in written[:, 0, 0]
    ]


def test_fill_without_an_lse_leaves_it_out() -> None:
    case = make_case([0], 8, 2)
    launch = Launch.of(case, pack(Fill(uid=0, token_begin=0, token_end=2)), num_slots=0)
    launch.tensors["lse"] = None
    launch.run()
    assert bool((launch.o == 0).all())


def test_demo_batch_is_right_and_quick() -> None:
    case = make_case([4641, 45118, 1730, 1696], 16, 4)
    launch = Launch.of_plan(case, plan_of(case))
    started = time.perf_counter()
    launch.run()
    elapsed = time.perf_counter() - started
    errors = launch.errors()
    assert errors.passed, errors
    assert elapsed < 20


# Interleavings


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Batches of every kind, small enough for the interpreter."""
    length = st.one_of(st.integers(0, 3), st.integers(1, 300), st.integers(300, 1500))
    lengths = draw(st.lists(length, min_size=1, max_size=5))
    each = st.lists(st.integers(0, 16), min_size=len(lengths), max_size=len(lengths))
    tokens = draw(st.one_of(st.integers(1, 4), each.filter(any)))
    h_kv = draw(st.sampled_from((1, 1, 1, 2)))
    heads = draw(st.sampled_from((1, 8, 12, 16, 64, 128)))
    if isinstance(tokens, list) and heads * max(tokens) > 256:
        heads = 12
    sinks = draw(st.booleans())
    return make_case(
        lengths,
        heads * h_kv,
        tokens,
        draw(st.sampled_from((1, 16, 48, 64, 128))),
        seed=draw(st.integers(0, 1000)),
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16))),
        h_kv=h_kv,
        padding_tokens=draw(st.integers(0, 3)),
        csr=draw(st.booleans()),
        causal=draw(st.booleans()),
        attn_sink=torch.linspace(-2, 8, heads * h_kv) if sinks else None,
        lse_base=draw(st.sampled_from((math.e, 2.0))),
        lse_empty=draw(st.sampled_from((math.inf, -math.inf))),
    )


def require_same_under_interleaving(
    case: Case,
    queue: list[Instruction],
    num_slots: int,
    workers: int,
    seed: int,
    group_rows: int = MAX_ROWS,
) -> None:
    in_order = Launch.of(case, pack(*queue), num_slots, group_rows)
    in_order.run()
    errors = in_order.errors()
    assert errors.passed, errors
    shuffled = Launch.of(case, pack(*queue), num_slots, group_rows)
    interpreter.run(shuffled.arguments(), num_workers=workers, seed=seed)
    assert same_bits(in_order.o, shuffled.o)
    assert same_bits(in_order.lse, shuffled.lse)


@settings(max_examples=30)
@given(
    case=cases(),
    tiles=st.integers(1, 4),
    runs=st.booleans(),
    workers=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)
def test_every_interleaving_of_a_cut_agrees(
    case: Case, tiles: int, runs: bool, workers: int, seed: int
) -> None:
    queue, num_slots = cut(case, tiles, runs=runs)
    require_same_under_interleaving(case, queue, num_slots, workers, seed)


@settings(max_examples=30)
@given(
    case=cases(),
    sms=st.integers(1, 160),
    group_rows=st.sampled_from([None, *GROUP_ROWS]),
    workers=st.integers(1, 160),
    seed=st.integers(0, 2**32),
)
def test_every_plan_validates_and_every_interleaving_agrees(
    case: Case, sms: int, group_rows: int | None, workers: int, seed: int
) -> None:
    plan = plan_of(case, num_workers=sms, group_rows=group_rows)
    plan.validate()
    require_same_under_interleaving(
        case, plan.decoded(), plan.num_slots, workers, seed, plan.group_rows
    )


@pytest.mark.parametrize("policy", ("balanced", "backward", "unsplit", "fixed"))
def test_every_policy_gives_attention(policy: str) -> None:
    case = make_case([700, 1, 3000, 0], 16, 2)
    plan = plan_of(case, policy=policy, split_tiles=3 if policy == "fixed" else 0)
    launch = Launch.of_plan(case, plan)
    interpreter.run(launch.arguments(), num_workers=9, seed=1)
    errors = launch.errors()
    assert errors.passed, errors


def test_seeds_give_different_orders_and_the_same_seed_the_same() -> None:
    case = make_case([2000], 8, 1)
    plan = mla_decode.plan([2000], 8, num_workers=8)

    def order(seed: int) -> list[tuple[int, int]]:
        launch = Launch.of_plan(case, plan)
        run = interpreter.run(launch.arguments(), num_workers=8, seed=seed)
        return [(step.index, step.worker) for step in run.steps]

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(5)}) == 5


def test_workers_finish_their_own_in_order_and_start_at_their_index() -> None:
    case = make_case([3000], 8, 1)
    plan = mla_decode.plan([3000], 8, num_workers=6)
    launch = Launch.of_plan(case, plan)
    run = interpreter.run(launch.arguments(), num_workers=6, seed=4)
    assert sorted(step.index for step in run.steps) == list(range(plan.num_instructions))
    for worker in range(6):
        mine = [step.index for step in run.steps if step.worker == worker]
        assert mine == sorted(mine)
        assert mine[0] == worker


def test_reader_runs_after_every_input_is_published() -> None:
    case = make_case([3000, 500], 16, 2)
    plan = mla_decode.plan([3000, 500], 16, 2)
    run = interpreter.run(Launch.of_plan(case, plan).arguments(), num_workers=40, seed=9)
    steps = {step.index: step for step in run.steps}
    decoded = plan.decoded()
    writer = {i.slot: n for n, i in enumerate(decoded) if i.slot is not None}
    checked = 0
    for n, instruction in enumerate(decoded):
        for slot in instruction.inputs:
            assert steps[writer[slot]].published < steps[n].executed
            checked += 1
    assert checked > 0


def test_a_missing_dependency_shows_under_some_interleaving() -> None:
    """Flags raised by hand beforehand: the reduction may run first, and then reads NaN."""
    case = make_case([130], 8, 1)
    poisoned = 0
    for seed in range(20):
        launch = Launch.of(case, pack(*split_in_two()), num_slots=2)
        launch.completion_flag.fill_(1)  # the epoch of the first launch
        interpreter.run(launch.arguments(), num_workers=3, seed=seed)
        poisoned += bool(launch.o.isnan().any())
    assert 0 < poisoned < 20


# Epochs


def test_launches_on_one_workspace_advance_the_epoch() -> None:
    case = make_case([130], 8, 1)
    launch = Launch.of(case, pack(*split_in_two()), num_slots=2)
    state = launch.global_instruction_index
    results = []
    for number in range(1, 5):
        launch.poison()
        launch.run()
        results.append(launch.o.clone())
        assert state[interpreter.STATE_NEXT_TICKET] == 0
        assert state[EPOCH_WORD] == number
        assert launch.completion_flag.tolist() == [number, number]
    assert all(same_bits(results[0], result) for result in results)
    assert not results[0].isnan().any()


def test_flags_of_an_earlier_launch_satisfy_nobody() -> None:
    case = make_case([130], 8, 1)
    launch = Launch.of(case, pack(*split_in_two()), num_slots=2)
    for seed in range(20):
        launch.poison()
        interpreter.run(launch.arguments(), num_workers=3, seed=seed)
        assert not launch.o.isnan().any()


@pytest.mark.parametrize("tics", [(0, 0, 0), (0, 1, 2), (1, 0, 1), (7, 7, 0)], ids=str)
def test_any_tic_gives_a_new_epoch(tics: tuple[int, ...]) -> None:
    case = make_case([130], 8, 1)
    launch = Launch.of(case, pack(*split_in_two()), num_slots=2)
    epochs = []
    for tic in tics:
        launch.tensors["tic"] = tic
        launch.poison()
        launch.run()
        epochs.append(int(launch.completion_flag[0]))
        assert not launch.o.isnan().any()
    assert len(set(epochs)) == len(epochs)


def test_epoch_wraps_around() -> None:
    case = make_case([130], 8, 1)
    launch = Launch.of(case, pack(*split_in_two()), num_slots=2)
    launch.global_instruction_index[EPOCH_WORD] = 2**31 - 1
    launch.run()
    assert launch.global_instruction_index[EPOCH_WORD] == -(2**31)
    assert not launch.o.isnan().any()


# Deadlocks


def test_input_that_nothing_writes_is_a_deadlock() -> None:
    case = make_case([130], 8, 1)
    first, _, merge = split_in_two()
    launch = Launch.of(case, pack(first, merge), num_slots=2)
    with pytest.raises(DeadlockError) as caught:
        launch.run()
    (line,) = caught.value.waits
    assert "worker 0: instruction 1 (uid 2, reduction)" in line
    assert "flag [slot 1] == 1, sees 0: nothing in the queue writes it" in line


def test_input_of_a_run_that_nothing_writes_is_a_deadlock() -> None:
    case = make_case([64 * 5], 8, 1)
    (*partials, merge), num_slots = cut(case, 1)
    del partials[3]
    launch = Launch.of(case, pack(*partials, merge), num_slots)
    with pytest.raises(DeadlockError, match=r"flag \[slot 3\] == 1, sees 0: nothing in the queue"):
        launch.run()


def test_launch_after_a_deadlock_works() -> None:
    case = make_case([130], 8, 1)
    first, second, merge = split_in_two()
    broken = Launch.of(case, pack(first, merge), num_slots=2)
    with pytest.raises(DeadlockError):
        broken.run()
    fine = Launch.of(case, pack(first, second, merge), num_slots=2)
    for name in ("global_instruction_index", "o_scratch", "lvec_scratch", "completion_flag"):
        fine.tensors[name] = broken.tensors[name]
    fine.run()
    assert fine.errors().passed


def test_reader_before_its_input_deadlocks_one_worker_but_not_two() -> None:
    case = make_case([130], 8, 1)
    first, second, merge = split_in_two()
    queue = pack(merge, first, second)
    with pytest.raises(
        DeadlockError, match="uid 0 writes it, held by worker 0 behind its own wait"
    ):
        interpreter.run(Launch.of(case, queue, num_slots=2).arguments(), num_workers=1)
    launch = Launch.of(case, queue, num_slots=2)
    interpreter.run(launch.arguments(), num_workers=2, seed=0)
    assert launch.errors().passed


def test_readers_that_hold_all_workers_are_a_deadlock() -> None:
    case = make_case([130, 130], 8, 1)
    first, second, merge = split_in_two()
    others = split_in_two(request=1, first_uid=3)
    queue = pack(
        merge, others[2], *(Noop(uid=90 + i) for i in range(2)), first, second, *others[:2]
    )
    with pytest.raises(DeadlockError) as caught:
        interpreter.run(Launch.of(case, queue, num_slots=5).arguments(), num_workers=2, seed=3)
    assert len(caught.value.waits) == 2
    assert "that no free worker can reach" in str(caught.value)


# Records


def test_timing_records_name_the_worker_and_are_in_order() -> None:
    case = make_case([3000], 8, 1)
    plan = mla_decode.plan([3000], 8, num_workers=4)
    launch = Launch.of_plan(case, plan)
    launch.timings.fill_(-7)
    run = interpreter.run(launch.arguments(), num_workers=4, seed=2)
    records = launch.timings.long()
    for step in run.steps:
        assert records[step.index, 0] == step.worker + 1
    times = records[:, 1:]
    assert bool(((times[:, 1:] - times[:, :-1]) % 2**32 < 2**31).all())
