"""What an instruction computes, on CPU tensors, rounded where the kernel rounds.

Scores are fp32 sums of bf16 products; the softmax is base 2; P is rounded to bf16 before
P @ V; everything is accumulated in fp32; partials are stored normalised, with the base-2
log-sum-exp of the scaled scores (-inf where no key is visible).
"""

from __future__ import annotations

import math

import torch

from .arguments import KernelArguments
from .errors import RangeError
from .words import Partial, Reduction

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


class KvCache:
    """Rows of the paged cache in fp32, keeping the last range: row groups share it."""

    def __init__(self, arguments: KernelArguments) -> None:
        self._arguments = arguments
        self._key: tuple[int, int, int] | None = None
        self._rows = (torch.empty(0), torch.empty(0))

    def rows(self, request: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rope and latent part ``[end - start, 64]`` and ``[end - start, 512]`` fp32.

        Only blocks that hold a position of ``[start, end)`` are looked up, and no row
        outside of it is ever read.
        """
        key = (request, start, end)
        if key != self._key:
            self._rows = self._gather(request, start, end)
            self._key = key
        return self._rows

    def _gather(self, request: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, size = self._arguments, self._arguments.block_size
        first = start // size
        blocks = a.table[request, first : (end - 1) // size + 1].long()
        outside = (blocks < 0) | (blocks >= a.num_blocks)
        if bool(outside.any()):
            where = int(outside.nonzero()[0])
            raise RangeError(
                f"table: request {request}, block {first + where}: expected 0 to "
                f"{a.num_blocks - 1}, got {int(blocks[where])}"
            )
        offset = start - first * size
        rows = torch.arange(offset, offset + end - start)
        ids, inside = blocks[rows // size], rows % size
        return a.k_rot[ids, inside].float(), a.v[ids, inside].float()


def run_partial(arguments: KernelArguments, partial: Partial, kv: KvCache) -> None:
    """Attention of some rows over some keys, into the output or a scratch slot."""
    a = arguments
    begin, end = partial.flat_rows(a.new_tokens, a.num_heads)
    rows = torch.arange(begin, end)
    tokens, heads = rows // a.num_heads, rows % a.num_heads
    q_rot = a.q_rot[partial.q_batch, tokens, heads].float()
    q_v = a.q_v[partial.q_batch, tokens, heads].float()
    k_rot, v = kv.rows(partial.q_batch, partial.start, partial.end)

    scores = q_v @ v.T
    scores.addmm_(q_rot, k_rot.T).mul_(float(a.softmax_scale) * LOG2_E)
    last_visible = partial.length - a.new_tokens + tokens
    if partial.end - 1 > int(last_visible.min()):
        positions = torch.arange(partial.start, partial.end)
        scores.masked_fill_(positions[None, :] > last_visible[:, None], -math.inf)
    top = scores.amax(1, keepdim=True)
    scores.sub_(torch.where(top == -math.inf, 0.0, top)).exp2_()
    total = scores.sum(1, keepdim=True)
    out = scores.bfloat16().float() @ v
    blind = total == 0  # sees no key; a NaN is not blind and goes on into the output
    out = torch.where(blind, 0.0, out / total)
    lse_log2 = torch.where(blind, -math.inf, top + total.log2())[:, 0]

    if partial.slot is None:
        a.o[partial.dst_batch, tokens, heads] = out.bfloat16()
        if a.lse is not None:
            a.lse[partial.dst_batch, heads, tokens] = _natural(lse_log2)
    else:
        a.o_scratch[partial.slot, tokens, heads] = out
        a.lvec_scratch[partial.slot, tokens, heads] = lse_log2


def run_reduction(arguments: KernelArguments, reduction: Reduction) -> None:
    """Merge of scratch slots, weighted by their log-sum-exps."""
    a = arguments
    token, inputs = reduction.dst_seq, list(reduction.inputs)
    heads = slice(*reduction.heads(a.num_heads))
    columns = slice(*reduction.columns())
    lse_log2 = a.lvec_scratch[inputs, token, heads]
    top = lse_log2.amax(0)
    top = torch.where(top == -math.inf, 0.0, top)
    weight = (lse_log2 - top).exp2()
    total = weight.sum(0)
    partials = a.o_scratch[inputs, token, heads, columns]
    blind = total == 0
    out = torch.where(blind[:, None], 0.0, (weight[..., None] * partials).sum(0) / total[:, None])
    merged = torch.where(blind, -math.inf, top + total.log2())

    if reduction.slot is None:
        a.o[reduction.dst_batch, token, heads, columns] = out.bfloat16()
        if a.lse is not None and reduction.col_begin == 0:
            a.lse[reduction.dst_batch, heads, token] = _natural(merged)
    else:
        a.o_scratch[reduction.slot, token, heads, columns] = out
        a.lvec_scratch[reduction.slot, token, heads] = merged


def _natural(lse_log2: torch.Tensor) -> torch.Tensor:
    """Natural log outside; FlashMLA's users expect +inf for a row that sees no key."""
    return torch.where(lse_log2 == -math.inf, math.inf, lse_log2 * LN_2)
