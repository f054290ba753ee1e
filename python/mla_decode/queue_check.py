"""Checks of a queue's words against the tensors of a launch.

This is no proof that a queue computes attention (the scheduler's validator is that); it
guarantees that no instruction reads or writes outside the tensors it was launched with.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .errors import QueueError
from .words import (
    COLUMN_CHUNK,
    INSTRUCTION_WORDS,
    KV_TILE,
    LATENT_DIM,
    MAX_REDUCTION_INPUTS,
    MAX_ROWS,
    OPCODE_MLA_PARTIAL,
    OPCODE_MLA_REDUCTION,
    OPCODE_NOOP,
    Words,
    queue_length,
)


@dataclass(frozen=True)
class QueueLimits:
    """Sizes of the tensors that a queue's words index."""

    batch: int
    new_tokens: int
    num_heads: int
    max_length: int  # KV positions that one block table row can name
    num_slots: int  # scratch slots


def check_words(instructions: Words, limits: QueueLimits) -> None:
    """Check every word of ``instructions`` ``[n, 32]`` against ``limits``.

    Raises
    ------
    QueueError
        Names the first bad instruction, the word, the range and the value.
    """
    words = instructions[: queue_length(instructions)].astype(np.int64)
    opcode = words[:, 0]
    known = (OPCODE_NOOP, OPCODE_MLA_PARTIAL, OPCODE_MLA_REDUCTION)
    _require(words, np.isin(opcode, known), 0, "opcode", f"an opcode in {known}")
    partials = np.flatnonzero(opcode == OPCODE_MLA_PARTIAL)
    reductions = np.flatnonzero(opcode == OPCODE_MLA_REDUCTION)
    _check_partials(words, partials, limits)
    _check_reductions(words, reductions, limits)


def _check_partials(
    words: npt.NDArray[np.int64], rows: npt.NDArray[np.intp], lim: QueueLimits
) -> None:
    w = words[rows]

    def need(ok: npt.NDArray[np.bool_], word: int, name: str, expected: str) -> None:
        _require(words, ok, word, name, expected, rows)

    _check_destination(words, rows, 2, lim)
    need((w[:, 5] >= 0) & (w[:, 5] < lim.new_tokens), 5, "q_seq", f"0 to {lim.new_tokens - 1}")
    need(w[:, 3] == w[:, 5], 3, "dst_seq", "the same as q_seq")
    need((w[:, 4] >= 0) & (w[:, 4] < lim.batch), 4, "q_batch", f"0 to {lim.batch - 1}")
    need((w[:, 8] >= 1) & (w[:, 8] <= lim.max_length), 8, "length", f"1 to {lim.max_length}")
    need((w[:, 6] >= 0) & (w[:, 6] % KV_TILE == 0), 6, "start", f"a multiple of {KV_TILE}")
    need((w[:, 7] > w[:, 6]) & (w[:, 7] <= w[:, 8]), 7, "end", "above start, at most length")
    rows_left = (lim.new_tokens - w[:, 5]) * lim.num_heads - w[:, 9]
    need((w[:, 9] >= 0) & (rows_left > 0), 9, "row_begin", "a (token, head) row of the request")
    count = np.where(w[:, 10] == 0, rows_left, w[:, 10])
    # The kernel moves whole groups: a smaller one would overwrite the rows after it.
    group = min(MAX_ROWS, lim.new_tokens * lim.num_heads)
    whole = count == np.minimum(rows_left, group)
    need(whole, 10, "num_rows", f"{group} rows, or all that are left if fewer (0)")


def _check_reductions(
    words: npt.NDArray[np.int64], rows: npt.NDArray[np.intp], lim: QueueLimits
) -> None:
    w = words[rows]
    shape = w[:, 2]

    def need(ok: npt.NDArray[np.bool_], word: int, name: str, expected: str) -> None:
        _require(words, ok, word, name, expected, rows)

    _check_destination(words, rows, 3, lim)
    need(shape >= 0, 2, "shape", "bit 31 to be 0")
    count = (shape & 0xFF) + 1
    need(count <= MAX_REDUCTION_INPUTS, 2, "shape", f"at most {MAX_REDUCTION_INPUTS} inputs")
    head_begin, num_heads = shape >> 8 & 0xFF, shape >> 16 & 0xFF
    head_end = np.where(num_heads == 0, lim.num_heads, head_begin + num_heads)
    heads_fit = (head_begin < lim.num_heads) & (head_end <= lim.num_heads)
    need(
        heads_fit & ((num_heads != 0) | (head_begin == 0)),
        2,
        "shape",
        f"heads in 0 to {lim.num_heads}",
    )
    col_begin, num_cols = (shape >> 24 & 0x7) * COLUMN_CHUNK, (shape >> 27 & 0xF) * COLUMN_CHUNK
    cols_fit = col_begin + num_cols <= LATENT_DIM
    need(
        cols_fit & ((num_cols != 0) | (col_begin == 0)), 2, "shape", f"columns in 0 to {LATENT_DIM}"
    )
    need((w[:, 4] >= 0) & (w[:, 4] < lim.new_tokens), 4, "dst_seq", f"0 to {lim.new_tokens - 1}")
    for i in range(MAX_REDUCTION_INPUTS):
        slot = w[:, 5 + i]
        ok = (i >= count) | ((slot >= 0) & (slot < lim.num_slots))
        need(ok, 5 + i, f"input {i}", f"a scratch slot, 0 to {lim.num_slots - 1}")


def _check_destination(
    words: npt.NDArray[np.int64], rows: npt.NDArray[np.intp], word: int, lim: QueueLimits
) -> None:
    dst = words[rows, word]
    ok = (dst >= -lim.num_slots) & (dst < lim.batch)
    expected = f"a request (0 to {lim.batch - 1}) or a scratch slot (-1 to {-lim.num_slots})"
    _require(words, ok, word, "dst_batch", expected, rows)


def _require(
    words: npt.NDArray[np.int64],
    ok: npt.NDArray[np.bool_],
    word: int,
    name: str,
    expected: str,
    rows: npt.NDArray[np.intp] | None = None,
) -> None:
    if ok.all():
        return
    bad = int(np.flatnonzero(~ok)[0])
    index = bad if rows is None else int(rows[bad])
    raise QueueError(
        f"instructions: instruction {index} (uid {words[index, 1]}), word {word} ({name}): "
        f"expected {expected}, got {words[index, word]}"
    )


def as_words(instructions: object) -> Words:
    """Check that ``instructions`` is an ``[n, 32]`` int32 array."""
    if not isinstance(instructions, np.ndarray) or instructions.dtype != np.int32:
        kind = getattr(instructions, "dtype", type(instructions).__name__)
        raise QueueError(f"instructions: expected an int32 array, got {kind}")
    if instructions.ndim != 2 or instructions.shape[1] != INSTRUCTION_WORDS:
        raise QueueError(
            f"instructions: expected shape [n, {INSTRUCTION_WORDS}], got {list(instructions.shape)}"
        )
    return np.ascontiguousarray(instructions)
