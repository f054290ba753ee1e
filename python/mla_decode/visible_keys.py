"""Which of a rank's keys each new token sees, for caches that are spread over ranks.

Arrays ``visible [T]`` count, token by token, the keys of one rank that the token sees; tokens
are those of request 0, then of request 1, and so on. The keys are always the rank's first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from . import checks
from .errors import DtypeError, RangeError, ShapeError

Ints: TypeAlias = Sequence[int] | npt.NDArray[np.integer] | torch.Tensor
Array: TypeAlias = npt.NDArray[np.int64]


def visible_in_chunk(seq_lens: Ints, new_tokens: int | Ints, keys_behind: Ints) -> Array:
    """Visible keys where each rank holds one run of consecutive keys of a request.

    Parameters
    ----------
    seq_lens : list of int, ndarray or CPU Tensor
        ``[B]`` keys of each request on this rank.
    new_tokens : int, or list of int, ndarray or CPU Tensor
        New tokens of every request, or ``[B]`` of each.
    keys_behind : list of int, ndarray or CPU Tensor
        ``[B]`` keys of each request that come after this rank's, on other ranks; 0 where
        this rank holds the end.

    Returns
    -------
    ndarray
        ``[T]`` int64.

    Raises
    ------
    DtypeError, ShapeError, RangeError
        No integers, of different lengths, or negative.
    """
    own = host_ints("seq_lens", seq_lens)
    tokens = _tokens(new_tokens, own.size)
    behind = _same_size("keys_behind", host_ints("keys_behind", keys_behind), own.size)
    # Of all keys up to this rank's end and beyond, a token sees those up to its own.
    seen = own + behind
    visible = _until_own_key(seen, tokens)
    return np.minimum(visible, np.repeat(own, tokens))


def visible_interleaved(
    seq_lens: Ints, new_tokens: int | Ints, rank: int, world_size: int, *, interleave: int = 1
) -> Array:
    """Visible keys where ranks take turns: ``interleave`` keys each, rank 0 first.

    Key ``p`` of a request lies on rank ``p // interleave % world_size``. The keys of a request
    on this rank are what its last new token sees.

    Parameters
    ----------
    seq_lens : list of int, ndarray or CPU Tensor
        ``[B]`` keys of each request on *all* ranks, new tokens included.
    new_tokens : int, or list of int, ndarray or CPU Tensor
        New tokens of every request, or ``[B]`` of each.
    rank, world_size : int
        This rank, and how many there are.
    interleave : int
        Keys per turn.

    Returns
    -------
    ndarray
        ``[T]`` int64.

    Raises
    ------
    DtypeError, ShapeError, RangeError
        No integers, of different lengths, or out of range.
    """
    lengths = host_ints("seq_lens", seq_lens)
    tokens = _tokens(new_tokens, lengths.size)
    checks.require_int("world_size", world_size, 1, 1 << 20)
    checks.require_int("rank", rank, 0, world_size - 1)
    checks.require_int("interleave", interleave, 1, 1 << 30)
    seen = _until_own_key(lengths, tokens)
    rounds, rest = np.divmod(seen, interleave * world_size)
    visible: Array = rounds * interleave + np.clip(rest - rank * interleave, 0, interleave)
    return visible


@dataclass(frozen=True)
class Part:
    """Tokens that one decode call can do together.

    Each of its requests is a run of consecutive tokens of one request of the batch.
    """

    causal: bool
    rows: Array
    """``[t]`` flat tokens of the batch."""
    requests: Array
    """``[s]`` request of the batch for each of this part's."""
    cu_seqlens_q: npt.NDArray[np.int32]
    """``[s + 1]`` first token of each of this part's requests, counted in ``rows``."""
    seq_lens: npt.NDArray[np.int32]
    """``[s]`` keys that the last token of each sees."""


def require_visible(visible: Ints, tokens: Array) -> Array:
    """``visible`` as a flat array, checked: for each request 0 or more and never falling.

    Raises
    ------
    DtypeError, ShapeError, RangeError
        It is none.
    """
    flat = host_ints("visible", visible, flatten=True)
    if flat.size != tokens.sum():
        raise ShapeError(f"visible: expected {tokens.sum()} numbers, one a token, got {flat.size}")
    for request, (begin, end) in enumerate(_ranges(tokens)):
        if (np.diff(flat[begin:end]) < 0).any():
            raise RangeError(
                f"visible: request {request}: expected numbers that never fall from token to "
                f"token, got {flat[begin:end].tolist()}"
            )
    return flat


