"""The raw launches, arguments in the order of the original kernel."""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import checks, interpreter, native
from .arguments import KernelArguments
from .errors import DeviceError, RangeError, UnsupportedError
from .queue_check import check_mates_run, check_words
from .words import CLUSTER_SIZES, LATENT_DIM, ROPE_DIM, queue_length

# Far above any honest wait (a launch takes milliseconds), far below a driver's watchdog.
DEFAULT_SPIN_TIMEOUT_NS = 2_000_000_000
MAX_SPIN_TIMEOUT_NS = 1 << 62

# What the raw launches call the fields of `KernelArguments`.
_RAW_NAMES = {
    "queue_state": "global_instruction_index",
    "q_nope": "q_v",
    "q_pe": "q_rot",
    "latent": "v",
    "rope": "k_rot",
    "block_ids": "table",
    "out": "o",
}


@dataclass(frozen=True)
class _CheckedQueue:
    """A queue on a GPU that was copied back and checked."""

    sizes: Hashable
    others: tuple[tuple[weakref.ref[torch.Tensor], int], ...]
    """Other tensors whose values counted, and their versions."""
    length: int
    """Instructions before the end mark."""


_CheckedQueues: TypeAlias = MutableMapping[torch.Tensor, _CheckedQueue]
_checked_queues: _CheckedQueues = WeakIdKeyDictionary()


