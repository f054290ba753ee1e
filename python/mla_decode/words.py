"""The words of an instruction, seen from Python.

The numbers come from ``instructions/layout.h`` through the scheduler extension;
this module only packs and unpacks them.

A *sequence* is one KV head of one request, numbered ``kv_head * B + request``. Its *rows* are
its (new token, query head) pairs, ``row = token * num_heads + head``, where ``num_heads`` are
the query heads of one KV head. Rows ``[64 g, 64 g + 64)`` are a *row group*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ._scheduler import (
    COLUMN_CHUNK,
    INSTRUCTION_WORDS,
    KV_TILE,
    LATENT_DIM,
    MAX_HEADS,
    MAX_MATES,
    MAX_NEW_TOKENS,
    MAX_REDUCTION_INPUTS,
    MAX_ROWS,
    MAX_RUN_INPUTS,
    NARROW_ROWS,
    NARROWEST_ROWS,
    OPCODE_END_OF_QUEUE,
    OPCODE_MLA_FILL,
    OPCODE_MLA_PARTIAL,
    OPCODE_MLA_REDUCTION,
    OPCODE_NOOP,
    QUEUE_VERSION,
    ROPE_DIM,
    group_rows_of,
)
from .errors import QueueError

__all__ = [
    "CLUSTER_SIZES",
    "COLUMN_CHUNK",
    "GROUP_ROWS",
    "INSTRUCTION_WORDS",
    "KV_TILE",
    "LATENT_DIM",
    "MAX_HEADS",
    "MAX_NEW_TOKENS",
    "MAX_REDUCTION_INPUTS",
    "MAX_ROWS",
    "MAX_RUN_INPUTS",
    "NARROWEST_ROWS",
    "NARROW_ROWS",
    "OPCODE_END_OF_QUEUE",
    "OPCODE_MLA_FILL",
    "OPCODE_MLA_PARTIAL",
    "OPCODE_MLA_REDUCTION",
    "OPCODE_NOOP",
    "QUEUE_STATE_WORDS",
    "QUEUE_VERSION",
    "ROPE_DIM",
    "TIMING_WORDS",
    "Fill",
    "Instruction",
    "Noop",
    "Partial",
    "Reduction",
    "Words",
    "decode_queue",
    "decode_words",
    "find_mates",
    "group_rows_of",
    "queue_length",
]

Words: TypeAlias = npt.NDArray[np.int32]

CLUSTER_SIZES = tuple(1 << i for i in range(1, MAX_MATES.bit_length()))  # mates of a partial
GROUP_ROWS = (NARROWEST_ROWS, NARROW_ROWS, MAX_ROWS)  # that a row group may have
QUEUE_STATE_WORDS = 32  # int32 words of the queue state
TIMING_WORDS = 8  # int32 words of one instruction's timing record

_OPCODES = (
    OPCODE_END_OF_QUEUE,
    OPCODE_NOOP,
    OPCODE_MLA_PARTIAL,
    OPCODE_MLA_REDUCTION,
    OPCODE_MLA_FILL,
)


def find_mates(words: npt.NDArray[np.integer]) -> tuple[npt.NDArray[np.intp], int]:
    """Queue positions of mates, and how many the largest group has: 1 if there are none."""
    counts = np.where(words[:, 0] == OPCODE_MLA_PARTIAL, words[:, 11], 0)
    return np.flatnonzero(counts), max(1, int(counts.max(initial=0)))


@dataclass(frozen=True)
class Noop:
    """Does nothing."""

    uid: int

    def pack(self) -> Words:
        words = np.zeros(INSTRUCTION_WORDS, np.int32)
        words[:2] = OPCODE_NOOP, self.uid
        return words

    @property
    def slot(self) -> None:
        """It writes no scratch slot."""
        return None

    @property
    def inputs(self) -> tuple[int, ...]:
        """It reads no scratch slot."""
        return ()


@dataclass(frozen=True)
class Partial:
    """Attention of one row group of a sequence over its KV positions ``[start, end)``.

    ``dst_batch >= 0`` names the sequence whose output it writes, ``dst_batch < 0`` the
    scratch slot ``-dst_batch - 1``. Its first row is ``q_seq * num_heads + row_begin``, a
    multiple of a row group's rows, 64, 32 or 16; ``num_rows`` 0 stands for all of the group.

    ``num_mates`` 2, 4 or 8 partials, *mates*, share one destination: neighbours in the queue,
    ``mate`` 0 first, at a position that is a multiple of ``num_mates``. Their ranges of keys
    follow each other; in everything else but the uid they agree. To what reads it they are one
    input, whose slot is the uid of mate 0. An ordinary partial has ``num_mates`` 0.

    ``adopted`` names a scratch slot that holds the same rows' attention over other keys, or is
    None. The partial merges that result with its own before it writes, as a reduction of the
    two would. Mates adopt nothing.
    """

    uid: int
    dst_batch: int
    q_batch: int
    start: int
    end: int
    length: int
    row_begin: int = 0
    num_rows: int = 0
    q_seq: int = 0
    dst_seq: int = 0
    num_mates: int = 0
    mate: int = 0
    adopted: int | None = None

    def pack(self) -> Words:
        words = np.zeros(INSTRUCTION_WORDS, np.int32)
        words[:14] = (
            OPCODE_MLA_PARTIAL,
            self.uid,
            self.dst_batch,
            self.dst_seq,
            self.q_batch,
            self.q_seq,
            self.start,
            self.end,
            self.length,
            self.row_begin,
            self.num_rows,
            self.num_mates,
            self.mate,
            0 if self.adopted is None else self.adopted + 1,
        )
        return words

    @property
    def slot(self) -> int | None:
        """Scratch slot that it writes, mates together, or None when it writes the output."""
        return -self.dst_batch - 1 if self.dst_batch < 0 else None

    @property
    def inputs(self) -> tuple[int, ...]:
        """Scratch slots that it reads: the adopted one, if any."""
        return () if self.adopted is None else (self.adopted,)

    def rows(self, num_heads: int, sequence_rows: int, group_rows: int = MAX_ROWS) -> range:
        """Rows of its sequence, which has ``sequence_rows`` in groups of ``group_rows``."""
        first = self.q_seq * num_heads + self.row_begin
        return range(first, first + (self.num_rows or min(group_rows, sequence_rows - first)))


@dataclass(frozen=True)
class Reduction:
    """Merges scratch slots of one row group over a slice of rows and columns.

    The type of ``inputs`` is the form of the words: a tuple lists up to 27 slots, a range
    runs over up to 65,536 of them. Its first row is
    ``dst_seq * num_heads + head_begin + row_offset``; only a run has a ``row_offset``.
    ``num_rows`` 0 stands for the heads of token ``dst_seq`` from ``head_begin`` on,
    ``num_cols`` 0 for all columns from ``col_begin`` on.
    """

    uid: int
    dst_batch: int
    dst_seq: int
    inputs: tuple[int, ...] | range
    head_begin: int = 0
    num_rows: int = 0
    col_begin: int = 0
    num_cols: int = 0
    row_offset: int = 0

    def pack(self) -> Words:
        run = isinstance(self.inputs, range)
        words = np.zeros(INSTRUCTION_WORDS, np.int64)
        shape = (
            (0 if run else len(self.inputs) - 1)
            | self.head_begin << 8
            | self.num_rows << 16
            | self.col_begin // COLUMN_CHUNK << 24
            | self.num_cols // COLUMN_CHUNK << 27
            | run << 31
        )
        words[:5] = OPCODE_MLA_REDUCTION, self.uid, shape, self.dst_batch, self.dst_seq
        if isinstance(self.inputs, range):
            count = len(self.inputs)
            words[5:9] = self.inputs.start, count, self.inputs.step, self.row_offset
        else:
            words[5 : 5 + len(self.inputs)] = self.inputs
        return words.astype(np.int32)  # bit 31 of the shape becomes the sign

    @property
    def slot(self) -> int | None:
        """Scratch slot that it writes, or None when it writes the output."""
        return -self.dst_batch - 1 if self.dst_batch < 0 else None

    def rows(self, num_heads: int) -> range:
        """Rows of its sequence."""
        first = self.dst_seq * num_heads + self.head_begin + self.row_offset
        return range(first, first + (self.num_rows or num_heads - self.head_begin))

    def columns(self) -> range:
        """Output columns."""
        end = self.col_begin + self.num_cols if self.num_cols else LATENT_DIM
        return range(self.col_begin, end)


@dataclass(frozen=True)
class Fill:
    """Writes what a row without keys has, O = 0 and its LSE, for all heads of some tokens.

    Tokens ``[token_begin, token_end)`` are counted as the output counts them: all new tokens
    of KV head 0, then those of KV head 1, and so on.
    """

    uid: int
    token_begin: int
    token_end: int

    def pack(self) -> Words:
        words = np.zeros(INSTRUCTION_WORDS, np.int32)
        words[:4] = OPCODE_MLA_FILL, self.uid, self.token_begin, self.token_end
        return words

    @property
    def slot(self) -> None:
        """It writes no scratch slot."""
        return None

    @property
    def inputs(self) -> tuple[int, ...]:
        """It reads no scratch slot."""
        return ()

    @property
    def tokens(self) -> range:
        """Tokens of the output."""
        return range(self.token_begin, self.token_end)


Instruction: TypeAlias = Noop | Partial | Reduction | Fill


def decode_words(row: Sequence[int] | Words) -> Instruction | None:
    """Decode one instruction; None for the end of the queue.

    Raises
    ------
    QueueError
        Unknown opcode, or no number of inputs that a reduction can have.
    """
    w = [int(x) for x in row]
    opcode, uid = w[0], w[1]
    if opcode == OPCODE_END_OF_QUEUE:
        return None
    if opcode == OPCODE_NOOP:
        return Noop(uid)
    if opcode == OPCODE_MLA_PARTIAL:
        return Partial(
            uid=uid,
            dst_batch=w[2],
            dst_seq=w[3],
            q_batch=w[4],
            q_seq=w[5],
            start=w[6],
            end=w[7],
            length=w[8],
            row_begin=w[9],
            num_rows=w[10],
            num_mates=w[11],
            mate=w[12],
            adopted=w[13] - 1 if w[13] else None,
        )
    if opcode == OPCODE_MLA_REDUCTION:
        shape = w[2]
        is_run = shape < 0
        return Reduction(
            uid=uid,
            dst_batch=w[3],
            dst_seq=w[4],
            inputs=_run_inputs(w) if is_run else _listed_inputs(w),
            head_begin=shape >> 8 & 0xFF,
            num_rows=shape >> 16 & 0xFF,
            col_begin=(shape >> 24 & 0x7) * COLUMN_CHUNK,
            num_cols=(shape >> 27 & 0xF) * COLUMN_CHUNK,
            row_offset=w[8] if is_run else 0,
        )
    if opcode == OPCODE_MLA_FILL:
        return Fill(uid, token_begin=w[2], token_end=w[3])
    raise QueueError(f"uid {uid}: word 0: expected an opcode {_OPCODES}, got {opcode}")


def _listed_inputs(w: list[int]) -> tuple[int, ...]:
    count = (w[2] & 0xFF) + 1
    if count > MAX_REDUCTION_INPUTS:
        raise QueueError(
            f"uid {w[1]}: word 2: {count} inputs, a reduction lists {MAX_REDUCTION_INPUTS}"
        )
    return tuple(w[5 : 5 + count])


def _run_inputs(w: list[int]) -> range:
    first, count, step = w[5:8]
    if not 1 <= count <= MAX_RUN_INPUTS:
        raise QueueError(f"uid {w[1]}: word 6: expected 1 to {MAX_RUN_INPUTS} inputs, got {count}")
    if step < 1:
        raise QueueError(f"uid {w[1]}: word 7: expected a step of at least 1, got {step}")
    return range(first, first + count * step, step)


def queue_length(instructions: Words) -> int:
    """Number of instructions before the first end-of-queue mark."""
    ends = np.flatnonzero(instructions[:, 0] == OPCODE_END_OF_QUEUE)
    return int(ends[0]) if ends.size else int(instructions.shape[0])


def decode_queue(instructions: Words) -> list[Instruction]:
    """Decode a queue ``[n, 32]`` int32 up to its end mark."""
    decoded = [decode_words(row) for row in instructions[: queue_length(instructions)].tolist()]
    return [instruction for instruction in decoded if instruction is not None]
