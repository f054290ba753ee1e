"""`mla_decode.flashinfer`: the wrapper that FlashInfer's users plan and run."""

from __future__ import annotations

import inspect
import math
from typing import Any

import mla_decode
import pytest
import torch
from mla_decode.errors import (
    DtypeError,
    MlaDecodeError,
    ScheduleError,
    ShapeError,
    UnsupportedError,
)
from mla_decode.flashinfer import BatchMLAPagedAttentionWrapper
from mla_decode.reference import Case, attention, compare, make_case

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS = [2, 0, 1, 4]


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
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_plan_refuses(change: dict[str, Any], message: str) -> None:
    wrapper = wrapper_on("cpu")
    with pytest.raises(MlaDecodeError) as caught:
        wrapper.plan(**plan_arguments(case_of([130, 65, 0, 700]), **change))
    assert message in str(caught.value)


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
