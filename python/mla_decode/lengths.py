"""Sequence lengths, however they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .errors import DtypeError, RangeError, ShapeError, UnsupportedError

SeqLens: TypeAlias = Sequence[int] | npt.NDArray[np.integer] | torch.Tensor

MAX_SEQ_LEN = 2**31 - 256  # positions are int32 words, rounded up to a block


def host_seq_lens(
    seq_lens: SeqLens, known: npt.NDArray[np.int32] | None = None
) -> npt.NDArray[np.int32]:
    """Lengths as an int32 array on the host; copies from the GPU, which waits for it.

    Lengths that equal ``known``, which were checked before, are not checked again; the
    result is then ``known`` itself.

    Raises
    ------
    DtypeError, ShapeError, RangeError
        Not integers, not one-dimensional or empty, below 1 or too long.
    UnsupportedError
        On the GPU while a CUDA graph is captured.
    """
    if isinstance(seq_lens, torch.Tensor):
        if seq_lens.is_cuda and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "seq_lens: on the GPU they cannot be read while a CUDA graph is captured; plan "
                "before and pass plan="
            )
        if seq_lens.dtype not in (torch.int32, torch.int64):
            raise DtypeError(f"seq_lens: expected int32 or int64, got {seq_lens.dtype}")
        array = seq_lens.detach().cpu().numpy()
    elif isinstance(seq_lens, np.ndarray):
        array = seq_lens
    else:
        array = _from_sequence(seq_lens)
    if array.dtype.kind not in "iu":
        raise DtypeError(f"seq_lens: expected integers, got {array.dtype}")
    if array.ndim != 1 or array.size == 0:
        raise ShapeError(f"seq_lens: expected shape [B] with B >= 1, got {list(array.shape)}")
    if known is not None and array.shape == known.shape and (array == known).all():
        return known
    low, high = int(array.min()), int(array.max())
    if low < 1:
        where = int(np.argmin(array))
        raise RangeError(f"seq_lens: request {where}: expected a length of at least 1, got {low}")
    if high > MAX_SEQ_LEN:
        where = int(np.argmax(array))
        raise RangeError(f"seq_lens: request {where}: expected at most {MAX_SEQ_LEN}, got {high}")
    return array.astype(np.int32)


def _from_sequence(seq_lens: Sequence[int]) -> npt.NDArray[np.int64]:
    try:
        values = list(seq_lens)
    except TypeError:
        kind = type(seq_lens).__name__
        raise DtypeError(f"seq_lens: expected a list or a tensor, got {kind}") from None
    for i, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            kind = type(value).__name__
            raise DtypeError(f"seq_lens: request {i}: expected an int, got {kind}")
        if not -(2**62) < value < 2**62:
            raise RangeError(f"seq_lens: request {i}: expected at most {MAX_SEQ_LEN}, got {value}")
    return np.asarray(values, dtype=np.int64)
