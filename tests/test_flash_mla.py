"""`mla_decode.flash_mla`: FlashMLA's users run unchanged."""

from __future__ import annotations

import inspect
import math
import sys
import weakref
from typing import Any

import mla_decode
import pytest
import torch
from mla_decode import flash_mla
from mla_decode.errors import DtypeError, MlaDecodeError, RangeError, ScheduleError
from mla_decode.flash_mla import (
    FlashMLASchedMeta,
    NotSupportedError,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from mla_decode.reference import Case, attention, compare, make_case

from tests.support import same_bits

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def case_of(lengths: list[int], heads: int = 16, tokens: int = 2, **options: Any) -> Case:
    return make_case(lengths, heads, tokens, **options)


def lengths_of(case: Case) -> torch.Tensor:
    return torch.tensor(case.seq_lens, dtype=torch.int32, device=case.q.device)


def cache_of(case: Case) -> torch.Tensor:
    assert isinstance(case.kv_cache, torch.Tensor)
    return case.kv_cache if case.h_kv > 1 else case.kv_cache.unsqueeze(2)


def metadata_of(case: Case, form: str) -> Any:
    if form == "present":
        return get_mla_metadata()
    rows = case.new_tokens * case.num_heads // case.h_kv
    return get_mla_metadata(lengths_of(case), rows, case.h_kv)


def call(case: Case, metadata: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_mla_with_kvcache(
        case.q,
        cache_of(case),
        case.block_table,
        lengths_of(case),
        512,
        *metadata,
        softmax_scale=case.softmax_scale,
        **{"causal": case.causal, "attn_sink": case.attn_sink, **options},
    )


def test_names_and_defaults_are_flash_mlas() -> None:
    parameters = inspect.signature(flash_mla_with_kvcache).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        **dict.fromkeys(
            (
                "q",
                "k_cache",
                "block_table",
                "cache_seqlens",
                "head_dim_v",
                "tile_scheduler_metadata",
            ),
            inspect.Parameter.empty,
        ),
        **dict.fromkeys(
            (
                "num_splits",
                "softmax_scale",
                "indices",
                "attn_sink",
                "extra_k_cache",
                "extra_indices_in_kvcache",
                "topk_length",
                "extra_topk_length",
            )
        ),
        "causal": False,
        "is_fp8_kvcache": False,
    }
    kinds = {p.kind for p in parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ("present", "older"))
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"causal": False},
        {"h_kv": 2, "heads": 32},
        {"heads": 128, "tokens": 1},
        {"attn_sink": [0.1 * i for i in range(16)]},
        {"block_size": 16, "dtype": torch.float16},
    ],
    ids=str,
)
def test_results_are_flash_mlas(options: dict[str, Any], form: str, device: str) -> None:
    """NaN past each length, wild block ids past each last block, +inf for an empty request."""
    case = case_of([130, 65, 0, 3000, 1], **options, device=device)
    metadata = metadata_of(case, form)
    out, lse = call(case, metadata)
    assert out.shape == (5, case.new_tokens, case.num_heads, 512)
    assert lse.shape == (5, case.num_heads, case.new_tokens)
    assert lse.is_contiguous()
    assert compare(out, lse, *attention(case)).passed
    assert bool((lse[2] == math.inf).all())
    again = call(case, metadata)
    assert same_bits(again[0], out)


def test_default_scale_is_of_the_head_dim() -> None:
    case = case_of([130])
    arguments = (case.q, cache_of(case), case.block_table, lengths_of(case), 512)
    implicit = flash_mla_with_kvcache(*arguments, *get_mla_metadata())
    explicit = flash_mla_with_kvcache(*arguments, *get_mla_metadata(), 576**-0.5, False)
    assert same_bits(implicit[0], explicit[0])


def test_present_metadata_is_empty_until_the_first_call() -> None:
    case = case_of([130, 65])
    metadata, nothing = get_mla_metadata()
    assert isinstance(metadata, FlashMLASchedMeta)
    assert nothing is None
    assert (metadata.have_initialized, metadata.config) == (False, None)
    call(case, (metadata, None))
    assert metadata.have_initialized
    assert metadata.config == FlashMLASchedMeta.Config(
        2, 2, 16, 64, 1, True, False, None, None, None
    )
    assert metadata.tile_scheduler_metadata is not None
    words = metadata.tile_scheduler_metadata.data_ptr()
    call(case, (metadata, None))
    assert metadata.tile_scheduler_metadata.data_ptr() == words


