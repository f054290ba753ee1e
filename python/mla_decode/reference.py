"""What tests, demo and benchmark compare with: test cases and a float64 attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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
    """Inputs of one decode call; see `make_case`."""

    seq_lens: list[int]
    num_heads: int
    new_tokens: int
    block_size: int
    q: torch.Tensor
    """``[B, s_q, H, 576]`` bf16."""
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    """``[num_blocks, block_size, 576]`` bf16, or (latent, rope)."""
    block_table: torch.Tensor
    """``[B, max_blocks]`` int32."""
    softmax_scale: float

    @property
    def latent(self) -> torch.Tensor:
        """``[num_blocks, block_size, 512]``."""
        if isinstance(self.kv_cache, tuple):
            return self.kv_cache[0]
        return self.kv_cache[..., :LATENT_DIM]

    @property
    def rope(self) -> torch.Tensor:
        """``[num_blocks, block_size, 64]``."""
        if isinstance(self.kv_cache, tuple):
            return self.kv_cache[1]
        return self.kv_cache[..., LATENT_DIM:]

    def poisoned_outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """NaN-filled ``out`` ``[B, s_q, H, 512]`` bf16 and ``lse`` ``[B, H, s_q]`` fp32."""
        batch, device = len(self.seq_lens), self.q.device
        out = torch.full((*self.q.shape[:3], LATENT_DIM), math.nan, device=device)
        lse = torch.full((batch, self.num_heads, self.new_tokens), math.nan, device=device)
        return out.bfloat16(), lse

    def to(self, device: torch.device | str) -> Case:
        """The same case on another device."""
        kv = self.kv_cache
        moved = (kv[0].to(device), kv[1].to(device)) if isinstance(kv, tuple) else kv.to(device)
        return Case(
            self.seq_lens,
            self.num_heads,
            self.new_tokens,
            self.block_size,
            self.q.to(device),
            moved,
            self.block_table.to(device),
            self.softmax_scale,
        )


def make_case(
    seq_lens: Sequence[int],
    num_heads: int = 16,
    new_tokens: int = 1,
    block_size: int = 64,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    poison: bool = True,
    combined: bool = True,
    softmax_scale: float | None = None,
) -> Case:
    """Random inputs with a paged cache as an engine would hold it, and traps in it.

    Inputs are N(0, 1) / 10 clamped to +-1. Blocks are shuffled over a cache with blocks to
    spare. With ``poison``, rows past each length and unused blocks are NaN, and block ids
    past each request's last block are wild.

    Parameters
    ----------
    seq_lens : sequence of int
        KV lengths, new tokens included.
    num_heads, new_tokens, block_size, seed, device
        Sizes, and where the randomness and the tensors come from.
    poison : bool
        Set the traps; zeros and valid ids instead when False.
    combined : bool
        One ``[num_blocks, block_size, 576]`` cache; two separate tensors when False.
    softmax_scale : float, optional
        ``576 ** -0.5`` when None.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    batch, width = len(seq_lens), LATENT_DIM + ROPE_DIM
    used = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(used) + max(3, sum(used) // 16)
    max_blocks = max(used) + 2

    def randn(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=device)
        return values.div_(10).clamp_(-1, 1).bfloat16()

    trap = math.nan if poison else 0.0
    kv = torch.full((num_blocks, block_size, width), trap, dtype=torch.bfloat16, device=device)
    table = torch.zeros(batch, max_blocks, dtype=torch.int32, device=device)
    if poison:
        wild = torch.tensor([2**31 - 1, -1, -(2**31), num_blocks], dtype=torch.int32)
        columns = torch.arange(batch * max_blocks) % len(wild)
        table.copy_(wild[columns].view(batch, max_blocks))
    order = torch.randperm(num_blocks, generator=generator, device=device)
    taken = 0
    for request, (length, blocks) in enumerate(zip(seq_lens, used, strict=True)):
        ids = order[taken : taken + blocks]
        taken += blocks
        rows = torch.full((blocks * block_size, width), trap, dtype=torch.bfloat16, device=device)
        rows[:length] = randn(length, width)
        kv[ids] = rows.view(blocks, block_size, width)
        table[request, :blocks] = ids.int()
    return Case(
        seq_lens=list(seq_lens),
        num_heads=num_heads,
        new_tokens=new_tokens,
        block_size=block_size,
        q=randn(batch, new_tokens, num_heads, width),
        kv_cache=kv
        if combined
        else (kv[..., :LATENT_DIM].contiguous(), kv[..., LATENT_DIM:].contiguous()),
        block_table=table,
        softmax_scale=width**-0.5 if softmax_scale is None else softmax_scale,
    )


def attention(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 attention of a case, on its device, reading only what a request owns.

    Returns
    -------
    out : Tensor
        ``[B, s_q, H, 512]`` float64; 0 for a query token that sees no key.
    lse : Tensor
        ``[B, H, s_q]`` float64, natural log; +inf for a query token that sees no key.
    """
    outs, lses = [], []
    for request, length in enumerate(case.seq_lens):
        out, lse = _attention_of_request(case, request, length)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


def _attention_of_request(
    case: Case, request: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-level softmax over chunks of keys, so that long requests fit in memory."""
    device, heads, tokens = case.q.device, case.num_heads, case.new_tokens
    q = case.q[request].double().reshape(tokens * heads, -1)
    token = torch.arange(tokens * heads, device=device) // heads
    last_visible = length - tokens + token
    top = torch.full((len(q), 1), -math.inf, dtype=torch.float64, device=device)
    total = torch.zeros_like(top)
    acc = torch.zeros(len(q), LATENT_DIM, dtype=torch.float64, device=device)
    chunk = _CHUNK // case.block_size * case.block_size
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        first, last = start // case.block_size, -(-end // case.block_size)
        ids = case.block_table[request, first:last].long()
        latent = case.latent[ids].reshape(-1, LATENT_DIM)[: end - start].double()
        rope = case.rope[ids].reshape(-1, ROPE_DIM)[: end - start].double()
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
    lse = torch.where(blind, math.inf, top + total.log()).view(tokens, heads).T
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