def mla_decode(
    instructions: torch.Tensor,
    timings: torch.Tensor | None,
    global_instruction_index: torch.Tensor,
    q_rot: torch.Tensor,
    q_v: torch.Tensor,
    k_rot: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    o: torch.Tensor,
    o_scratch: torch.Tensor,
    lvec_scratch: torch.Tensor,
    completion_flag: torch.Tensor,
    softmax_scale: float,
    tic: int,
    lse: torch.Tensor | None = None,
    stream: torch.cuda.Stream | int | None = None,
    *,
    causal: bool = True,
    cu_seqlens_q: torch.Tensor | None = None,
    kv_indptr: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    lse_base: float = math.e,
    lse_empty: float = math.inf,
    check_queue: bool = True,
    num_ctas: int = 0,
    cluster_ctas: int = 1,
    spin_timeout_ns: int = DEFAULT_SPIN_TIMEOUT_NS,
) -> None:
    """Run a queue of instructions: one kernel on CUDA tensors, the interpreter on CPU tensors.

    ``B`` requests, ``s_q`` new tokens each (1 to 16) or as many as ``cu_seqlens_q`` says,
    ``H`` query heads (1 to 128), one KV head. Queries, cache and output are bf16 or fp16, all
    the same; all tensors lie on one device. Queries and cache may be strided views: last
    dimension contiguous, base address and outer strides multiples of 16 bytes, so the 512 and
    the 64 wide part may be two views of one ``[blocks, block_size, 576]`` cache. In the
    queries, requests, tokens and heads must be countable through as one dimension. ``lse``
    may have any strides, ``table`` any stride between requests; everything else is contiguous.

    Parameters
    ----------
    instructions : Tensor
        ``[n, 32]`` int32, in execution order; see `mla_decode.plan`.
    timings : Tensor or None
        ``[>= n, 8]`` int32, written: SM + 1 (0: not executed), then fetched, load begin and
        end, compute begin and end, store begin and end, each the low 32 bits of a
        nanosecond clock.
    global_instruction_index : Tensor
        ``[>= 32]`` int32, the state of the queue; zero it once, at creation. The launch
        advances it, so that a captured CUDA graph can be replayed for ever.
    q_rot, q_v : Tensor
        ``[B, s_q, H, 64]`` and ``[B, s_q, H, 512]``: queries against the rope part and
        against the latent part. With ``cu_seqlens_q``, ``[T, H, 64]`` and ``[T, H, 512]``.
    k_rot, v : Tensor
        ``[blocks, block_size, 64]`` and ``[blocks, block_size, 512]``: the paged cache, or
        with a dimension of size 1 before the last. Any block_size; multiples of 16 are the
        fast ones.
    table : Tensor
        ``[B, max_blocks]`` int32 block ids; entries past a request's last block are never
        read. With ``kv_indptr``, ``[n]``.
    o : Tensor
        ``[B, s_q, H, 512]``, or ``[T, H, 512]`` with ``cu_seqlens_q``; written.
    o_scratch, lvec_scratch, completion_flag : Tensor
        ``[slots, slot_rows, 512]`` fp32, ``[slots, slot_rows]`` fp32 and ``[slots]`` int32,
        written; slot count of the plan, ``slot_rows`` the (token, head) rows of a request,
        at most 64. With 32 or 16 the queue's row groups have so many rows, whatever a request
        has, otherwise 64 (`Plan.group_rows`). ``o_scratch`` and ``completion_flag`` are zeroed
        once, when ``global_instruction_index`` is, and used with that one only: what they hold
        tells which launch has written it.
    softmax_scale : float
        Multiplies the scores before the softmax.
    tic : int
        At least 0. The launch's epoch is that of the last one, in
        ``global_instruction_index``, plus 1, plus ``tic``; 0 will do always.
    lse : Tensor, optional
        ``[B, H, s_q]`` fp32, or ``[T, H]`` with ``cu_seqlens_q``; written: log of the sum of
        exponentials of the scaled scores.
    stream : torch.cuda.Stream or int, optional
        Where to enqueue; the current stream when None. Two streams need two workspaces.
    causal : bool
        Token ``t`` of a request sees the keys up to ``length - tokens + t``; all when False.
    cu_seqlens_q : Tensor, optional
        ``[B + 1]`` int32: request r has the tokens ``[cu_seqlens_q[r], cu_seqlens_q[r + 1])``,
        0 to 16 of them. ``T`` may exceed ``cu_seqlens_q[B]``; the rest is padding.
    kv_indptr : Tensor, optional
        ``[B + 1]`` int32: request r has the block ids
        ``table[kv_indptr[r] : kv_indptr[r + 1]]``.
    attn_sink : Tensor, optional
        ``[H]`` fp32: O is multiplied by ``exp(lse) / (exp(lse) + exp(attn_sink))``; the LSE
        stays as it is.
    lse_base : float
        ``math.e`` for natural logs, 2 for base 2.
    lse_empty : float
        LSE of a row that sees no key: inf or -inf.
    check_queue : bool
        Check the words against the tensors. For a CUDA queue this copies it to the host, and
        ``cu_seqlens_q`` and ``kv_indptr`` with it, which waits for the stream, once per
        tensors, versions and sizes. Pass False only for a queue that is known to be valid for
        these, for ``num_ctas`` and ``cluster_ctas``, with nothing behind its end mark.
    num_ctas : int
        CTAs to launch, or workers to interpret with; 0 means one per SM (1 on the CPU).
    cluster_ctas : int
        CTAs of a cluster, 1, 2, 4 or 8, a divisor of ``num_ctas``: as many as the largest group
        of mates in the queue has (`Plan.cluster_ctas`). CUDA only.
    spin_timeout_ns : int
        Nanoseconds after which a wait inside the kernel gives up. CUDA only.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, StrideError, AlignmentError, RangeError
        An argument is wrong; named with what was expected. Nothing was launched.
    QueueError
        A word of the queue is out of range.
    UnsupportedError
        More heads, KV heads or new tokens than supported, or no GPU that can run it.
    MegakernelTimeout
        An *earlier* launch on this device timed out; see `mla_decode.synchronize`.
    DeadlockError
        CPU only: an instruction waits for a flag that nothing will raise.
    """
    queries = ("B", "s_q", "H") if cu_seqlens_q is None else ("T", "H")
    _check_shapes(queries, q_rot, q_v, k_rot, v, o, lse)
    if cu_seqlens_q is None and kv_indptr is None:
        checks.require_tensor("table", table)
        checks.require_shape("table", table, [q_v.shape[0], "max_blocks"])
    arguments = KernelArguments(
        instructions=instructions,
        timings=timings,
        queue_state=global_instruction_index,
        q_nope=_merged("q_v", q_v),
        q_pe=_merged("q_rot", q_rot),
        latent=v if v.dim() == 4 else v.unsqueeze(2),
        rope=k_rot if k_rot.dim() == 4 else k_rot.unsqueeze(2),
        block_ids=table,
        kv_indptr=kv_indptr,
        cu_seqlens_q=cu_seqlens_q,
        s_q=1 if cu_seqlens_q is not None else int(q_v.shape[1]),
        out=_merged("o", o),
        lse=lse if lse is None or cu_seqlens_q is not None else lse.transpose(1, 2),
        attn_sink=attn_sink,
        o_scratch=o_scratch,
        lvec_scratch=lvec_scratch,
        completion_flag=completion_flag,
        softmax_scale=softmax_scale,
        tic=tic,
        causal=causal,
        lse_base=lse_base,
        lse_empty=lse_empty,
    )
    run_checked(
        arguments,
        stream,
        native.Grid(num_ctas, cluster_ctas),
        spin_timeout_ns,
        check_queue=check_queue,
        names=_RAW_NAMES,
    )


