"""`mla_decode.flashinfer`: the wrapper that FlashInfer's users plan and run."""

from __future__ import annotations

import inspect
import math
from typing import Any

import mla_decode
import pytest
import torch
from mla_decode.errors import (
    DeviceError,
    DtypeError,
    MlaDecodeError,
    RangeError,
    ScheduleError,
    ShapeError,
    StrideError,
    UnsupportedError,
)
from mla_decode.flashinfer import BatchMLAPagedAttentionWrapper
from mla_decode.reference import Case, attention, compare, make_case

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS = [2, 0, 1, 4]


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def case_of(lengths: list[int], tokens: Any = TOKENS, **options: Any) -> Case:
    sizes = {"num_heads": 16, "block_size": 16, "csr": True, "combined": False}
    bases = {"lse_base": 2.0, "lse_empty": -math.inf}
    return make_case(lengths, new_tokens=tokens, **{**sizes, **bases, **options})


def plan_arguments(case: Case, **options: Any) -> dict[str, Any]:
    lengths = torch.tensor(case.seq_lens, dtype=torch.int32, device=case.q.device)
    return {
        "qo_indptr": case.cu_seqlens_q,
        "kv_indptr": case.kv_indptr,
        "kv_indices": case.block_table,
        "kv_len_arr": lengths,
        "num_heads": case.num_heads,
        "head_dim_ckv": 512,
        "head_dim_kpe": 64,
        "page_size": case.block_size,
        "causal": case.causal,
        "sm_scale": case.softmax_scale,
        "q_data_type": case.q.dtype,
        "kv_data_type": case.q.dtype,
        **options,
    }


def run(
    wrapper: BatchMLAPagedAttentionWrapper, case: Case, *, pages: int = 0, **options: Any
) -> Any:
    """The wrapper's run of a case, whose cache gets more pages if ``pages`` says so."""
    q_nope, q_pe = case.q[..., :512].contiguous(), case.q[..., 512:].contiguous()
    more = (0, 0, 0, 0, 0, max(pages - case.latent.shape[0], 0))
    caches = (torch.nn.functional.pad(part, more) for part in (case.latent, case.rope))
    return wrapper.run(q_nope, q_pe, *caches, **options)


def wrapper_on(device: str | torch.device, **options: Any) -> BatchMLAPagedAttentionWrapper:
    workspace = torch.empty(128, dtype=torch.int8, device=device)
    return BatchMLAPagedAttentionWrapper(workspace, **options)


def graph_buffers(batch: int, pages: int, device: str | torch.device) -> dict[str, torch.Tensor]:
    sizes = {"qo_indptr": batch + 1, "kv_indptr": batch + 1, "kv_indices": pages}
    sizes["kv_len_arr"] = batch
    return {
        name: torch.zeros(size, dtype=torch.int32, device=device) for name, size in sizes.items()
    }


def test_names_and_order_are_flashinfers() -> None:
    names = {
        "__init__": "float_workspace_buffer use_cuda_graph qo_indptr kv_indptr kv_indices "
        "kv_len_arr backend",
        "plan": "qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv head_dim_kpe "
        "page_size causal sm_scale q_data_type kv_data_type use_profiler",
        "run": "q_nope q_pe ckv_cache kpe_cache out lse return_lse profiler_buffer kv_len "
        "page_table return_lse_base_on_e",
    }
    for method, expected in names.items():
        signature = inspect.signature(getattr(BatchMLAPagedAttentionWrapper, method))
        assert list(signature.parameters) == ["self", *expected.split()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"block_size": 1},
        {"block_size": 64, "dtype": torch.float16, "num_heads": 128},
        {"padding_tokens": 3},
    ],
    ids=str,
)
def test_results_are_flashinfers(options: dict[str, Any], device: str) -> None:
    case = case_of([130, 65, 0, 700], **options, device=device)
    wrapper = wrapper_on(device)
    wrapper.plan(**plan_arguments(case))
    for _ in range(2):  # two layers
        out, lse = run(wrapper, case, return_lse=True)
        assert lse.shape == out.shape[:2]
        assert compare(out, lse, *attention(case)).passed


