"""The decode op: attention of a batch of requests over their paged latent caches."""

from __future__ import annotations

import math
from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from . import calls, checks, interpreter, native, raw
from .calls import DEFAULT_SOFTMAX_SCALE, Call, Inputs, Launch, Options, TensorOrPair
from .device_plan import DevicePlan, PlannedWords
from .errors import (
    DeviceError,
    DtypeError,
    RangeError,
    ScheduleError,
    ShapeError,
    UnsupportedError,
)
from .lengths import MAX_SEQ_LEN, SeqLens, host_seq_lens, tokens_from_offsets
from .planning import Plan, PlanCache
from .queue_check import check_words
from .words import LATENT_DIM, MAX_HEADS, MAX_NEW_TOKENS
from .workspace import Workspace, WorkspaceViews, cached_workspace, release_workspaces

__all__ = ["DEFAULT_SOFTMAX_SCALE", "TensorOrPair", "decode", "interpret", "release_caches"]

_ROPE_OFFSET = 2 * LATENT_DIM  # bytes from a row's 512 wide part to its 64 wide part

_PLANS = (Plan, DevicePlan, PlannedWords)
AnyPlan: TypeAlias = Plan | DevicePlan | PlannedWords

_plans = PlanCache()

# Plans on the GPU that calls without a plan use, by stream and sizes. Never evicted: a captured
# graph may still write there.
_device_plans: dict[Hashable, DevicePlan] = {}

# A workspace ready for a capture on a new stream, by device; and those that captures took, by
# device and stream.
_spares: dict[torch.device, Workspace] = {}
_claimed: dict[tuple[torch.device, int], Workspace] = {}

# Calls whose tensors passed the checks, by layouts and options.
_calls: dict[Hashable, Call] = {}


