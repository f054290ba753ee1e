"""Decode over a cache that is spread over several ranks: context parallelism.

Every rank holds some of the keys of every request, attends to them, and sends its output and
log-sum-exp to all others; each merges the states in the order of ranks, so that all ranks end
with the same bits. One collective per call: a rank receives ``T * H * 1028`` bytes from each
other rank (512 values of 2 bytes and an fp32 LSE for each row), whatever the lengths are.

Tensor parallelism, which splits the heads, needs nothing from here: each rank calls
`mla_decode.decode` for its heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from . import calls, checks, decoding, planning, visible_keys
from .calls import TensorOrPair
from .device_plan import DevicePlan
from .errors import DtypeError, RangeError, ShapeError, UnsupportedError
from .lengths import SeqLens, tokens_from_offsets
from .merge_states import copied_into, merge_states
from .planning import Plan
from .visible_keys import Array, Ints, visible_in_chunk, visible_interleaved
from .words import LATENT_DIM

__all__ = ["context_parallel_decode", "visible_in_chunk", "visible_interleaved"]

_LSE_BYTES = 4
_REFUSED = ("stream", "timings")

# One function under two names; torch 2.13 deprecates the older one.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)


def context_parallel_decode(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: torch.Tensor | None = None,
    seq_lens: SeqLens | None = None,
    plan: Plan | DevicePlan | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    softmax_scale: float | None = None,
    causal: bool | None = None,
    visible: Ints | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    lse_base: float = math.e,
    lse_empty: float = math.inf,
    lse_layout: str | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mla_decode.decode` of requests whose keys are spread over the ranks of ``group``.

    A collective: every rank of the group calls it, with the same ``q`` and with its own cache,
    block table and lengths. The results are the same on all ranks, bit for bit.

    Each key of a request lies on one rank, by any rule: chunk by chunk, token by token in
    turn, or all on one rank; on a rank they are in order. With several new tokens, a token
    must not see the keys of those after it. How many of *this rank's* keys it sees is said by
    ``causal`` or ``visible``, which may differ from rank to rank.

    Parameters
    ----------
    q, kv_cache, block_table
        As of `decode`; cache and table are this rank's.
    seq_lens : Tensor, ndarray or list of int, optional
        ``[B]`` keys of each request *on this rank*; 0 where it holds none. None with a
        ``plan``.
    plan
        As of `decode`, made for this rank's ``seq_lens``. Not looked at where ``visible``
        takes more than one decode call (see Notes).
    group : ProcessGroup, optional
        NCCL for CUDA tensors, gloo for CPU tensors; the default group when None.
    causal : bool, optional
        One mask for all requests. False: every new token sees all keys of this rank. True:
        the last keys here are those of the new tokens, one each. So the rank that holds the
        end of *every* request, with the keys of all its new tokens, passes True, and the
        others False. Not needed with one new token per request, or one rank.
    visible : list of int, ndarray or CPU Tensor, optional
        ``[T]`` or ``[B, s_q]``: how many of this rank's keys each new token sees. Instead of
        ``causal``, for every other split: requests that end on different ranks, new tokens
        whose keys lie on several. `visible_in_chunk` and `visible_interleaved` compute it.
    softmax_scale, cu_seqlens_q, lse_base, lse_empty, lse_layout, out, lse
        As of `decode`.
    attn_sink : Tensor, optional
        As of `decode`; applied once, to the merged output.
    **options
        Further options of `decode`, but not ``stream`` (the call runs on the current stream,
        as collectives do) and not ``timings``.

    Returns
    -------
    out, lse : Tensor
        As of `decode` over all ranks' keys.

    Raises
    ------
    UnsupportedError
        There is no process group, this process is not in it, or an option is not for several
        ranks.
    RangeError, ShapeError, DtypeError
        Both or neither of ``causal`` and ``visible`` were given; ``visible`` does not fit
        ``seq_lens``; or ``causal`` is True although a request has fewer keys here than new
        tokens (checked where lengths are on the host). And whatever `decode` raises.

    Notes
    -----
    The merge is exact; what a rank sends is rounded to the dtype of q, so there is one such
    rounding more than in `decode`: in bf16 a relative L2 error against float64 of 2.7e-3 at
    most instead of 2.0e-3, however many the ranks (docs/serving.md). An error on one rank
    leaves the others in the collective until the group's timeout.

    With ``visible``, tokens are grouped into runs that see the same keys or one key more each,
    at most two for a request and rank where the split is in chunks. Where all requests are
    masked alike that is one decode call, else two, one of them causal; a request of two runs
    has its keys read twice. With one call the function can be captured in a CUDA graph,
    provided that `decode` and the group's backend can.
    """
    for name in _REFUSED:
        if name in options:
            raise UnsupportedError(f"{name}: expected none with several ranks, got {name}=")
    if causal is not None and not isinstance(causal, bool):
        raise DtypeError(f"causal: expected a bool or None, got {type(causal).__name__}")
    ranks = _world_size(group)
    call = _Call.of(q, cu_seqlens_q, lse_layout)
    call.require_outputs(out, lse, attn_sink)
    work = _work(call, seq_lens, cu_seqlens_q, causal, visible, ranks)
    options.update(softmax_scale=softmax_scale, lse_base=lse_base, lse_layout="th")

    own = _States(call, 1)
    if isinstance(work, bool):
        if cu_seqlens_q is not None:
            options["cu_seqlens_q"] = cu_seqlens_q
        options.update(out=call.shaped(own.outs[0]), lse=own.lses[0])
        decoding.decode(q, kv_cache, block_table, seq_lens, plan, causal=work, **options)
    else:
        _decode_parts(q, kv_cache, block_table, work, own, options)
    every = own
    if ranks > 1:
        every = _States(call, ranks)
        _all_gather(every.bytes.view(-1), own.bytes.view(-1), group=group)
    merged, merged_lse = merge_states(
        every.outs, every.lses, lse_base=lse_base, lse_empty=lse_empty, attn_sink=attn_sink
    )
    return (
        copied_into("out", out, call.shaped(merged)),
        copied_into("lse", lse, call.shaped_lse(merged_lse).contiguous()),
    )