def mla_decode_8_heads(
    instructions: torch.Tensor,
    timings: torch.Tensor | None,
    global_instruction_index: torch.Tensor,
    q_rot: torch.Tensor,
    q_v: torch.Tensor,
    *arguments: Any,
    **options: Any,
) -> None:
    """`mla_decode` for exactly 8 query heads, of the same arguments.

    Raises
    ------
    UnsupportedError
        ``q_v`` has another number of heads. Everything else as `mla_decode`.
    """
    heads = checks.require_tensor("q_v", q_v).shape[-2:-1]
    if list(heads) != [8]:
        raise UnsupportedError(
            f"q_v: expected 8 heads, got shape {list(q_v.shape)}; mla_decode takes the others"
        )
    mla_decode(instructions, timings, global_instruction_index, q_rot, q_v, *arguments, **options)


def _check_shapes(
    queries: Sequence[str],
    q_rot: torch.Tensor,
    q_v: torch.Tensor,
    k_rot: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Check the shapes of what `mla_decode` reshapes, as its caller sees them."""
    given = {"q_v": q_v, "q_rot": q_rot, "v": v, "k_rot": k_rot, "o": o}
    for name, tensor in given.items():
        checks.require_tensor(name, tensor)
    checks.require_shape("q_v", q_v, [*queries, LATENT_DIM])
    checks.require_shape("q_rot", q_rot, [*q_v.shape[:-1], ROPE_DIM])
    checks.require_shape("o", o, list(q_v.shape))
    if v.dim() == 4 and v.shape[2] > 1:
        raise UnsupportedError(
            f"v: expected one KV head, got shape {list(v.shape)}; decode takes several"
        )
    head = [1] if v.dim() == 4 else []
    checks.require_shape("v", v, ["blocks", "block_size", *head, LATENT_DIM])
    checks.require_shape("k_rot", k_rot, [*v.shape[:-1], ROPE_DIM])
    if lse is not None:
        checks.require_tensor("lse", lse)
        batch_first = [q_v.shape[0], q_v.shape[2], q_v.shape[1]]
        checks.require_shape("lse", lse, batch_first if q_v.dim() == 4 else list(q_v.shape[:2]))


def _merged(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A view ``[tokens, heads, width]`` of queries or outputs."""
    if tensor.dim() == 3:
        return tensor
    checks.require_merged(name, tensor, 0)
    return tensor.flatten(0, 1)


def run_checked(
    arguments: KernelArguments,
    stream: torch.cuda.Stream | int | None,
    grid: native.Grid,
    spin_timeout_ns: int,
    *,
    check_queue: bool = True,
    names: Mapping[str, str] | None = None,
) -> None:
    """Check everything, then launch or interpret; see `mla_decode`.

    ``names`` are what the caller knows the fields as, for the messages.
    """
    arguments.check(names)
    checks.require_int("num_ctas", grid.num_ctas, 0, 1 << 16)
    checks.require_int("spin_timeout_ns", spin_timeout_ns, 1, MAX_SPIN_TIMEOUT_NS)
    device = arguments.device
    if device.type == "cpu":
        if stream is not None:
            raise DeviceError("stream: expected None for CPU tensors")
        if check_queue:
            check_words(arguments.instructions.numpy(), arguments.limits())
        interpreter.run(arguments, num_workers=max(grid.num_ctas, 1))
        return
    index = native.require(device)
    grid = require_grid(grid, device)
    handle = native.stream_handle(stream, device)
    # CTAs draw tickets: they would run what stands behind an end mark, so it is not launched.
    length = _check_device_queue(arguments, grid) if check_queue else None
    native.raise_pending(device)
    native.launch(arguments, handle, grid, spin_timeout_ns, index, length)


def require_grid(grid: native.Grid, device: torch.device) -> native.Grid:
    """Check that all CTAs of a launch run at the same time; returns it with their number.

    Raises
    ------
    RangeError
        There are more than SMs, or than are in clusters, or no such clusters.
    """
    # A CTA that is not resident would hold its first instruction back for ever.
    sms, (num_ctas, size) = native.num_sms(device), grid
    if num_ctas > sms:
        raise RangeError(f"num_ctas: expected at most {sms} (SMs of {device}), got {num_ctas}")
    if size == 1:
        return grid._replace(num_ctas=num_ctas or sms)
    if size not in CLUSTER_SIZES:
        raise RangeError(f"cluster_ctas: expected one of {(1, *CLUSTER_SIZES)}, got {size}")
    most = native.max_clusters(size, device) * size
    num_ctas = num_ctas or most
    if num_ctas > most or num_ctas % size:
        raise RangeError(
            f"num_ctas: expected a multiple of cluster_ctas, at most {most} (SMs of {device} in "
            f"clusters of {size}), got {num_ctas}"
        )
    return native.Grid(num_ctas, size)


def _check_device_queue(arguments: KernelArguments, grid: native.Grid) -> int:
    """Check the words, once per tensors, versions and sizes; return how many precede the end."""
    a = arguments
    sizes = (
        _version(a.instructions),
        a.num_sequences,
        a.num_heads,
        a.s_q,
        tuple(a.block_ids.shape),
        a.block_size,
        tuple(a.q_nope.shape),
        tuple(a.o_scratch.shape),
        grid,
    )
    others = [tensor for tensor in (a.cu_seqlens_q, a.kv_indptr) if tensor is not None]
    known = _checked_queues.get(a.instructions)
    if known is not None and known.sizes == sizes and _same_values(known, others):
        return known.length
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "instructions: a queue cannot be checked while a CUDA graph is captured; launch it "
            "once before, or pass check_queue=False"
        )
    words = a.instructions.cpu().numpy()
    check_words(words, a.limits())
    check_mates_run(words, *grid)
    length = queue_length(words)
    if all(not tensor.is_inference() for tensor in (a.instructions, *others)):
        references = tuple((weakref.ref(tensor), tensor._version) for tensor in others)
        _checked_queues[a.instructions] = _CheckedQueue(sizes, references, length)
    return length


def _version(tensor: torch.Tensor) -> int:
    """Rises when the tensor is written; what inference tensors do not count is -1."""
    return -1 if tensor.is_inference() else tensor._version


def _same_values(known: _CheckedQueue, others: list[torch.Tensor]) -> bool:
    return len(known.others) == len(others) and all(
        reference() is tensor and version == _version(tensor)
        for (reference, version), tensor in zip(known.others, others, strict=True)
    )