def test_lse_is_returned_on_request_and_in_either_base() -> None:
    case = case_of([130, 65, 0, 700])
    wrapper = wrapper_on("cpu")
    wrapper.plan(**plan_arguments(case))
    alone = run(wrapper, case)
    assert isinstance(alone, torch.Tensor)
    natural = run(wrapper, case, return_lse=True, return_lse_base_on_e=True)[1]
    base_2 = run(wrapper, case, return_lse=True)[1]
    seen = base_2.isfinite()
    torch.testing.assert_close(natural[seen], base_2[seen] * math.log(2))
    assert torch.equal(natural.isfinite(), seen)


def test_outputs_go_where_they_are_asked_to() -> None:
    case = case_of([130, 65, 0, 700])
    wrapper = wrapper_on("cpu")
    wrapper.plan(**plan_arguments(case))
    out, lse = case.poisoned_outputs()
    made = run(wrapper, case, out=out, lse=lse, return_lse=True)
    assert made[0] is out
    assert made[1] is lse
    assert compare(out, lse, *attention(case)).passed


def test_steps_of_other_sizes_follow_one_another() -> None:
    wrapper = wrapper_on("cpu")
    for lengths, tokens, options in (
        ([130, 65], [1, 1], {}),
        ([5], [16], {}),
        ([700, 65, 3], [1, 2, 3], {"padding_tokens": 60}),
        ([130, 65], [4, 1], {"num_heads": 3}),
    ):
        case = case_of(lengths, tokens, **options)
        wrapper.plan(**plan_arguments(case))
        assert compare(*run(wrapper, case, return_lse=True), *attention(case)).passed


