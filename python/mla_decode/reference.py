"""What tests, demo and benchmark compare with: test cases and a float64 attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from .words import LATENT_DIM, ROPE_DIM

# Relative L2 of O. bf16 keeps 8 bits: rounding O and rounding P each leave an error that is
# uniform in +-2**-9 relative to a value in [1, 2), about 1.1e-3 in the mean square; together
# 1.6e-3, and the rest is room for the order of summation.
MAX_RELATIVE_L2 = 3e-3

# FlashMLA's tolerances for inputs N(0, 1) / 10 clamped to +-1.
OUT_ABS_TOL = 8e-4
OUT_REL_TOL = 2.01 / 128
OUT_COSINE_TOL = 5e-6
LSE_ABS_TOL = 1e-6
LSE_REL_TOL = 8.01 / 65536

_CHUNK = 8192  # keys per step of the float64 reference: 75 MB in float64


@dataclass(frozen=True)
class Case:
    """Inputs of one decode call; see `make_case`.

    ``H`` query heads are ``h_kv`` KV heads times ``G`` query heads of each. *Uniform*: every
    request has ``s_q`` new tokens; *ragged*: ``new_tokens`` has one number for each.
    """

    seq_lens: list[int]
    num_heads: int
    """Query heads, those of all KV heads together."""
    new_tokens: int | list[int]
    block_size: int
    q: torch.Tensor
    """``[B, s_q, H, 576]`` bf16 or fp16; ragged ``[T, H, 576]``."""
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    """``[num_blocks, block_size, 576]``, with ``h_kv`` above 1 ``[num_blocks, block_size, h_kv,
    576]``; or (latent, rope)."""
    block_table: torch.Tensor
    """``[B, max_blocks]`` int32, or the block ids ``[n]`` with ``kv_indptr``."""
    softmax_scale: float
    h_kv: int = 1
    cu_seqlens_q: torch.Tensor | None = None
    """Ragged: ``[B + 1]`` int32; tokens of q behind the last are padding."""
    kv_indptr: torch.Tensor | None = None
    """``[B + 1]`` int32: request r has ``block_table[kv_indptr[r] : kv_indptr[r + 1]]``."""
    causal: bool = True
    attn_sink: torch.Tensor | None = None
    """``[H]`` fp32."""
    lse_base: float = math.e
    lse_empty: float = math.inf

    @property
    def latent(self) -> torch.Tensor:
        """The cache's first 512 columns."""
        if isinstance(self.kv_cache, tuple):
            return self.kv_cache[0]
        return self.kv_cache[..., :LATENT_DIM]

    @property
    def rope(self) -> torch.Tensor:
        """The cache's last 64 columns."""
        if isinstance(self.kv_cache, tuple):
            return self.kv_cache[1]
        return self.kv_cache[..., LATENT_DIM:]

    @property
    def heads_per_kv(self) -> int:
        """Query heads of one KV head."""
        return self.num_heads // self.h_kv

    @property
    def tokens(self) -> list[int]:
        """New tokens of every request."""
        if isinstance(self.new_tokens, int):
            return [self.new_tokens] * len(self.seq_lens)
        return self.new_tokens

    @property
    def total_tokens(self) -> int:
        """Tokens of q, padding included."""
        return self.q[..., 0, 0].numel()

    def poisoned_outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """NaN-filled ``out`` in the shape and dtype of q (512 wide) and fp32 ``lse``
        ``[B, H, s_q]``, ragged ``[T, H]``."""
        device = self.q.device
        out = torch.full((*self.q.shape[:-1], LATENT_DIM), math.nan, device=device)
        ragged = self.cu_seqlens_q is not None
        shape = out.shape[:-1] if ragged else (out.shape[0], out.shape[2], out.shape[1])
        return out.to(self.q.dtype), torch.full(shape, math.nan, device=device)

    def to(self, device: torch.device | str) -> Case:
        """The same case on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(part.to(device) for part in value)
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return Case(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


def make_case(
    seq_lens: Sequence[int],
    num_heads: int = 16,
    new_tokens: int | Sequence[int] = 1,
    block_size: int = 64,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    poison: bool = True,
    combined: bool = True,
    softmax_scale: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    h_kv: int = 1,
    padding_tokens: int = 0,
    csr: bool = False,
    causal: bool = True,
    attn_sink: torch.Tensor | Sequence[float] | None = None,
    lse_base: float = math.e,
    lse_empty: float = math.inf,
) -> Case:
    """Random inputs with a paged cache as an engine would hold it, and traps in it.

    Inputs are N(0, 1) / 10 clamped to +-1. Blocks are shuffled over a cache with blocks to
    spare. With ``poison``, rows past each length, unused blocks and padding tokens are NaN,
    and block ids past each request's last block are wild.

    Parameters
    ----------
    seq_lens : sequence of int
        KV lengths, new tokens included; 0 for an empty request.
    num_heads : int
        Query heads, those of all ``h_kv`` KV heads together.
    new_tokens : int or sequence of int
        For every request, or for each: a ragged case.
    block_size, seed, device
        Sizes, and where the randomness and the tensors come from.
    poison : bool
        Set the traps; zeros and valid ids instead when False.
    combined : bool
        One ``[num_blocks, block_size, 576]`` cache; two separate tensors when False.
    softmax_scale : float, optional
        ``576 ** -0.5`` when None.
    dtype : torch.dtype
        bf16 or fp16, of queries and cache.
    h_kv : int
        KV heads.
    padding_tokens : int
        Tokens of q behind those of the last request, in a ragged case.
    csr : bool
        Block ids in one row with ``kv_indptr``, instead of a block table.
    causal, attn_sink, lse_base, lse_empty
        What is to be computed; ``attn_sink`` has ``num_heads`` numbers.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    width = LATENT_DIM + ROPE_DIM
    used = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(used) + max(3, sum(used) // 16)

    def randn(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=device)
        return values.div_(10).clamp_(-1, 1).to(dtype)

    trap = math.nan if poison else 0.0
    head = () if h_kv == 1 else (h_kv,)
    kv = torch.full((num_blocks, block_size, *head, width), trap, dtype=dtype, device=device)
    order = torch.randperm(num_blocks, generator=generator, device=device)
    ids = torch.split(order[: sum(used)], used)
    for own, length, blocks in zip(ids, seq_lens, used, strict=True):
        rows = torch.full((blocks * block_size, *head, width), trap, dtype=dtype, device=device)
        rows[:length] = randn(length, *head, width)
        kv[own] = rows.view(blocks, block_size, *head, width)
    table = _block_table(ids, num_blocks, poison, device)
    kv_indptr = None
    if csr:
        rows_of_ids = [row[: len(own) + 2] for row, own in zip(table, ids, strict=True)]
        kv_indptr = _offsets([len(row) for row in rows_of_ids], device)
        table = torch.cat(rows_of_ids)

    cu_seqlens_q = None
    if isinstance(new_tokens, int):
        q = randn(len(seq_lens), new_tokens, num_heads, width)
    else:
        new_tokens = list(new_tokens)
        cu_seqlens_q = _offsets(new_tokens, device)
        padding = torch.full((padding_tokens, num_heads, width), trap, dtype=dtype, device=device)
        q = torch.cat([randn(sum(new_tokens), num_heads, width), padding])
    if attn_sink is not None:
        attn_sink = torch.as_tensor(attn_sink, dtype=torch.float32, device=device)
    return Case(
        seq_lens=list(seq_lens),
        num_heads=num_heads,
        new_tokens=new_tokens,
        block_size=block_size,
        q=q,
        kv_cache=kv
        if combined
        else (kv[..., :LATENT_DIM].contiguous(), kv[..., LATENT_DIM:].contiguous()),
        block_table=table,
        softmax_scale=width**-0.5 if softmax_scale is None else softmax_scale,
        h_kv=h_kv,
        cu_seqlens_q=cu_seqlens_q,
        kv_indptr=kv_indptr,
        causal=causal,
        attn_sink=attn_sink,
        lse_base=lse_base,
        lse_empty=lse_empty,
    )


def _block_table(
    ids: Sequence[torch.Tensor], num_blocks: int, poison: bool, device: torch.device | str
) -> torch.Tensor:
    """Table ``[B, max_blocks]`` of the ids, with two entries to spare; wild ids with poison."""
    batch, max_blocks = len(ids), max(map(len, ids)) + 2
    table = torch.zeros(batch, max_blocks, dtype=torch.int32, device=device)
    if poison:
        wild = torch.tensor([2**31 - 1, -1, -(2**31), num_blocks], dtype=torch.int32)
        columns = torch.arange(batch * max_blocks) % len(wild)
        table.copy_(wild[columns].view(batch, max_blocks))
    for row, own in zip(table, ids, strict=True):
        row[: len(own)] = own.int()
    return table


def _offsets(sizes: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """``[len(sizes) + 1]`` int32: where each range starts, and where the last one ends."""
    ends = [0, *itertools.accumulate(sizes)]
    return torch.tensor(ends, dtype=torch.int32, device=device)


def attention(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 attention of a case, on its device, reading only what a request owns.

    Returns
    -------
    out : Tensor
        ``[B, s_q, H, 512]`` float64, ragged ``[T, H, 512]``; 0 for a query token that sees no
        key, and for padding.
    lse : Tensor
        ``[B, H, s_q]`` float64, ragged ``[T, H]``, in the case's base; the case's
        ``lse_empty`` for a query token that sees no key, and for padding.
    """
    shape = (case.total_tokens, case.num_heads)
    out = torch.zeros(*shape, LATENT_DIM, dtype=torch.float64, device=case.q.device)
    lse = torch.full(shape, -math.inf, dtype=torch.float64, device=case.q.device)
    q = case.q.reshape(*shape, case.q.shape[-1])
    first, group = 0, case.heads_per_kv
    for request, tokens in enumerate(case.tokens):
        for kv_head in range(case.h_kv):
            where = slice(first, first + tokens), slice(kv_head * group, (kv_head + 1) * group)
            out[where], lse[where] = _attention_of_sequence(case, request, kv_head, q[where])
        first += tokens
    blind = lse == -math.inf
    if case.attn_sink is not None:
        share = 1 / (1 + (case.attn_sink.double() - lse).exp())
        out *= share.masked_fill(blind, 0)[..., None]
    lse = (lse / math.log(case.lse_base)).masked_fill(blind, case.lse_empty)
    if case.cu_seqlens_q is not None:
        return out, lse
    return out.view(*case.q.shape[:3], LATENT_DIM), lse.view(case.q.shape[:3]).transpose(1, 2)


def _attention_of_sequence(
    case: Case, request: int, kv_head: int, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-level softmax over chunks of keys, so that long requests fit in memory.

    Takes q ``[tokens, heads, 576]``; returns O ``[tokens, heads, 512]`` and the natural LSE
    ``[tokens, heads]``, -inf where no key is seen.
    """
    device, (tokens, heads, _) = q.device, q.shape
    length = case.seq_lens[request]
    q = q.double().reshape(tokens * heads, LATENT_DIM + ROPE_DIM)
    token = torch.arange(tokens * heads, device=device) // max(heads, 1)
    last_visible = length - tokens + token if case.causal else torch.full_like(token, length - 1)
    top = torch.full((len(q), 1), -math.inf, dtype=torch.float64, device=device)
    total = torch.zeros_like(top)
    acc = torch.zeros(len(q), LATENT_DIM, dtype=torch.float64, device=device)
    chunk = max(_CHUNK // case.block_size, 1) * case.block_size
    block_ids = case.block_table if case.kv_indptr is not None else case.block_table[request]
    if case.kv_indptr is not None:
        block_ids = block_ids[int(case.kv_indptr[request]) :]
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        first, last = start // case.block_size, -(-end // case.block_size)
        ids = block_ids[first:last].long()
        latent, rope = (
            (part[ids] if case.h_kv == 1 else part[ids][:, :, kv_head])
            .reshape(-1, part.shape[-1])[: end - start]
            .double()
            for part in (case.latent, case.rope)
        )
        scores = q[:, :LATENT_DIM] @ latent.T + q[:, LATENT_DIM:] @ rope.T
        scores *= case.softmax_scale
        position = torch.arange(start, end, device=device)
        scores.masked_fill_(position[None, :] > last_visible[:, None], -math.inf)
        new_top = torch.maximum(top, scores.amax(1, keepdim=True))
        base = torch.where(new_top == -math.inf, 0.0, new_top)
        weight = (scores - base).exp()
        shrink = (top - base).exp()
        acc = acc * shrink + weight @ latent
        total = total * shrink + weight.sum(1, keepdim=True)
        top = new_top
    blind = total == 0
    out = torch.where(blind, 0.0, acc / total).view(tokens, heads, LATENT_DIM)
    lse = torch.where(blind, -math.inf, top + total.log()).view(tokens, heads)
    return out, lse


@dataclass(frozen=True)
class Errors:
    """How far a result is from the reference, and whether it passes."""

    rel_err: float
    """Relative L2 error of O."""
    out_cosine: float
    """1 - cosine similarity of O."""
    out_max_abs: float
    lse_max_abs_err: float
    failures: tuple[str, ...]
    """What exceeds its tolerance; empty if it passes."""

    @property
    def passed(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        return (
            f"relative L2 {self.rel_err:.2e} (at most {MAX_RELATIVE_L2:.0e}), cosine "
            f"{self.out_cosine:.1e}, max abs {self.out_max_abs:.1e}, lse max abs "
            f"{self.lse_max_abs_err:.1e}" + "".join(f"; FAILED: {f}" for f in self.failures)
        )


def compare(
    out: torch.Tensor,
    lse: torch.Tensor,
    expected_out: torch.Tensor,
    expected_lse: torch.Tensor,
) -> Errors:
    """Compare with the float64 reference under the tolerances above.

    An element of O passes if its absolute *or* its relative error is within tolerance, as
    FlashMLA counts. NaN and infinities must be where the reference has them.
    """
    failures: list[str] = []
    got, want = out.double(), expected_out.double()
    difference = (got - want).abs()
    rel_err = float(difference.norm() / want.norm().clamp_min(1e-300))
    cosine = 1 - 2 * float(
        (got * want).sum() / (got.square() + want.square()).sum().clamp_min(1e-300)
    )
    if not bool(want.any()):
        cosine = 0.0
    _require_elements(failures, "out", got, want, OUT_ABS_TOL, OUT_REL_TOL)
    if not rel_err <= MAX_RELATIVE_L2:
        failures.append(f"out: relative L2 {rel_err:.2e} > {MAX_RELATIVE_L2:.0e}")
    if not abs(cosine) <= OUT_COSINE_TOL:
        failures.append(f"out: cosine difference {cosine:.1e} > {OUT_COSINE_TOL:.0e}")
    got_lse, want_lse = lse.double(), expected_lse.double()
    _require_elements(failures, "lse", got_lse, want_lse, LSE_ABS_TOL, LSE_REL_TOL)
    finite = want_lse.isfinite()
    lse_abs = (got_lse - want_lse)[finite].abs()
    return Errors(
        rel_err=rel_err,
        out_cosine=cosine,
        out_max_abs=float(difference.max()),
        lse_max_abs_err=float(lse_abs.max()) if lse_abs.numel() else 0.0,
        failures=tuple(failures),
    )


def _require_elements(
    failures: list[str],
    name: str,
    got: torch.Tensor,
    want: torch.Tensor,
    abs_tol: float,
    rel_tol: float,
) -> None:
    if got.shape != want.shape:
        failures.append(f"{name}: expected shape {list(want.shape)}, got {list(got.shape)}")
        return
    error = (got - want).abs()
    near = (error <= abs_tol) | (error <= rel_tol * want.abs())
    fine = (near & want.isfinite()) | (got == want)
    if not bool(fine.all()):
        where = [int(i) for i in (~fine).nonzero()[0]]
        failures.append(
            f"{name}: {int((~fine).sum())} elements off, the first at {where}: expected "
            f"{float(want[tuple(where)]):.6g}, got {float(got[tuple(where)]):.6g}"
        )