@dataclass(frozen=True)
class _Call:
    """Sizes of a call, and the shapes that its results have."""

    leading: tuple[int, ...]
    """``(B, s_q)`` or ``(T,)``: the dimensions of q before the heads."""
    new_tokens: int | None
    """s_q; None with ``cu_seqlens_q``."""
    num_heads: int
    dtype: torch.dtype
    device: torch.device
    lse_layout: str

    @staticmethod
    def of(q: TensorOrPair, cu_seqlens_q: torch.Tensor | None, lse_layout: str | None) -> _Call:
        part = checks.require_tensor("q", q[0] if isinstance(q, tuple) and q else q)
        ragged = cu_seqlens_q is not None
        if ragged or part.dim() != 4:
            checks.require_shape("q", part, ["T", "H", "D"])
        leading = tuple(part.shape[:-2])
        order = lse_layout or ("bhs" if len(leading) == 2 else "th")
        if order not in calls.LSE_LAYOUTS:
            raise RangeError(f"lse_layout: expected one of {calls.LSE_LAYOUTS}, got {lse_layout!r}")
        if ragged and order == "bhs":
            raise UnsupportedError("lse_layout: expected 'th' with cu_seqlens_q, got 'bhs'")
        new_tokens = None if ragged else leading[1] if len(leading) == 2 else 1
        return _Call(leading, new_tokens, int(part.shape[-2]), part.dtype, part.device, order)

    @property
    def tokens(self) -> int:
        """T."""
        return math.prod(self.leading)

    def shaped(self, out: torch.Tensor) -> torch.Tensor:
        """``[T, H, 512]`` as `decode` returns it."""
        return out.view(*self.leading, self.num_heads, LATENT_DIM)

    def shaped_lse(self, lse: torch.Tensor) -> torch.Tensor:
        """``[T, H]`` as `decode` returns it, by strides."""
        if self.lse_layout == "th":
            return lse
        assert self.new_tokens is not None
        return lse.view(-1, self.new_tokens, self.num_heads).transpose(1, 2)

    def require_outputs(
        self,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        attn_sink: torch.Tensor | None,
    ) -> None:
        """Check what is used after the collective only, before a rank enters it."""
        lse_shape = self.shaped_lse(torch.empty(self.tokens, self.num_heads, device="meta")).shape
        for name, tensor, dtype, shape in (
            ("out", out, self.dtype, (*self.leading, self.num_heads, LATENT_DIM)),
            ("lse", lse, torch.float32, lse_shape),
            ("attn_sink", attn_sink, torch.float32, (self.num_heads,)),
        ):
            if tensor is not None:
                checks.require_shape(name, checks.require_tensor(name, tensor), shape)
                checks.require_dtype(name, tensor, dtype)
                checks.require_device(name, tensor, self.device)


