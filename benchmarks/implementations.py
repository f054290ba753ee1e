"""What is benchmarked: the megakernel, and the peers that are installed.

An implementation prepares a case (plans, allocates). Its ``call(i)`` enqueues the operation on copy
``i`` and returns the output, shaped as the case's reference; under CUDA-graph capture that tensor
stays where it is, so a replay writes it again. Of a decode step planning is a part, on the GPU:
``plan()`` enqueues it, before the calls of all layers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.case import SOFTMAX_SCALE, Case, blocks_of
from benchmarks.shapes import HEAD_DIM, LATENT_DIM

FLASH_MLA_BLOCK_SIZE = 64


@dataclass(frozen=True)
class Prepared:
    """An implementation made ready for one case."""

    call: Callable[[int], torch.Tensor]
    plan: Callable[[], object] = lambda: None
    synchronize: Callable[[], None] = torch.cuda.synchronize  # raises what a launch reported


class UnavailableError(RuntimeError):
    """An implementation cannot run here; the message says why."""


class NotOfferedError(RuntimeError):
    """An implementation has no operation for this shape; its place in the table stays empty."""


def import_or_explain(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a wheel built for another torch fails in many ways
        raise UnavailableError(f"{package}: {type(error).__name__}: {error}") from error


def mla_decode(case: Case) -> Prepared:
    """Prepare the megakernel: one plan for all copies, made ahead as an engine does."""
    package = import_or_explain("mla_decode", "mla_decode")
    shape = case.shape
    plan = package.plan(
        list(shape.seq_lens),
        shape.num_heads,
        list(shape.tokens) if shape.is_mixed else shape.new_tokens,
        batch_invariant=shape.batch_invariant,
    )
    return mla_decode_by(plan, case)


def mla_decode_by(plan: Any, case: Case) -> Prepared:
    """Prepare the megakernel with a plan that was made before."""
    package = import_or_explain("mla_decode", "mla_decode")
    calls = decode_calls(package, case, plan, plan.workspace(case.seq_lens.device))
    return Prepared(calls, synchronize=package.synchronize)


def mla_decode_step(case: Case) -> Prepared:
    """Prepare the megakernel for steps that plan on the GPU."""
    package = import_or_explain("mla_decode", "mla_decode")
    shape = case.shape
    if shape.is_mixed or shape.batch_invariant:
        raise NotOfferedError("a step is measured with as many new tokens for all requests")
    plan = package.DevicePlan(
        len(shape.seq_lens),
        shape.num_heads,
        shape.new_tokens,
        max_seq_len=max(shape.seq_lens),
        device=case.seq_lens.device,
    )
    plan.update(case.seq_lens)
    return Prepared(
        decode_calls(package, case, plan, plan.workspace()),
        plan=lambda: plan.update(case.seq_lens),
        synchronize=package.synchronize,
    )


def decode_calls(
    package: Any, case: Case, plan: object, workspace: object
) -> Callable[[int], torch.Tensor]:
    """The megakernel's decode of copy ``i``, by ``plan``."""
    cu_seqlens_q = case.cu_seqlens_q if case.shape.is_mixed else None

    def call(i: int) -> torch.Tensor:
        out, _ = package.decode(
            case.q[i],
            case.kv_cache[i],
            case.block_table,
            case.seq_lens,
            plan=plan,
            softmax_scale=SOFTMAX_SCALE,
            cu_seqlens_q=cu_seqlens_q,
            workspace=workspace,
        )
        return out

    return call


def flash_mla(case: Case) -> Prepared:
    """Prepare FlashMLA (wheel sgl-flash-mla). The first call fills the scheduling metadata."""
    return Prepared(flash_mla_step(case).call)


def flash_mla_step(case: Case) -> Prepared:
    """Prepare FlashMLA for steps: the first call with new metadata plans."""
    shape = case.shape
    if shape.block_size != FLASH_MLA_BLOCK_SIZE or shape.is_mixed or shape.batch_invariant:
        raise NotOfferedError("flash_mla: blocks of 64, as many new tokens for all requests")
    flash = import_or_explain("flash_mla", "sgl-flash-mla")
    metadata, _ = flash.get_mla_metadata()

    def plan() -> None:
        nonlocal metadata
        metadata, _ = flash.get_mla_metadata()

    def call(i: int) -> torch.Tensor:
        return call_flash_mla(flash, case, i, metadata)

    return Prepared(call, plan)


def call_flash_mla(flash: Any, case: Case, i: int, metadata: object) -> torch.Tensor:
    """FlashMLA's dense decode of copy ``i``; with fresh metadata it plans first."""
    out: torch.Tensor
    out, _ = flash.flash_mla_with_kvcache(
        case.q[i],
        case.kv_cache[i],
        case.block_table,
        case.seq_lens,
        LATENT_DIM,
        metadata,
        softmax_scale=SOFTMAX_SCALE,
        causal=True,
        is_fp8_kvcache=False,
        use_legacy=True,
    )
    return out


def flashinfer_fa3(case: Case) -> Prepared:
    """Prepare FlashInfer's fa3 backend, which compiles its kernel at first use."""
    shape, device = case.shape, case.seq_lens.device
    if shape.batch_invariant:
        raise NotOfferedError("flashinfer: no plan that is batch invariant")
    mla = import_or_explain("flashinfer.mla", "flashinfer-python")
    blocks = blocks_of(shape)
    indices = torch.cat([case.block_table[row, :n] for row, n in enumerate(blocks)])
    workspace = torch.empty(256 << 20, dtype=torch.int8, device=device)
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
    wrapper.plan(
        case.cu_seqlens_q,
        torch.tensor([0, *blocks], device=device).cumsum(0).int(),
        indices,
        case.seq_lens,
        shape.num_heads,
        LATENT_DIM,
        HEAD_DIM - LATENT_DIM,
        shape.block_size,
        True,  # causal
        SOFTMAX_SCALE,
        torch.bfloat16,
        torch.bfloat16,
    )
    split = [LATENT_DIM, HEAD_DIM - LATENT_DIM]
    queries = [
        tuple(part.contiguous() for part in q.flatten(0, -3).split(split, -1)) for q in case.q
    ]

    def call(i: int) -> torch.Tensor:
        latent, rope = case.kv_cache[i].squeeze(2).split(split, -1)
        out: torch.Tensor = wrapper.run(*queries[i], latent, rope)
        return out.view(case.reference[i].shape)

    return Prepared(call)


IMPLEMENTATIONS: dict[str, Callable[[Case], Prepared]] = {
    "mla_decode": mla_decode,
    "flash_mla": flash_mla,
    "flashinfer_fa3": flashinfer_fa3,
}
# FlashInfer plans on the host: no graph can hold a step of it.
STEPS: dict[str, Callable[[Case], Prepared]] = {
    "mla_decode": mla_decode_step,
    "flash_mla": flash_mla_step,
}
