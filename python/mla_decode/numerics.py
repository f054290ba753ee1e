"""What an instruction computes, on CPU tensors, rounded where the kernel rounds.

Scores are fp32 sums of bf16 or fp16 products; the softmax is base 2; P is rounded to the cache's
dtype before P @ V; everything is accumulated in fp32; partials are stored normalised, with the
base-2 log-sum-exp of the scaled scores (-inf where no key is visible).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .arguments import KernelArguments
from .errors import RangeError
from .words import LATENT_DIM, Fill, Partial, Reduction

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

_INPUTS_AT_ONCE = 64  # of a reduction: 8 MB of partials


class KvCache:
    """Rows of the paged cache in fp32, keeping the last range: row groups share it."""

    def __init__(self, arguments: KernelArguments) -> None:
        self._arguments = arguments
        self._key: tuple[int, int, int] | None = None
        self._rows = (torch.empty(0), torch.empty(0))

    def rows(self, sequence: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rope and latent part ``[end - start, 64]`` and ``[end - start, 512]`` fp32.

        Only blocks that hold a position of ``[start, end)`` are looked up, and no row
        outside of it is ever read.
        """
        key = (sequence, start, end)
        if key != self._key:
            self._rows = self._gather(sequence, start, end)
            self._key = key
        return self._rows

    def _gather(self, sequence: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        a, size = self._arguments, self._arguments.block_size
        kv_head, request = divmod(sequence, a.num_requests)
        first = start // size
        blocks = a.blocks_of(request)[first : (end - 1) // size + 1].long()
        outside = (blocks < 0) | (blocks >= a.num_blocks)
        if bool(outside.any()):
            where = int(outside.nonzero()[0])
            raise RangeError(
                f"block_ids: request {request}, block {first + where}: expected 0 to "
                f"{a.num_blocks - 1}, got {int(blocks[where])}"
            )
        offset = start - first * size
        rows = torch.arange(offset, offset + end - start)
        ids, inside = blocks[rows // size], rows % size
        return a.rope[ids, inside, kv_head].float(), a.latent[ids, inside, kv_head].float()


class State(NamedTuple):
    """Attention of some rows over some keys; or, with inputs before rows, of several ranges."""

    out: torch.Tensor  # [rows, columns] fp32, normalised; 0 in a row that saw no key
    lse_log2: torch.Tensor  # [rows] fp32, without sinks; -inf in a row that saw no key


def attend(arguments: KernelArguments, partial: Partial, kv: KvCache) -> State:
    """Attention of a row group over the keys of a partial."""
    a = arguments
    first_token, num_tokens = a.tokens_of(partial.q_batch)
    own = partial.rows(a.num_heads, num_tokens * a.num_heads, a.group_rows)
    rows = torch.arange(own.start, own.stop)
    tokens, heads = rows // a.num_heads, rows % a.num_heads
    q_nope = a.q_nope[first_token + tokens, heads].float()
    q_pe = a.q_pe[first_token + tokens, heads].float()
    rope, latent = kv.rows(partial.q_batch, partial.start, partial.end)

    scores = q_nope @ latent.T
    scores.addmm_(q_pe, rope.T).mul_(float(a.softmax_scale) * LOG2_E)
    last_visible = partial.length - num_tokens + tokens
    if a.causal and partial.end - 1 > int(last_visible.min()):
        positions = torch.arange(partial.start, partial.end)
        scores.masked_fill_(positions[None, :] > last_visible[:, None], -math.inf)
    top = scores.amax(1, keepdim=True)
    scores.sub_(torch.where(top == -math.inf, 0.0, top)).exp2_()
    total = scores.sum(1, keepdim=True)
    out = scores.to(a.dtype).float() @ latent
    blind = total == 0  # sees no key; a NaN is not blind and goes on into the output
    out = torch.where(blind, 0.0, out / total)
    return State(out, torch.where(blind, -math.inf, top + total.log2())[:, 0])


def store_partial(arguments: KernelArguments, partial: Partial, state: State) -> None:
    """Write what a partial, or all its mates together, found."""
    rows = _rows_of(arguments, partial)
    _store(arguments, partial, rows, slice(0, LATENT_DIM), state)


def merge(states: Sequence[State]) -> State:
    """Merge of what was found for the same rows, each over keys of its own."""
    return _merge(State(*(torch.stack(parts) for parts in zip(*states, strict=True))))


def adopt(arguments: KernelArguments, partial: Partial, state: State) -> State:
    """What a partial found, merged with what it adopts, if anything."""
    if partial.adopted is None:
        return state
    rows = _rows_in_slot(arguments, _rows_of(arguments, partial))
    out, lse_log2 = arguments.o_scratch[partial.adopted], arguments.lvec_scratch[partial.adopted]
    return merge((state, State(out[rows], lse_log2[rows])))


def run_reduction(arguments: KernelArguments, reduction: Reduction) -> None:
    """Merge of scratch slots, weighted by their log-sum-exps."""
    a = arguments
    own, own_columns = reduction.rows(a.num_heads), reduction.columns()
    in_slot, columns = _rows_in_slot(a, own), slice(own_columns.start, own_columns.stop)
    inputs = slot_index(reduction.inputs)
    states = State(a.o_scratch[inputs, in_slot, columns], a.lvec_scratch[inputs, in_slot])
    _store(a, reduction, own, columns, _merge(states))


def _merge(states: State) -> State:
    """Merge over the first dimension, weighted by the log-sum-exps."""
    partials, lse_log2 = states
    top = lse_log2.amax(0)
    top = torch.where(top == -math.inf, 0.0, top)
    weight = (lse_log2 - top).exp2()
    total = weight.sum(0)
    out = torch.zeros(partials.shape[1:])
    for some in range(0, len(weight), _INPUTS_AT_ONCE):
        few = slice(some, some + _INPUTS_AT_ONCE)
        out += (weight[few, :, None] * partials[few]).sum(0)
    blind = total == 0
    out = torch.where(blind[:, None], 0.0, out / total[:, None])
    return State(out, torch.where(blind, -math.inf, top + total.log2()))


def run_fill(arguments: KernelArguments, fill: Fill) -> None:
    """Zeros, and the LSE of rows that see no key."""
    a = arguments
    a.out[fill.token_begin : fill.token_end] = 0
    tokens = torch.arange(fill.token_begin, fill.token_end)[:, None]
    heads = torch.arange(a.num_heads)[None, :]
    _store_lse(a, tokens, heads, torch.full((len(tokens), a.num_heads), -math.inf))


def slot_index(inputs: tuple[int, ...] | range) -> list[int] | slice:
    """The slots that an instruction reads, as an index: a run needs no list."""
    if isinstance(inputs, range):
        return slice(inputs.start, inputs.stop, inputs.step)
    return list(inputs)


def _rows_of(a: KernelArguments, partial: Partial) -> range:
    """Rows of its sequence that a partial works on."""
    _, num_tokens = a.tokens_of(partial.q_batch)
    return partial.rows(a.num_heads, num_tokens * a.num_heads, a.group_rows)


def _rows_in_slot(a: KernelArguments, rows: range) -> slice:
    """Where rows of a sequence lie in a slot of their row group."""
    first = rows.start % a.group_rows
    return slice(first, first + len(rows))


def _store(
    a: KernelArguments,
    instruction: Partial | Reduction,
    rows: range,
    columns: slice,
    state: State,
) -> None:
    """Write rows of a sequence into the output or the scratch slot of an instruction."""
    if instruction.slot is None:
        _store_output(a, instruction.dst_batch, rows, columns, state)
        return
    in_slot = _rows_in_slot(a, rows)
    a.o_scratch[instruction.slot, in_slot, columns] = state.out
    a.lvec_scratch[instruction.slot, in_slot] = state.lse_log2


def _store_output(
    a: KernelArguments, sequence: int, rows: range, columns: slice, state: State
) -> None:
    """Write rows of a sequence into the output; LSEs with the first column."""
    out, lse_log2 = state
    first_token, _ = a.tokens_of(sequence)
    index = torch.arange(rows.start, rows.stop)
    tokens, heads = first_token + index // a.num_heads, index % a.num_heads
    if a.attn_sink is not None:
        sink = a.attn_sink[sequence // a.num_requests * a.num_heads + heads]
        share = 1 / (1 + torch.exp2(sink * LOG2_E - lse_log2))
        # Without a key the share is 0 / 0 for a sink of -inf.
        out = torch.where(lse_log2[:, None] == -math.inf, 0.0, out * share[:, None])
    a.out[tokens, heads, columns] = out.to(a.dtype)
    if columns.start == 0:
        _store_lse(a, tokens, heads, lse_log2)


def _store_lse(
    a: KernelArguments, tokens: torch.Tensor, heads: torch.Tensor, lse_log2: torch.Tensor
) -> None:
    """Write LSEs of (token, head) pairs, in the base and with the empty value that were asked."""
    if a.lse is None:
        return
    value = lse_log2 if a.lse_base == 2 else lse_log2 * LN_2
    value = torch.where(lse_log2 == -math.inf, a.lse_empty, value)
    if a.lse.dim() == 3:
        a.lse[tokens // a.s_q, tokens % a.s_q, heads] = value
    else:
        a.lse[tokens, heads] = value