class _States:
    """States of ``ranks`` ranks, each in one piece of memory that a collective can send."""

    def __init__(self, call: _Call, ranks: int) -> None:
        rows = call.tokens * call.num_heads
        out_bytes = rows * LATENT_DIM * call.dtype.itemsize
        self.bytes = torch.empty(
            ranks, out_bytes + rows * _LSE_BYTES, dtype=torch.uint8, device=call.device
        )
        sizes = (ranks, call.tokens, call.num_heads)
        outs, lses = self.bytes[:, :out_bytes], self.bytes[:, out_bytes:]
        self.outs = outs.view(call.dtype).view(*sizes, LATENT_DIM)
        self.lses = lses.view(torch.float32).view(sizes)


def _work(
    call: _Call,
    seq_lens: SeqLens | None,
    cu_seqlens_q: torch.Tensor | None,
    causal: bool | None,
    visible: Ints | None,
    ranks: int,
) -> bool | tuple[Array, Array]:
    """The mask of one decode call for the whole batch; or, where that does not do, the keys
    that each token sees and the tokens of each request."""
    if visible is None:
        if causal is None and ranks > 1 and call.new_tokens != 1:
            raise RangeError(
                "causal: with several new tokens and ranks, expected causal= or visible=, which "
                "say what they see of this rank's keys; got neither"
            )
        mask = True if causal is None else causal
        if mask and ranks > 1 and call.new_tokens not in (None, 1):
            _require_end(seq_lens, call.new_tokens)
        return mask
    if causal is not None:
        raise RangeError("visible: expected None beside causal=, got both")
    tokens = _tokens_per_request(call, cu_seqlens_q)
    array = visible_keys.require_visible(visible, tokens)
    _require_own_keys(array, tokens, seq_lens)
    one = visible_keys.one_mask(array, tokens)
    return (array, tokens) if one is None else one


@dataclass(frozen=True)
class _DevicePart:
    """A `Part` with its plan, and its indices on the device."""

    causal: bool
    plan: Plan
    rows: torch.Tensor
    requests: torch.Tensor
    cu_seqlens_q: torch.Tensor


@lru_cache(maxsize=64)  # one entry serves all layers of a step
def _device_parts(
    visible: bytes,
    tokens: bytes,
    num_heads: int,
    num_kv_heads: int,
    batch_invariant: bool,
    device: torch.device,
) -> tuple[_DevicePart, ...]:
    parts = visible_keys.parts(
        np.frombuffer(visible, dtype=np.int64), np.frombuffer(tokens, dtype=np.int64)
    )
    return tuple(
        _DevicePart(
            part.causal,
            planning.plan(
                part.seq_lens,
                num_heads,
                np.diff(part.cu_seqlens_q),
                num_kv_heads=num_kv_heads,
                batch_invariant=batch_invariant,
                device=device,
            ),
            torch.from_numpy(part.rows).to(device),
            torch.from_numpy(part.requests).to(device),
            torch.from_numpy(part.cu_seqlens_q).to(device),
        )
        for part in parts
    )