def decode(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: torch.Tensor | None = None,
    seq_lens: SeqLens | None = None,
    plan: AnyPlan | None = None,
    softmax_scale: float | None = None,
    *,
    causal: bool = True,
    cu_seqlens_q: torch.Tensor | None = None,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    lse_base: float = math.e,
    lse_empty: float = math.inf,
    lse_layout: str | None = None,
    batch_invariant: bool = False,
    timings: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    check_block_table: bool = False,
    check_seq_lens: bool = False,
    stream: torch.cuda.Stream | int | None = None,
    spin_timeout_ns: int = raw.DEFAULT_SPIN_TIMEOUT_NS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA decode: the megakernel on CUDA tensors, the interpreter on CPU tensors.

    Every query head attends to a latent KV head of width 576 = 512 + 64, whose first 512
    columns are the values too (DeepSeek-V2/V3 after absorbing W_UK into q). No gradients.

    Parameters
    ----------
    q : Tensor or (Tensor, Tensor)
        ``[B, s_q, H, 576]`` bf16 or fp16, or (q_nope ``[.., 512]``, q_pe ``[.., 64]``): the
        same number ``s_q``, 1 to 16, of new tokens for every request. Or ``[T, H, 576]``: one
        new token per request, or, with ``cu_seqlens_q``, 0 to 16 of each, one request behind
        the other. 1 to 128 heads for each KV head. Copied if tokens and heads cannot be
        counted through as one dimension.
    kv_cache : Tensor or (Tensor, Tensor)
        ``[num_blocks, block_size, 576]`` or ``[num_blocks, block_size, h_kv, 576]`` of q's
        dtype, or (latent ``[.., 512]``, rope ``[.., 64]``). ``block_size`` 1 or more; those
        that are multiples of 16 are fastest. Outer strides may be any multiples of 16 bytes.
        With ``h_kv`` over 1, query head ``h`` belongs to KV head ``h // (H // h_kv)``, and q
        and the outputs are copied.
    block_table : Tensor, optional
        ``[B, max_blocks]`` int32. Entries past a request's last block are never read.
        None with ``kv_indptr``.
    seq_lens : Tensor, ndarray or list of int
        ``[B]`` KV length of every request, new tokens included; 0 for an empty request. May
        be None with a ``plan``, which holds lengths of its own.
    plan : Plan or DevicePlan, optional
        Made by `mla_decode.plan` for these lengths, or a `mla_decode.DevicePlan` that was
        updated with them. When None, lengths on the host are planned there, and the plan is
        kept for the next call with the same ones; lengths on the GPU are planned on the GPU in
        every call: nothing is copied to the host and nothing waits, so the call can be
        captured in a CUDA graph and replayed with other lengths. A layer loop saves that by
        sharing one `DevicePlan`.
    softmax_scale : float, optional
        Multiplies the scores. ``576 ** -0.5`` when None, as FlashMLA; absorbed DeepSeek-V3
        uses ``192 ** -0.5`` (times its YaRN factor), so engines pass it.
    causal : bool
        Query token ``t`` sees the keys up to ``seq_len - s_q + t``; all keys when False.
    cu_seqlens_q : Tensor, optional
        ``[B + 1]`` int32, from 0: the new tokens of request ``r`` are rows
        ``cu_seqlens_q[r]`` to ``cu_seqlens_q[r + 1] - 1`` of ``q [T, H, 576]``. Rows past
        the last are padding; their outputs are those of an empty request.
    kv_indptr, kv_indices : Tensor, optional
        int32, instead of ``block_table``: the blocks of request ``r`` are
        ``kv_indices[kv_indptr[r] : kv_indptr[r + 1]]``.
    attn_sink : Tensor, optional
        ``[H]`` fp32, natural log: the output of head ``h`` is multiplied by
        ``exp(lse) / (exp(lse) + exp(attn_sink[h]))``. ``lse`` is left alone.
    out, lse : Tensor, optional
        Where to write, of the shapes returned; ``out`` contiguous.
    lse_base : float
        Base of the logarithm in ``lse``: ``math.e`` or 2.
    lse_empty : float
        ``lse`` of a query token that sees no key: inf as FlashMLA, -inf for merging.
    lse_layout : str, optional
        ``"bhs"``: ``[B, H, s_q]``, the default for ``q [B, s_q, H, 576]``; ``"th"``:
        ``[T, H]``, the default for ``q [T, H, 576]``.
    batch_invariant : bool
        For calls without a plan: plan every request by itself, so that its output bits do not
        depend on the rest of the batch. A plan has this property or not by itself. It takes
        1.0 to 2.0 times as long, most where requests are few and short (docs/serving.md).
    timings : Tensor, optional
        ``[num_instructions, 8]`` int32, see `mla_decode.mla_decode`; selects the slower
        kernel that records them.
    workspace : Workspace, optional
        Scratch of the caller's own; by default one per device and stream, on the CPU one per
        thread, kept. CUDA graphs that may be replayed at the same time need different ones.
    check_block_table : bool
        Check the block ids inside each request's length (waits for the GPU).
    check_seq_lens : bool
        Check lengths on the GPU against the plan (waits for the GPU). Those on the CPU are
        always checked against a `Plan`.
    stream : torch.cuda.Stream or int, optional
        Where to enqueue, and to make new outputs and the copies that a call may need; the
        current stream when None.
    spin_timeout_ns : int
        Nanoseconds after which a wait inside the kernel gives up. CUDA only.

    Returns
    -------
    out : Tensor
        ``[B, s_q, H, 512]`` or ``[T, H, 512]``, of q's dtype. 0 for a query token that sees
        no key (``seq_len < s_q``, or padding).
    lse : Tensor
        ``[B, H, s_q]`` or ``[T, H]`` fp32, logarithm of the sum of exponentials of the scaled
        scores.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, StrideError, AlignmentError, RangeError
        An argument is wrong; named with what was expected. Nothing was launched. A RangeError
        may also be that of a length on the GPU in an *earlier* call.
    ScheduleError
        The plan was made for another batch, or is a `mla_decode.DevicePlan` without an update.
        That ``cu_seqlens_q`` on a GPU is what was planned is not looked at.
    UnsupportedError
        Sizes that the kernels do not support, an input that requires a gradient, or no GPU
        that can run them.
    MegakernelTimeout
        An *earlier* launch on this device timed out; see `mla_decode.synchronize`.
    """
    if torch.compiler.is_compiling():
        from . import ops

        return ops.traced_decode(
            q,
            kv_cache,
            block_table,
            seq_lens,
            plan,
            softmax_scale,
            causal=causal,
            cu_seqlens_q=cu_seqlens_q,
            kv_indptr=kv_indptr,
            kv_indices=kv_indices,
            attn_sink=attn_sink,
            out=out,
            lse=lse,
            lse_base=lse_base,
            lse_empty=lse_empty,
            lse_layout=lse_layout,
            batch_invariant=batch_invariant,
            unsupported={
                "timings": timings,
                "workspace": workspace,
                "stream": stream,
                "check_block_table": check_block_table or None,
                "check_seq_lens": check_seq_lens or None,
            },
        )
    if stream is not None:
        given = {**locals(), "stream": None}
        with _current_stream_being(stream, q):  # for copies and new outputs as for the launch
            return decode(**given)
    layouts, addresses = native.read_tensors(
        q, kv_cache, block_table, cu_seqlens_q, kv_indptr, kv_indices, attn_sink, out, lse
    ) or (
        _layouts(
            (q, kv_cache, block_table, cu_seqlens_q, kv_indptr, attn_sink, out, lse), kv_indices
        ),
        None,
    )
    # The types, because True is 1.
    kinds = (type(softmax_scale), type(causal))
    key = (layouts, kinds, softmax_scale, causal, lse_base, lse_empty, lse_layout)
    try:
        call = _calls.get(key)
    except TypeError:  # one of them has no hash, and so is none of what the checks let through
        call = None
    inputs = None
    if call is None:
        inputs = Inputs(q, kv_cache, block_table, cu_seqlens_q, kv_indptr, kv_indices, attn_sink)
        scale = DEFAULT_SOFTMAX_SCALE if softmax_scale is None else softmax_scale
        options = Options(scale, causal, lse_base, lse_empty, lse_layout)
        call = calls.make_call(inputs, options)
        if call.device.type == "cuda":
            call.index = native.require(call.device)
    if torch.is_grad_enabled():
        _refuse_gradients(q, kv_cache)
    handle = 0
    if call.index >= 0:
        handle = native.current_stream(call.index)
        native.raise_pending_on(call.index)  # of earlier calls: this one's plan may record, too
    if plan is None:
        plan = _own_plan(call, seq_lens, cu_seqlens_q, kv_indptr, batch_invariant, handle)
    elif not isinstance(plan, _PLANS):
        raise DtypeError(f"plan: expected a Plan or a DevicePlan, got {type(plan).__name__}")
    elif seq_lens is not None:
        _require_lengths(plan, seq_lens, call.batch, check_seq_lens)
    if workspace is None:
        views = _own_views(call.device, handle, plan.num_slots, plan.slot_rows)
    elif isinstance(workspace, Workspace):
        views = workspace.views(plan.num_slots, plan.slot_rows)
    else:
        raise _no_workspace(workspace)
    launch = call.launch
    if (
        launch is None
        or launch.binding is not plan.binding
        or launch.views is not views
        or launch.spin_timeout_ns != spin_timeout_ns
        or timings is not None
        or check_block_table
    ):
        _require_plan(call, plan, cu_seqlens_q)
        if workspace is not None:
            workspace.require_device(call.device)
        if check_block_table:
            _check_block_ids(call, plan, block_table, kv_indptr, kv_indices)
        launch = _bound(call, plan, views, spin_timeout_ns) if timings is None else None
        if launch is None:
            inputs = inputs or Inputs(
                q, kv_cache, block_table, cu_seqlens_q, kv_indptr, kv_indices, attn_sink
            )
            out, lse = call.outputs(out, lse)
            _run_checked(call, inputs, plan, views, out, lse, timings, handle, spin_timeout_ns)
            checks.remember(_calls, key, call)
            return out, lse
    if addresses is None or call.copies_q:
        block_ids = block_table if kv_indices is None else kv_indices
        q = calls.dense(q) if call.copies_q else q
        addresses = _addresses(q, kv_cache, block_ids, kv_indptr, cu_seqlens_q, attn_sink)
    out, lse = call.outputs(out, lse)
    launch.enqueue(addresses, out.data_ptr(), lse.data_ptr(), handle)
    return out, lse


def interpret(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: torch.Tensor | None = None,
    seq_lens: SeqLens | None = None,
    plan: AnyPlan | None = None,
    softmax_scale: float | None = None,
    *,
    causal: bool = True,
    cu_seqlens_q: torch.Tensor | None = None,
    kv_indptr: torch.Tensor | None = None,
    kv_indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    lse_base: float = math.e,
    lse_empty: float = math.inf,
    lse_layout: str | None = None,
    batch_invariant: bool = False,
    num_workers: int = 1,
    seed: int | None = None,
    timings: torch.Tensor | None = None,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode` by the interpreter with ``num_workers`` workers; CPU tensors.

    Parameters
    ----------
    num_workers, seed
        See `mla_decode.interpreter.run`: with a seed, a random legal interleaving.

    Everything else, results and errors as `decode`. Without ``workspace`` each call gets
    fresh scratch filled with NaN, so that a value read before it was written shows.

    Raises
    ------
    DeadlockError
        The queue can reach a state in which every worker waits for another.
    """
    inputs = Inputs(q, kv_cache, block_table, cu_seqlens_q, kv_indptr, kv_indices, attn_sink)
    scale = DEFAULT_SOFTMAX_SCALE if softmax_scale is None else softmax_scale
    call = calls.make_call(inputs, Options(scale, causal, lse_base, lse_empty, lse_layout))
    if call.device.type != "cpu":
        raise DeviceError(f"q: expected device cpu, got {call.device}")
    if torch.is_grad_enabled():
        _refuse_gradients(q, kv_cache)
    if plan is None:
        plan = _own_plan(call, seq_lens, cu_seqlens_q, kv_indptr, batch_invariant, 0)
    elif not isinstance(plan, _PLANS):
        raise DtypeError(f"plan: expected a Plan or a DevicePlan, got {type(plan).__name__}")
    elif seq_lens is not None:
        _require_lengths(plan, seq_lens, call.batch, check=True)
    _require_plan(call, plan, cu_seqlens_q)
    if workspace is None:
        workspace = Workspace("cpu", plan.num_slots, plan.slot_rows)
        workspace.poison()
    elif not isinstance(workspace, Workspace):
        raise _no_workspace(workspace)
    workspace.require_device(call.device)
    views = workspace.views(plan.num_slots, plan.slot_rows)
    out, lse = call.outputs(None, None)
    words = plan.to(call.device)
    arguments = calls.kernel_arguments(call, inputs, words, views, out, lse, timings)
    calls.check(call, arguments)
    if call.total_tokens == 0:
        return out, lse
    check_words(arguments.instructions.numpy(), arguments.limits())
    interpreter.run(arguments, num_workers=num_workers, seed=seed)
    calls.write_back(call, arguments, out, lse)
    return out, lse


def release_caches() -> None:
    """Forget cached workspaces and plans.

    No captured graph that used one may be replayed after.
    """
    release_workspaces()
    for cache in (_device_plans, _spares, _claimed, _calls):
        cache.clear()


def require_block_table(
    block_table: torch.Tensor,
    seq_lens: npt.NDArray[np.int32],
    block_size: int,
    num_blocks: int,
) -> None:
    """Check the block ids inside each request's length; the rest may be anything.

    Raises
    ------
    RangeError
        Names the first request and block that lie outside the cache.
    """
    table = block_table.detach().cpu().numpy()
    used = -(-seq_lens.astype(np.int64) // block_size)
    bad = (table < 0) | (table >= num_blocks)
    bad &= np.arange(table.shape[1])[None, :] < used[:, None]
    if bad.any():
        request, block = np.argwhere(bad)[0]
        raise RangeError(
            f"block_table: request {request}, block {block}: expected 0 to {num_blocks - 1}, got "
            f"{table[request, block]}"
        )


def require_block_lists(
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    seq_lens: npt.NDArray[np.int32],
    block_size: int,
    num_blocks: int,
) -> None:
    """`require_block_table` for ``kv_indptr`` and ``kv_indices``.

    Raises
    ------
    RangeError
        A request has fewer blocks than its length needs, or one lies outside the cache.
    """
    starts = kv_indptr.detach().cpu().numpy().astype(np.int64)
    ids = kv_indices.detach().cpu().numpy()
    needed = -(-seq_lens.astype(np.int64) // block_size)
    for request, blocks in enumerate(needed.tolist()):
        begin, end = starts[request : request + 2].tolist()
        if not 0 <= begin <= end <= ids.size or end - begin < blocks:
            raise RangeError(
                f"kv_indptr: request {request}: expected at least {blocks} blocks within "
                f"kv_indices, got [{begin}, {end}) of {ids.size}"
            )
        mine = ids[begin : begin + blocks]
        bad = np.flatnonzero((mine < 0) | (mine >= num_blocks))
        if bad.size:
            raise RangeError(
                f"kv_indices: request {request}, block {bad[0]}: expected 0 to {num_blocks - 1}, "
                f"got {mine[bad[0]]}"
            )


def _current_stream_being(
    stream: torch.cuda.Stream | int, q: TensorOrPair
) -> AbstractContextManager[None]:
    """The context in which ``stream`` is the current one of q's device."""
    part = checks.require_tensor("q", q[0] if isinstance(q, tuple) and q else q)
    if not part.is_cuda:
        raise DeviceError("stream: expected None for CPU tensors")
    handle = native.stream_handle(stream, part.device)
    if handle == 0:
        stream = torch.cuda.default_stream(part.device)
    elif isinstance(stream, int):
        stream = torch.cuda.ExternalStream(handle, part.device)  # type: ignore[no-untyped-call]
    context: AbstractContextManager[None] = torch.cuda.stream(stream)
    return context


def _layouts(values: tuple[object, ...], kv_indices: object) -> Hashable:
    """`checks.layout` of each, for what `native.read_tensors` does not read.

    Of ``kv_indices`` without the length, which changes from step to step and decides nothing.
    """
    found = [
        tuple(map(checks.layout, value)) if isinstance(value, tuple) else checks.layout(value)
        for value in values
    ]
    if isinstance(kv_indices, torch.Tensor):
        ids = kv_indices.dim(), kv_indices.stride(), kv_indices.dtype, kv_indices.device
        return *found, ids
    return *found, type(kv_indices).__name__


def _addresses(
    q: TensorOrPair, kv_cache: TensorOrPair, *others: torch.Tensor | None
) -> tuple[int, ...]:
    """What `BoundDecode.enqueue` is given; the others in the order of `native.ADDRESSES`."""
    found: list[int] = []
    for value in (q, kv_cache):
        if isinstance(value, tuple):
            found += (value[0].data_ptr(), value[1].data_ptr())
        else:
            found += (value.data_ptr(), value.data_ptr() + _ROPE_OFFSET)
    return *found, *map(native.address, others)


def _bound(call: Call, plan: AnyPlan, views: WorkspaceViews, spin_timeout_ns: int) -> Launch | None:
    """A launch of this plan with this scratch, kept for the next call; None before the first."""
    kernel = call.layouts.get(plan.slot_rows)
    if kernel is None:
        return None
    checks.require_int("spin_timeout_ns", spin_timeout_ns, 1, raw.MAX_SPIN_TIMEOUT_NS)
    queue, grid = plan.queue(call.device), _grid(plan, call.device, call.num_sms)
    bound = native.bind(kernel, queue, views, grid, spin_timeout_ns)
    call.launch = Launch(plan.binding, views, spin_timeout_ns, bound.enqueue)
    return call.launch


def _grid(plan: AnyPlan, device: torch.device, num_sms: int) -> native.Grid:
    """The CTAs that run a plan; one without clusters is correct with any number of them.

    Raises
    ------
    UnsupportedError
        It was made for more clusters than this GPU runs at a time.
    """
    size = plan.cluster_ctas
    if size == 1:
        ctas = min(plan.num_workers, num_sms)
        # Neighbours in the queue read the same keys: in one cluster, at the same time.
        if plan.shares_keys and ctas % 2 == 0 and ctas // 2 <= native.max_clusters(2, device):
            return native.Grid(ctas, 2)
        return native.Grid(ctas)
    count = native.max_clusters(size, device)
    if plan.num_workers > count * size:
        raise UnsupportedError(
            f"plan: expected one for at most {count} clusters of {size} SMs, as many as {device} "
            f"runs at a time, got one for {plan.num_workers // size}; plan for this device, or "
            "with clusters=False"
        )
    return native.Grid(plan.num_workers, size)


def _run_checked(
    call: Call,
    inputs: Inputs,
    plan: AnyPlan,
    views: WorkspaceViews,
    out: torch.Tensor,
    lse: torch.Tensor,
    timings: torch.Tensor | None,
    handle: int,
    spin_timeout_ns: int,
) -> None:
    """Check everything, then launch or interpret; the next launch of its kind is `_launch`."""
    words = plan.to(call.device)
    arguments = calls.kernel_arguments(call, inputs, words, views, out, lse, timings)
    on_gpu = call.device.type == "cuda"
    calls.check(call, arguments)
    if call.total_tokens == 0:
        return
    raw.run_checked(
        arguments,
        handle if on_gpu else None,
        _grid(plan, call.device, native.num_sms(call.device)) if on_gpu else native.Grid(),
        spin_timeout_ns,
        check_queue=not on_gpu,  # a plan's words were proved when it was made
    )
    if on_gpu:
        _make_spare(call.device)
    if on_gpu and call.num_kv_heads == 1:
        call.num_sms = native.num_sms(call.device)
        call.layouts[plan.slot_rows] = native.layout_of(arguments, call.index)
    calls.write_back(call, arguments, out, lse)


def _own_views(device: torch.device, stream: int, num_slots: int, slot_rows: int) -> WorkspaceViews:
    """Scratch of a call that brings none: the stream's, or under capture the spare one."""
    try:
        return cached_workspace(device, stream).views(num_slots, slot_rows)
    except UnsupportedError:
        # A CUDA graph is captured on a stream that was not used before, and cannot allocate.
        key = (device, stream)
        if key not in _claimed:
            if device not in _spares:
                raise
            _claimed[key] = _spares.pop(device)
        return _claimed[key].views(num_slots, slot_rows)


def _make_spare(device: torch.device) -> None:
    """Keep a workspace ready for the next stream that a CUDA graph is captured on."""
    if device not in _spares and not torch.cuda.is_current_stream_capturing():
        slots = 2 * native.num_sms(device) + MAX_HEADS  # what a DevicePlan can need, and more
        _spares[device] = Workspace(device, slots)


def _own_plan(
    call: Call,
    seq_lens: SeqLens | None,
    cu_seqlens_q: torch.Tensor | None,
    kv_indptr: torch.Tensor | None,
    batch_invariant: bool,
    handle: int,
) -> Plan | DevicePlan:
    """The plan of a call that brings none: on the GPU for lengths there, else on the host."""
    if seq_lens is None:
        raise DtypeError("seq_lens: expected lengths, or a plan that holds them, got None")
    on_gpu = call.device.type == "cuda"
    if on_gpu and isinstance(seq_lens, torch.Tensor) and seq_lens.is_cuda:
        return _planned_on_gpu(call, seq_lens, cu_seqlens_q, kv_indptr, batch_invariant, handle)
    lengths = host_seq_lens(seq_lens)
    if lengths.size != call.batch:
        raise ShapeError(f"seq_lens: expected shape [{call.batch}] as q, got [{lengths.size}]")
    if on_gpu and cu_seqlens_q is not None:
        # The offsets are on the GPU, so the lengths go there too.
        on_device = torch.from_numpy(lengths).to(call.device)
        return _planned_on_gpu(call, on_device, cu_seqlens_q, kv_indptr, batch_invariant, handle)
    return _plans.get(
        lengths,
        call.num_heads,
        call.s_q if cu_seqlens_q is None else tokens_from_offsets(cu_seqlens_q, call.batch),
        None,
        call.device,
        num_kv_heads=call.num_kv_heads,
        total_tokens=call.total_tokens,
        batch_invariant=batch_invariant,
    )


def _planned_on_gpu(
    call: Call,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    kv_indptr: torch.Tensor | None,
    batch_invariant: bool,
    handle: int,
) -> DevicePlan:
    """The plan on this stream for calls of these sizes, updated."""
    if seq_lens.dtype is torch.int64:
        seq_lens = seq_lens.clamp(-1, (1 << 31) - 1).to(torch.int32)
    plan = call.device_plans.get((handle, batch_invariant))
    if plan is None:
        plan = _device_plan(call, cu_seqlens_q is not None, batch_invariant, handle)
        call.device_plans[handle, batch_invariant] = plan
    plan.rebind(call.total_tokens, min(call.capacity, MAX_SEQ_LEN))
    block_size = None if kv_indptr is None else call.block_size
    return plan.update(seq_lens, cu_seqlens_q, handle, kv_indptr=kv_indptr, block_size=block_size)


def _device_plan(call: Call, ragged: bool, batch_invariant: bool, handle: int) -> DevicePlan:
    """The plan that calls of nearly these sizes share on a stream, made now or before."""
    room = limit = min(call.capacity, MAX_SEQ_LEN)
    if not batch_invariant and limit:
        # Tables of nearly the same width share buffers, sized for the next power of two.
        room = min(1 << (limit - 1).bit_length(), MAX_SEQ_LEN)
    most_tokens = call.s_q or MAX_NEW_TOKENS
    token_room = max(call.batch * most_tokens, call.total_tokens)
    heads = (call.num_heads, call.num_kv_heads)
    sizes = (call.batch, *heads, call.s_q, token_room, room, batch_invariant)
    key = (call.device, handle, sizes)
    plan = _device_plans.get(key)
    if plan is None:
        plan = _device_plans[key] = DevicePlan(
            call.batch,
            call.num_heads,
            most_tokens,
            num_kv_heads=call.num_kv_heads,
            total_tokens=token_room,
            max_seq_len=room,
            ragged=ragged,
            batch_invariant=batch_invariant,
            device=call.device,
        )
    return plan


def _require_lengths(plan: AnyPlan, seq_lens: SeqLens, batch: int, check: bool) -> None:
    """Check lengths on the host against the plan's, and those on the GPU if asked to."""
    on_gpu = isinstance(seq_lens, torch.Tensor) and seq_lens.is_cuda
    if not check and (on_gpu or not isinstance(plan, Plan)):
        return
    known = plan.seq_lens if isinstance(plan, Plan) else None
    if isinstance(plan, Plan) and type(seq_lens) is list and plan.holds(seq_lens):
        return
    lengths = host_seq_lens(seq_lens, known)
    if lengths.size != batch:
        raise ShapeError(f"seq_lens: expected shape [{batch}] as q, got [{lengths.size}]")
    plan.require_seq_lens(lengths)


def _require_plan(call: Call, plan: AnyPlan, cu_seqlens_q: torch.Tensor | None) -> None:
    """Check that the plan was made for a call of these sizes, and fits its block ids."""
    plan.require_fits(*call.fit_key)
    plan.require_capacity(call.capacity, call.capacity_text)
    if cu_seqlens_q is not None and cu_seqlens_q.device.type == "cpu":
        _require_tokens(plan, tokens_from_offsets(cu_seqlens_q, call.batch))


def _require_tokens(plan: AnyPlan, tokens: tuple[int, ...]) -> None:
    """Check the new tokens of every request against the plan's, where these are known."""
    for request, (want, have) in enumerate(zip(plan.tokens or (), tokens, strict=False)):
        if want != have:
            raise ScheduleError(
                f"cu_seqlens_q: request {request}: expected {want} new tokens, for which the plan "
                f"was made, got {have}"
            )


def _no_workspace(value: object) -> DtypeError:
    return DtypeError(f"workspace: expected a Workspace, got {type(value).__name__}")


def _check_block_ids(
    call: Call,
    plan: AnyPlan,
    block_table: torch.Tensor | None,
    kv_indptr: torch.Tensor | None,
    kv_indices: torch.Tensor | None,
) -> None:
    if call.index >= 0 and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "check_block_table: block ids cannot be read while a CUDA graph is captured; call once "
            "before with it"
        )
    lengths = (plan if isinstance(plan, Plan) else plan.to_host()).seq_lens
    if block_table is not None:
        require_block_table(block_table, lengths, call.block_size, call.num_blocks)
    elif kv_indptr is not None and kv_indices is not None:
        require_block_lists(kv_indptr, kv_indices, lengths, call.block_size, call.num_blocks)


def _refuse_gradients(q: TensorOrPair, kv_cache: TensorOrPair) -> None:
    for name, value in (("q", q), ("kv_cache", kv_cache)):
        learns = (
            any(p.requires_grad for p in value)
            if isinstance(value, tuple)
            else (value.requires_grad)
        )
        if learns:
            raise UnsupportedError(
                f"{name}: expected a tensor that requires no gradient: decode has none; call it "
                "under torch.no_grad() or torch.inference_mode(), or detach"
            )
