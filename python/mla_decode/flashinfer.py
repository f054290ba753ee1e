"""FlashInfer's wrapper for MLA decode over a paged cache, by this package's kernels.

`BatchMLAPagedAttentionWrapper` takes the arguments of FlashInfer's class of that name, for
bf16 and fp16. The LSE is base 2 unless asked otherwise, and -inf where no key is seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from . import checks
from .decoding import decode
from .device_plan import DevicePlan
from .errors import (
    DeviceError,
    DtypeError,
    RangeError,
    ScheduleError,
    ShapeError,
    UnsupportedError,
)
from .lengths import MAX_SEQ_LEN
from .planning import require_heads
from .words import LATENT_DIM, MAX_NEW_TOKENS, MAX_ROWS, ROPE_DIM
from .workspace import Workspace

_BACKENDS = ("auto", "fa2", "fa3")
_DTYPES = (torch.bfloat16, torch.float16)
_INT32 = torch.iinfo(torch.int32)


@dataclass(frozen=True)
class _Step:
    """What a call of `plan` said, beside its tensors."""

    batch: int
    num_heads: int
    page_size: int
    room: int
    """Keys of a request that the pages can hold."""
    tokens: int
    """New tokens of all requests; 0 on the GPU, where nobody reads them."""
    causal: bool
    sm_scale: float
    dtype: torch.dtype

    def has_sizes_of(self, other: _Step | None) -> bool:
        """Whether a plan for the other has room for this one."""
        if other is None:
            return False
        mine = (self.batch, self.num_heads, self.room)
        return mine == (other.batch, other.num_heads, other.room)


class BatchMLAPagedAttentionWrapper:
    """MLA decode of batches with different numbers of new tokens, over pages listed by request.

    `plan` takes the lengths and the pages of a step, `run` is called once for each layer. The
    queue is planned on the device: by the first `run` of a step where only that knows the rows
    of q, else by `plan`. Nothing is copied to the host, unless an int64 tensor on the GPU is to
    be checked.

    Parameters
    ----------
    float_workspace_buffer : Tensor
        Says on which device to work; the memory is not used.
    use_cuda_graph : bool
        `plan` copies into the four buffers below, so that a graph captured around `run` may be
        replayed after another `plan`. The number of requests then stays as it is.
    qo_indptr, kv_indptr : Tensor, optional
        ``[B + 1]`` int32 buffers, with ``use_cuda_graph``.
    kv_indices : Tensor, optional
        int32 buffer for the most pages that a batch has, with ``use_cuda_graph``.
    kv_len_arr : Tensor, optional
        ``[B]`` int32 buffer, with ``use_cuda_graph``.
    backend : str
        ``auto``, ``fa2`` or ``fa3``, which are all this package's kernel.

    Raises
    ------
    UnsupportedError
        Another backend.
    ShapeError, DtypeError, DeviceError, StrideError
        ``use_cuda_graph`` without its buffers, or with others than these.
    """

    def __init__(
        self,
        float_workspace_buffer: torch.Tensor,
        use_cuda_graph: bool = False,
        qo_indptr: torch.Tensor | None = None,
        kv_indptr: torch.Tensor | None = None,
        kv_indices: torch.Tensor | None = None,
        kv_len_arr: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        if backend not in _BACKENDS:
            raise UnsupportedError(f"backend: expected one of {_BACKENDS}, got {backend!r}")
        self.device = checks.require_tensor("float_workspace_buffer", float_workspace_buffer).device
        self._use_cuda_graph = use_cuda_graph
        self._buffers: dict[str, torch.Tensor] = {}
        given = {
            "qo_indptr": qo_indptr,
            "kv_indptr": kv_indptr,
            "kv_indices": kv_indices,
            "kv_len_arr": kv_len_arr,
        }
        if use_cuda_graph:
            for name, buffer in given.items():
                tensor = checks.require_tensor(name, buffer)
                checks.require_dtype(name, tensor, torch.int32)
                checks.require_device(name, tensor, self.device)
                checks.require_shape(name, tensor, ["n"])
                checks.require_dense(name, tensor, 4)
                self._buffers[name] = tensor
        self._workspace = Workspace(self.device)
        self._plans: dict[tuple[int, ...], DevicePlan] = {}
        self._plan: DevicePlan | None = None
        self._step: _Step | None = None
        self._is_planned = False  # for the present lengths
        self._has_run = False  # so that the plan knows the rows of q

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        """Say what the next calls of `run` work on; all or, with an exception, nothing.

        As FlashInfer, it copies the tensors, but for ``kv_indices`` that lie on the wrapper's
        device: without ``use_cuda_graph`` these must stay as they are until the last `run`.
        Tensors of int64 are accepted too, and their values checked, which waits for the GPU
        where they lie there.

        Parameters
        ----------
        qo_indptr : Tensor
            ``[B + 1]`` int32: where the new tokens of every request begin; at most 16 each.
        kv_indptr, kv_indices : Tensor
            ``[B + 1]`` and ``[>= kv_indptr[B]]`` int32: the pages of every request.
        kv_len_arr : Tensor
            ``[B]`` int32 KV lengths, new tokens included. Wrong ones, or wrong offsets, are
            refused on the CPU; on the GPU they are planned as the nearest possible, and
            lengths reported by a later call.
        num_heads : int
            Query heads, 1 to 128.
        head_dim_ckv, head_dim_kpe : int
            512 and 64.
        page_size : int
            Tokens per page.
        causal : bool
            Whether a new token sees only the keys up to its own.
        sm_scale : float
            Multiplies the scores.
        q_data_type, kv_data_type : torch.dtype
            bf16 or fp16, the same.
        use_profiler : bool
            Not supported.

        Raises
        ------
        ShapeError, DtypeError, DeviceError, RangeError, UnsupportedError
            An argument is wrong or not supported.
        RangeError, MegakernelTimeout
            An *earlier* call on this device failed.
        """
        if use_profiler:
            raise UnsupportedError("use_profiler: expected False, got True")
        if (head_dim_ckv, head_dim_kpe) != (LATENT_DIM, ROPE_DIM):
            raise UnsupportedError(
                f"head_dim_ckv, head_dim_kpe: expected {LATENT_DIM} and {ROPE_DIM}, got "
                f"{head_dim_ckv} and {head_dim_kpe}"
            )
        if q_data_type not in _DTYPES or kv_data_type != q_data_type:
            raise DtypeError(
                f"q_data_type, kv_data_type: expected bf16 or fp16 for both, got {q_data_type} and "
                f"{kv_data_type}"
            )
        require_heads(num_heads, 1)
        checks.require_int("page_size", page_size, 1, 1 << 20)
        _require_options(causal, sm_scale)
        given = {
            "qo_indptr": qo_indptr,
            "kv_indptr": kv_indptr,
            "kv_indices": kv_indices,
            "kv_len_arr": kv_len_arr,
        }
        batch = self._require_lists(given)
        taken = {name: self._taken(name, value) for name, value in given.items()}
        step = _Step(
            batch=batch,
            num_heads=num_heads,
            page_size=page_size,
            room=self._room(taken["kv_indices"], page_size),
            tokens=_require_values(taken, page_size) if self.device.type == "cpu" else 0,
            causal=causal,
            sm_scale=sm_scale,
            dtype=q_data_type,
        )
        self._commit(step, taken)

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        out: torch.Tensor | None = None,
        lse: torch.Tensor | None = None,
        return_lse: bool = False,
        profiler_buffer: torch.Tensor | None = None,
        kv_len: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        return_lse_base_on_e: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of one layer.

        Parameters
        ----------
        q_nope, q_pe : Tensor
            ``[N, H, 512]`` and ``[N, H, 64]``, one request behind the other. Rows past
            ``qo_indptr[B]`` are padding; their output is 0.
        ckv_cache, kpe_cache : Tensor
            ``[pages, page_size, 512]`` and ``[pages, page_size, 64]``.
        out, lse : Tensor, optional
            Where to write, of the shapes returned.
        return_lse : bool
            Whether to return ``lse`` too.
        profiler_buffer, kv_len, page_table
            Of other backends; None.
        return_lse_base_on_e : bool
            Natural logarithm instead of base 2.

        Returns
        -------
        out : Tensor
            ``[N, H, 512]``.
        lse : Tensor
            ``[N, H]`` fp32, base 2 or natural; -inf where no key is seen.

        Raises
        ------
        ScheduleError
            `plan` was not called, or said otherwise.
        ShapeError, DtypeError, DeviceError, RangeError, MegakernelTimeout
            As `mla_decode.decode`.
        """
        for name, value in (
            ("profiler_buffer", profiler_buffer),
            ("kv_len", kv_len),
            ("page_table", page_table),
        ):
            if value is not None:
                raise UnsupportedError(f"{name}: expected None, it belongs to another backend")
        step = self._step
        if step is None:
            raise ScheduleError("run: expected plan() before it")
        self._require_part("q_nope", q_nope, ["N", step.num_heads, LATENT_DIM])
        rows = int(q_nope.shape[0])
        self._require_part("q_pe", q_pe, [rows, step.num_heads, ROPE_DIM])
        self._require_part("ckv_cache", ckv_cache, ["pages", step.page_size, LATENT_DIM])
        pages = int(ckv_cache.shape[0])
        self._require_part("kpe_cache", kpe_cache, [pages, step.page_size, ROPE_DIM])
        if rows < step.tokens:
            raise ShapeError(
                f"q_nope: expected at least the {step.tokens} rows of qo_indptr, got {rows}"
            )
        made_out, made_lse = decode(
            (q_nope, q_pe),
            (ckv_cache, kpe_cache),
            None,
            None,
            self._plan_for(step, rows, min(pages * step.page_size, step.room)),
            step.sm_scale,
            causal=step.causal,
            cu_seqlens_q=self._buffers["qo_indptr"],
            kv_indptr=self._buffers["kv_indptr"],
            kv_indices=self._buffers["kv_indices"],
            out=out,
            lse=lse,
            lse_base=math.e if return_lse_base_on_e else 2.0,
            lse_empty=-math.inf,
            workspace=self._workspace,
        )
        return (made_out, made_lse) if return_lse else made_out

    def _require_part(self, name: str, value: object, shape: list[int | str]) -> None:
        """Check a tensor of `run` by the name it has there."""
        assert self._step is not None, "run checked it"
        tensor = checks.require_tensor(name, value)
        checks.require_shape(name, tensor, shape)
        checks.require_dtype(name, tensor, self._step.dtype)
        checks.require_device(name, tensor, self.device)

    def _require_lists(self, given: dict[str, torch.Tensor]) -> int:
        """Check the tensors of a step, their values on the GPU aside; how many requests."""
        for name, value in given.items():
            _require_integers(name, checks.require_tensor(name, value))
        checks.require_shape("kv_len_arr", given["kv_len_arr"], ["B"])
        batch = int(given["kv_len_arr"].shape[0])
        if batch < 1:
            raise ShapeError("kv_len_arr: expected at least 1 request, got shape [0]")
        for name in ("qo_indptr", "kv_indptr"):
            checks.require_shape(name, given[name], [batch + 1])
        checks.require_shape("kv_indices", given["kv_indices"], ["n"])
        if self._use_cuda_graph:
            for name, value in given.items():
                self._require_fits(name, int(value.shape[0]))
        return batch

    def _require_fits(self, name: str, count: int) -> None:
        """Check that a tensor of a step fits into the buffer that a graph knows."""
        room = int(self._buffers[name].shape[0])
        if count > room or (count < room and name != "kv_indices"):
            raise ShapeError(
                f"{name}: expected the {room} entries of the CUDA graph's buffer, got {count}"
            )

    def _taken(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """A step's tensor on this device, a copy where FlashInfer makes one."""
        on_gpu = self.device.type == "cuda"
        own = name != "kv_indices"
        if own and on_gpu and value.device.type == "cpu" and value.is_pinned():
            # The caller may write there before the GPU has read it.
            value = torch.empty_like(value, pin_memory=True).copy_(value)
        return value.to(
            self.device, torch.int32, non_blocking=on_gpu, copy=own and not self._use_cuda_graph
        ).contiguous()

    def _room(self, kv_indices: torch.Tensor, page_size: int) -> int:
        """Keys that the pages of a step can hold, as the buffers of its plan count them."""
        if self._use_cuda_graph:
            pages = max(int(self._buffers["kv_indices"].shape[0]), 1)
        else:  # steps of nearly the same size share a plan
            pages = 1 << (max(int(kv_indices.shape[0]), 1) - 1).bit_length()
        return min(pages * page_size, MAX_SEQ_LEN)

    def _commit(self, step: _Step, taken: dict[str, torch.Tensor]) -> None:
        """Make a step the present one. What can fail comes before what changes anything.

        Buffers and scratch are allocated here, so that `run` allocates neither under capture.
        """
        plan = self._plan
        if plan is None or not self._use_cuda_graph or not step.has_sizes_of(self._step):
            plan = self._allocated(step, step.batch * MAX_NEW_TOKENS)
        self._workspace.views(plan.num_slots, MAX_ROWS)
        has_run = self._has_run and plan is self._plan
        # A graph captured after a warm-up holds no planning of its own.
        plans_now = self._use_cuda_graph and has_run and step.tokens <= plan.total_tokens
        if plans_now:
            _update(plan, taken, step.page_size)
        if self._use_cuda_graph:
            self._write_buffers(taken)
        else:
            self._buffers = taken
        self._step, self._plan = step, plan
        self._is_planned, self._has_run = plans_now, has_run

    def _write_buffers(self, taken: dict[str, torch.Tensor]) -> None:
        with torch.inference_mode():  # where buffers made there can be written, too
            for name, value in taken.items():
                self._buffers[name][: value.shape[0]].copy_(value)

    def _allocated(self, step: _Step, token_room: int) -> DevicePlan:
        """The plan of a step's sizes with room for so many rows of q."""
        key = (step.batch, step.num_heads, step.room, token_room)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = DevicePlan(
                step.batch,
                step.num_heads,
                MAX_NEW_TOKENS,
                total_tokens=token_room,
                max_seq_len=step.room,
                ragged=True,
                device=self.device,
            )
        return plan

    def _plan_for(self, step: _Step, rows: int, keys: int) -> DevicePlan:
        """This step's plan, made now unless it was for as many rows of q and keys."""
        plan = self._plan
        assert plan is not None, "run checked it"
        if rows > step.batch * MAX_NEW_TOKENS:  # far more padding than requests
            bigger = self._allocated(step, rows)
            self._is_planned = self._is_planned and bigger is plan
            plan = self._plan = bigger
        if not self._is_planned or (plan.total_tokens, plan.max_seq_len) != (rows, keys):
            self._is_planned = False  # should the update fail
            plan.rebind(rows, keys)
            _update(plan, self._buffers, step.page_size)
            self._is_planned = True
        self._has_run = True
        return plan


def _update(plan: DevicePlan, lists: dict[str, torch.Tensor], page_size: int) -> None:
    plan.update(
        lists["kv_len_arr"],
        lists["qo_indptr"],
        kv_indptr=lists["kv_indptr"],
        block_size=page_size,
    )


def _require_options(causal: object, sm_scale: object) -> None:
    if not isinstance(causal, bool):
        raise DtypeError(f"causal: expected a bool, got {type(causal).__name__}")
    if isinstance(sm_scale, bool) or not isinstance(sm_scale, float | int):
        raise DtypeError(f"sm_scale: expected a float, got {type(sm_scale).__name__}")
    if not (math.isfinite(sm_scale) and sm_scale > 0):
        raise RangeError(f"sm_scale: expected a finite number above 0, got {sm_scale}")


def _require_integers(name: str, value: torch.Tensor) -> None:
    """Check that the values are int32, or int64 that fit."""
    if value.is_meta:
        raise DeviceError(f"{name}: expected a tensor with values, got one on device meta")
    if value.dtype is torch.int32:
        return
    if value.dtype is not torch.int64:
        raise DtypeError(f"{name}: expected torch.int32, got {value.dtype}")
    if value.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"{name}: expected torch.int32 while a CUDA graph is captured, got {value.dtype}"
        )
    if value.numel() == 0:
        return
    low, high = torch.stack(value.aminmax()).tolist()
    if low < _INT32.min or high > _INT32.max:
        wrong = low if low < _INT32.min else high
        raise RangeError(f"{name}: expected values that fit into int32, got {wrong}")


