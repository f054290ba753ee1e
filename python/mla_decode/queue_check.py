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
    CLUSTER_SIZES,
    COLUMN_CHUNK,
    INSTRUCTION_WORDS,
    KV_TILE,
    LATENT_DIM,
    MAX_REDUCTION_INPUTS,
    MAX_RUN_INPUTS,
    OPCODE_MLA_FILL,
    OPCODE_MLA_PARTIAL,
    OPCODE_MLA_REDUCTION,
    OPCODE_NOOP,
    Words,
    find_mates,
    group_rows_of,
    queue_length,
)

_KNOWN = (OPCODE_NOOP, OPCODE_MLA_PARTIAL, OPCODE_MLA_REDUCTION, OPCODE_MLA_FILL)
_RUN_END = 9  # words of a run from here on are 0
_NUM_MATES = (0, *CLUSTER_SIZES)
_SHARED_WORDS = {  # in which mates agree
    2: "dst_batch",
    3: "dst_seq",
    4: "q_batch",
    5: "q_seq",
    8: "length",
    9: "row_begin",
    10: "num_rows",
}


@dataclass(frozen=True)
class QueueLimits:
    """Sizes of the tensors that a queue's words index."""

    num_sequences: int  # KV heads * requests
    num_heads: int  # query heads per KV head
    rows: int | tuple[int, ...]  # (token, head) rows, of every sequence or of each
    max_length: int | tuple[int, ...]  # KV positions that a sequence's block ids name, as `rows`
    num_tokens: int  # tokens of the output, those of all KV heads
    num_slots: int  # scratch slots
    slot_rows: int  # rows of a scratch slot

    @property
    def group_rows(self) -> int:
        """Rows of every row group but a sequence's last."""
        return group_rows_of(self.slot_rows)


def check_words(instructions: Words, limits: QueueLimits) -> None:
    """Check every word of ``instructions`` ``[n, 32]`` against ``limits``.

    Raises
    ------
    QueueError
        Names the first bad instruction, the word, the range and the value.
    """
    words = instructions[: queue_length(instructions)].astype(np.int64)
    opcode = words[:, 0]
    _require(words, np.isin(opcode, _KNOWN), 0, "opcode", f"an opcode in {_KNOWN}")
    _Partials(words, np.flatnonzero(opcode == OPCODE_MLA_PARTIAL), limits).check()
    _Reductions(words, np.flatnonzero(opcode == OPCODE_MLA_REDUCTION), limits).check()
    _Fills(words, np.flatnonzero(opcode == OPCODE_MLA_FILL), limits).check()


def check_mates_run(instructions: Words, num_ctas: int, cluster_ctas: int) -> None:
    """Check that mates are first instructions of CTAs in one cluster. The words were checked.

    Raises
    ------
    QueueError
        They are not, in a launch of so many CTAs in clusters of so many.
    """
    words = instructions[: queue_length(instructions)].astype(np.int64)
    where, _ = find_mates(words)
    fits = words[where, 11] <= cluster_ctas
    _require(words, fits, 11, "num_mates", f"at most {cluster_ctas} (cluster_ctas)", where)
    among = f"mates among the first {num_ctas} (num_ctas) instructions"
    _require(words, where < num_ctas, 12, "mate", among, where)


