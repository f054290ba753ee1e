"""The decode op: attention of a batch of requests over their paged latent caches."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch

from . import checks, interpreter, native, raw
from .arguments import (
    KernelArguments,
    require_supported_block_size,
    require_supported_query,
)
from .errors import DtypeError, RangeError, ShapeError, UnsupportedError
from .lengths import SeqLens, host_seq_lens
from .planning import Plan, PlanCache
from .queue_check import check_words
from .words import LATENT_DIM, ROPE_DIM
from .workspace import Workspace, cached_workspace

TensorOrPair: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

DEFAULT_SOFTMAX_SCALE = float((LATENT_DIM + ROPE_DIM) ** -0.5)

_plans = PlanCache()

# Layouts of queries, cache and block table that passed `_check_inputs`.
_passed: dict[Hashable, None] = {}


def decode(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: torch.Tensor,
    seq_lens: SeqLens,
    plan: Plan | None = None,
    softmax_scale: float | None = None,
    *,
    causal: bool = True,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    timings: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    check_block_table: bool = False,
    check_seq_lens: bool = False,
    stream: torch.cuda.Stream | int | None = None,
    spin_timeout_ns: int = raw.DEFAULT_SPIN_TIMEOUT_NS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA decode: the megakernel on CUDA tensors, the interpreter on CPU tensors.

    Every query head attends to one latent KV head of width 576 = 512 + 64, whose first 512
    columns are the values too (DeepSeek-V2/V3 after absorbing W_UK into q).

    Parameters
    ----------
    q : Tensor or (Tensor, Tensor)
        ``[B, s_q, H, 576]`` bf16, or (q_nope ``[.., 512]``, q_pe ``[.., 64]``). ``s_q`` 1 to
        4 new tokens per request; ``H`` 8, 16, 32, 64 or 128.
    kv_cache : Tensor or (Tensor, Tensor)
        ``[num_blocks, block_size, 576]`` or ``[num_blocks, block_size, 1, 576]`` bf16, or
        (latent ``[.., 512]``, rope ``[.., 64]``). ``block_size`` 64, 128 or 256. Blocks may
        have a stride of their own; only the last dimension must be contiguous.
    block_table : Tensor
        ``[B, max_blocks]`` int32. Entries past a request's last block are never read.
    seq_lens : Tensor, ndarray or list of int
        ``[B]`` KV length of every request, new tokens included, at least 1.
    plan : Plan, optional
        Made by `mla_decode.plan` for these lengths. When None one is made, and kept for the
        next call with the same lengths; lengths on the GPU are then copied to the host, so
        pass a plan to stay asynchronous or to capture a CUDA graph.
    softmax_scale : float, optional
        Multiplies the scores. ``576 ** -0.5`` when None, as FlashMLA; absorbed DeepSeek-V3
        uses ``192 ** -0.5`` (times its YaRN factor), so engines pass it.
    causal : bool
        Query token ``t`` sees the keys up to ``seq_len - s_q + t``. False only with
        ``s_q`` 1, where it is the same.
    out, lse : Tensor, optional
        Where to write, of the shapes returned.
    timings : Tensor, optional
        ``[num_instructions, 8]`` int32, see `mla_decode.mla_decode`; selects the slower
        kernel that records them.
    workspace : Workspace, optional
        Scratch of the caller's own; by default one per device and stream, kept.
    check_block_table : bool
        Check the block ids inside each request's length (waits for the GPU).
    check_seq_lens : bool
        Check lengths on the GPU against the plan (waits for the GPU). Those on the CPU are
        always checked.
    stream : torch.cuda.Stream or int, optional
        Where to enqueue; the current stream when None.
    spin_timeout_ns : int
        Nanoseconds after which a wait inside the kernel gives up. CUDA only.

    Returns
    -------
    out : Tensor
        ``[B, s_q, H, 512]`` bf16.
    lse : Tensor
        ``[B, H, s_q]`` fp32, natural log of the sum of exponentials of the scaled scores;
        +inf for a query token that sees no key (``seq_len < s_q``), whose output is 0.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, StrideError, AlignmentError, RangeError
        An argument is wrong; named with what was expected. Nothing was launched.
    ScheduleError
        The plan was made for another batch.
    UnsupportedError
        Sizes that the kernels do not support, or no GPU that can run them.
    MegakernelTimeout
        An *earlier* launch on this device timed out; see `mla_decode.synchronize`.
    """
    call = _prepare(q, kv_cache, block_table, seq_lens, plan, check_seq_lens)
    if not causal and call.new_tokens > 1:
        raise UnsupportedError(
            f"causal: expected True with {call.new_tokens} new tokens; False only with 1"
        )
    if check_block_table:
        require_block_table(block_table, call.plan.seq_lens, call.block_size, call.num_blocks)
    device = call.q_v.device
    handle = 0
    if device.type == "cuda":
        native.require(device)
        handle = native.stream_handle(stream, device)
    out, lse = _outputs(call, out, lse)
    if workspace is None:
        workspace = cached_workspace(device, handle)
    arguments = _arguments(call, workspace, block_table, softmax_scale, out, lse, timings)
    num_ctas = 0
    if device.type == "cuda":
        num_ctas = min(call.plan.num_workers, native.num_sms(device))
        stream = handle
    raw.run_checked(arguments, stream, num_ctas, spin_timeout_ns)
    return out, lse


