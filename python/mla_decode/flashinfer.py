"""FlashInfer's wrapper for MLA decode over a paged cache, by this package's kernels.

`BatchMLAPagedAttentionWrapper` takes the arguments of FlashInfer's class of that name, for
bf16 and fp16. The LSE is base 2 unless asked otherwise, and -inf where no key is seen.
"""

from __future__ import annotations

import math

import torch

from . import checks
from .decoding import decode
from .device_plan import DevicePlan
from .errors import DtypeError, ScheduleError, ShapeError, UnsupportedError
from .lengths import MAX_SEQ_LEN
from .planning import require_heads
from .words import LATENT_DIM, MAX_NEW_TOKENS, MAX_ROWS, ROPE_DIM
from .workspace import Workspace

_BACKENDS = ("auto", "fa2", "fa3")
_DTYPES = (torch.bfloat16, torch.float16)


class BatchMLAPagedAttentionWrapper:
    """MLA decode of batches with different numbers of new tokens, over pages listed by request.

    `plan` takes the lengths and the pages of a step, `run` is called once for each layer. The
    queue is planned on the device: by the first `run` of a step where only that knows the rows
    of q, else by `plan`. Nothing is copied to the host.

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
    DtypeError
        ``use_cuda_graph`` without its buffers.
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
                self._buffers[name] = tensor
        self._workspace = Workspace(self.device)
        self._plans: dict[tuple[int, ...], DevicePlan] = {}
        self._plan: DevicePlan | None = None
        self._batch = 0
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
        """Say what the next calls of `run` work on.

        Parameters
        ----------
        qo_indptr : Tensor
            ``[B + 1]`` int32: where the new tokens of every request begin; at most 16 each.
        kv_indptr, kv_indices : Tensor
            ``[B + 1]`` and ``[>= kv_indptr[B]]`` int32: the pages of every request.
        kv_len_arr : Tensor
            ``[B]`` int32 KV lengths, new tokens included.
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
        ShapeError, DtypeError, RangeError, UnsupportedError
            An argument is wrong or not supported.
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
        batch = int(checks.require_tensor("kv_len_arr", kv_len_arr).shape[0])
        checks.require_shape(
            "qo_indptr", checks.require_tensor("qo_indptr", qo_indptr), [batch + 1]
        )
        checks.require_shape(
            "kv_indptr", checks.require_tensor("kv_indptr", kv_indptr), [batch + 1]
        )
        checks.require_shape("kv_indices", checks.require_tensor("kv_indices", kv_indices), ["n"])
        self._keep("qo_indptr", qo_indptr)
        self._keep("kv_indptr", kv_indptr)
        self._keep("kv_indices", kv_indices)
        self._keep("kv_len_arr", kv_len_arr)
        self._num_heads = num_heads
        self._page_size = page_size
        self._causal = causal
        self._sm_scale = sm_scale
        self._dtype = q_data_type
        self._prepare(batch)

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
        if self._plan is None:
            raise ScheduleError("run: expected plan() before it")
        checks.require_shape("q_nope", q_nope, ["N", self._num_heads, LATENT_DIM])
        checks.require_dtype("q_nope", q_nope, self._dtype)
        checks.require_shape("ckv_cache", ckv_cache, ["pages", self._page_size, LATENT_DIM])
        keys = int(ckv_cache.shape[0]) * self._page_size
        made_out, made_lse = decode(
            (q_nope, q_pe),
            (ckv_cache, kpe_cache),
            None,
            None,
            self._plan_for(int(q_nope.shape[0]), min(keys, self._room)),
            self._sm_scale,
            causal=self._causal,
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

    def _keep(self, name: str, value: torch.Tensor) -> None:
        """Take a step's tensor: copied into the buffer that a graph knows, or moved here."""
        if not self._use_cuda_graph:
            moved = value.to(device=self.device, dtype=torch.int32, non_blocking=True)
            self._buffers[name] = moved.contiguous()
            return
        buffer = self._buffers[name]
        count = int(value.shape[0])
        fits = count <= buffer.shape[0] if name == "kv_indices" else count == buffer.shape[0]
        if not fits:
            raise ShapeError(
                f"{name}: expected the {buffer.shape[0]} entries of the CUDA graph's buffer, got "
                f"{count}"
            )
        buffer[:count].copy_(value, non_blocking=True)

    def _prepare(self, batch: int) -> None:
        """Buffers and scratch for a step, so that `run` allocates neither under capture."""
        pages = max(int(self._buffers["kv_indices"].shape[0]), 1)
        if not self._use_cuda_graph:
            pages = 1 << (pages - 1).bit_length()  # steps of nearly the same size share a plan
        self._batch = batch
        self._room = min(pages * self._page_size, MAX_SEQ_LEN)
        plan = self._allocated(batch * MAX_NEW_TOKENS)
        self._workspace.views(plan.num_slots, MAX_ROWS)
        same = plan is self._plan
        self._plan = plan
        self._is_planned = False
        self._has_run = self._has_run and same
        if self._use_cuda_graph and self._has_run:
            self._update(plan)  # a graph captured after a warm-up holds no planning of its own

    def _allocated(self, token_room: int) -> DevicePlan:
        """The plan of this step's sizes with room for so many rows of q."""
        key = (self._batch, self._num_heads, self._room, token_room)
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = DevicePlan(
                self._batch,
                self._num_heads,
                MAX_NEW_TOKENS,
                total_tokens=token_room,
                max_seq_len=self._room,
                ragged=True,
                device=self.device,
            )
        return plan

    def _plan_for(self, rows: int, keys: int) -> DevicePlan:
        """This step's plan, made now unless it was for as many rows of q and keys."""
        plan = self._plan
        assert plan is not None, "run checked it"
        if rows > self._batch * MAX_NEW_TOKENS:  # far more padding than requests
            bigger = self._allocated(rows)
            self._is_planned = self._is_planned and bigger is plan
            plan = self._plan = bigger
        if not self._is_planned or (plan.total_tokens, plan.max_seq_len) != (rows, keys):
            plan.rebind(rows, keys)
            self._update(plan)
        self._has_run = True
        return plan

    def _update(self, plan: DevicePlan) -> None:
        plan.update(
            self._buffers["kv_len_arr"],
            self._buffers["qo_indptr"],
            kv_indptr=self._buffers["kv_indptr"],
            block_size=self._page_size,
        )
        self._is_planned = True
