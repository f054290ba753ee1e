"""Sequence lengths, however they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .errors import DtypeError, RangeError, ShapeError, UnsupportedError
from .words import MAX_NEW_TOKENS

SeqLens: TypeAlias = Sequence[int] | npt.NDArray[np.integer] | torch.Tensor
NewTokens: TypeAlias = int | tuple[int, ...]

MAX_SEQ_LEN = 2**31 - 256  # positions are int32 words, rounded up to a block


def host_seq_lens(
    seq_lens: SeqLens, known: npt.NDArray[np.int32] | None = None
) -> npt.NDArray[np.int32]:
    """Lengths as an int32 array on the host; copies from the GPU, which waits for it.

    A length of 0 is an empty request: a row that only pads the batch. Lengths that equal
    ``known``, which were checked before, are not checked again; the result is then ``known``
    itself.

    Raises
    ------
    DtypeError, ShapeError, RangeError
        Not integers, not one-dimensional or empty, below 0 or too long.
    UnsupportedError
        On the GPU while a CUDA graph is captured.
    """
    array = _host_array("seq_lens", seq_lens)
    if known is not None and array.shape == known.shape and (array == known).all():
        return known
    _require_range("seq_lens", array, "a length of at least", MAX_SEQ_LEN)
    return array.astype(np.int32)


def host_new_tokens(new_tokens: int | SeqLens, batch: int) -> NewTokens:
    """New tokens per request: an int from 1 to 16, or one from 0 to 16 for each request.

    Raises
    ------
    DtypeError, ShapeError, RangeError
        Not integers, not one for each of ``batch`` requests, none at all.
    UnsupportedError
        More than 16 for a request.
    """
    if isinstance(new_tokens, bool):
        raise DtypeError("new_tokens: expected an int or one for each request, got bool")
    if isinstance(new_tokens, int | np.integer):
        if not 1 <= new_tokens <= MAX_NEW_TOKENS:
            raise UnsupportedError(f"new_tokens: expected 1 to {MAX_NEW_TOKENS}, got {new_tokens}")
        return int(new_tokens)
    array = _host_array("new_tokens", new_tokens)
    if array.size != batch:
        raise ShapeError(f"new_tokens: expected shape [{batch}] as seq_lens, got [{array.size}]")
    if int(array.max()) > MAX_NEW_TOKENS:
        request = int(array.argmax())
        raise UnsupportedError(
            f"new_tokens: request {request}: expected at most {MAX_NEW_TOKENS}, got "
            f"{array[request]}"
        )
    _require_range("new_tokens", array, "at least", MAX_NEW_TOKENS)
    return tuple(array.tolist())


def tokens_from_offsets(cu_seqlens_q: torch.Tensor, batch: int) -> tuple[int, ...]:
    """New tokens of every request from their offsets ``[B + 1]``, which lie on the host.

    Raises
    ------
    RangeError
        The offsets do not start at 0 or decrease.
    """
    offsets = cu_seqlens_q.detach().numpy()
    if int(offsets[0]) != 0:
        raise RangeError(f"cu_seqlens_q: expected to start at 0, got {offsets[0]}")
    wide = offsets.astype(np.int64)
    tokens = wide[1:] - wide[:-1]
    if tokens.min(initial=0) < 0:
        request = int(tokens.argmin())
        raise RangeError(
            f"cu_seqlens_q: request {request}: expected offsets that do not decrease, got "
            f"{offsets[request]} and then {offsets[request + 1]}"
        )
    counts = host_new_tokens(tokens, batch)
    return counts if isinstance(counts, tuple) else (counts,) * batch


def _host_array(name: str, values: SeqLens) -> npt.NDArray[np.integer]:
    """One-dimensional integers on the host, however they come."""
    if isinstance(values, torch.Tensor):
        if values.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                f"{name}: on the GPU it cannot be read while a CUDA graph is captured; plan on the "
                "GPU with mla_decode.DevicePlan, or before the capture"
            )
        if values.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"{name}: expected int32 or int64, got {values.dtype}")
        array = values.detach().cpu().numpy()
    elif isinstance(values, np.ndarray):
        array = values
    else:
        array = _from_sequence(name, values)
    if array.dtype.kind not in "iu":
        raise DtypeError(f"{name}: expected integers, got {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ShapeError(f"{name}: expected shape [B] with B >= 1, got {list(array.shape)}")
    return array


def _require_range(name: str, array: npt.NDArray[np.integer], least: str, high: int) -> None:
    low, top = int(array.min()), int(array.max())
    if low < 0:
        raise RangeError(f"{name}: request {int(array.argmin())}: expected {least} 0, got {low}")
    if top > high:
        raise RangeError(
            f"{name}: request {int(array.argmax())}: expected at most {high}, got {top}"
        )


def _from_sequence(name: str, given: Sequence[int]) -> npt.NDArray[np.int64]:
    try:
        values = list(given)
    except TypeError:
        kind = type(given).__name__
        raise DtypeError(f"{name}: expected a list or a tensor, got {kind}") from None
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            kind = type(value).__name__
            raise DtypeError(f"{name}: request {i}: expected an int, got {kind}")
        if not -(2**62) < value < 2**62:
            raise RangeError(f"{name}: request {i}: expected at most {MAX_SEQ_LEN}, got {value}")
    return np.asarray(values, dtype=np.int64)
