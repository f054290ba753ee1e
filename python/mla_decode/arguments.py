"""The tensors of one launch, and the checks that they fit each other."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from . import checks
from .errors import DtypeError, RangeError, ShapeError, UnsupportedError
from .queue_check import QueueLimits
from .words import (
    INSTRUCTION_WORDS,
    LATENT_DIM,
    MAX_HEADS,
    MAX_NEW_TOKENS,
    QUEUE_STATE_WORDS,
    ROPE_DIM,
    TIMING_WORDS,
    group_rows_of,
)

DTYPES = (torch.bfloat16, torch.float16)  # of queries, cache and output, all the same

# What stands for the log-sum-exp's base and for its value where no key is seen.
LSE_BASES = (math.e, 2.0)
LSE_EMPTY = (math.inf, -math.inf)

_SAME_DTYPE = ("q_nope", "q_pe", "latent", "rope", "out")
_INT32 = (
    "instructions",
    "timings",
    "queue_state",
    "block_ids",
    "kv_indptr",
    "cu_seqlens_q",
    "completion_flag",
)
_FP32 = ("lse", "attn_sink", "o_scratch", "lvec_scratch")
_OPTIONAL = ("timings", "kv_indptr", "cu_seqlens_q", "lse", "attn_sink")

# Layouts of arguments that passed every check of their tensors.
_passed: dict[Hashable, None] = {}


@dataclass(frozen=True)
class KernelArguments:
    """What raw launches, the interpreter and the GPU's launch share; CPU or CUDA tensors.

    ``B`` requests, ``h_kv`` KV heads, ``G`` query heads per KV head, ``S = h_kv * B``
    sequences (``kv_head * B + request``), ``T`` new tokens of all requests. Every request
    has ``s_q`` new tokens, or ``cu_seqlens_q[r + 1] - cu_seqlens_q[r]``; then ``T`` may
    exceed ``cu_seqlens_q[B]``: the rest is padding.
    """

    instructions: torch.Tensor
    """``[n, 32]`` int32, contiguous."""
    timings: torch.Tensor | None
    """``[>= n, 8]`` int32, contiguous."""
    queue_state: torch.Tensor
    """``[>= 32]`` int32, contiguous; zeroed once."""
    q_nope: torch.Tensor
    """``[h_kv * T, G, 512]`` bf16 or fp16; tokens and heads countable through as one."""
    q_pe: torch.Tensor
    """``[h_kv * T, G, 64]``, as ``q_nope``."""
    latent: torch.Tensor
    """``[blocks, block_size, h_kv, 512]``; outer strides are multiples of 16 bytes."""
    rope: torch.Tensor
    """``[blocks, block_size, h_kv, 64]``, as ``latent``."""
    block_ids: torch.Tensor
    """int32 block table ``[B, max_blocks]``, or ``[n]`` with ``kv_indptr``."""
    kv_indptr: torch.Tensor | None
    """``[B + 1]`` int32: request r has ``block_ids[kv_indptr[r] : kv_indptr[r + 1]]``."""
    cu_seqlens_q: torch.Tensor | None
    """``[B + 1]`` int32: request r has tokens ``[cu_seqlens_q[r], cu_seqlens_q[r + 1])``."""
    s_q: int
    """New tokens of every request; ignored with ``cu_seqlens_q``."""
    out: torch.Tensor
    """``[h_kv * T, G, 512]``, contiguous, written."""
    lse: torch.Tensor | None
    """``[h_kv * T, G]``, or ``[S, s_q, G]`` without ``cu_seqlens_q``, fp32, written."""
    attn_sink: torch.Tensor | None
    """``[h_kv * G]`` fp32, contiguous, natural log: scales O, not the LSE."""
    o_scratch: torch.Tensor
    """``[slots, slot_rows, 512]`` fp32, contiguous, written; zeroed once, with ``queue_state``."""
    lvec_scratch: torch.Tensor
    """``[slots, slot_rows]`` fp32, contiguous, written: base-2 LSE."""
    completion_flag: torch.Tensor
    """``[slots]`` int32, contiguous, written; zeroed once, with ``queue_state``."""
    softmax_scale: float
    tic: int
    causal: bool = True
    lse_base: float = math.e
    """``math.e`` or 2."""
    lse_empty: float = math.inf
    """LSE of a row that sees no key: inf or -inf."""

    @property
    def device(self) -> torch.device:
        return self.q_nope.device

    @property
    def dtype(self) -> torch.dtype:
        """Of queries, cache and output."""
        return self.q_nope.dtype

    @property
    def num_heads(self) -> int:
        """Query heads per KV head."""
        return int(self.q_nope.shape[1])

    @property
    def h_kv(self) -> int:
        return int(self.latent.shape[2])

    @property
    def num_requests(self) -> int:
        if self.kv_indptr is not None:
            return int(self.kv_indptr.shape[0]) - 1
        return int(self.block_ids.shape[0])

    @property
    def num_sequences(self) -> int:
        return self.h_kv * self.num_requests

    @property
    def total_tokens(self) -> int:
        """New tokens of all requests, padding included."""
        return int(self.q_nope.shape[0]) // self.h_kv

    @property
    def block_size(self) -> int:
        return int(self.latent.shape[1])

    @property
    def num_blocks(self) -> int:
        return int(self.latent.shape[0])

    @property
    def num_slots(self) -> int:
        return int(self.o_scratch.shape[0])

    @property
    def slot_rows(self) -> int:
        return int(self.o_scratch.shape[1])

    @property
    def group_rows(self) -> int:
        """Rows of every row group but a sequence's last."""
        return group_rows_of(self.slot_rows)

    def tokens_of(self, sequence: int) -> tuple[int, int]:
        """First token of a sequence, as the output counts them, and how many; host tensors."""
        kv_head, request = divmod(sequence, self.num_requests)
        if self.cu_seqlens_q is None:
            return sequence * self.s_q, self.s_q
        begin, end = self.cu_seqlens_q[request : request + 2].tolist()
        return kv_head * self.total_tokens + begin, end - begin

    def blocks_of(self, request: int) -> torch.Tensor:
        """Block ids of a request; host tensors."""
        if self.kv_indptr is None:
            return self.block_ids[request]
        begin, end = self.kv_indptr[request : request + 2].tolist()
        return self.block_ids[begin:end]

    def limits(self) -> QueueLimits:
        """Sizes that the queue's words must stay inside.

        Reads ``cu_seqlens_q`` and ``kv_indptr``, which waits for them if they are on a GPU.

        Raises
        ------
        RangeError
            They do not rise from 0 within q and ``block_ids``, or a request has more new
            tokens than the kernels take.
        """
        rows: int | tuple[int, ...] = self.s_q * self.num_heads
        if self.cu_seqlens_q is not None:
            tokens = _differences("cu_seqlens_q", self.cu_seqlens_q, self.total_tokens)
            if tokens.max() > MAX_NEW_TOKENS:
                raise RangeError(
                    f"cu_seqlens_q: request {tokens.argmax()}: expected at most "
                    f"{MAX_NEW_TOKENS} new tokens, got {tokens.max()}"
                )
            rows = tuple((tokens * self.num_heads).tolist()) * self.h_kv
        max_length: int | tuple[int, ...]
        if self.kv_indptr is None:
            max_length = int(self.block_ids.shape[1]) * self.block_size
        else:
            blocks = _differences("kv_indptr", self.kv_indptr, int(self.block_ids.shape[0]))
            max_length = tuple((blocks * self.block_size).tolist()) * self.h_kv
        return QueueLimits(
            num_sequences=self.num_sequences,
            num_heads=self.num_heads,
            rows=rows,
            max_length=max_length,
            num_tokens=int(self.q_nope.shape[0]),
            num_slots=self.num_slots,
            slot_rows=self.slot_rows,
        )

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors, in the order of the fields."""
        return (
            self.instructions,
            self.timings,
            self.queue_state,
            self.q_nope,
            self.q_pe,
            self.latent,
            self.rope,
            self.block_ids,
            self.kv_indptr,
            self.cu_seqlens_q,
            self.out,
            self.lse,
            self.attn_sink,
            self.o_scratch,
            self.lvec_scratch,
            self.completion_flag,
        )

    def check(self, names: Mapping[str, str] | None = None) -> None:
        """Check every argument alone and against the others, but no tensor's values.

        Parameters
        ----------
        names : mapping, optional
            What the caller knows the fields as, for the messages.

        Raises
        ------
        ShapeError, DtypeError, DeviceError, StrideError, AlignmentError, RangeError,
        UnsupportedError
            Naming the argument, what was expected and what came.
        """
        self._check_numbers()
        layouts = (self.s_q, *[checks.layout(tensor) for tensor in self.tensors()])
        if layouts in _passed:
            return
        _Checker(self, names or {}).check()
        checks.remember(_passed, layouts, None)

    def _check_numbers(self) -> None:
        checks.require_int("tic", self.tic, 0, 2**31 - 2)
        if not isinstance(self.softmax_scale, float | int) or isinstance(self.softmax_scale, bool):
            kind = type(self.softmax_scale).__name__
            raise DtypeError(f"softmax_scale: expected a float, got {kind}")
        if not (math.isfinite(self.softmax_scale) and self.softmax_scale > 0):
            raise RangeError(
                f"softmax_scale: expected a finite number above 0, got {self.softmax_scale}"
            )
        if not isinstance(self.causal, bool):
            raise DtypeError(f"causal: expected a bool, got {type(self.causal).__name__}")
        if self.lse_base not in LSE_BASES:
            raise RangeError(f"lse_base: expected math.e or 2, got {self.lse_base}")
        if self.lse_empty not in LSE_EMPTY:
            raise RangeError(f"lse_empty: expected inf or -inf, got {self.lse_empty}")


class _Checker:
    """The checks of the tensors of one launch, under the names that the caller gave them."""

    def __init__(self, arguments: KernelArguments, names: Mapping[str, str]) -> None:
        self.a = arguments
        self.names = names

    def check(self) -> None:
        self._check_types()
        self._check_queries()
        self._check_cache()
        self._check_requests()
        self._check_outputs()
        self._check_scratch()
        self._check_queue()
        self._check_strides()

    def _name(self, field: str) -> str:
        return self.names.get(field, field)

    def _shape(self, field: str, shape: list[int | str]) -> None:
        checks.require_shape(self._name(field), getattr(self.a, field), shape)

    def _check_types(self) -> None:
        q = checks.require_tensor(self._name("q_nope"), self.a.q_nope)
        if q.dtype not in DTYPES:
            expected = " or ".join(str(dtype) for dtype in DTYPES)
            raise DtypeError(f"{self._name('q_nope')}: expected {expected}, got {q.dtype}")
        for fields, dtype in (
            (_SAME_DTYPE, q.dtype),
            (_INT32, torch.int32),
            (_FP32, torch.float32),
        ):
            for field in fields:
                value = getattr(self.a, field)
                if value is None and field in _OPTIONAL:
                    continue
                name = self._name(field)
                tensor = checks.require_tensor(name, value)
                checks.require_dtype(name, tensor, dtype)
                checks.require_device(name, tensor, q.device)

    def _check_queries(self) -> None:
        a = self.a
        self._shape("q_nope", ["h_kv * T", "G", LATENT_DIM])
        self._shape("latent", ["blocks", "block_size", "h_kv", LATENT_DIM])
        require_supported_query(a.num_heads, 1 if a.cu_seqlens_q is not None else a.s_q)
        tokens, heads = int(a.q_nope.shape[0]), a.h_kv
        if heads < 1:
            raise ShapeError(
                f"{self._name('latent')}: expected at least 1 KV head, got shape "
                f"{list(a.latent.shape)}"
            )
        if tokens < 1 or tokens % heads:
            raise ShapeError(
                f"{self._name('q_nope')}: expected at least 1 token for each of {heads} KV heads, "
                f"as many for each, got shape {list(a.q_nope.shape)}"
            )
        self._shape("q_pe", [tokens, a.num_heads, ROPE_DIM])

    def _check_cache(self) -> None:
        a = self.a
        require_supported_block_size(self._name("latent"), a.block_size)
        self._shape("rope", [a.num_blocks, a.block_size, a.h_kv, ROPE_DIM])

    def _check_requests(self) -> None:
        a = self.a
        if a.kv_indptr is None:
            self._shape("block_ids", ["B", "max_blocks"])
        else:
            self._shape("block_ids", ["n"])
            self._shape("kv_indptr", ["B + 1"])
        batch = a.num_requests
        if batch < 1:
            field = "block_ids" if a.kv_indptr is None else "kv_indptr"
            shape = list(getattr(a, field).shape)
            raise ShapeError(f"{self._name(field)}: expected at least 1 request, got shape {shape}")
        if a.cu_seqlens_q is not None:
            self._shape("cu_seqlens_q", [batch + 1])
        elif a.total_tokens != batch * a.s_q:
            raise ShapeError(
                f"{self._name('q_nope')}: expected {batch * a.s_q} tokens ({batch} requests of "
                f"{a.s_q}), got {a.total_tokens}"
            )

    def _check_outputs(self) -> None:
        a = self.a
        self._shape("out", [*a.q_nope.shape])
        if a.lse is not None:
            if a.lse.dim() == 3 and a.cu_seqlens_q is None:
                self._shape("lse", [a.num_sequences, a.s_q, a.num_heads])
            else:
                self._shape("lse", [a.q_nope.shape[0], a.num_heads])
        if a.attn_sink is not None:
            self._shape("attn_sink", [a.h_kv * a.num_heads])

    def _check_scratch(self) -> None:
        a = self.a
        self._shape("o_scratch", ["slots", "slot_rows", LATENT_DIM])
        self._shape("lvec_scratch", [a.num_slots, a.slot_rows])
        self._shape("completion_flag", [a.num_slots])
        # With cu_seqlens_q, how many rows there are is known from its values alone.
        rows = 1 if a.cu_seqlens_q is not None else min(a.group_rows, a.s_q * a.num_heads)
        if a.num_slots and a.slot_rows < rows:
            raise ShapeError(
                f"{self._name('o_scratch')}: expected at least {rows} rows per slot, got shape "
                f"{list(a.o_scratch.shape)}"
            )

    def _check_queue(self) -> None:
        a = self.a
        self._shape("instructions", ["n", INSTRUCTION_WORDS])
        if a.timings is not None:
            self._shape("timings", ["n", TIMING_WORDS])
            if a.timings.shape[0] < a.instructions.shape[0]:
                raise ShapeError(
                    f"{self._name('timings')}: expected at least {a.instructions.shape[0]} "
                    f"records, one per instruction, got {a.timings.shape[0]}"
                )
        state = a.queue_state
        if state.dim() != 1 or state.shape[0] < QUEUE_STATE_WORDS:
            raise ShapeError(
                f"{self._name('queue_state')}: expected at least {QUEUE_STATE_WORDS} int32 words, "
                f"zeroed once, got shape {list(state.shape)}"
            )

    def _check_strides(self) -> None:
        a = self.a
        for field in ("q_nope", "q_pe", "latent", "rope"):
            checks.require_layout(self._name(field), getattr(a, field))
        for field in ("q_nope", "q_pe"):
            checks.require_merged(self._name(field), getattr(a, field), 0)
        for field in ("out", "o_scratch", "instructions", "timings"):
            self._require_dense(field, checks.TMA_BYTES)
        for field in (
            "queue_state",
            "completion_flag",
            "lvec_scratch",
            "kv_indptr",
            "cu_seqlens_q",
            "attn_sink",
        ):
            self._require_dense(field, 4)
        checks.require_last_dim(self._name("block_ids"), a.block_ids)
        if a.lse is not None:
            checks.require_no_overlap(self._name("lse"), a.lse)

    def _require_dense(self, field: str, alignment: int) -> None:
        tensor = getattr(self.a, field)
        if tensor is not None:
            checks.require_dense(self._name(field), tensor, alignment)


def _differences(name: str, starts: torch.Tensor, end: int) -> npt.NDArray[np.int64]:
    """Sizes ``[B]`` of the ranges that ``starts`` ``[B + 1]`` bound, from 0 to at most ``end``."""
    values = starts.detach().cpu().numpy().astype(np.int64)
    sizes = np.diff(values)
    if values[0] != 0:
        raise RangeError(f"{name}: expected to start with 0, got {values[0]}")
    if sizes.min() < 0:
        where = int(sizes.argmin())
        raise RangeError(
            f"{name}: expected not to fall, got {values[where]} and {values[where + 1]} for "
            f"request {where}"
        )
    if values[-1] > end:
        raise RangeError(f"{name}: expected to end at {end} or below, got {values[-1]}")
    return sizes


def require_supported_query(num_heads: object, new_tokens: object) -> None:
    """Check query heads per KV head (1 to 128) and new tokens of a request (1 to 16).

    Raises
    ------
    UnsupportedError
        The kernels do not take that many.
    """
    for name, value, most in (
        ("num_heads", num_heads, MAX_HEADS),
        ("new_tokens", new_tokens, MAX_NEW_TOKENS),
    ):
        if not isinstance(value, int) or not 1 <= value <= most:
            raise UnsupportedError(f"{name}: expected 1 to {most}, got {value}")


def require_supported_block_size(name: str, block_size: int) -> None:
    """Check the number of tokens in a cache block: any, multiples of 16 being the fast ones.

    A block whose size is a multiple of 16 is loaded in boxes, another row by row.

    Raises
    ------
    UnsupportedError
        A block holds no token.
    """
    if block_size < 1:
        raise UnsupportedError(f"{name}: expected a block size of at least 1, got {block_size}")
