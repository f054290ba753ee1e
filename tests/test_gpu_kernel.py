"""The kernel itself, on a Hopper GPU: against the interpreter, replayed, timed out, timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mla_decode
import numpy as np
import pytest
import torch
from mla_decode import interpreter, native, timeline
from mla_decode.errors import (
    DeviceError,
    MegakernelTimeout,
    QueueError,
    RangeError,
    ScheduleError,
    UnsupportedError,
)
from mla_decode.measure import timing_records
from mla_decode.reference import Case, attention, compare, make_case
from mla_decode.words import (
    INSTRUCTION_WORDS,
    KV_TILE,
    LATENT_DIM,
    MAX_REDUCTION_INPUTS,
    Noop,
    Partial,
    Reduction,
)

from benchmarks.measure import measure as benchmark
from benchmarks.shapes import Shape
from tests.support import Launch, cut, pack, require_attention, run_queue, same_bits
from tests.test_adoption import WHOLE_CHAIN, chained
from tests.test_mates import shared

pytestmark = pytest.mark.gpu

DEMO = [4641, 45118, 1730, 1696]
SHORT_TIMEOUT_NS = 50_000_000

# Kernel and interpreter round P to bf16 against different maxima (of the tiles seen so far, of
# the whole instruction), so their errors of 1.6e-3 each against float64 are partly independent.
AGREEMENT_L2 = 3e-3
# Both sum exponentials in fp32; the GPU's ex2 and lg2 are good to 2 units in the last place.
AGREEMENT_LSE = 2e-5


@pytest.fixture(autouse=True)
def no_error_left_behind() -> Iterator[None]:
    """A test that leaves a timeout unread would fail its successor instead of itself."""
    yield
    mla_decode.synchronize()


def decode(case: Case, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = case.poisoned_outputs()
    mla_decode.decode(
        case.q,
        case.kv_cache,
        case.block_table,
        case.seq_lens,
        **{"softmax_scale": case.softmax_scale, "out": out, "lse": lse, **options},
    )
    return out, lse


def require_the_same_bits(case: Case, plan: mla_decode.Plan, *, launches: int) -> None:
    """Right at first, and every launch behind it, back to back, writes the same."""
    launch = Launch.of_plan(case, plan)
    launch.run()
    mla_decode.synchronize()
    first = launch.o.clone()
    assert compare(first, launch.lse, *attention(case)).passed
    for _ in range(launches):
        launch.run(check_queue=False)
    mla_decode.synchronize()
    assert same_bits(first, launch.o)


# Against the interpreter, on the same words


def agree(case: Case, kernel: Launch, model: Launch) -> None:
    kernel.run()
    mla_decode.synchronize()
    model.run()
    got, want = kernel.o.cpu().double(), model.o.double()
    assert float((got - want).norm() / want.norm()) < AGREEMENT_L2
    got_lse, want_lse = kernel.lse.cpu(), model.lse
    finite = want_lse.isfinite()
    assert torch.equal(finite, got_lse.isfinite())
    assert float((got_lse - want_lse)[finite].abs().max()) < AGREEMENT_LSE
    # What they leave behind: flags, and the state that the next launch starts from.
    assert torch.equal(kernel.completion_flag.cpu(), model.completion_flag)
    state = (interpreter.STATE_NEXT_TICKET, interpreter.STATE_EPOCH)
    for word in state:
        assert kernel.global_instruction_index[word] == model.global_instruction_index[word]
    errors = compare(kernel.o, kernel.lse, *attention(case))
    assert errors.passed, errors


@pytest.mark.parametrize("policy", ("balanced", "backward", "unsplit", "fixed"))
@pytest.mark.parametrize("num_heads", (8, 16, 32, 64, 128))
def test_kernel_agrees_with_interpreter(num_heads: int, policy: str) -> None:
    lengths = [700, 1, 6000, 65]
    case = make_case(lengths, num_heads, 3, 128, device="cuda")
    tiles = 5 if policy == "fixed" else 0
    plan = mla_decode.plan(lengths, num_heads, 3, policy=policy, split_tiles=tiles)
    agree(case, Launch.of_plan(case, plan), Launch.of_plan(case.to("cpu"), plan))


def test_kernel_agrees_with_interpreter_on_the_demo_batch() -> None:
    case = make_case(DEMO, 16, 4, device="cuda")
    plan = mla_decode.plan(DEMO, 16, 4)
    agree(case, Launch.of_plan(case, plan), Launch.of_plan(case.to("cpu"), plan))


def test_kernel_agrees_with_interpreter_on_a_tree_in_slices() -> None:
    case = make_case([256], 16, device="cuda")
    queue = [
        Partial(uid=i, dst_batch=-i - 1, q_batch=0, start=64 * i, end=64 * i + 64, length=256)
        for i in range(4)
    ]
    final, slot = [], 4
    for head in (0, 8):
        for column in (0, 256):
            piece = {"head_begin": head, "num_rows": 8, "col_begin": column, "num_cols": 256}
            for pair in ((0, 1), (2, 3)):
                queue.append(Reduction(slot, -slot - 1, 0, pair, **piece))
                slot += 1
            final.append(Reduction(100 + slot, 0, 0, (slot - 2, slot - 1), **piece))
    words = pack(*queue, *final)
    agree(case, Launch.of(case, words, slot), Launch.of(case.to("cpu"), words, slot))


# Merges


@pytest.mark.parametrize("column_slices", (1, 2, 8))
@pytest.mark.parametrize("inputs", (2, 3, 9, 18, 19, 32, 33))
@pytest.mark.parametrize("num_heads, new_tokens", [(16, 1), (16, 4), (5, 16), (128, 1)])
def test_merges_of_any_size_give_attention(
    num_heads: int, new_tokens: int, inputs: int, column_slices: int
) -> None:
    """By chunks and by whole rows, in one turn and in many; a merge's last input has three keys,
    which the first of several tokens do not see."""
    sinks = torch.linspace(-3, 9, num_heads)
    lengths = [(inputs - 1) * KV_TILE + 3] * 3
    case = make_case(lengths, num_heads, new_tokens, attn_sink=sinks, device="cuda")
    for runs in (True, False):
        if runs or inputs <= MAX_REDUCTION_INPUTS:
            queue, num_slots = cut(case, 1, runs=runs, column_slices=column_slices)
            require_attention(run_queue(case, queue, num_slots))


# Mates


@pytest.mark.parametrize("gangs", (1, 2))
@pytest.mark.parametrize("count", (2, 4, 8))
@pytest.mark.parametrize(
    ("num_heads", "new_tokens", "options"),
    (
        (16, 1, {}),
        (8, 3, {"dtype": torch.float16}),
        (32, 1, {"block_size": 16}),
        (16, 1, {"block_size": 1}),
        (64, 1, {}),
        (16, 4, {"dtype": torch.float16}),
        (128, 1, {"block_size": 16}),
        (40, 2, {"block_size": 1}),
    ),
)
def test_mates_agree_with_the_interpreter(
    num_heads: int, new_tokens: int, options: dict[str, Any], count: int, gangs: int
) -> None:
    """To the output, and to slots that a reduction reads; an uneven number of tiles."""
    lengths = [2 * count * KV_TILE * gangs + 70, 2 * count * KV_TILE * gangs - 30]
    case = make_case(lengths, num_heads, new_tokens, device="cuda", **options)
    queue, num_slots = shared(case, count, gangs)
    words = pack(*queue)
    agree(case, Launch.of(case, words, num_slots), Launch.of(case.to("cpu"), words, num_slots))


@pytest.mark.parametrize("pieces", (2, WHOLE_CHAIN))
@pytest.mark.parametrize(
    "num_heads, new_tokens, block_size",
    [(16, 1, 64), (8, 3, 16), (16, 2, 40), (16, 4, 64), (12, 5, 16), (128, 1, 1)],
)
def test_adoption_agrees_with_the_interpreter(
    num_heads: int, new_tokens: int, block_size: int, pieces: int
) -> None:
    """To the output and to slots, in both kernels and with every way to load KV."""
    sinks = torch.linspace(-3, 9, num_heads, device="cuda")
    case = make_case(
        [1000, 64, 767, 350, 0],
        num_heads,
        new_tokens,
        block_size,
        attn_sink=sinks,
        device="cuda",
    )
    queue, num_slots = chained(case, 2, pieces)
    words = pack(*queue)
    agree(case, Launch.of(case, words, num_slots), Launch.of(case.to("cpu"), words, num_slots))


@pytest.mark.parametrize("group_rows", (16, 32))
@pytest.mark.parametrize("merge", ("reductions", "mates", "mates and reductions", "adoption"))
@pytest.mark.parametrize(
    ("num_heads", "new_tokens", "options"),
    (
        (64, 1, {}),
        (16, 5, {"dtype": torch.float16}),
        (128, 1, {"block_size": 16}),
        (9, 5, {"block_size": 1}),  # a last group of fewer rows
    ),
)
def test_groups_of_fewer_rows_agree_with_the_interpreter(
    num_heads: int, new_tokens: int, options: dict[str, Any], merge: str, group_rows: int
) -> None:
    lengths = [4 * KV_TILE + 70, 8 * KV_TILE - 30, 64]
    sinks = torch.linspace(-3, 9, num_heads, device="cuda")
    case = make_case(lengths, num_heads, new_tokens, attn_sink=sinks, device="cuda", **options)
    if merge == "reductions":
        queue, num_slots = cut(case, 2, group_rows=group_rows)
    elif merge == "adoption":
        queue, num_slots = chained(case, 2, 2, group_rows)
    else:
        queue, num_slots = shared(case, 2, 1 if merge == "mates" else 2, group_rows)
    words = pack(*queue)
    agree(
        case,
        Launch.of(case, words, num_slots, group_rows),
        Launch.of(case.to("cpu"), words, num_slots, group_rows),
    )


@pytest.mark.parametrize("num_heads, new_tokens", [(16, 1), (16, 4), (128, 1)])
def test_plans_that_adopt_replay_bit_identically(num_heads: int, new_tokens: int) -> None:
    lengths = [700 + 64 * (i % 5) for i in range(150)]
    case = make_case(lengths, num_heads, new_tokens, device="cuda")
    plan = mla_decode.plan(lengths, num_heads, new_tokens)
    assert any(isinstance(i, Partial) and i.adopted is not None for i in plan.decoded())
    require_the_same_bits(case, plan, launches=1000)


def test_a_slot_that_nobody_writes_is_not_adopted_for_ever() -> None:
    """Unchecked words: the adopter waits until the watchdog ends the launch."""
    case = make_case([256], 16, device="cuda")
    words = pack(Partial(5, 0, 0, 0, 128, 256, adopted=0))
    launch = Launch.of(case, words, num_slots=1)
    launch.run(check_queue=False, spin_timeout_ns=SHORT_TIMEOUT_NS)
    with pytest.raises(MegakernelTimeout, match="completion flag of scratch slot 0"):
        mla_decode.synchronize()


@pytest.mark.parametrize("num_heads", (16, 64))
def test_plans_with_clusters_replay_bit_identically(num_heads: int) -> None:
    case = make_case([1024] * 6, num_heads, 1, device="cuda")
    plan = mla_decode.plan(case.seq_lens, num_heads)
    assert plan.cluster_ctas > 1
    require_the_same_bits(case, plan, launches=2000)


@pytest.mark.parametrize("count", (2, 8))
@pytest.mark.parametrize("gangs", (1, 2))
@pytest.mark.parametrize("exponents", [(-100, 90), (60, -40), (0, -90)])
@pytest.mark.parametrize("num_heads", (16, 64, 128))
def test_what_mates_send_may_have_any_size(
    num_heads: int, exponents: tuple[int, int], gangs: int, count: int
) -> None:
    """Halves of the columns, each of a size of its own, are as precise as always."""
    case = make_case([2 * count * KV_TILE * gangs + 70], num_heads, device="cuda")
    case.q[..., :LATENT_DIM] = 0  # scores come from the rope columns alone
    halves = case.latent.unflatten(-1, (2, -1)).unbind(-2)
    for half, exponent in zip(halves, exponents, strict=True):
        half.mul_(2.0**exponent)
    queue, num_slots = shared(case, count, gangs)
    out, _ = run_queue(case, queue, num_slots).result()
    expected, _ = attention(case)
    for columns in (slice(0, LATENT_DIM // 2), slice(LATENT_DIM // 2, LATENT_DIM)):
        own, wanted = out[..., columns].double(), expected[..., columns].double()
        assert (own - wanted).norm() <= 3e-3 * wanted.norm()


@pytest.mark.parametrize("num_heads", (16, 64))
def test_a_row_without_a_number_harms_no_other_when_mates_merge(num_heads: int) -> None:
    case = make_case([1100], num_heads, device="cuda")
    expected, _ = attention(case)
    case.q[0, 0, 5] = math.nan
    queue, num_slots = shared(case, 8)
    out, _ = run_queue(case, queue, num_slots).result()
    assert bool(out[0, 0, 5].isnan().all())
    others = [head for head in range(num_heads) if head != 5]
    error = (out - expected)[0, 0, others].double().norm()
    assert error <= 3e-3 * expected[0, 0, others].double().norm()


def test_mates_need_their_cluster() -> None:
    case = make_case([1024] * 6, 16, 1, device="cuda")
    plan = mla_decode.plan(case.seq_lens, 16)
    launch = Launch.of_plan(case, plan)
    with pytest.raises(QueueError, match=r"num_mates.*at most 1 \(cluster_ctas\)"):
        launch.run(cluster_ctas=1)
    with pytest.raises(QueueError, match="mates among the first 8"):
        launch.run(num_ctas=8)
    with pytest.raises(RangeError, match="num_ctas: expected a multiple of cluster_ctas"):
        launch.run(num_ctas=17)
    with pytest.raises(RangeError, match="cluster_ctas: expected one of"):
        launch.run(cluster_ctas=3)
    too_many = replace(plan, num_workers=10_000)
    with pytest.raises(UnsupportedError, match="plan: expected one for at most"):
        decode(case, plan=too_many)


def test_a_mate_that_never_comes_ends_in_a_timeout() -> None:
    """Unchecked words: the others wait for it, until the watchdog ends the launch."""
    case = make_case([2048], 16, 1, device="cuda")
    queue, num_slots = shared(case, 8)
    words = pack(*queue)
    words[3] = pack(Noop(7))[0]
    launch = Launch.of(case, words, num_slots)
    launch.run(cluster_ctas=8, check_queue=False, spin_timeout_ns=SHORT_TIMEOUT_NS)
    with pytest.raises(MegakernelTimeout, match="other CTAs of the cluster"):
        mla_decode.synchronize()
    whole = Launch.of(case, pack(*queue), num_slots)
    whole.run()
    mla_decode.synchronize()
    errors = compare(whole.o, whole.lse, *attention(case))
    assert errors.passed, errors


# Launches


@pytest.mark.parametrize("num_ctas", (1, 2, 7, 50, 132))
def test_any_number_of_ctas_gives_the_same_bits(num_ctas: int) -> None:
    if num_ctas > native.num_sms(torch.device("cuda")):
        pytest.skip("fewer SMs")
    case = make_case([3000, 70], 16, 2, device="cuda")
    plan = mla_decode.plan(case.seq_lens, 16, 2, clusters=False)
    all_sms, few = Launch.of_plan(case, plan), Launch.of_plan(case, plan)
    all_sms.run()
    few.run(num_ctas=num_ctas)
    mla_decode.synchronize()
    assert same_bits(all_sms.o, few.o)
    assert same_bits(all_sms.lse, few.lse)
    assert not few.o.isnan().any()


def test_a_thousand_graph_replays_are_bit_identical() -> None:
    case = make_case(DEMO, 16, 4, device="cuda")
    plan = mla_decode.plan(DEMO, 16, 4)
    workspace = plan.workspace("cuda")
    out, lse = case.poisoned_outputs()

    def call() -> None:
        decode(case, plan=plan, workspace=workspace, out=out, lse=lse)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    first_out, first_lse = out.clone(), lse.clone()
    assert compare(out, lse, *attention(case)).passed
    different = torch.zeros((), dtype=torch.int32, device="cuda")
    for number in range(1000):
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        if number % 100 == 50:
            workspace.poison()
        graph.replay()
        different += (out.view(torch.int16) != first_out.view(torch.int16)).any()
        different += (lse.view(torch.int32) != first_lse.view(torch.int32)).any()
    mla_decode.synchronize()
    assert int(different) == 0


@pytest.mark.parametrize("heads", [16, 64], ids=["narrow", "wide"])
def test_long_streams_survive_ten_thousand_launches(heads: int) -> None:
    """Every SM streams all the time: a wait that ends too early would show sooner or later."""
    require_the_same_of_ten_thousand([2048 + 64 * (i % 3) for i in range(132)], heads)


@pytest.mark.parametrize("heads", [16, 32, 64], ids=["narrowest", "narrow", "wide"])
def test_short_ranges_survive_ten_thousand_launches(heads: int) -> None:
    """Every launch begins with keys and code in memory: some warps are late where others are not.

    Where that let warps meet at a barrier who had come for different reasons, narrow kernels hung
    after a few hundred launches.
    """
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    others = torch.ones(l2_bytes // 2, dtype=torch.float32, device="cuda")
    require_the_same_of_ten_thousand([310, 451, 4876, 2855, 9817], heads, others.sum)


def require_the_same_of_ten_thousand(
    lengths: list[int], heads: int, before_each: Callable[[], object] = lambda: None
) -> None:
    case = make_case(lengths, heads, device="cuda", poison=False)
    plan = mla_decode.plan(case.seq_lens, heads)
    workspace = plan.workspace("cuda")
    first_out, first_lse = decode(case, plan=plan, workspace=workspace)
    out, lse = case.poisoned_outputs()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            before_each()
            mla_decode.decode(
                case.q,
                case.kv_cache,
                case.block_table,
                plan=plan,
                softmax_scale=case.softmax_scale,
                workspace=workspace,
                out=out,
                lse=lse,
            )
    for _ in range(100):
        graph.replay()
    mla_decode.synchronize()
    assert same_bits(out, first_out) and same_bits(lse, first_lse)


def test_launches_advance_the_epoch_without_a_reset() -> None:
    case = make_case([3000], 16, device="cuda")
    launch = Launch.of_plan(case, mla_decode.plan([3000], 16))
    for number in range(1, 6):
        launch.poison()
        launch.run()
        assert int(launch.global_instruction_index[interpreter.STATE_EPOCH]) == number
        assert int(launch.global_instruction_index[interpreter.STATE_NEXT_TICKET]) == 0
        assert not launch.o.isnan().any()


@pytest.mark.parametrize("position", (0, 1, 200))
def test_unknown_opcode_ends_in_an_error(position: int) -> None:
    """Unchecked words: the CTA that meets it says so, the first instruction or a later one."""
    case = make_case([64], 8, device="cuda")
    words = pack(*(Noop(uid=i) for i in range(300)))
    words[position, 0] = 77
    launch = Launch.of(case, words, num_slots=1)
    launch.run(check_queue=False)
    with pytest.raises(MegakernelTimeout, match="an opcode that the kernel knows") as caught:
        mla_decode.synchronize()
    assert (caught.value.instruction, caught.value.opcode) == (position, 77)
    launch.run(check_queue=False)
    with pytest.raises(MegakernelTimeout):
        mla_decode.synchronize()


def test_calls_that_read_what_the_call_before_wrote() -> None:
    """A launch reads its instructions while the one before still runs, but nothing else.

    Every output has a buffer of its own, and NaN in it before a replay: whoever reads it too early
    computes NaN.
    """
    case = make_case([3000, 70, 900], 16, 2, device="cuda")
    q_pe = case.q[..., 512:].contiguous()
    plan = mla_decode.plan(case.seq_lens, 16, 2)
    workspace = plan.workspace("cuda")

    def chain(synchronize: bool) -> list[torch.Tensor]:
        outputs = [case.q[..., :512].contiguous()]
        for _ in range(60):
            out, _ = mla_decode.decode(
                (outputs[-1], q_pe),
                case.kv_cache,
                case.block_table,
                case.seq_lens,
                plan=plan,
                workspace=workspace,
                softmax_scale=case.softmax_scale,
            )
            outputs.append(out)
            if synchronize:
                mla_decode.synchronize()
        return outputs[1:]

    expected = chain(True)
    assert all(bool(out.isfinite().all()) for out in expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = chain(False)
    for _ in range(20):
        for out in outputs:
            out.fill_(float("nan"))
        graph.replay()
        assert all(same_bits(out, right) for out, right in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("count", (1, 131, 132, 133, 5000))
def test_queue_of_noops_runs_and_leaves_a_record_each(count: int) -> None:
    case = make_case([64], 8, device="cuda")
    launch = Launch.of(case, pack(*(Noop(uid=i) for i in range(count))), num_slots=1)
    launch.run()
    mla_decode.synchronize()
    assert bool((launch.timings[:, 0] > 0).all())
    assert bool(launch.o.isnan().all()), "a no-op wrote the output"


def test_end_marks_end_the_queue() -> None:
    case = make_case([64], 8, device="cuda")
    ended = np.full((300, INSTRUCTION_WORDS), -1, dtype=np.int32)
    words = np.concatenate([pack(Noop(uid=1), Partial(0, 0, 0, 0, 64, 64)), ended])
    launch = Launch.of(case, words, num_slots=1)
    for _ in range(2):
        launch.poison()
        launch.run()
        mla_decode.synchronize()
        assert compare(launch.o, launch.lse, *attention(case)).passed


def test_what_stands_behind_the_end_mark_does_not_run() -> None:
    case = make_case([64], 8, device="cuda")
    words = pack(Noop(uid=0), Noop(uid=1), Partial(2, 0, 0, 0, 64, 64), Noop(uid=3))
    words[1, 0] = -1
    words[3] = 77  # no opcode at all
    launch = Launch.of(case, words, num_slots=1)
    launch.run()
    mla_decode.synchronize()
    assert bool(launch.o.isnan().all())


@pytest.mark.parametrize("num_heads, new_tokens", [(16, 2), (8, 1), (16, 4)])
def test_launches_in_a_row_over_mixed_queues_give_the_same_bits(
    num_heads: int, new_tokens: int
) -> None:
    """Partials and reductions in turn on every CTA, launches back to back.

    A role that waited for a page without having seen every earlier holder of it went ahead too
    early here, and the page was released twice.
    """
    lengths = [64 * (1 + 7 * i % 40) + i for i in range(120)]
    case = make_case(lengths, num_heads, new_tokens, device="cuda")
    plan = mla_decode.plan(lengths, num_heads, new_tokens, policy="fixed", split_tiles=8)
    require_the_same_bits(case, plan, launches=300)


def test_nothing_is_written_outside_the_plans_slots() -> None:
    case = make_case([3000, 70], 64, 3, device="cuda")
    plan = mla_decode.plan(case.seq_lens, 64, 3)
    launch = Launch.of(case, plan.instructions, plan.num_slots + 2, plan.group_rows)
    launch.run()
    mla_decode.synchronize()
    assert bool(launch.o_scratch[-2:].isnan().all())
    assert bool(launch.lvec_scratch[-2:].isnan().all())
    assert bool((launch.completion_flag[-2:] == 0).all())


def test_two_streams_with_two_workspaces_do_not_disturb_each_other() -> None:
    cases = [make_case([9000, 300], 16, 2, device="cuda"), make_case([65, 4000], 64, device="cuda")]
    plans = [mla_decode.plan(c.seq_lens, c.num_heads, c.new_tokens) for c in cases]
    alone = [decode(c, plan=p) for c, p in zip(cases, plans, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    results: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(decode(cases[i], plan=plans[i]))
    mla_decode.synchronize()
    for expected, found in zip(alone, results, strict=True):
        for out, lse in found:
            assert same_bits(out, expected[0])
            assert same_bits(lse, expected[1])


def test_stream_argument_is_where_the_launch_goes() -> None:
    case = make_case([3000], 16, device="cuda")
    plan = mla_decode.plan([3000], 16)
    expected = decode(case, plan=plan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    for handle in (stream, stream.cuda_stream):
        out, lse = decode(case, plan=plan, stream=handle)
        stream.synchronize()
        assert same_bits(out, expected[0])
        assert same_bits(lse, expected[1])


# Caches


def test_strided_caches_give_the_same_bits() -> None:
    case = make_case([700, 64, 1], 16, 2, 64, device="cuda")
    expected = decode(case)
    kv = case.kv_cache
    assert isinstance(kv, torch.Tensor)
    blocks, size, width = kv.shape
    padded_blocks = torch.full(
        (blocks, size * width + 128), torch.nan, dtype=kv.dtype, device="cuda"
    )
    own_stride = padded_blocks[:, : size * width].view(blocks, size, width)
    own_stride.copy_(kv)
    padded_rows = torch.full((blocks, size, 640), torch.nan, dtype=kv.dtype, device="cuda")
    padded_rows[..., :width] = kv
    interleaved = torch.full((blocks, 2, size, width), torch.nan, dtype=kv.dtype, device="cuda")
    interleaved[:, 1] = kv  # one layer of several in a block
    pair = (kv[..., :512].contiguous(), kv[..., 512:].contiguous())
    forms = (own_stride, padded_rows[..., :width], interleaved[:, 1], kv.unsqueeze(2), pair)
    for form in forms:
        out, lse = decode(Case(**{**vars(case), "kv_cache": form}))
        assert same_bits(out, expected[0])
        assert same_bits(lse, expected[1])


@pytest.mark.parametrize("block_size", (5, 16, 64, 128))
@pytest.mark.parametrize("num_heads, new_tokens", [(16, 1), (16, 4), (128, 1)])
def test_a_request_may_end_anywhere_in_a_tile(
    num_heads: int, new_tokens: int, block_size: int
) -> None:
    """One to three tiles, and all that the cache holds past the end is NaN."""
    lengths = [max(length, new_tokens) for length in range(1, 2 * KV_TILE + 2)]
    case = make_case(lengths, num_heads, new_tokens, block_size, device="cuda")
    assert compare(*decode(case), *attention(case)).passed


def test_wild_block_ids_and_nan_past_a_request_do_not_matter() -> None:
    trapped = make_case([700, 1, 64, 65], 16, 4, device="cuda")
    clean = make_case([700, 1, 64, 65], 16, 4, device="cuda", poison=False)
    assert same_bits(decode(trapped)[0], decode(clean)[0])


# Timeouts


def waits_for_ever() -> tuple[Partial, Reduction]:
    """A reduction whose second input nobody writes; no validator would let it pass."""
    return Partial(0, -1, 0, 0, 64, 130), Reduction(7, 0, 0, (0, 1))


def good_queue() -> tuple[Partial, Partial, Reduction]:
    return (
        Partial(0, -1, 0, 0, 64, 130),
        Partial(1, -2, 0, 64, 130, 130),
        Reduction(2, 0, 0, (0, 1)),
    )


def test_queue_that_waits_for_ever_ends_in_a_timeout_and_the_next_launch_works() -> None:
    case = make_case([130], 16, device="cuda")
    stuck = Launch.of(case, pack(*waits_for_ever()), num_slots=2)
    stuck.run(spin_timeout_ns=SHORT_TIMEOUT_NS)
    with pytest.raises(MegakernelTimeout) as caught:
        mla_decode.synchronize()
    error = caught.value
    assert (error.instruction, error.uid, error.opcode) == (1, 7, 2)
    assert (error.expected, error.seen) == (1, 0)
    assert "flag" in error.wait
    assert "1" in error.wait
    assert 0 <= error.sm < native.num_sms(torch.device("cuda"))
    assert error.role
    for part in (f"SM {error.sm}", error.role, "uid 7", error.wait):
        assert part in str(error)

    fine = Launch.of(case, pack(*good_queue()), num_slots=2)
    for name in ("global_instruction_index", "o_scratch", "lvec_scratch", "completion_flag"):
        fine.tensors[name] = stuck.tensors[name]
    for _ in range(3):
        fine.poison()
        fine.run()
        mla_decode.synchronize()
        errors = compare(fine.o, fine.lse, *attention(case))
        assert errors.passed, errors


def test_unread_timeout_is_raised_by_the_next_launch_once() -> None:
    case = make_case([130], 16, device="cuda")
    Launch.of(case, pack(*waits_for_ever()), 2).run(spin_timeout_ns=SHORT_TIMEOUT_NS)
    torch.cuda.synchronize()
    fine = Launch.of(case, pack(*good_queue()), num_slots=2)
    with pytest.raises(MegakernelTimeout):
        fine.run()
    assert bool(fine.o.isnan().all()), "nothing is launched by the call that raises"
    fine.run()
    mla_decode.synchronize()
    assert compare(fine.o, fine.lse, *attention(case)).passed


def test_timeout_of_a_full_machine_leaves_it_usable() -> None:
    """Every CTA waits for a slot that nobody writes, behind work of its own."""
    case = make_case([130], 16, device="cuda")
    sms = native.num_sms(torch.device("cuda"))
    readers = [Reduction(100 + i, 0, 0, (1,)) for i in range(2 * sms)]
    queue = pack(Partial(0, -1, 0, 0, 64, 130), *readers)
    Launch.of(case, queue, 2).run(spin_timeout_ns=SHORT_TIMEOUT_NS)
    with pytest.raises(MegakernelTimeout):
        mla_decode.synchronize()
    out, lse = decode(case)
    assert compare(out, lse, *attention(case)).passed


# Timing records


def test_timing_records_are_sane() -> None:
    case = make_case(DEMO, 16, 4, device="cuda")
    plan = mla_decode.plan(DEMO, 16, 4)
    records = timing_records(case, plan).cpu()
    sms = native.num_sms(torch.device("cuda"))
    assert bool(((records[:, 0] >= 1) & (records[:, 0] <= sms)).all())
    drawn = timeline.measured(plan, records, "GPU")
    assert plan.floor_us / 3 < drawn.makespan_us < 20 * plan.floor_us
    for s in drawn.slices:
        last = s.phases[-1].name
        # The clock ticks every 32 ns. A partial's store takes longer; a reduction's storer may have
        # nothing to do but look, and a phase without length is not drawn.
        assert last == "store" or (last == "compute" and isinstance(s.instruction, Reduction))
        assert s.fetched_us is not None
        assert s.fetched_us <= s.start_us
        names = {p.name: p for p in s.phases}
        if isinstance(s.instruction, Partial):
            assert names["load"].start_us <= names["compute"].start_us
        assert names["compute"].end_us <= s.end_us
    ends = {s.index: s.end_us for s in drawn.slices}
    # A reader's result is stored after its writer's (the clocks of SMs agree to 1 us or so).
    assert all(ends[source] <= ends[target] + 1.0 for source, target in drawn.flows)


def test_recording_times_does_not_change_the_result() -> None:
    case = make_case([3000, 70], 16, 2, device="cuda")
    plan = mla_decode.plan(case.seq_lens, 16, 2)
    timings = torch.zeros(plan.num_instructions, 8, dtype=torch.int32, device="cuda")
    plain, timed = decode(case, plan=plan), decode(case, plan=plan, timings=timings)
    assert same_bits(plain[0], timed[0])
    assert same_bits(plain[1], timed[1])
    assert bool((timings[:, 0] > 0).all())


# Calls that cannot be


def test_more_ctas_than_sms_are_refused() -> None:
    case = make_case([64], 8, device="cuda")
    launch = Launch.of(case, pack(Noop(uid=0)), num_slots=1)
    sms = native.num_sms(torch.device("cuda"))
    with pytest.raises(RangeError, match=f"num_ctas: expected at most {sms}"):
        launch.run(num_ctas=sms + 1)


def test_lengths_on_the_gpu_are_planned_and_checked() -> None:
    case = make_case([700, 65], 8, device="cuda")
    lengths = torch.tensor(case.seq_lens, dtype=torch.int32, device="cuda")
    out, lse = mla_decode.decode(case.q, case.kv_cache, case.block_table, lengths)
    assert compare(out, lse, *attention(case)).passed
    other = mla_decode.plan([700, 64], 8)
    with pytest.raises(ScheduleError, match="plan: made for length 64 of request 1"):
        mla_decode.decode(
            case.q, case.kv_cache, case.block_table, lengths, plan=other, check_seq_lens=True
        )


def test_tensors_on_two_devices_are_refused() -> None:
    case = make_case([700], 8, device="cuda")
    with pytest.raises(DeviceError, match="block_table: expected device cuda:0, got cpu"):
        mla_decode.decode(case.q, case.kv_cache, case.block_table.cpu(), [700])


def test_what_needs_the_host_is_refused_during_capture() -> None:
    case = make_case([700], 8, device="cuda")
    lengths = torch.tensor([700], dtype=torch.int32, device="cuda")
    fresh = mla_decode.plan([700], 8)
    known = mla_decode.plan([700], 8)
    own = known.workspace("cuda")
    decode(case, plan=known, workspace=own)
    torch.cuda.synchronize()
    mla_decode.release_caches()  # the spare workspace that a capture would take
    inputs = (case.q, case.kv_cache, case.block_table)
    refused: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        # Lengths on the GPU are planned there; it is to compare them that they must be read.
        ("seq_lens: on the GPU", (lengths, known), {"workspace": own, "check_seq_lens": True}),
        (
            "check_block_table: .* captured",
            (None, known),
            {"workspace": own, "check_block_table": True},
        ),
        ("cannot be copied to the GPU", ([700], fresh), {"workspace": own}),
        ("cannot be copied to the GPU", ([699],), {"workspace": own}),
        ("workspace: cannot grow", (None, known), {}),  # the capture's stream has none yet
    ]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for message, arguments, options in refused:
            with pytest.raises(UnsupportedError, match=message):
                mla_decode.decode(*inputs, *arguments, **options)


def test_a_step_of_layers_plans_in_its_graph() -> None:
    shape = Shape("step", (700, 65, 3000), 2, 16)
    (row,) = benchmark(shape, ["mla_decode"], replays=3, layers=5)
    assert not row.error
    assert 0 < row.us < 10_000