def _decode_parts(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: torch.Tensor | None,
    work: tuple[Array, Array],
    own: _States,
    options: dict[str, Any],
) -> None:
    """Decode each part's tokens and put their states where they belong."""
    if block_table is None:
        raise UnsupportedError(
            "visible: without block_table, expected the same mask for all requests of a rank"
        )
    _require_paged(kv_cache, block_table, work[1].size)
    out, lse = own.outs[0], own.lses[0]
    out.zero_()
    lse.fill_(-math.inf)
    cache = kv_cache[0] if isinstance(kv_cache, tuple) else kv_cache
    num_kv_heads = int(cache.shape[2]) if cache.dim() == 4 else 1
    batch_invariant = bool(options.pop("batch_invariant", False))
    visible, tokens = (array.tobytes() for array in work)
    for part in _device_parts(
        visible, tokens, out.shape[1], num_kv_heads, batch_invariant, out.device
    ):
        part_out, part_lse = decoding.decode(
            tuple(_rows(half, part.rows) for half in q)  # type: ignore[arg-type]
            if isinstance(q, tuple)
            else _rows(q, part.rows),
            kv_cache,
            block_table.index_select(0, part.requests),
            plan=part.plan,
            cu_seqlens_q=part.cu_seqlens_q,
            causal=part.causal,
            **options,
        )
        out.index_copy_(0, part.rows, part_out)
        lse.index_copy_(0, part.rows, part_lse)


def _require_paged(kv_cache: TensorOrPair, block_table: torch.Tensor, batch: int) -> None:
    """Check what is looked at before the first part's decode."""
    first = kv_cache[0] if isinstance(kv_cache, tuple) and kv_cache else kv_cache
    checks.require_tensor("kv_cache", first)
    table = checks.require_tensor("block_table", block_table)
    checks.require_shape("block_table", table, [batch, "max_blocks"])


def _rows(q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Tokens ``rows`` of ``[B, s_q, H, D]`` or ``[T, H, D]``."""
    return (q.flatten(0, 1) if q.dim() == 4 else q).index_select(0, rows)


def _tokens_per_request(call: _Call, cu_seqlens_q: torch.Tensor | None) -> Array:
    if cu_seqlens_q is None:
        assert call.new_tokens is not None
        return np.full(call.tokens // max(1, call.new_tokens), call.new_tokens, dtype=np.int64)
    offsets = checks.require_tensor("cu_seqlens_q", cu_seqlens_q)
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "visible: with cu_seqlens_q on the GPU it cannot be used while a CUDA graph is captured"
        )
    on_host = offsets.cpu()
    ends = visible_keys.host_ints("cu_seqlens_q", on_host)
    if ends.size < 2:
        raise ShapeError(f"cu_seqlens_q: expected shape [B + 1], got [{ends.size}]")
    tokens = np.array(tokens_from_offsets(on_host, ends.size - 1), dtype=np.int64)
    if ends[-1] > call.tokens:
        raise RangeError(
            f"cu_seqlens_q: expected to end at {call.tokens}, the tokens of q, or before, got "
            f"{ends[-1]}"
        )
    return tokens


def _require_end(seq_lens: SeqLens | None, new_tokens: int | None) -> None:
    """Check that every request has the keys of its new tokens here."""
    assert new_tokens is not None
    if seq_lens is None or (isinstance(seq_lens, torch.Tensor) and seq_lens.is_cuda):
        return
    lengths = visible_keys.host_ints("seq_lens", seq_lens)
    for request in np.flatnonzero(lengths < new_tokens)[:1]:
        raise RangeError(
            f"causal: request {request} has {lengths[request]} keys on this rank, expected at "
            f"least its {new_tokens} new tokens; where their keys lie elsewhere say visible="
        )


def _require_own_keys(visible: Array, tokens: Array, seq_lens: SeqLens | None) -> None:
    """Check that the last token of each request sees all of this rank's keys."""
    if seq_lens is None or (isinstance(seq_lens, torch.Tensor) and seq_lens.is_cuda):
        return
    lengths = visible_keys.host_ints("seq_lens", seq_lens)
    if lengths.size != tokens.size:
        raise ShapeError(f"seq_lens: expected shape [{tokens.size}] as q, got [{lengths.size}]")
    last = visible[np.maximum(np.cumsum(tokens) - 1, 0)] if visible.size else lengths
    for request in np.flatnonzero((tokens > 0) & (last != lengths))[:1]:
        raise RangeError(
            f"visible: request {request}: expected the last token to see all "
            f"{lengths[request]} keys of this rank, got {last[request]}"
        )


def _world_size(group: dist.ProcessGroup | None) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        raise UnsupportedError(
            "group: expected torch.distributed to be initialised (init_process_group), it is not"
        )
    if dist.get_rank(group) < 0:
        raise UnsupportedError("group: expected one that this process belongs to, got another")
    return dist.get_world_size(group)
