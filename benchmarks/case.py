"""Inputs of a shape, several copies of them, and the reference they are checked against."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from benchmarks.shapes import HEAD_DIM, LATENT_DIM, Shape

SOFTMAX_SCALE = 192**-0.5  # DeepSeek-V3: of the head before absorption
MIN_COPIES, MAX_COPIES = 2, 8
CACHE_FACTOR = 4  # the KV of all copies together should be this many times the L2
MAX_KV_BYTES = 24 << 30


def number_of_copies(kv_bytes: int, l2_bytes: int, max_bytes: int = MAX_KV_BYTES) -> int:
    """Return how many KV caches a replay rotates over: enough to leave L2, 2 to 8, and no more
    than fits into ``max_bytes`` (but never fewer than one)."""
    wanted = CACHE_FACTOR * l2_bytes // kv_bytes + 1
    copies = min(max(wanted, MIN_COPIES), MAX_COPIES)
    return max(1, min(copies, max_bytes // kv_bytes))


def calls_per_copy(copies: int, kv_bytes: int, l2_bytes: int) -> int:
    """Return how often a replay goes round the copies: enough for eight calls, over which the start
    of the graph (about 5 us) is spread, but once where a second round could find KV in L2."""
    if copies * kv_bytes < CACHE_FACTOR * l2_bytes:
        return 1
    return -(-MAX_COPIES // copies)


@dataclass
class Case:
    """A shape with its tensors; index ``i`` of the lists is the i-th copy."""

    shape: Shape
    q: list[torch.Tensor]  # [batch, s_q, h_q, 576] bf16; of a mixed shape [tokens, h_q, 576]
    kv_cache: list[torch.Tensor]  # [num_blocks, block_size, 1, 576] bf16
    block_table: torch.Tensor  # [batch, max_blocks] int32
    seq_lens: torch.Tensor  # [batch] int32
    cu_seqlens_q: torch.Tensor  # [batch + 1] int32: the first token of each request
    reference: list[torch.Tensor]  # fp32, shaped as q but 512 wide

    @property
    def copies(self) -> int:
        return len(self.q)


def make_case(shape: Shape, device: torch.device, *, copies: int, seed: int = 0) -> Case:
    """Make queries and paged caches, the blocks of each request in random places."""
    generator = torch.Generator(device).manual_seed(seed)

    def values(*size: int) -> torch.Tensor:
        tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
        return tensor.normal_(generator=generator).div_(10).clamp_(-1, 1)

    blocks = blocks_of(shape)
    order = torch.randperm(sum(blocks), generator=generator, device=device, dtype=torch.int32)
    table = torch.zeros(len(blocks), max(blocks), dtype=torch.int32, device=device)
    for row, own in enumerate(order.split(blocks)):
        table[row, : len(own)] = own
    uniform = isinstance(shape.new_tokens, int)
    leading = (len(blocks), shape.new_tokens) if uniform else (sum(shape.tokens),)
    offsets = [0, *itertools.accumulate(shape.tokens)]
    case = Case(
        shape,
        q=[values(*leading, shape.num_heads, HEAD_DIM) for _ in range(copies)],
        kv_cache=[values(sum(blocks), shape.block_size, 1, HEAD_DIM) for _ in range(copies)],
        block_table=table,
        seq_lens=torch.tensor(shape.seq_lens, dtype=torch.int32, device=device),
        cu_seqlens_q=torch.tensor(offsets, dtype=torch.int32, device=device),
        reference=[],
    )
    for q, kv_cache in zip(case.q, case.kv_cache, strict=True):
        case.reference.append(reference(case, q, kv_cache))
    return case


def blocks_of(shape: Shape) -> list[int]:
    """Return how many cache blocks each request has."""
    return [math.ceil(length / shape.block_size) for length in shape.seq_lens]


def reference(case: Case, q: torch.Tensor, kv_cache: torch.Tensor) -> torch.Tensor:
    """Return O in float64 arithmetic, request by request, rounded to float32."""
    shape = case.shape
    out = torch.empty(*q.shape[:-1], LATENT_DIM, dtype=torch.float32, device=q.device)
    by_token = out if shape.is_mixed else out.flatten(0, 1)
    queries = q if shape.is_mixed else q.flatten(0, 1)
    first = 0
    for row, (length, tokens) in enumerate(zip(shape.seq_lens, shape.tokens, strict=True)):
        own = slice(first, first + tokens)
        first += tokens
        blocks = case.block_table[row, : math.ceil(length / shape.block_size)].long()
        keys = kv_cache[blocks].view(-1, HEAD_DIM)[:length].double()
        scores = (queries[own].double() @ keys.T).mul_(SOFTMAX_SCALE)  # [tokens, h_q, length]
        last_visible = length - tokens + torch.arange(tokens, device=q.device)
        hidden = torch.arange(length, device=q.device)[None, :] > last_visible[:, None]
        scores.masked_fill_(hidden[:, None, :], -math.inf)
        by_token[own] = (scores.softmax(dim=-1) @ keys[:, :LATENT_DIM]).float()
    return out


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative L2 error; NaN or infinity anywhere in ``out`` gives infinity."""
    error = (out.double() - expected.double()).norm() / expected.double().norm()
    return float(error) if bool(error.isfinite()) else math.inf


class WorstErrors:
    """The worst errors of a case's outputs so far: `relative_error`, and the same of each request.

    They stay where the outputs are until they are read: to read them is to wait for the GPU.
    """

    def __init__(self, case: Case) -> None:
        tokens = case.shape.tokens
        device = case.seq_lens.device
        self._case = case
        self._request_of_token = torch.tensor(
            [request for request, count in enumerate(tokens) for _ in range(count)], device=device
        )
        self._expected = [self._squares(values) for values in case.reference]
        self._whole = torch.zeros((), dtype=torch.float64, device=device)
        self._of_request = torch.zeros(len(tokens), dtype=torch.float64, device=device)

    def add(self, i: int, out: torch.Tensor) -> None:
        """Take in an output of copy ``i``; NaN and infinity are errors without end."""
        missed = self._squares(out, self._case.reference[i])
        expected = self._expected[i]
        self._whole = torch.maximum(self._whole, _relative(missed.sum(), expected.sum()))
        self._of_request = torch.maximum(self._of_request, _relative(missed, expected))

    @property
    def whole(self) -> float:
        """The worst relative error of a whole output."""
        return float(self._whole)

    @property
    def worst_request(self) -> tuple[int, float]:
        """The request with the worst error in any output, and that error."""
        worst, request = self._of_request.max(dim=0)
        return int(request), float(worst)

    def _squares(self, values: torch.Tensor, less: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of squares over the rows of each request."""
        wide = values.to(torch.float64, copy=True)  # the one large allocation
        if less is not None:
            wide.sub_(less)
        by_token = wide.square_().sum((-1, -2)).flatten()
        sums = by_token.new_zeros(len(self._case.shape.seq_lens))
        return sums.index_add_(0, self._request_of_token, by_token)


def _relative(missed: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (missed / expected).sqrt().nan_to_num(nan=math.inf, posinf=math.inf)