def one_mask(visible: Array, tokens: Array) -> bool | None:
    """Whether one decode of the whole batch does, and then its ``causal``; else None."""
    ends = np.cumsum(tokens)
    last = np.zeros_like(tokens)
    last[tokens > 0] = visible[ends[tokens > 0] - 1]
    if (visible == np.repeat(last, tokens)).all():
        return False
    if (visible == _until_own_key(last, tokens)).all():
        return True
    return None


def parts(visible: Array, tokens: Array) -> tuple[Part, ...]:
    """The fewest runs of tokens that see the same keys or one more each, in one or two parts.

    Tokens that see no key are in none.
    """
    runs = [
        (request, first, end)
        for request, (begin, stop) in enumerate(_ranges(tokens))
        for first, end in _runs(visible, begin, stop)
    ]
    steps = [int(visible[end - 1] - visible[first]) for _, first, end in runs]
    single = [end - first == 1 for _, first, end in runs]
    # A token by itself is masked alike by both: it goes where a call is made anyway.
    flat_needed = any(step == 0 and not one for step, one in zip(steps, single, strict=True))
    made = []
    for causal in (False, True):
        chosen = [
            run
            for run, step, one in zip(runs, steps, single, strict=True)
            if (causal != flat_needed if one else (step > 0) == causal)
        ]
        if chosen:
            made.append(_part(causal, chosen, visible))
    return tuple(made)


def host_ints(name: str, values: Ints, *, flatten: bool = False) -> Array:
    """Integers of 0 or more as an int64 array on the host; ``[n]`` unless ``flatten`` is set.

    Raises
    ------
    DtypeError, ShapeError, RangeError
        No integers, on a GPU, not one-dimensional, or negative.
    """
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise DtypeError(f"{name}: expected numbers on the host, got a {values.device} tensor")
        array = values.detach().numpy()
    else:
        try:
            array = np.asarray(values)
        except ValueError:
            raise ShapeError(f"{name}: expected rows of the same length") from None
    if array.dtype.kind not in "iu" and array.size:
        raise DtypeError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim != 1 and not flatten:
        raise ShapeError(f"{name}: expected one dimension, got shape {list(array.shape)}")
    flat = array.reshape(-1).astype(np.int64)
    if (flat < 0).any():
        where = int(np.argmin(flat))
        raise RangeError(f"{name}: entry {where}: expected 0 or more, got {flat[where]}")
    return flat


def _until_own_key(seq_lens: Array, tokens: Array) -> Array:
    """Keys up to each token's own, of requests whose last keys are those of their tokens."""
    ends = np.cumsum(tokens)
    behind = np.repeat(ends, tokens) - 1 - np.arange(ends[-1] if ends.size else 0)
    visible: Array = np.maximum(0, np.repeat(seq_lens, tokens) - behind)
    return visible


def _ranges(tokens: Array) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(tokens)
    return zip((ends - tokens).tolist(), ends.tolist(), strict=True)


def _runs(visible: Array, begin: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut ``[begin, stop)`` into the fewest runs that are constant or grow by one a token.

    Tokens that see no key, the first ones, are left out.
    """
    first = begin + int(np.count_nonzero(visible[begin:stop] == 0))
    while first < stop:
        end = first + 1
        if end < stop:
            step = visible[end] - visible[first]
            while step <= 1 and end < stop and visible[end] - visible[end - 1] == step:
                end += 1
        yield first, end
        first = end


def _part(causal: bool, runs: list[tuple[int, int, int]], visible: Array) -> Part:
    lengths = [end - first for _, first, end in runs]
    return Part(
        causal=causal,
        rows=np.concatenate([np.arange(first, end) for _, first, end in runs]),
        requests=np.array([request for request, _, _ in runs], dtype=np.int64),
        cu_seqlens_q=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        seq_lens=np.array([visible[end - 1] for _, _, end in runs], dtype=np.int32),
    )


def _tokens(new_tokens: int | Ints, batch: int) -> Array:
    if isinstance(new_tokens, int | np.integer):
        return np.full(batch, checks.require_int("new_tokens", int(new_tokens), 0, 1 << 20))
    return _same_size("new_tokens", host_ints("new_tokens", new_tokens), batch)


def _same_size(name: str, array: Array, batch: int) -> Array:
    if array.size != batch:
        raise ShapeError(f"{name}: expected shape [{batch}] as seq_lens, got [{array.size}]")
    return array