class _Instructions:
    """The instructions of one opcode."""

    def __init__(
        self, words: npt.NDArray[np.int64], where: npt.NDArray[np.intp], limits: QueueLimits
    ) -> None:
        self.words = words
        self.where = where
        self.w = words[where]
        self.limits = limits

    def need(
        self, ok: npt.NDArray[np.bool_] | np.bool_, word: int, name: str, expected: str
    ) -> None:
        _require(self.words, np.asarray(ok), word, name, expected, self.where)

    def rows_of(self, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows of each sequence; the numbers are in range."""
        return _per_sequence(self.limits.rows, sequences)

    @property
    def slots(self) -> str:
        """What a destination in scratch may be, in words."""
        count = self.limits.num_slots
        return f"a scratch slot (-1 to {-count})" if count else "no scratch slot (there are none)"


class _Partials(_Instructions):
    def check(self) -> None:
        w, lim, need = self.w, self.limits, self.need
        last = lim.num_sequences - 1
        need((w[:, 4] >= 0) & (w[:, 4] <= last), 4, "q_batch", f"0 to {last}")
        own_output, slot = w[:, 2] == w[:, 4], w[:, 2] < 0
        to = own_output | (slot & (w[:, 2] >= -lim.num_slots))
        need(to, 2, "dst_batch", f"the sequence of q_batch or {self.slots}")
        rows = self.rows_of(w[:, 4])
        token = (w[:, 5] >= 0) & (w[:, 5] * lim.num_heads < rows)
        need(token, 5, "q_seq", "a new token of the sequence")
        need(w[:, 3] == w[:, 5], 3, "dst_seq", "the same as q_seq")
        capacity = _per_sequence(lim.max_length, w[:, 4])
        limit = (
            f"{capacity.max(initial=0)}" if isinstance(lim.max_length, int) else "its block ids'"
        )
        need((w[:, 8] >= 1) & (w[:, 8] <= capacity), 8, "length", f"1 to {limit}")
        need((w[:, 6] >= 0) & (w[:, 6] % KV_TILE == 0), 6, "start", f"a multiple of {KV_TILE}")
        need((w[:, 7] > w[:, 6]) & (w[:, 7] <= w[:, 8]), 7, "end", "above start, at most length")
        whole_tiles = (w[:, 7] % KV_TILE == 0) | (w[:, 7] == w[:, 8])
        need(whole_tiles, 7, "end", f"a multiple of {KV_TILE} or the length")
        first = w[:, 5] * lim.num_heads + w[:, 9]
        need((w[:, 9] >= 0) & (first < rows), 9, "row_begin", "a (token, head) row of the sequence")
        most = lim.group_rows
        need(first % most == 0, 9, "row_begin", f"a first row that is a multiple of {most}")
        # The kernel moves whole groups: a smaller one would overwrite the rows after it.
        group = np.minimum(most, rows - first)
        whole = (w[:, 10] == 0) | (w[:, 10] == group)
        need(whole, 10, "num_rows", f"{most} rows, or all that are left if fewer (0)")
        # Of sequences that differ in their rows, a slot tells the kernel how many a group can have.
        differ = isinstance(lim.rows, tuple)
        fits = ~(slot | differ) | (group <= lim.slot_rows)
        need(fits, 2, "dst_batch", f"rows that a scratch slot holds ({lim.slot_rows})")
        exists = (w[:, 13] >= 0) & (w[:, 13] <= lim.num_slots)
        need(exists, 13, "adopted", f"0 or 1 + a scratch slot, at most {lim.num_slots}")
        fits = (w[:, 13] == 0) | (group <= lim.slot_rows)
        need(fits, 13, "adopted", f"rows that a scratch slot holds ({lim.slot_rows})")
        self._check_mates()

    def _check_mates(self) -> None:
        """Mates wait for each other, and each takes it that the others agree with it."""
        words, w, at, need = self.words, self.w, self.where, self.need
        count, mate = w[:, 11], w[:, 12]
        need(np.isin(count, _NUM_MATES), 11, "num_mates", f"one of {_NUM_MATES}")
        place = at % np.maximum(count, 1)
        need(mate == place, 12, "mate", "the queue position modulo num_mates, without mates 0")
        first = at - mate
        for other in range(1, max(_NUM_MATES)):
            where = np.minimum(first + other, len(words) - 1)
            is_mate = (words[where, 0] == OPCODE_MLA_PARTIAL) & (words[where, 11] == count)
            there = (other >= count) | (is_mate & (first + other < len(words)))
            need(there, 11, "num_mates", "that many partials, neighbours, of the same number")
        for word, name in _SHARED_WORDS.items():
            need(w[:, word] == words[first, word], word, name, "the same as of mate 0")
        follows = (mate == 0) | (w[:, 6] == words[at - 1, 7])
        need(follows, 6, "start", "the end of the mate before it")
        need((count == 0) | (w[:, 13] == 0), 13, "adopted", "0, as mates adopt nothing")


class _Reductions(_Instructions):
    def check(self) -> None:
        w, lim, need = self.w, self.limits, self.need
        last = lim.num_sequences - 1
        to = (w[:, 3] >= -lim.num_slots) & (w[:, 3] <= last)
        need(to, 3, "dst_batch", f"a sequence (0 to {last}) or {self.slots}")
        self._check_rows()
        shape = w[:, 2]
        col_begin, num_cols = (shape >> 24 & 0x7) * COLUMN_CHUNK, (shape >> 27 & 0xF) * COLUMN_CHUNK
        columns = col_begin + num_cols <= LATENT_DIM
        need(columns, 2, "shape", f"columns in 0 to {LATENT_DIM}")
        is_run = shape < 0
        self._check_list(~is_run)
        self._check_run(is_run)

    def _check_rows(self) -> None:
        w, lim, need = self.w, self.limits, self.need
        shape = w[:, 2]
        offset = np.where(shape < 0, w[:, 8], 0)
        head, count = shape >> 8 & 0xFF, shape >> 16 & 0xFF
        count = np.where(count == 0, lim.num_heads - head, count)
        need(head < lim.num_heads, 2, "shape", f"a first head below {lim.num_heads}")
        # Which sequence a slot belongs to, the words do not say: that of any will do.
        most = max(lim.rows, default=0) if isinstance(lim.rows, tuple) else lim.rows
        rows = np.where(w[:, 3] < 0, most, self.rows_of(np.maximum(w[:, 3], 0)))
        token = (w[:, 4] >= 0) & (w[:, 4] * lim.num_heads < rows)
        need(token, 4, "dst_seq", "a new token of the sequence")
        need(offset >= 0, 8, "row_offset", "at least 0")
        first = w[:, 4] * lim.num_heads + head + offset
        need(first + count <= rows, 2, "shape", "(token, head) rows of the sequence")
        group_end = first % lim.group_rows + count
        need(group_end <= lim.group_rows, 2, "shape", f"rows in one row group of {lim.group_rows}")
        in_slots = f"rows that a scratch slot holds ({lim.slot_rows})"
        need(group_end <= lim.slot_rows, 2, "shape", in_slots)

    def _check_list(self, listed: npt.NDArray[np.bool_]) -> None:
        w, slots = self.w, self.limits.num_slots
        count = (w[:, 2] & 0xFF) + 1
        few = ~listed | (count <= MAX_REDUCTION_INPUTS)
        self.need(few, 2, "shape", f"at most {MAX_REDUCTION_INPUTS} inputs")
        for i in range(MAX_REDUCTION_INPUTS):
            slot = w[:, 5 + i]
            ok = ~listed | (i >= count) | ((slot >= 0) & (slot < slots))
            self.need(ok, 5 + i, f"input {i}", f"a scratch slot, 0 to {slots - 1}")

    def _check_run(self, is_run: npt.NDArray[np.bool_]) -> None:
        w, slots = self.w, self.limits.num_slots
        first, count, step = w[:, 5], w[:, 6], w[:, 7]
        self.need(~is_run | (w[:, 2] & 0xFF == 0), 2, "shape", "bits 0 to 7 of a run to be 0")
        first_ok = (first >= 0) & (first < slots)
        self.need(~is_run | first_ok, 5, "first_input", f"a scratch slot, 0 to {slots - 1}")
        count_ok = (count >= 1) & (count <= MAX_RUN_INPUTS)
        self.need(~is_run | count_ok, 6, "num_inputs", f"1 to {MAX_RUN_INPUTS}")
        self.need(~is_run | (step >= 1), 7, "input_step", "at least 1")
        last_ok = first + (count - 1) * step < slots
        self.need(~is_run | last_ok, 6, "num_inputs", f"inputs below {slots}, the scratch slots")
        for word in range(_RUN_END, INSTRUCTION_WORDS):
            self.need(~is_run | (w[:, word] == 0), word, "unused", "0")


class _Fills(_Instructions):
    def check(self) -> None:
        w, tokens = self.w, self.limits.num_tokens
        begin = (w[:, 2] >= 0) & (w[:, 2] < tokens)
        self.need(begin, 2, "token_begin", f"0 to {tokens - 1}")
        end = (w[:, 3] > w[:, 2]) & (w[:, 3] <= tokens)
        self.need(end, 3, "token_end", f"above token_begin, at most {tokens}")


def _per_sequence(
    values: int | tuple[int, ...], sequences: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    if isinstance(values, int):
        return np.full(sequences.shape, values, dtype=np.int64)
    return np.asarray(values, dtype=np.int64)[sequences]


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
