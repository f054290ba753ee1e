"""The words of an instruction, seen from Python.

The numbers come from ``instructions/layout.h`` through the scheduler extension;
this module only packs and unpacks them.
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
    MAX_REDUCTION_INPUTS,
    MAX_ROWS,
    OPCODE_END_OF_QUEUE,
    OPCODE_MLA_PARTIAL,
    OPCODE_MLA_REDUCTION,
    OPCODE_NOOP,
    QUEUE_VERSION,
    ROPE_DIM,
)
from .errors import QueueError

__all__ = [
    "COLUMN_CHUNK",
    "INSTRUCTION_WORDS",
    "KV_TILE",
    "LATENT_DIM",
    "MAX_REDUCTION_INPUTS",
    "MAX_ROWS",
    "OPCODE_END_OF_QUEUE",
    "OPCODE_MLA_PARTIAL",
    "OPCODE_MLA_REDUCTION",
    "OPCODE_NOOP",
    "QUEUE_STATE_WORDS",
    "QUEUE_VERSION",
    "ROPE_DIM",
    "SUPPORTED_BLOCK_SIZES",
    "SUPPORTED_HEADS",
    "SUPPORTED_NEW_TOKENS",
    "TIMING_WORDS",
    "Instruction",
    "Noop",
    "Partial",
    "Reduction",
    "Words",
    "decode_queue",
    "decode_words",
    "queue_length",
]

Words: TypeAlias = npt.NDArray[np.int32]

SUPPORTED_HEADS = (8, 16, 32, 64, 128)
SUPPORTED_NEW_TOKENS = (1, 2, 3, 4)
SUPPORTED_BLOCK_SIZES = (64, 128, 256)

QUEUE_STATE_WORDS = 32  # int32 words of ``global_instruction_index``
TIMING_WORDS = 8  # int32 words of one instruction's timing record


@dataclass(frozen=True)
class Noop:
    """Does nothing."""

    uid: int

    def pack(self) -> Words:
        words = np.zeros(INSTRUCTION_WORDS, np.int32)
        words[:2] = OPCODE_NOOP, self.uid
        return words


@dataclass(frozen=True)
class Partial:
    """Attention of some query rows of one request over KV positions ``[start, end)``.

    ``dst_batch >= 0`` names the request whose output it writes, ``dst_batch < 0`` the
    scratch slot ``-dst_batch - 1``. Rows count ``(token, head)`` from token ``q_seq``;
    ``num_rows`` 0 stands for all rows from ``row_begin`` on.
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

    def pack(self) -> Words:
        words = np.zeros(INSTRUCTION_WORDS, np.int32)
        words[:11] = (
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
        )
        return words

    @property
    def slot(self) -> int | None:
        """Scratch slot that it writes, or None when it writes the output."""
        return -self.dst_batch - 1 if self.dst_batch < 0 else None

    def flat_rows(self, new_tokens: int, num_heads: int) -> tuple[int, int]:
        """First and last+1 row, counted from token 0 of the request."""
        begin = self.q_seq * num_heads + self.row_begin
        end = begin + self.num_rows if self.num_rows else new_tokens * num_heads
        return begin, end

    def tokens(self, new_tokens: int, num_heads: int) -> range:
        """Query tokens that its rows touch."""
        begin, end = self.flat_rows(new_tokens, num_heads)
        return range(begin // num_heads, (end - 1) // num_heads + 1)


@dataclass(frozen=True)
class Reduction:
    """Merges scratch slots for one token over a slice of heads and columns.

    ``num_heads`` 0 and ``num_cols`` 0 stand for all of them.
    """

    uid: int
    dst_batch: int
    dst_seq: int
    inputs: tuple[int, ...]
    head_begin: int = 0
    num_heads: int = 0
    col_begin: int = 0
    num_cols: int = 0

    def pack(self) -> Words:
        words = np.zeros(INSTRUCTION_WORDS, np.int32)
        shape = (
            len(self.inputs) - 1
            | self.head_begin << 8
            | self.num_heads << 16
            | self.col_begin // COLUMN_CHUNK << 24
            | self.num_cols // COLUMN_CHUNK << 27
        )
        words[:5] = OPCODE_MLA_REDUCTION, self.uid, shape, self.dst_batch, self.dst_seq
        words[5 : 5 + len(self.inputs)] = self.inputs
        return words

    @property
    def slot(self) -> int | None:
        """Scratch slot that it writes, or None when it writes the output."""
        return -self.dst_batch - 1 if self.dst_batch < 0 else None

    def heads(self, num_heads: int) -> tuple[int, int]:
        """First and last+1 head."""
        return self.head_begin, self.head_begin + self.num_heads if self.num_heads else num_heads

    def columns(self) -> tuple[int, int]:
        """First and last+1 output column."""
        return self.col_begin, self.col_begin + self.num_cols if self.num_cols else LATENT_DIM


Instruction: TypeAlias = Noop | Partial | Reduction


def decode_words(row: Sequence[int] | Words) -> Instruction | None:
    """Decode one instruction; None for the end of the queue.

    Raises
    ------
    QueueError
        Unknown opcode, or more inputs than a reduction holds.
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
        )
    if opcode == OPCODE_MLA_REDUCTION:
        shape = w[2]
        count = (shape & 0xFF) + 1
        if count > MAX_REDUCTION_INPUTS:
            raise QueueError(
                f"uid {uid}: word 2: {count} inputs, a reduction holds {MAX_REDUCTION_INPUTS}"
            )
        return Reduction(
            uid=uid,
            dst_batch=w[3],
            dst_seq=w[4],
            inputs=tuple(w[5 : 5 + count]),
            head_begin=shape >> 8 & 0xFF,
            num_heads=shape >> 16 & 0xFF,
            col_begin=(shape >> 24 & 0x7) * COLUMN_CHUNK,
            num_cols=(shape >> 27 & 0xF) * COLUMN_CHUNK,
        )
    raise QueueError(f"uid {uid}: word 0: expected an opcode (-1, 0, 1, 2), got {opcode}")


def queue_length(instructions: Words) -> int:
    """Number of instructions before the first end-of-queue mark."""
    ends = np.flatnonzero(instructions[:, 0] == OPCODE_END_OF_QUEUE)
    return int(ends[0]) if ends.size else int(instructions.shape[0])


def decode_queue(instructions: Words) -> list[Instruction]:
    """Decode a queue ``[n, 32]`` int32 up to its end mark."""
    decoded = [decode_words(row) for row in instructions[: queue_length(instructions)].tolist()]
    return [instruction for instruction in decoded if instruction is not None]