@pytest.mark.parametrize("warm", (False, True), ids=("cold", "warm"))
def test_graph_mode_copies_into_its_buffers(warm: bool) -> None:
    buffers = graph_buffers(4, 200, "cpu")
    wrapper = wrapper_on("cpu", use_cuda_graph=True, **buffers)
    addresses = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    words = None
    for lengths in ([130, 65, 0, 700], [1, 0, 0, 64], [200, 300, 64, 65]):
        case = case_of(lengths)
        wrapper.plan(**plan_arguments(case))
        assert buffers["kv_len_arr"].tolist() == lengths
        assert wrapper._plan is not None
        if words is not None and warm:
            # What a graph would find that was captured after a run: the plan of these lengths.
            assert wrapper._plan.to_host().seq_lens.tolist() == lengths
        if warm:
            result = run(wrapper, case, pages=200, return_lse=True)
            assert compare(*result, *attention(case)).passed
        assert words in (None, wrapper._plan.instructions.data_ptr())
        words = wrapper._plan.instructions.data_ptr()
    assert {name: b.data_ptr() for name, b in wrapper._buffers.items()} == addresses
    with pytest.raises(ShapeError, match="qo_indptr: expected the 5 entries"):
        wrapper.plan(**plan_arguments(case_of([5], [1])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_profiler": True}, "use_profiler: expected False"),
        ({"head_dim_ckv": 256}, "head_dim_ckv, head_dim_kpe: expected 512 and 64"),
        ({"kv_data_type": torch.float8_e4m3fn}, "q_data_type, kv_data_type: expected bf16"),
        ({"num_heads": 129}, "num_heads: expected at most 128"),
        ({"page_size": 0}, "page_size: expected 1 to"),
        ({"qo_indptr": torch.zeros(3, dtype=torch.int32)}, "qo_indptr: expected shape [5]"),
        ({"kv_len_arr": [1, 2]}, "kv_len_arr: expected a torch.Tensor"),
        ({"kv_len_arr": torch.tensor(3, dtype=torch.int32)}, "kv_len_arr: expected shape [B]"),
        ({"kv_len_arr": int32()}, "kv_len_arr: expected at least 1 request"),
        ({"kv_len_arr": int32(130, -1, 0, 700)}, "kv_len_arr: request 1: expected 0 to "),
        ({"kv_len_arr": int32(130, 65, 99, 700)}, "kv_len_arr: request 2: expected 0 to "),
        ({"kv_len_arr": int32(1, 1, 0, 1).to("meta")}, "kv_len_arr: expected a tensor with values"),
        ({"qo_indptr": int32(1, 1, 1, 2, 2)}, "qo_indptr: expected to start with 0, got 1"),
        ({"qo_indptr": int32(0, 2, 1, 2, 2)}, "qo_indptr: request 1: expected offsets that do not"),
        ({"qo_indptr": int32(0, 17, 17, 18, 18)}, "qo_indptr: request 0: expected at most 16 new"),
        ({"kv_indptr": int32(0, 9, 14, 14, 999)}, "kv_indptr: expected to end at "),
        ({"kv_indptr": int32(0, 9, 8, 14, 20)}, "kv_indptr: request 1: expected offsets that do"),
        ({"sm_scale": "x"}, "sm_scale: expected a float, got str"),
        ({"sm_scale": -1.0}, "sm_scale: expected a finite number above 0"),
        ({"causal": None}, "causal: expected a bool, got NoneType"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_plan_refuses(change: dict[str, Any], message: str) -> None:
    wrapper = wrapper_on("cpu")
    with pytest.raises(MlaDecodeError) as caught:
        wrapper.plan(**plan_arguments(case_of([130, 65, 0, 700]), **change))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"))
def test_plan_takes_int64_that_fit_and_no_other_dtype(name: str) -> None:
    case = case_of([130, 65, 0, 700])
    wrapper = wrapper_on("cpu")
    given = plan_arguments(case)
    for dtype in (torch.float32, torch.float64, torch.bool, torch.int16, torch.uint8):
        with pytest.raises(DtypeError, match=f"^{name}: expected torch.int32, got {dtype}"):
            wrapper.plan(**{**given, name: given[name].to(dtype)})
    for wrong in (2**32, -(2**32), 2**63 - 1):
        wide = given[name].long()
        wide[-1] = wrong
        with pytest.raises(RangeError, match=f"^{name}: expected values that fit .* got {wrong}"):
            wrapper.plan(**{**given, name: wide})
    wrapper.plan(**{**given, name: given[name].long()})
    assert compare(*run(wrapper, case, return_lse=True), *attention(case)).passed


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("use_cuda_graph", (False, True), ids=("eager", "graph"))
def test_what_is_written_after_plan_changes_no_result(
    use_cuda_graph: bool, dtype: torch.dtype
) -> None:
    case = case_of([130, 65, 0, 700])
    buffers = graph_buffers(4, 200, "cpu") if use_cuda_graph else {}
    wrapper = wrapper_on("cpu", use_cuda_graph=use_cuda_graph, **buffers)
    given = plan_arguments(case)
    names = ("qo_indptr", "kv_indptr", "kv_len_arr", *(("kv_indices",) if use_cuda_graph else ()))
    mine = {name: given[name].to(dtype, copy=True) for name in names}
    wrapper.plan(**{**given, **mine})
    for _ in range(2):
        for tensor in mine.values():
            tensor.fill_(1)
        assert compare(*run(wrapper, case, return_lse=True), *attention(case)).passed


FAILING: list[dict[str, Any]] = [
    {"kv_indices": torch.zeros(300, dtype=torch.float32)},
    {"kv_len_arr": int32(1, 2, 0, 9999)},
    {"qo_indptr": int32(0, 17, 17, 18, 18)},
    {"qo_indptr": int32(0)},
    {"kv_indptr": int32(0, 1, 1, 1, 9999)},
    {"num_heads": 8, "kv_len_arr": int32(), "qo_indptr": int32(0), "kv_indptr": int32(0)},
    {"sm_scale": None, "num_heads": 8},
]


@pytest.mark.parametrize("warm", (False, True), ids=("cold", "warm"))
@pytest.mark.parametrize("use_cuda_graph", (False, True), ids=("eager", "graph"))
def test_after_a_failed_plan_all_is_as_before(use_cuda_graph: bool, warm: bool) -> None:
    case, other = case_of([130, 65, 0, 700]), case_of([1, 60, 0, 300], [1, 1, 1, 1], seed=1)
    buffers = graph_buffers(4, 200, "cpu") if use_cuda_graph else {}
    wrapper = wrapper_on("cpu", use_cuda_graph=use_cuda_graph, **buffers)
    wrapper.plan(**plan_arguments(case))
    if warm:
        run(wrapper, case)
    before = {name: buffer.tolist() for name, buffer in buffers.items()}
    failing = list(FAILING)
    if use_cuda_graph:
        failing.append({"kv_indices": torch.zeros(201, dtype=torch.int32)})
    for change in failing:
        with pytest.raises(MlaDecodeError):
            wrapper.plan(**{**plan_arguments(other), **change})
        assert {name: buffer.tolist() for name, buffer in buffers.items()} == before
        assert compare(*run(wrapper, case, return_lse=True), *attention(case)).passed


def failing_update(self: mla_decode.DevicePlan, *_: Any, **__: Any) -> mla_decode.DevicePlan:
    """As on a GPU that reports an earlier call: nothing was enqueued."""
    raise RangeError("of an earlier call")


def test_a_plan_that_meets_an_earlier_error_writes_no_buffer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, other = case_of([130, 65, 0, 700]), case_of([1, 60, 0, 300], seed=1)
    buffers = graph_buffers(4, 200, "cpu")
    wrapper = wrapper_on("cpu", use_cuda_graph=True, **buffers)
    wrapper.plan(**plan_arguments(case))
    run(wrapper, case)
    with monkeypatch.context() as patch, pytest.raises(RangeError, match="of an earlier call"):
        patch.setattr(mla_decode.DevicePlan, "update", failing_update)
        wrapper.plan(**plan_arguments(other))
    assert buffers["kv_len_arr"].tolist() == [130, 65, 0, 700]
    assert compare(*run(wrapper, case, return_lse=True), *attention(case)).passed


def test_a_run_that_fails_to_plan_leaves_it_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    case, padded = case_of([130, 65, 0, 700]), case_of([130, 65, 0, 700], padding_tokens=3)
    wrapper = wrapper_on("cpu")
    wrapper.plan(**plan_arguments(case))
    run(wrapper, case)
    updates: list[object] = []
    with monkeypatch.context() as patch, pytest.raises(RangeError, match="of an earlier call"):
        patch.setattr(mla_decode.DevicePlan, "update", failing_update)
        run(wrapper, padded)
    update = mla_decode.DevicePlan.update

    def spy(self: mla_decode.DevicePlan, *given: Any, **named: Any) -> mla_decode.DevicePlan:
        updates.append(self)
        return update(self, *given, **named)

    monkeypatch.setattr(mla_decode.DevicePlan, "update", spy)
    assert compare(*run(wrapper, padded, return_lse=True), *attention(padded)).passed
    assert len(updates) == 1


def test_graph_buffers_of_inference_mode_are_written_outside_of_it() -> None:
    case = case_of([130, 65, 0, 700])
    with torch.inference_mode():
        buffers = graph_buffers(4, 200, "cpu")
    wrapper = wrapper_on("cpu", use_cuda_graph=True, **buffers)
    wrapper.plan(**plan_arguments(case))
    assert compare(*run(wrapper, case, return_lse=True), *attention(case)).passed


def test_graph_mode_takes_more_tokens_than_it_ran() -> None:
    wrapper = wrapper_on("cpu", use_cuda_graph=True, **graph_buffers(2, 60, "cpu"))
    for tokens in ([1, 1], [4, 1], [1, 2]):
        case = case_of([130, 65], tokens)
        wrapper.plan(**plan_arguments(case))
        assert compare(*run(wrapper, case, return_lse=True), *attention(case)).passed


def test_graph_mode_keeps_its_plan_where_padding_made_it_bigger() -> None:
    """What a graph would find that was captured after a run: the plan of these lengths."""
    wrapper = wrapper_on("cpu", use_cuda_graph=True, **graph_buffers(1, 60, "cpu"))
    case, other = (case_of([n], [1], padding_tokens=20) for n in (700, 65))
    wrapper.plan(**plan_arguments(case))
    run(wrapper, case, pages=60)
    captured = wrapper._plan
    assert captured is not None
    wrapper.plan(**plan_arguments(other))
    assert wrapper._plan is captured
    assert captured.to_host().seq_lens.tolist() == [65]
    assert compare(*run(wrapper, other, pages=60, return_lse=True), *attention(other)).passed


def test_run_refuses_what_was_not_planned() -> None:
    case = case_of([130, 65, 0, 700])
    wrapper = wrapper_on("cpu")
    with pytest.raises(ScheduleError, match=r"run: expected plan\(\) before it"):
        run(wrapper, case)
    wrapper.plan(**plan_arguments(case))
    with pytest.raises(ShapeError, match=r"q_nope: expected shape \[N, 16, 512\]"):
        run(wrapper, case_of([130, 65, 0, 700], num_heads=8))
    with pytest.raises(ShapeError, match=r"ckv_cache: expected shape \[pages, 16, 512\]"):
        run(wrapper, case_of([130, 65, 0, 700], block_size=64))
    with pytest.raises(DtypeError, match="q_nope: expected"):
        run(wrapper, case_of([130, 65, 0, 700], dtype=torch.float16))
    for name in ("profiler_buffer", "kv_len", "page_table"):
        with pytest.raises(UnsupportedError, match=f"{name}: expected None"):
            run(wrapper, case, **{name: torch.zeros(1)})


def test_run_names_its_arguments() -> None:
    case = case_of([130, 65, 0, 700])
    wrapper = wrapper_on("cpu")
    wrapper.plan(**plan_arguments(case))
    q_nope, q_pe = (part.contiguous() for part in case.q.split([512, 64], dim=-1))
    good = {"q_nope": q_nope, "q_pe": q_pe, "ckv_cache": case.latent, "kpe_cache": case.rope}
    for name, tensor in good.items():
        for bad, error in (
            (None, DtypeError),
            ([1.0], DtypeError),
            (tensor.half(), DtypeError),
            (tensor[..., :32], ShapeError),
            (tensor[0], ShapeError),
            (tensor.to("meta"), DeviceError),
        ):
            with pytest.raises(error, match=f"^{name}: expected"):
                wrapper.run(**{**good, name: bad})
    with pytest.raises(ShapeError, match=r"^q_pe: expected shape \[7, 16, 64\]"):
        wrapper.run(**{**good, "q_pe": q_pe[:3]})
    with pytest.raises(ShapeError, match=r"^kpe_cache: expected shape"):
        wrapper.run(**{**good, "kpe_cache": case.rope[:3]})
    with pytest.raises(ShapeError, match=r"^q_nope: expected at least the 7 rows of qo_indptr"):
        wrapper.run(**{**good, "q_nope": q_nope[:3], "q_pe": q_pe[:3]})


def test_wrapper_refuses_buffers_that_no_kernel_reads() -> None:
    good = graph_buffers(4, 200, "cpu")
    for name, buffer in good.items():
        for bad, error in (
            (buffer.float(), DtypeError),
            (buffer[None], ShapeError),
            (torch.zeros(10, dtype=torch.int32)[::2], StrideError),
        ):
            with pytest.raises(error, match=f"^{name}: expected"):
                wrapper_on("cpu", use_cuda_graph=True, **{**good, name: bad})


def test_wrapper_refuses_other_backends_and_missing_buffers() -> None:
    with pytest.raises(UnsupportedError, match="backend: expected one of"):
        wrapper_on("cpu", backend="cutlass")
    with pytest.raises(DtypeError, match=r"qo_indptr: expected a torch\.Tensor, got NoneType"):
        wrapper_on("cpu", use_cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.parametrize("warm", (False, True), ids=("cold", "warm"))
def test_graph_replays_after_another_plan(warm: bool) -> None:
    cases = [
        case_of(lengths, device="cuda", seed=seed)
        for seed, lengths in enumerate(([130, 65, 0, 4000], [1, 0, 0, 64], [700, 300, 64, 65]))
    ]
    pages = max(case.latent.shape[0] for case in cases)
    ckv = torch.zeros(pages, 16, 512, dtype=torch.bfloat16, device="cuda")
    kpe = torch.zeros(pages, 16, 64, dtype=torch.bfloat16, device="cuda")
    q_nope, q_pe = (part.contiguous() for part in cases[0].q.split([512, 64], dim=-1))
    wrapper = wrapper_on("cuda", use_cuda_graph=True, **graph_buffers(4, 2000, "cuda"))
    wrapper.plan(**plan_arguments(cases[0]))
    if warm:
        wrapper.run(q_nope, q_pe, ckv, kpe)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = wrapper.run(q_nope, q_pe, ckv, kpe, return_lse=True)
    for case in (*cases, *cases):
        ckv[: case.latent.shape[0]] = case.latent
        kpe[: case.rope.shape[0]] = case.rope
        q_nope.copy_(case.q[..., :512])
        q_pe.copy_(case.q[..., 512:])
        wrapper.plan(**plan_arguments(case))
        graph.replay()
        mla_decode.synchronize()
        assert compare(out, lse, *attention(case)).passed
