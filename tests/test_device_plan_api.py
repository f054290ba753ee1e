"""`mla_decode.DevicePlan`: plans made where the lengths are; many times into the same buffers."""

from __future__ import annotations

import math
from typing import Any

import mla_decode
import numpy as np
import pytest
import torch
from mla_decode import decoding, native
from mla_decode.device_plan import DevicePlan
from mla_decode.errors import (
    DeviceError,
    DtypeError,
    MegakernelTimeout,
    MlaDecodeError,
    RangeError,
    ScheduleError,
    UnsupportedError,
)
from mla_decode.measure import decode_case
from mla_decode.reference import Case, attention, compare, make_case
from mla_decode.row_groups import choose_clusters, choose_groups

from tests.support import same_bits


def int32(*values: int, device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def lengths_of(case: Case) -> torch.Tensor:
    return int32(*case.seq_lens, device=case.q.device)


def plan_of(case: Case, **options: Any) -> DevicePlan:
    ragged = case.cu_seqlens_q is not None
    plan = DevicePlan(
        len(case.seq_lens),
        case.num_heads,
        max(1, *case.tokens),
        num_kv_heads=case.h_kv,
        total_tokens=case.total_tokens if ragged else None,
        max_seq_len=max(1, *case.seq_lens),
        ragged=ragged,
        device=case.q.device,
        **options,
    )
    return plan.update(lengths_of(case), case.cu_seqlens_q)


FORMS: dict[str, dict[str, Any]] = {
    "uniform": {"num_heads": 16, "new_tokens": 2},
    "9 heads of 3 KV heads": {"num_heads": 9, "h_kv": 3},
    "128 heads": {"num_heads": 128, "new_tokens": 3},
    "ragged": {"num_heads": 5, "new_tokens": [1, 0, 16, 4, 2], "padding_tokens": 9},
}


def check_result(case: Case, plan: DevicePlan) -> None:
    """Right, and the same bits by several workers in another order."""
    out, lse = case.poisoned_outputs()
    decode_case(case, plan, out=out, lse=lse)
    assert compare(out, lse, *attention(case)).passed
    again = mla_decode.interpret(
        case.q,
        case.kv_cache,
        case.block_table,
        plan=plan.to_host(),
        softmax_scale=case.softmax_scale,
        cu_seqlens_q=case.cu_seqlens_q,
        num_workers=5,
        seed=3,
    )
    assert same_bits(again[0], out)


@pytest.mark.parametrize("invariant", (False, True), ids=("balanced", "invariant"))
@pytest.mark.parametrize("form", FORMS)
def test_plan_is_valid_and_its_result_right(form: str, invariant: bool) -> None:
    case = make_case([130, 65, 0, 3000, 1], **FORMS[form])
    plan = plan_of(case, batch_invariant=invariant)
    host = plan.to_host()
    host.validate()
    assert host.num_slots <= plan.num_slots
    assert host.num_instructions + plan.num_workers <= plan.capacity
    check_result(case, plan)


@pytest.mark.parametrize(
    ("lengths", "form"),
    [
        ([900, 800, 0, 700, 130], FORMS["uniform"]),
        ([900, 800, 0, 700, 130], FORMS["9 heads of 3 KV heads"]),
        ([300] * 5, FORMS["128 heads"]),
        ([700, 700, 0, 600, 1], {"num_heads": 16, "new_tokens": [1, 0, 2, 1, 2]}),
        ([300, 300, 0, 280, 300] * 2, {"num_heads": 96, "new_tokens": [2, 0, 2, 1, 2] * 2}),
    ],
    ids=("uniform", "KV heads", "128 heads", "ragged", "row groups"),
)
def test_plan_with_mates_is_valid_and_its_result_right(
    lengths: list[int], form: dict[str, Any]
) -> None:
    case = make_case(lengths, **form, padding_tokens=9 * isinstance(form.get("new_tokens"), list))
    plan = plan_of(case)
    host = plan.to_host()
    host.validate()
    assert 1 < host.cluster_ctas <= plan.cluster_ctas
    assert plan.num_workers % plan.cluster_ctas == 0
    assert host.num_slots == 0
    check_result(case, plan)
    assert plan_of(case, clusters=False).to_host().cluster_ctas == 1


@pytest.mark.parametrize(
    ("groups", "max_seq_len", "workers", "expected"),
    [
        (16, 2048, 132, (8, 120)),
        (17, 2048, 132, (2, 132)),
        (16, 2049, 132, (2, 132)),
        (99, 2048, 132, (2, 132)),
        (100, 2048, 132, (1, 132)),
        (1, 1 << 20, 131, (2, 130)),
        (4, 64, 36, (8, 32)),
        (1, 64, 7, (2, 6)),
        (1, 64, 1, (1, 1)),
    ],
)
def test_sizes_decide_the_clusters(
    groups: int, max_seq_len: int, workers: int, expected: tuple[int, int]
) -> None:
    assert choose_clusters(groups, max_seq_len, workers, ((2, 66), (8, 15))) == expected
    assert choose_clusters(groups, max_seq_len, workers, ((8, 0),)) == (1, workers)
    assert choose_clusters(groups, max_seq_len, workers, ()) == (1, workers)


@pytest.mark.parametrize(
    ("sequences", "rows", "max_seq_len", "expected"),
    [
        (1, 128, 2048, (16, 8, 120)),
        (2, 128, 2048, (32, 8, 120)),  # 16 groups of 16: not a cluster for each
        (3, 128, 2048, (32, 8, 120)),
        (8, 128, 2048, (64, 8, 120)),
        (1, 128, 2049, (64, 2, 132)),
        (1, 20, 64, (16, 8, 120)),
        (9, 20, 64, (64, 8, 120)),
        (16, 16, 64, (64, 8, 120)),
        (1, 240, 64, (16, 8, 120)),
        (1, 256, 64, (32, 8, 120)),
    ],
)
def test_sizes_decide_the_row_groups(
    sequences: int, rows: int, max_seq_len: int, expected: tuple[int, int, int]
) -> None:
    clusters = ((2, 66), (8, 15))
    rows_of_all = np.full(sequences, rows)
    assert choose_groups(rows_of_all, max_seq_len, 132, clusters) == expected
    assert choose_groups(rows_of_all, max_seq_len, 132, ()) == (64, 1, 132)


SMALL_GROUPS: dict[str, dict[str, Any]] = {
    "128 heads": {"num_heads": 128},
    "3 tokens": {"num_heads": 16, "new_tokens": 3},
    "ragged": {"num_heads": 12, "new_tokens": [5], "padding_tokens": 2},
    "2 KV heads": {"num_heads": 40, "h_kv": 2},
}


@pytest.mark.parametrize("length", (402, 2000))
@pytest.mark.parametrize("form", SMALL_GROUPS)
def test_plan_in_small_row_groups_is_valid_and_its_result_right(form: str, length: int) -> None:
    case = make_case([length], **SMALL_GROUPS[form])
    plan = plan_of(case)
    host = plan.to_host()
    host.validate()
    assert plan.group_rows == host.group_rows == plan.slot_rows == host.slot_rows == 16
    check_result(case, plan)
    assert plan_of(case, clusters=False).group_rows == 64


def test_only_balanced_plans_have_clusters() -> None:
    sizes: dict[str, Any] = {"max_seq_len": 2000, "device": "cpu"}
    assert DevicePlan(4, 16, **sizes).cluster_ctas == 8
    assert DevicePlan(4, 16, **sizes).num_workers == 120
    for options in ({"batch_invariant": True}, {"split_tiles": 3}, {"clusters": False}):
        plan = DevicePlan(4, 16, **sizes, **options)
        assert (plan.cluster_ctas, plan.num_workers) == (1, 132)


def test_updates_use_the_same_buffers() -> None:
    plan = DevicePlan(3, 8, max_seq_len=4000, device="cpu")
    words, header = plan.instructions.data_ptr(), plan.header.data_ptr()
    for lengths in ([4000, 4000, 4000], [1, 0, 0], [0, 0, 0], [17, 4000, 64]):
        case = make_case(lengths, 8)
        plan.update(lengths_of(case))
        plan.to_host().validate()
        table = torch.nn.functional.pad(case.block_table, (0, 63))
        out, lse = decode_case(Case(**{**vars(case), "block_table": table}), plan)
        assert compare(out, lse, *attention(case)).passed
    assert (plan.instructions.data_ptr(), plan.header.data_ptr()) == (words, header)


def test_several_plans_are_alive_at_once() -> None:
    cases = [make_case([700, 65], 8), make_case([65, 3000], 8)]
    plans = [
        DevicePlan(2, 8, max_seq_len=case.block_table.shape[1] * 64, device="cpu") for case in cases
    ]
    for plan, case in zip(plans, cases, strict=True):
        plan.update(lengths_of(case))
    for plan, case in zip(plans, cases, strict=True):
        assert compare(*decode_case(case, plan), *attention(case)).passed


def test_updates_inside_and_outside_of_inference_mode_mix() -> None:
    with torch.inference_mode():
        plan = DevicePlan(2, 8, max_seq_len=100, device="cpu").update(int32(5, 6))
    plan.update(int32(7, 8)).to_host().validate()


def test_saved_plan_is_the_devices(tmp_path: Any) -> None:
    plan = plan_of(make_case([700, 65], 8))
    plan.to_host().save(tmp_path / "plan.json")
    loaded = mla_decode.Plan.load(tmp_path / "plan.json")
    assert loaded.instructions.tolist() == plan.to_host().instructions.tolist()
    assert loaded.predicted_us > 0


@pytest.mark.parametrize(("length", "planned"), [(-1, 0), (101, 100), (2**31 - 1, 100)])
def test_bad_length_is_named_and_planned_as_the_nearest(length: int, planned: int) -> None:
    plan = DevicePlan(3, 8, max_seq_len=100, device="cpu")
    message = rf"seq_lens: request 1: expected 0 to 100, got {length}; planned as {planned}"
    with pytest.raises(RangeError, match=message):
        plan.update(int32(5, length, 7))
    host = plan.to_host()
    assert host.seq_lens.tolist() == [5, planned, 7]
    host.validate()


@pytest.mark.parametrize(("length", "planned"), [(-7, 0), (129, 128), (301, 128)])
def test_length_beyond_its_own_blocks_is_planned_as_what_they_hold(
    length: int, planned: int
) -> None:
    plan = DevicePlan(3, 8, max_seq_len=300, device="cpu")
    blocks = {"kv_indptr": int32(0, 1, 3, 3), "block_size": 64}
    with pytest.raises(RangeError, match=rf"request 1: expected 0 to 128, got {length}; planned"):
        plan.update(int32(64, length, 0), **blocks)
    host = plan.to_host()
    assert host.seq_lens.tolist() == [64, planned, 0]
    assert int(plan.header[2]) == 1
    host.validate()
    with pytest.raises(RangeError, match="request 2: expected 0 to 0, got 1; planned as 0"):
        plan.update(int32(64, 128, 1), **blocks)
    assert plan.update(int32(64, 128, 0), **blocks).header[2] == 0


def test_blocks_of_requests_need_their_size() -> None:
    plan = DevicePlan(2, 8, max_seq_len=300, device="cpu")
    for options in ({"kv_indptr": int32(0, 1, 2)}, {"block_size": 64}):
        with pytest.raises(DtypeError, match="kv_indptr, block_size: expected both or neither"):
            plan.update(int32(1, 2), **options)
    with pytest.raises(MlaDecodeError, match=r"kv_indptr: expected shape \[3\], got \[2\]"):
        plan.update(int32(1, 2), kv_indptr=int32(0, 1), block_size=64)
    with pytest.raises(RangeError, match="block_size: expected 1 to"):
        plan.update(int32(1, 2), kv_indptr=int32(0, 1, 2), block_size=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ([int32(1, 2)], MlaDecodeError, "seq_lens: expected shape [3], got [2]"),
        ([int32(1, 2, 3).long()], DtypeError, "seq_lens: expected torch.int32"),
        ([[1, 2, 3]], DtypeError, "seq_lens: expected a torch.Tensor, got list"),
        ([int32(1, 2, 3).to("meta")], DeviceError, "seq_lens: expected device cpu, got meta"),
        ([int32(*range(6))[::2]], MlaDecodeError, "seq_lens: expected a contiguous tensor"),
        ([int32(1, 2, 3), int32(0, 1, 2, 3)], DtypeError, "cu_seqlens_q: expected None without"),
        ([int32(1, 2, 3), None, 7], DeviceError, "stream: expected None for a plan on the CPU"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_update_refuses(arguments: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        DevicePlan(3, 8, max_seq_len=100, device="cpu").update(*arguments)
    assert message in str(caught.value)


def test_offsets_beyond_the_plan_are_refused() -> None:
    plan = DevicePlan(2, 8, 2, total_tokens=4, max_seq_len=9, ragged=True, device="cpu")
    with pytest.raises(DtypeError, match="cu_seqlens_q: expected a tensor with ragged=True"):
        plan.update(int32(5, 6))
    with pytest.raises(RangeError, match="request 1: expected at most 2 new tokens, got 3"):
        plan.update(int32(5, 6), int32(0, 1, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_requests": 0}, "num_requests: expected 1 to"),
        ({"num_heads": 129}, "num_heads: expected at most 128"),
        ({"new_tokens": 17}, "new_tokens: expected 1 to 16, got 17"),
        ({"max_seq_len": -1}, "max_seq_len: expected 0 to"),
        ({"total_tokens": 5}, "total_tokens: expected 2 without ragged=True, got 5"),
        ({"num_workers": 0}, "num_workers: expected 1 to"),
        ({"num_kv_heads": 3}, "num_heads: expected a multiple of num_kv_heads = 3"),
    ],
    ids=str,
)
def test_sizes_that_no_plan_has_are_refused(options: dict[str, Any], message: str) -> None:
    sizes = {"num_requests": 2, "num_heads": 8, "max_seq_len": 9, "device": "cpu", **options}
    with pytest.raises(MlaDecodeError) as caught:
        DevicePlan(**sizes)
    assert message in str(caught.value)


def test_plan_that_does_not_fit_the_call_is_refused() -> None:
    case = make_case([130, 65], 8, 2)
    for sizes in ((2, 8, 1), (3, 8, 2), (2, 16, 2)):
        plan = DevicePlan(*sizes, max_seq_len=100, device="cpu")
        with pytest.raises(ScheduleError, match="plan: made for"):
            decode_case(case, plan)
    too_long = DevicePlan(2, 8, 2, max_seq_len=1 << 20, device="cpu").update(lengths_of(case))
    with pytest.raises(RangeError, match="plan: expected a max_seq_len of at most"):
        decode_case(case, too_long)
    with pytest.raises(UnsupportedError, match="expected an update before"):
        DevicePlan(2, 8, 2, max_seq_len=100, device="cpu").to_host()


@pytest.mark.parametrize("call", (mla_decode.decode, mla_decode.interpret))
def test_a_plan_without_an_update_is_refused(call: Any) -> None:
    case = make_case([130, 65], 8, [1, 2])
    plan = DevicePlan(2, 8, 2, total_tokens=3, max_seq_len=130, ragged=True, device="cpu")
    arguments = (case.q, case.kv_cache, case.block_table, None, plan)
    message = "plan: expected an update before decode"
    with pytest.raises(ScheduleError, match=message):
        call(*arguments, cu_seqlens_q=case.cu_seqlens_q)
    with pytest.raises(RangeError, match="cu_seqlens_q: request 0: expected at most 2"):
        plan.update(lengths_of(case), int32(0, 3, 3))  # which planned nothing
    with pytest.raises(ScheduleError, match=message):
        call(*arguments, cu_seqlens_q=case.cu_seqlens_q)
    plan.update(lengths_of(case), case.cu_seqlens_q)
    call(*arguments, cu_seqlens_q=case.cu_seqlens_q)


def test_offsets_on_the_host_must_be_those_that_were_planned() -> None:
    case = make_case([130, 65], 8, [1, 3])
    plan = plan_of(case)
    decode_case(case, plan)
    other = make_case([130, 65], 8, [2, 2])
    uniform = plan_of(make_case([130, 65], 8, 2))
    for accepted, refused, made in ((case, other, plan), (other, case, uniform)):
        decode_case(accepted, made)
        with pytest.raises(ScheduleError, match=r"cu_seqlens_q: request 0: expected . new tokens"):
            decode_case(refused, made)
    decode_case(other, plan.update(lengths_of(other), other.cu_seqlens_q))


def test_checked_lengths_must_be_the_plans() -> None:
    case = make_case([130, 65], 8)
    plan = plan_of(case)
    decode_case(case, plan, check_seq_lens=True)
    other = Case(**{**vars(case), "seq_lens": [130, 66]})
    with pytest.raises(ScheduleError, match="request 1"):
        decode_case(other, plan, check_seq_lens=True)


def test_error_records_become_typed_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {"kind": "length", "request": 3, "expected": 4096, "seen": -5},
        {
            "kind": "timeout",
            "sm": 1,
            "role": "loader",
            "instruction": 2,
            "uid": 3,
            "opcode": 1,
            "wait": "page",
            "expected": 1,
            "seen": 0,
        },
        None,
    ]

    class Fake:
        @staticmethod
        def take_error(index: int) -> object:
            return records.pop(0)

    monkeypatch.setattr(native, "_kernels", Fake, raising=False)
    with pytest.raises(RangeError, match="request 3: expected 0 to 4096, got -5; planned as 0"):
        native.raise_pending_on(0)
    with pytest.raises(MegakernelTimeout, match="waited too long for page"):
        native.raise_pending_on(0)
    native.raise_pending_on(0)


def test_update_hands_the_planning_kernel_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    class Fake:
        @staticmethod
        def take_error(index: int) -> None:
            return None

        @staticmethod
        def plan(*arguments: Any) -> None:
            seen.append(arguments)

    monkeypatch.setattr(native, "_kernels", Fake, raising=False)
    plan = DevicePlan(
        2, 16, 3, num_kv_heads=2, total_tokens=5, max_seq_len=100, ragged=True, device="cpu"
    )
    plan._index = 1  # as if it were a GPU's
    lengths, offsets, indptr = int32(5, 6), int32(0, 2, 5), int32(0, 1, 2)
    plan.update(lengths, offsets, 7, kv_indptr=indptr, block_size=64)
    words = (plan.instructions.data_ptr(), plan.capacity, plan.header.data_ptr())
    pointers = (lengths.data_ptr(), offsets.data_ptr(), indptr.data_ptr(), 64)
    sizes = (2, 2, 3, 5, 8, 100, plan.num_workers, 0, plan.cluster_ctas, plan.group_rows)
    assert seen == [(*pointers, *sizes, plan._cost, *words, 1, 7)]
    assert plan.is_planned  # at once, also where a CUDA graph is captured


def test_calls_with_tables_of_other_widths_share_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As calls with lengths on a GPU do, here with those on the CPU."""
    monkeypatch.setattr(decoding, "_device_plans", {})
    plans = set()
    for width in (5, 6, 8, 17):
        case = make_case([130, 65], 8, [1, 2])
        table = torch.zeros(2, width, dtype=torch.int32)
        table[:, : min(width, 5)] = case.block_table[:, : min(width, 5)]
        inputs = decoding.Inputs(case.q, case.kv_cache, table, case.cu_seqlens_q, None, None, None)
        call = decoding.calls.make_call(inputs, decoding.Options())
        plan = decoding._planned_on_gpu(
            call, lengths_of(case).long(), case.cu_seqlens_q, None, False, None
        )
        assert plan.max_seq_len == width * 64
        plan.to_host().validate()
        plans.add(plan)
    assert len(plans) == 2


# On a GPU


@pytest.fixture
def gpu() -> Any:
    yield torch.device("cuda", torch.cuda.current_device())
    mla_decode.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("invariant", (False, True), ids=("balanced", "invariant"))
@pytest.mark.parametrize("form", FORMS)
def test_gpu_plan_is_the_cpus_word_for_word(form: str, invariant: bool, gpu: Any) -> None:
    case = make_case([130, 65, 0, 3000, 1], **FORMS[form], device=gpu)
    require_the_cpus_words(case, batch_invariant=invariant, num_workers=100)


@pytest.mark.gpu
@pytest.mark.parametrize("length", (402, 2000))
@pytest.mark.parametrize("form", SMALL_GROUPS)
def test_gpu_plan_in_small_row_groups_is_the_cpus(form: str, length: int, gpu: Any) -> None:
    plan = require_the_cpus_words(make_case([length], **SMALL_GROUPS[form], device=gpu))
    assert plan.group_rows == 16


def require_the_cpus_words(case: Case, **options: Any) -> DevicePlan:
    """A plan of the GPU, whose words are those of the CPU's and whose result is right."""
    plan = plan_of(case, **options)
    mine = plan.to_host()
    mine.validate()
    model = plan_of(case.to("cpu"), **options)
    model._cost = plan._cost
    model.update(
        lengths_of(case).cpu(), None if case.cu_seqlens_q is None else case.cu_seqlens_q.cpu()
    )
    assert mine.instructions.tolist() == model.to_host().instructions.tolist()
    out, lse = case.poisoned_outputs()
    decode_case(case, plan, out=out, lse=lse)
    assert compare(out, lse, *attention(case)).passed
    return plan


@pytest.mark.gpu
def test_graph_replays_with_other_lengths_tables_and_live_requests(gpu: Any) -> None:
    batch, width = 5, 64
    cases = [
        make_case(lengths, 16, 2, device=gpu, seed=seed)
        for seed, lengths in enumerate(
            ([4000, 3, 65, 700, 129], [5, 0, 0, 0, 0], [0] * 5, [64, 4096 - 64, 0, 1, 2])
        )
    ]
    blocks = max(case.latent.shape[0] for case in cases)
    kv = torch.zeros(blocks, 64, 576, dtype=torch.bfloat16, device=gpu)
    q, table = cases[0].q.clone(), torch.zeros(batch, width, dtype=torch.int32, device=gpu)
    lengths = lengths_of(cases[0]).clone()
    out, lse = cases[0].poisoned_outputs()
    scale = cases[0].softmax_scale

    def load(case: Case) -> None:
        kv[: case.kv_cache.shape[0]] = case.kv_cache
        q.copy_(case.q)
        table[:, : case.block_table.shape[1]] = case.block_table[:, :width]
        lengths.copy_(lengths_of(case))
        out.fill_(math.nan)
        lse.fill_(math.nan)

    def call() -> None:
        mla_decode.decode(q, kv, table, lengths, softmax_scale=scale, out=out, lse=lse)

    load(cases[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    for case in (*cases, *cases[::-1]):
        load(case)
        graph.replay()
        errors = compare(out, lse, *attention(case))
        assert errors.passed, errors


@pytest.mark.gpu
def test_one_plan_serves_all_layers_of_a_captured_step(gpu: Any) -> None:
    layers = [make_case([700, 65, 3000], 16, device=gpu, seed=seed) for seed in range(3)]
    plan = plan_of(layers[0])
    lengths = lengths_of(layers[0])
    outputs = [case.poisoned_outputs() for case in layers]
    workspace = plan.workspace()

    def step() -> None:
        plan.update(lengths)
        for case, (out, lse) in zip(layers, outputs, strict=True):
            decode_case(case, plan, workspace=workspace, out=out, lse=lse)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for out, lse in outputs:
        out.fill_(math.nan)
        lse.fill_(math.nan)
    graph.replay()
    for case, (out, lse) in zip(layers, outputs, strict=True):
        assert compare(out, lse, *attention(case)).passed


@pytest.mark.gpu
def test_two_streams_plan_and_decode_at_once(gpu: Any) -> None:
    cases = [make_case([9000, 300], 16, 2, device=gpu), make_case([65, 4000], 64, device=gpu)]
    alone = [mla_decode.decode(c.q, c.kv_cache, c.block_table, lengths_of(c)) for c in cases]
    torch.cuda.synchronize()
    lengths = [lengths_of(c) for c in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    found: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                case = cases[i]
                found[i].append(
                    mla_decode.decode(case.q, case.kv_cache, case.block_table, lengths[i])
                )
    mla_decode.synchronize()
    for expected, results in zip(alone, found, strict=True):
        for out, lse in results:
            assert same_bits(out, expected[0])
            assert same_bits(lse, expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("form", ({"h_kv": 2}, {}), ids=("KV heads", "q to be copied"))
def test_copies_run_on_the_stream_of_the_call(form: dict[str, Any], gpu: Any) -> None:
    """The current stream is busy: what ran there would come too late, or too early."""
    case = make_case([700, 65], 16, 2, device=gpu, **form)
    wide = torch.full((2, 2, 32, 576), math.nan, dtype=torch.bfloat16, device=gpu)
    wide[:, :, :16] = case.q
    q = case.q if form else wide[:, :, :16]
    lengths = lengths_of(case)
    expected = mla_decode.decode(q, case.kv_cache, case.block_table, lengths)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for chosen in (stream, stream.cuda_stream):
        torch.cuda._sleep(200_000_000)
        out, lse = mla_decode.decode(q, case.kv_cache, case.block_table, lengths, stream=chosen)
        stream.synchronize()
        with torch.cuda.stream(stream):
            assert same_bits(out, expected[0])
            assert same_bits(lse, expected[1])


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu(gpu: Any) -> None:
    case = make_case([700, 65], 16, device=gpu)
    lengths = lengths_of(case)
    mla_decode.decode(case.q, case.kv_cache, case.block_table, lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mla_decode.decode(case.q, case.kv_cache, case.block_table, lengths)
        plan_of_sizes = DevicePlan(2, 16, max_seq_len=700, device=gpu)
        plan_of_sizes.update(lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("length", (-1, 1 << 20))
def test_bad_length_on_the_gpu_is_raised_at_the_next_synchronisation(length: int, gpu: Any) -> None:
    case = make_case([700, 65], 16, device=gpu, poison=False)
    lengths = lengths_of(case)
    lengths[1] = length
    mla_decode.decode(case.q, case.kv_cache, case.block_table, lengths)
    with pytest.raises(RangeError, match=rf"seq_lens: request 1: expected 0 to \d+, got {length}"):
        mla_decode.synchronize()
    out, lse = mla_decode.decode(case.q, case.kv_cache, case.block_table, lengths_of(case))
    mla_decode.synchronize()
    assert compare(out, lse, *attention(case)).passed


@pytest.mark.gpu
def test_csr_length_beyond_its_own_blocks_is_planned_as_what_they_hold(gpu: Any) -> None:
    plan = DevicePlan(3, 16, max_seq_len=4096, device=gpu)
    indptr = torch.tensor([0, 4, 5, 5], dtype=torch.int32, device=gpu)
    lengths = torch.tensor([64, 16, 0], dtype=torch.int32, device=gpu)
    plan.update(lengths, kv_indptr=indptr, block_size=16)
    mla_decode.synchronize()
    plan.update(lengths + 1, kv_indptr=indptr, block_size=16)
    with pytest.raises(RangeError, match="request 0: expected 0 to 64, got 65"):
        mla_decode.synchronize()
    assert plan.to_host().seq_lens.tolist() == [64, 16, 0]


@pytest.mark.gpu
def test_eager_calls_cost_the_host_15_us_at_most(gpu: Any) -> None:
    """Host time of a call with plan and workspace, the GPU kept from falling behind.

    Of both kinds of plans in turns, for a third of a second: another process may take the
    processor for some milliseconds.
    """
    import time

    case = make_case([700, 65], 16, device=gpu)
    plan = plan_of(case)
    workspace = plan.workspace()
    host_plan = mla_decode.plan(case.seq_lens, 16)
    lengths = lengths_of(case)
    times: dict[str, list[float]] = {"DevicePlan": [], "Plan": []}
    with torch.inference_mode():
        for _ in range(400):
            for name, made in (("DevicePlan", plan), ("Plan", host_plan)):
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(25):
                    mla_decode.decode(
                        case.q, case.kv_cache, case.block_table, lengths, made, workspace=workspace
                    )
                times[name].append((time.perf_counter() - started) / 25 * 1e6)
    figures = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    print("host time of an eager call, us:", figures)
    assert max(figures.values()) <= 15, figures