def count_updates(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    seen: list[object] = []
    update = mla_decode.DevicePlan.update

    def spy(self: mla_decode.DevicePlan, *arguments: Any) -> mla_decode.DevicePlan:
        seen.append(self)
        return update(self, *arguments)

    monkeypatch.setattr(mla_decode.DevicePlan, "update", spy)
    return seen


@pytest.mark.parametrize("form", ("present", "older"))
def test_a_step_is_planned_once(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = count_updates(monkeypatch)
    case = case_of([130, 65])
    lengths = lengths_of(case)
    metadata = metadata_of(case, form)
    inputs = (case.q, cache_of(case), case.block_table, lengths, 512, *metadata)
    for _ in range(3):
        flash_mla_with_kvcache(*inputs)
    assert len(updates) == 1
    lengths += 0  # written again: the next step
    flash_mla_with_kvcache(*inputs)
    assert len(updates) == 2
    if form == "older":
        metadata[0].copy_(get_mla_metadata(lengths, 32, 1)[0])
        flash_mla_with_kvcache(*inputs)
        assert len(updates) == 3


def call_with(case: Case, lengths: torch.Tensor, metadata: Any) -> Any:
    """A call on the case's tensors with other lengths than it has."""
    options = {"softmax_scale": case.softmax_scale, "causal": True}
    inputs = (case.q, cache_of(case), case.block_table, lengths, 512, *metadata)
    return flash_mla_with_kvcache(*inputs, **options)


@pytest.mark.parametrize("inside", ("lengths", "metadata", "both"))
def test_older_metadata_never_stands_for_lengths_whose_writes_cannot_be_seen(inside: str) -> None:
    case = case_of([130, 65])
    with torch.inference_mode(inside != "metadata"):
        lengths = lengths_of(case)
    with torch.inference_mode(inside != "lengths"):
        metadata = get_mla_metadata(lengths_of(case), 32, 1)
    with torch.inference_mode():
        longer = call_with(case, lengths, metadata)
        lengths.numpy()[:] = 3  # as an engine's kernel would, which counts no version
        if inside != "lengths":
            metadata[0].copy_(get_mla_metadata(lengths, 32, 1)[0])
        shorter = call_with(case, lengths, metadata)
    expected = call_with(case, torch.full((2,), 3, dtype=torch.int32), get_mla_metadata())
    assert not same_bits(longer[0], expected[0])
    assert same_bits(shorter[0], expected[0])


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("form", ("present", "older"))
def test_lengths_of_another_tensor_are_never_taken_for_those_before(
    form: str, dtype: torch.dtype
) -> None:
    """The tensor before stays alive, so that the next one gets another address."""
    case = case_of([130, 130])
    metadata = metadata_of(case, form)
    for length in (130, 3, 65, 7):
        lengths = torch.full((2,), length, dtype=dtype)
        made = call_with(case, lengths, metadata)
        alive = weakref.ref(lengths)
        del lengths
        assert alive() is not None
        fresh = torch.full((2,), length, dtype=torch.int32)
        assert same_bits(made[0], call_with(case, fresh, get_mla_metadata())[0])


def test_other_elements_of_the_same_memory_are_other_lengths() -> None:
    case = case_of([130, 65])
    metadata = get_mla_metadata()
    pairs = torch.tensor([[130, 65], [3, 3]], dtype=torch.int64)
    call_with(case, pairs[0], metadata)
    made = call_with(case, pairs[:, 0], metadata)
    fresh = torch.tensor([130, 3], dtype=torch.int32)
    assert same_bits(made[0], call_with(case, fresh, get_mla_metadata())[0])


def test_a_refused_call_fills_no_metadata() -> None:
    case = case_of([130, 65])
    metadata = get_mla_metadata()
    inputs = (case.q, cache_of(case), case.block_table.long(), lengths_of(case), 512, *metadata)
    with pytest.raises(DtypeError, match="block_table"):
        flash_mla_with_kvcache(*inputs)
    assert metadata == get_mla_metadata()


@pytest.mark.parametrize("form", ("present", "older"))
def test_lengths_that_are_refused_leave_the_plan_before(form: str) -> None:
    case = case_of([130, 65])
    metadata, lengths = metadata_of(case, form), lengths_of(case)
    good = call_with(case, lengths, metadata)
    with pytest.raises(RangeError, match="cache_seqlens: request 1: expected 0 to 320, got 9999"):
        call_with(case, torch.tensor([3, 9999], dtype=torch.int32), metadata)
    assert same_bits(call_with(case, lengths, metadata)[0], good[0])


def test_an_update_that_fails_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU an update raises what an earlier call reported."""
    case = case_of([130, 65])
    metadata, lengths = get_mla_metadata(), lengths_of(case)
    good = call_with(case, lengths, metadata)
    update = mla_decode.DevicePlan.update

    def fail(self: mla_decode.DevicePlan, *arguments: Any) -> mla_decode.DevicePlan:
        update(self, *arguments)
        raise RangeError("of an earlier call")

    with monkeypatch.context() as patch, pytest.raises(RangeError, match="of an earlier call"):
        patch.setattr(mla_decode.DevicePlan, "update", fail)
        call_with(case, torch.full((2,), 3, dtype=torch.int32), metadata)
    assert same_bits(call_with(case, lengths, metadata)[0], good[0])


def test_metadata_of_one_step_and_another_live_side_by_side() -> None:
    cases = [case_of([130, 65]), case_of([65, 700])]
    metadata = [metadata_of(case, "older") for case in cases]
    present = [get_mla_metadata() for _ in cases]
    for _ in range(2):
        for case, *forms in zip(cases, metadata, present, strict=True):
            for one in forms:
                out, lse = call(case, one)
                assert compare(out, lse, *attention(case)).passed


def test_older_metadata_fits_the_buffers_of_another_batch() -> None:
    """As engines do that keep buffers for CUDA graphs and copy each step's metadata there."""
    kept, kept_splits = get_mla_metadata(torch.ones(8, dtype=torch.int32), 32, 1)
    case = case_of([130, 65])
    metadata, splits = metadata_of(case, "older")
    kept.copy_(metadata)
    kept_splits[:3].copy_(splits)
    assert (metadata.dtype, splits.dtype, splits.shape) == (torch.int32, torch.int32, (3,))
    assert compare(*call(case, (kept, kept_splits[:3])), *attention(case)).passed
    by_name = get_mla_metadata(
        cache_seqlens=lengths_of(case), num_q_tokens_per_head_k=32, num_heads_k=1, num_heads_q=16
    )
    assert compare(*call(case, by_name), *attention(case)).passed
    assert compare(*call(case, (metadata, None)), *attention(case)).passed


def test_other_sizes_with_filled_metadata_are_refused() -> None:
    metadata = get_mla_metadata()
    call(case_of([130, 65]), metadata)
    for other in (case_of([130]), case_of([130, 65], 8), case_of([130, 65], tokens=1)):
        with pytest.raises(ScheduleError, match="tile_scheduler_metadata: filled for"):
            call(other, metadata)
    with pytest.raises(ScheduleError, match="causal=True"):
        call(case_of([130, 65]), metadata, causal=False)


@pytest.mark.parametrize(
    "options",
    [
        {"is_fp8_kvcache": True},
        {"indices": torch.zeros(1, 1, 4, dtype=torch.int32)},
        {"extra_k_cache": torch.zeros(1)},
        {"extra_indices_in_kvcache": torch.zeros(1)},
        {"topk_length": torch.zeros(1)},
        {"extra_topk_length": torch.zeros(1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_supported_is_named(options: dict[str, Any]) -> None:
    case = case_of([130])
    with pytest.raises(NotSupportedError, match=next(iter(options))) as caught:
        call(case, get_mla_metadata(), **options)
    assert isinstance(caught.value, NotImplementedError)
    assert isinstance(caught.value, MlaDecodeError)


def test_bad_arguments_are_named() -> None:
    case = case_of([130])
    good = (case.q, cache_of(case), case.block_table, lengths_of(case), 512, *get_mla_metadata())

    def refuse(position: int, value: object, message: str) -> None:
        bad = list(good)
        bad[position] = value
        with pytest.raises(MlaDecodeError, match=message):
            flash_mla_with_kvcache(*bad)

    refuse(0, case.q[0], r"q: expected shape \[b, s_q, h_q, 576\]")
    refuse(1, case.kv_cache, "k_cache: expected shape")
    refuse(2, None, "block_table: expected a torch.Tensor")
    refuse(3, None, "cache_seqlens: expected a torch.Tensor")
    refuse(4, 256, "head_dim_v: expected 512, got 256")
    refuse(5, None, "tile_scheduler_metadata: expected what get_mla_metadata returns")
    refuse(6, torch.zeros(2), "num_splits: expected None with a FlashMLASchedMeta")
    refuse(0, None, "q: expected a torch.Tensor, got NoneType")
    refuse(0, case.q[..., :512], r"^q: expected shape \[b, s_q, h_q, 576\]")
    refuse(0, case.q.repeat(1, 9, 1, 1), "q: expected s_q, the new tokens, of 1 to 16, got 18")
    refuse(0, case.q[:, :, :0], "q: expected a multiple of 1 heads")
    refuse(1, [1.0], "k_cache: expected a torch.Tensor, got list")
    refuse(1, cache_of(case).half(), r"^k_cache: expected torch\.bfloat16")
    refuse(1, cache_of(case)[..., :512], "k_cache: expected shape")
    refuse(1, cache_of(case)[:, :0], "k_cache: expected page_block_size and h_k of at least 1")
    refuse(2, torch.tensor(1), r"block_table: expected shape \[1, max_blocks\], got \[\]")
    refuse(2, case.block_table[0], r"block_table: expected shape \[1, max_blocks\]")
    refuse(3, lengths_of(case).float(), r"^cache_seqlens: expected torch\.int32")
    refuse(3, lengths_of(case).repeat(2), r"^cache_seqlens: expected shape \[1\], got \[2\]")
    refuse(3, lengths_of(case) - 131, "^cache_seqlens: request 0: expected 0 to 320, got -1")
    refuse(3, lengths_of(case).long() + 2**33, "^cache_seqlens: request 0: .* got 8589934722")
    with pytest.raises(DtypeError, match=r"cache_seqlens: expected torch\.int32"):
        get_mla_metadata(lengths_of(case).float(), 32, 1)


def test_gradients_are_not_in_the_way() -> None:
    case = case_of([130])
    learning = Case(**{**vars(case), "q": case.q.clone().requires_grad_()})
    out, _ = call(learning, get_mla_metadata())
    assert not out.requires_grad


def test_it_takes_flash_mlas_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_mla", mla_decode.flash_mla)
    from flash_mla import (  # type: ignore[import-not-found]
        flash_attn_varlen_func,
        flash_mla_sparse_fwd,
        flash_mla_with_kvcache,
        get_mla_metadata,
    )

    assert flash_mla_with_kvcache is flash_mla.flash_mla_with_kvcache
    assert get_mla_metadata is flash_mla.get_mla_metadata
    for absent in (flash_attn_varlen_func, flash_mla_sparse_fwd):
        with pytest.raises(NotImplementedError, match=f"{absent.__name__}: not supported"):
            absent(torch.zeros(1))
    assert not hasattr(flash_mla, "something_else")


@pytest.mark.gpu
@pytest.mark.parametrize("form", ("present", "older"))
def test_a_captured_step_follows_its_lengths(form: str) -> None:
    cases = [case_of([4000, 65, 700], device="cuda"), case_of([3, 0, 2000], device="cuda")]
    lengths, table = lengths_of(cases[0]).clone(), torch.zeros_like(cases[0].block_table)
    q, kv = cases[0].q.clone(), torch.zeros_like(cache_of(cases[0]))
    scale = cases[0].softmax_scale
    call(cases[0], metadata_of(cases[0], form))  # warm
    torch.cuda.synchronize()
    metadata = metadata_of(cases[0], form)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(2):
            out, lse = flash_mla_with_kvcache(
                q, kv, table, lengths, 512, *metadata, softmax_scale=scale, causal=True
            )
    for case in (*cases, *cases):
        q.copy_(case.q)
        kv[: cache_of(case).shape[0]] = cache_of(case)
        table[:, : case.block_table.shape[1]] = case.block_table
        lengths.copy_(lengths_of(case))
        graph.replay()
        mla_decode.synchronize()
        assert compare(out, lse, *attention(case)).passed