def _require_values(lists: dict[str, torch.Tensor], page_size: int) -> int:
    """Check a step on the CPU; how many new tokens it has.

    Raises
    ------
    UnsupportedError
        A request has more than 16 new tokens.
    RangeError
        Offsets that are none, or a length beyond the request's pages.
    """
    tokens = _sizes("qo_indptr", lists["qo_indptr"])
    if int(tokens.max()) > MAX_NEW_TOKENS:
        request = int(tokens.argmax())
        raise UnsupportedError(
            f"qo_indptr: request {request}: expected at most {MAX_NEW_TOKENS} new tokens, got "
            f"{tokens[request]}"
        )
    pages, listed = _sizes("kv_indptr", lists["kv_indptr"]), int(lists["kv_indices"].shape[0])
    if int(pages.sum()) > listed:
        raise RangeError(
            f"kv_indptr: expected to end at {listed}, the entries of kv_indices, or below, got "
            f"{pages.sum()}"
        )
    lengths = lists["kv_len_arr"].numpy()
    limits = np.minimum(pages * page_size, MAX_SEQ_LEN)
    bad = np.flatnonzero((lengths < 0) | (lengths > limits))
    if bad.size:
        request = int(bad[0])
        raise RangeError(
            f"kv_len_arr: request {request}: expected 0 to {limits[request]}, the keys of its "
            f"pages, got {lengths[request]}"
        )
    return int(tokens.sum())


def _sizes(name: str, offsets: torch.Tensor) -> npt.NDArray[np.int64]:
    """Sizes ``[B]`` of the ranges between offsets ``[B + 1]``."""
    values = offsets.numpy().astype(np.int64)
    if values[0] != 0:
        raise RangeError(f"{name}: expected to start with 0, got {values[0]}")
    sizes: npt.NDArray[np.int64] = np.diff(values)
    if int(sizes.min()) < 0:
        request = int(sizes.argmin())
        raise RangeError(
            f"{name}: request {request}: expected offsets that do not fall, got "
            f"{values[request]} and then {values[request + 1]}"
        )
    return sizes
