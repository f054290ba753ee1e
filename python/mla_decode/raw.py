"""The raw launches, arguments in the order of the original kernel."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TypeAlias

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import checks, interpreter, native
from .arguments import KernelArguments
from .errors import DeviceError, RangeError, UnsupportedError
from .queue_check import QueueLimits, check_words
from .words import INSTRUCTION_WORDS, queue_length

# Far above any honest wait (a launch takes milliseconds), far below a driver's watchdog.
DEFAULT_SPIN_TIMEOUT_NS = 2_000_000_000

# Queues on a GPU that were copied back and checked: ((tensor version, limits), length) by tensor.
_CheckedQueues: TypeAlias = MutableMapping[torch.Tensor, tuple[tuple[int, QueueLimits], int]]
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
    check_queue: bool = True,
    num_ctas: int = 0,
    spin_timeout_ns: int = DEFAULT_SPIN_TIMEOUT_NS,
) -> None:
    """Run a queue of instructions: one kernel on CUDA tensors, the interpreter on CPU tensors.

    ``B`` requests, ``s_q`` new tokens each (1 to 4), ``H`` query heads (8, 16, 32, 64 or
    128). All tensors on one device. Queries and cache may be strided views: last dimension
    contiguous, base address and outer strides multiples of 16 bytes, so the 512 and the 64
    wide part may be two views of one ``[blocks, block_size, 576]`` cache. In the queries,
    tokens and heads must be countable through as one dimension. ``lse`` may have any
    strides, ``table`` any stride between requests; everything else is contiguous.

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
        ``[B, s_q, H, 64]`` and ``[B, s_q, H, 512]`` bf16: queries against the rope part and
        against the latent part.
    k_rot, v : Tensor
        ``[blocks, block_size, 64]`` and ``[blocks, block_size, 512]`` bf16: the paged cache;
        block_size 64, 128 or 256.
    table : Tensor
        ``[B, max_blocks]`` int32 block ids; entries past a request's last block are never
        read.
    o : Tensor
        ``[B, s_q, H, 512]`` bf16, written.
    o_scratch, lvec_scratch, completion_flag : Tensor
        ``[slots, s_q, H, 512]`` fp32, ``[slots, s_q, H]`` fp32 and ``[slots, s_q]`` int32,
        written; slot count of the plan. ``completion_flag`` is zeroed once, at creation.
    softmax_scale : float
        Multiplies the scores before the softmax.
    tic : int
        At least 0. The launch's epoch is that of the last one, in
        ``global_instruction_index``, plus 1, plus ``tic``; 0 will do always.
    lse : Tensor, optional
        ``[B, H, s_q]`` fp32, written: natural log of the sum of exponentials of the scaled
        scores; +inf for a row that sees no key.
    stream : torch.cuda.Stream or int, optional
        Where to enqueue; the current stream when None. Two streams need two workspaces.
    check_queue : bool
        Check the words against the tensors. For a CUDA queue this copies it to the host,
        which waits for the stream, once per tensor, version and sizes. Pass False only for a
        queue that is known to be valid for these sizes, with nothing behind its end mark.
    num_ctas : int
        CTAs to launch, or workers to interpret with; 0 means one per SM (1 on the CPU).
    spin_timeout_ns : int
        Nanoseconds after which a wait inside the kernel gives up. CUDA only.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, StrideError, AlignmentError, RangeError
        An argument is wrong; named with what was expected. Nothing was launched.
    QueueError
        A word of the queue is out of range.
    UnsupportedError
        Head count, new tokens or block size not supported, or no GPU that can run it.
    MegakernelTimeout
        An *earlier* launch on this device timed out; see `mla_decode.synchronize`.
    DeadlockError
        CPU only: an instruction waits for a flag that nothing will raise.
    """
    arguments = KernelArguments(
        instructions,
        timings,
        global_instruction_index,
        q_rot,
        q_v,
        k_rot,
        v,
        table,
        o,
        o_scratch,
        lvec_scratch,
        completion_flag,
        softmax_scale,
        tic,
        lse,
    )
    run_checked(arguments, stream, num_ctas, spin_timeout_ns, check_queue=check_queue)


def mla_decode_8_heads(
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
    check_queue: bool = True,
    num_ctas: int = 0,
    spin_timeout_ns: int = DEFAULT_SPIN_TIMEOUT_NS,
) -> None:
    """`mla_decode` for exactly 8 query heads.

    Raises
    ------
    UnsupportedError
        ``q_v`` has another number of heads. Everything else as `mla_decode`.
    """
    heads = checks.require_tensor("q_v", q_v).shape[2:3]
    if list(heads) != [8]:
        raise UnsupportedError(
            f"q_v: expected 8 heads, got shape {list(q_v.shape)}; mla_decode takes the others"
        )
    mla_decode(
        instructions,
        timings,
        global_instruction_index,
        q_rot,
        q_v,
        k_rot,
        v,
        table,
        o,
        o_scratch,
        lvec_scratch,
        completion_flag,
        softmax_scale,
        tic,
        lse,
        stream,
        check_queue=check_queue,
        num_ctas=num_ctas,
        spin_timeout_ns=spin_timeout_ns,
    )


def run_checked(
    arguments: KernelArguments,
    stream: torch.cuda.Stream | int | None,
    num_ctas: int,
    spin_timeout_ns: int,
    *,
    check_queue: bool = True,
) -> None:
    """Check everything, then launch or interpret; see `mla_decode`."""
    geometries = arguments.check()
    checks.require_int("num_ctas", num_ctas, 0, 1 << 16)
    checks.require_int("spin_timeout_ns", spin_timeout_ns, 1, 1 << 62)
    device = arguments.device
    if device.type == "cpu":
        if stream is not None:
            raise DeviceError("stream: expected None for CPU tensors")
        if check_queue:
            check_words(arguments.instructions.numpy(), arguments.limits())
        interpreter.run(arguments, num_workers=max(num_ctas, 1))
        return
    index = native.require(device)
    if num_ctas > native.num_sms(device):
        # A CTA that is not resident would hold its first instruction back for ever.
        sms = native.num_sms(device)
        raise RangeError(f"num_ctas: expected at most {sms} (SMs of {device}), got {num_ctas}")
    handle = native.stream_handle(stream, device)
    if check_queue:
        # CTAs draw tickets: they would run what stands behind an end mark, so it is not launched.
        length = _check_device_queue(arguments.instructions, arguments.limits())
        geometries = (([length, INSTRUCTION_WORDS], [INSTRUCTION_WORDS, 1]), *geometries[1:])
    native.raise_pending(device)
    native.launch(arguments, geometries, handle, num_ctas, spin_timeout_ns, index)


def _check_device_queue(instructions: torch.Tensor, limits: QueueLimits) -> int:
    """Check the words, once per tensor, version and sizes; return how many come before the end."""
    key = (instructions._version, limits)
    known = _checked_queues.get(instructions)
    if known is not None and known[0] == key:
        return known[1]
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "instructions: a queue cannot be checked while a CUDA graph is captured; launch it "
            "once before, or pass check_queue=False"
        )
    words = instructions.cpu().numpy()
    check_words(words, limits)
    length = queue_length(words)
    _checked_queues[instructions] = (key, length)
    return length
