"""The tensors of one launch, and the checks that they fit each other."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from . import checks
from .errors import DtypeError, RangeError, ShapeError, UnsupportedError
from .queue_check import QueueLimits
from .words import (
    INSTRUCTION_WORDS,
    LATENT_DIM,
    QUEUE_STATE_WORDS,
    ROPE_DIM,
    SUPPORTED_BLOCK_SIZES,
    SUPPORTED_HEADS,
    SUPPORTED_NEW_TOKENS,
    TIMING_WORDS,
)

# Sizes and strides (in elements) of a tensor as the extension takes them.
Geometry: TypeAlias = tuple[list[int], list[int]]

# The geometries of arguments that passed every check of their tensors, by their layouts.
_passed: dict[Hashable, tuple[Geometry | None, ...]] = {}


@dataclass(frozen=True)
class KernelArguments:
    """Arguments of the raw launch, in its order. See `mla_decode.raw.mla_decode`."""

    instructions: torch.Tensor
    timings: torch.Tensor | None
    global_instruction_index: torch.Tensor
    q_rot: torch.Tensor
    q_v: torch.Tensor
    k_rot: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    o: torch.Tensor
    o_scratch: torch.Tensor
    lvec_scratch: torch.Tensor
    completion_flag: torch.Tensor
    softmax_scale: float
    tic: int
    lse: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.q_v.device

    @property
    def batch(self) -> int:
        return int(self.q_v.shape[0])

    @property
    def new_tokens(self) -> int:
        return int(self.q_v.shape[1])

    @property
    def num_heads(self) -> int:
        return int(self.q_v.shape[2])

    @property
    def block_size(self) -> int:
        return int(self.v.shape[1])

    @property
    def num_blocks(self) -> int:
        return int(self.v.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.o_scratch.shape[0])

    def limits(self) -> QueueLimits:
        """Sizes that the queue's words must stay inside."""
        return QueueLimits(
            batch=self.batch,
            new_tokens=self.new_tokens,
            num_heads=self.num_heads,
            max_length=int(self.table.shape[1]) * self.block_size,
            num_slots=self.num_slots,
        )

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors, in the order of the launch."""
        return (
            self.instructions,
            self.timings,
            self.global_instruction_index,
            self.q_rot,
            self.q_v,
            self.k_rot,
            self.v,
            self.table,
            self.o,
            self.o_scratch,
            self.lvec_scratch,
            self.completion_flag,
            self.lse,
        )

    def check(self) -> tuple[Geometry | None, ...]:
        """Check every tensor alone and against the others; changes nothing.

        Returns
        -------
        tuple of Geometry
            Sizes and strides of `tensors`.

        Raises
        ------
        ShapeError, DtypeError, DeviceError, StrideError, AlignmentError, RangeError,
        UnsupportedError
            Naming the argument, what was expected and what came.
        """
        checks.require_int("tic", self.tic, 0, 2**31 - 2)
        if not isinstance(self.softmax_scale, float | int) or isinstance(self.softmax_scale, bool):
            kind = type(self.softmax_scale).__name__
            raise DtypeError(f"softmax_scale: expected a float, got {kind}")
        if not (math.isfinite(self.softmax_scale) and self.softmax_scale > 0):
            raise RangeError(
                f"softmax_scale: expected a finite number above 0, got {self.softmax_scale}"
            )
        tensors = self.tensors()
        layouts = tuple([checks.layout(tensor) for tensor in tensors])
        known = _passed.get(layouts)
        if known is not None:
            return known
        self._check_types()
        self._check_sizes()
        self._check_strides()
        geometries = tuple(None if t is None else geometry(t) for t in tensors)
        return checks.remember(_passed, layouts, geometries)

    def _check_strides(self) -> None:
        for name in ("q_rot", "q_v", "k_rot", "v"):
            checks.require_layout(name, getattr(self, name))
        for name in ("q_rot", "q_v"):
            checks.require_merged(name, getattr(self, name), 1)
        for name in ("o", "o_scratch"):
            checks.require_dense(name, getattr(self, name), checks.TMA_BYTES)
        checks.require_dense("instructions", self.instructions, checks.TMA_BYTES)
        checks.require_dense("global_instruction_index", self.global_instruction_index, 4)
        checks.require_dense("completion_flag", self.completion_flag, 4)
        checks.require_dense("lvec_scratch", self.lvec_scratch, 4)
        checks.require_last_dim("table", self.table)
        if self.timings is not None:
            checks.require_dense("timings", self.timings, checks.TMA_BYTES)
        if self.lse is not None:
            checks.require_no_overlap("lse", self.lse)

    def _check_types(self) -> None:
        dtypes = {
            "instructions": torch.int32,
            "timings": torch.int32,
            "global_instruction_index": torch.int32,
            "q_rot": torch.bfloat16,
            "q_v": torch.bfloat16,
            "k_rot": torch.bfloat16,
            "v": torch.bfloat16,
            "table": torch.int32,
            "o": torch.bfloat16,
            "o_scratch": torch.float32,
            "lvec_scratch": torch.float32,
            "completion_flag": torch.int32,
            "lse": torch.float32,
        }
        device = checks.require_tensor("q_v", self.q_v).device
        for name, dtype in dtypes.items():
            value = getattr(self, name)
            if value is None and name in ("timings", "lse"):
                continue
            tensor = checks.require_tensor(name, value)
            checks.require_dtype(name, tensor, dtype)
            checks.require_device(name, tensor, device)

    def _check_sizes(self) -> None:
        shape = checks.require_shape
        shape("q_v", self.q_v, ["B", "s_q", "H", LATENT_DIM])
        batch, new_tokens, heads = self.batch, self.new_tokens, self.num_heads
        require_supported_query(heads, new_tokens)
        if batch < 1:
            raise ShapeError(f"q_v: expected at least 1 request, got shape {list(self.q_v.shape)}")
        shape("q_rot", self.q_rot, [batch, new_tokens, heads, ROPE_DIM])
        shape("v", self.v, ["blocks", "block_size", LATENT_DIM])
        require_supported_block_size("v", self.block_size)
        shape("k_rot", self.k_rot, [self.num_blocks, self.block_size, ROPE_DIM])
        shape("table", self.table, [batch, "max_blocks"])
        shape("o", self.o, [batch, new_tokens, heads, LATENT_DIM])
        shape("o_scratch", self.o_scratch, ["slots", new_tokens, heads, LATENT_DIM])
        slots = self.num_slots
        shape("lvec_scratch", self.lvec_scratch, [slots, new_tokens, heads])
        shape("completion_flag", self.completion_flag, [slots, new_tokens])
        shape("instructions", self.instructions, ["n", INSTRUCTION_WORDS])
        if self.timings is not None:
            shape("timings", self.timings, ["n", TIMING_WORDS])
            if self.timings.shape[0] < self.instructions.shape[0]:
                raise ShapeError(
                    f"timings: expected at least {self.instructions.shape[0]} records, one per "
                    f"instruction, got {self.timings.shape[0]}"
                )
        if self.lse is not None:
            shape("lse", self.lse, [batch, heads, new_tokens])
        state = self.global_instruction_index
        if state.dim() != 1 or state.shape[0] < QUEUE_STATE_WORDS:
            raise ShapeError(
                f"global_instruction_index: expected at least {QUEUE_STATE_WORDS} int32 words, "
                f"zeroed once, got shape {list(state.shape)}"
            )


def geometry(tensor: torch.Tensor) -> Geometry:
    """Sizes and strides (in elements) of a tensor as the extension takes them.

    The stride of a dimension of size 1 means nothing to torch and may be anything;
    the TMA still checks it, so it is replaced by that of a dense tensor.
    """
    sizes, strides = list(tensor.shape), list(tensor.stride())
    dense = 1
    for dim in reversed(range(len(sizes))):
        if sizes[dim] == 1:
            strides[dim] = dense
        dense = max(dense, strides[dim] * sizes[dim])
    return sizes, strides


def require_supported_query(num_heads: object, new_tokens: object) -> None:
    """Check query heads and new tokens per request.

    Raises
    ------
    UnsupportedError
        The kernels were not built for that many.
    """
    if num_heads not in SUPPORTED_HEADS:
        raise UnsupportedError(f"num_heads: expected one of {SUPPORTED_HEADS}, got {num_heads}")
    if new_tokens not in SUPPORTED_NEW_TOKENS:
        raise UnsupportedError(
            f"new_tokens: expected one of {SUPPORTED_NEW_TOKENS}, got {new_tokens}"
        )


def require_supported_block_size(name: str, block_size: int) -> None:
    """Check the number of tokens in a cache block."""
    if block_size not in SUPPORTED_BLOCK_SIZES:
        raise UnsupportedError(
            f"{name}: expected a block size of {SUPPORTED_BLOCK_SIZES}, got {block_size}"
        )