def interpret(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: torch.Tensor,
    seq_lens: SeqLens,
    plan: Plan | None = None,
    softmax_scale: float | None = None,
    *,
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
    call = _prepare(q, kv_cache, block_table, seq_lens, plan, check_seq_lens=True)
    if workspace is None:
        workspace = call.plan.workspace("cpu")
        workspace.poison()
    out, lse = _outputs(call, None, None)
    arguments = _arguments(call, workspace, block_table, softmax_scale, out, lse, timings)
    arguments.check()
    check_words(arguments.instructions.numpy(), arguments.limits())
    interpreter.run(arguments, num_workers=num_workers, seed=seed)
    return out, lse


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


@dataclass(frozen=True)
class _Call:
    """A call's tensors, split as the kernel takes them, and its plan."""

    q_v: torch.Tensor
    q_rot: torch.Tensor
    v: torch.Tensor
    k_rot: torch.Tensor
    plan: Plan

    @property
    def new_tokens(self) -> int:
        return int(self.q_v.shape[1])

    @property
    def block_size(self) -> int:
        return int(self.v.shape[1])

    @property
    def num_blocks(self) -> int:
        return int(self.v.shape[0])


def _prepare(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: torch.Tensor,
    seq_lens: SeqLens,
    plan: Plan | None,
    check_seq_lens: bool,
) -> _Call:
    layouts = (_layouts(q), _layouts(kv_cache), checks.layout(block_table))
    if layouts not in _passed:
        _check_inputs(q, kv_cache, block_table)
        checks.remember(_passed, layouts, None)
    q_v, q_rot = _split(q)
    v, k_rot = _split(_without_head(kv_cache))
    batch, new_tokens, num_heads, _ = q_v.shape

    if plan is not None and not isinstance(plan, Plan):
        raise DtypeError(f"plan: expected a mla_decode.Plan, got {type(plan).__name__}")
    on_gpu = isinstance(seq_lens, torch.Tensor) and seq_lens.is_cuda
    if plan is None or not on_gpu or check_seq_lens:
        lengths = host_seq_lens(seq_lens, None if plan is None else plan.seq_lens)
        if lengths.size != batch:
            raise ShapeError(f"seq_lens: expected shape [{batch}] as q, got [{lengths.size}]")
        if plan is not None:
            plan.require_seq_lens(lengths)
    if plan is None:
        plan = _plans.get(lengths, num_heads, new_tokens, None, q_v.device)
    plan.require_fits(batch, new_tokens, num_heads)
    plan.require_capacity(block_table.shape[1], v.shape[1])
    return _Call(q_v, q_rot, v, k_rot, plan)


def _layouts(value: TensorOrPair) -> Hashable:
    return tuple(map(checks.layout, value)) if isinstance(value, tuple) else checks.layout(value)


def _check_inputs(q: TensorOrPair, kv_cache: TensorOrPair, block_table: torch.Tensor) -> None:
    """Check the tensors that the caller sees, by the names that the caller gave them."""
    _check_widths("q", q, ["B", "s_q", "H"])
    _check_cache_dims(kv_cache)
    _check_widths("kv_cache", _without_head(kv_cache), ["num_blocks", "block_size"])
    table = checks.require_tensor("block_table", block_table)
    q_v, _ = _split(q)
    v, _ = _split(_without_head(kv_cache))
    batch, new_tokens, num_heads, _ = q_v.shape
    require_supported_query(num_heads, new_tokens)
    require_supported_block_size("kv_cache", int(v.shape[1]))
    checks.require_dtype("q", q_v, torch.bfloat16)
    checks.require_dtype("kv_cache", v, torch.bfloat16)
    checks.require_dtype("block_table", table, torch.int32)
    checks.require_device("kv_cache", v, q_v.device)
    checks.require_device("block_table", table, q_v.device)
    checks.require_shape("block_table", table, [batch, "max_blocks"])


def _check_widths(name: str, value: TensorOrPair, leading: list[int | str]) -> None:
    """Check a tensor 576 wide, or a pair of one 512 wide and one 64 wide."""
    if not isinstance(value, tuple):
        tensor = checks.require_tensor(name, value)
        checks.require_shape(name, tensor, [*leading, LATENT_DIM + ROPE_DIM])
        return
    if len(value) != 2:
        raise ShapeError(f"{name}: expected a tensor or a pair, got a tuple of {len(value)}")
    wide = checks.require_tensor(f"{name}[0]", value[0])
    narrow = checks.require_tensor(f"{name}[1]", value[1])
    checks.require_shape(f"{name}[0]", wide, [*leading, LATENT_DIM])
    checks.require_shape(f"{name}[1]", narrow, [*wide.shape[:-1], ROPE_DIM])


def _check_cache_dims(kv_cache: TensorOrPair) -> None:
    """Check that a fourth dimension of the cache is that of a single KV head."""
    pair = isinstance(kv_cache, tuple)
    for i, part in enumerate(kv_cache if isinstance(kv_cache, tuple) else (kv_cache,)):
        name = f"kv_cache[{i}]" if pair else "kv_cache"
        tensor = checks.require_tensor(name, part)
        if tensor.dim() == 4:
            checks.require_shape(name, tensor, ["num_blocks", "block_size", 1, tensor.shape[3]])


def _split(value: TensorOrPair) -> tuple[torch.Tensor, torch.Tensor]:
    """The 512 wide and the 64 wide part of a tensor or a pair."""
    if isinstance(value, tuple):
        return value
    return value[..., :LATENT_DIM], value[..., LATENT_DIM:]


def _without_head(kv_cache: TensorOrPair) -> TensorOrPair:
    """The cache without the dimension of its single KV head."""

    def squeeze(part: torch.Tensor) -> torch.Tensor:
        return part.squeeze(2) if part.dim() == 4 else part

    if isinstance(kv_cache, tuple):
        return cast(TensorOrPair, tuple(map(squeeze, kv_cache)))
    return squeeze(kv_cache)


def _outputs(
    call: _Call, out: torch.Tensor | None, lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, new_tokens, heads, _ = call.q_v.shape
    device = call.q_v.device
    if out is None:
        out = torch.empty(call.q_v.shape, dtype=torch.bfloat16, device=device)
    if lse is None:
        lse = torch.empty((batch, heads, new_tokens), dtype=torch.float32, device=device)
    checks.require_shape("out", checks.require_tensor("out", out), list(call.q_v.shape))
    return out, lse


def _arguments(
    call: _Call,
    workspace: Workspace,
    block_table: torch.Tensor,
    softmax_scale: float | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    timings: torch.Tensor | None,
) -> KernelArguments:
    workspace.require_device(call.q_v.device)
    plan = call.plan
    views = workspace.views(plan.num_slots, plan.new_tokens, plan.num_heads)
    return KernelArguments(
        instructions=plan.to(call.q_v.device),
        timings=timings,
        global_instruction_index=views.queue_state,
        q_rot=call.q_rot,
        q_v=call.q_v,
        k_rot=call.k_rot,
        v=call.v,
        table=block_table,
        o=out,
        o_scratch=views.o_scratch,
        lvec_scratch=views.lvec_scratch,
        completion_flag=views.completion_flag,
        softmax_scale=DEFAULT_SOFTMAX_SCALE if softmax_scale is None else softmax_scale,
        tic=0,
        lse=lse,
    )
