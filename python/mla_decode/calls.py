"""What follows from the layouts of a decode call's tensors; found once for each layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import torch

from . import checks
from .arguments import KernelArguments, require_supported_block_size, require_supported_query
from .errors import DtypeError, RangeError, ShapeError, UnsupportedError
from .words import LATENT_DIM, ROPE_DIM
from .workspace import WorkspaceViews

if TYPE_CHECKING:
    from ._kernels import DecodeLayout
    from .device_plan import DevicePlan

TensorOrPair: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

DEFAULT_SOFTMAX_SCALE = float((LATENT_DIM + ROPE_DIM) ** -0.5)
LSE_LAYOUTS = ("bhs", "th")

_WIDTH = LATENT_DIM + ROPE_DIM


@dataclass(frozen=True)
class Options:
    """The numbers and switches of a call."""

    softmax_scale: float = DEFAULT_SOFTMAX_SCALE
    causal: bool = True
    lse_base: float = math.e
    lse_empty: float = math.inf
    lse_layout: str | None = None


@dataclass(frozen=True)
class Launch:
    """What a launch on the GPU is given beside the caller's tensors; the same for many calls."""

    binding: object
    """That of the plan; see `Plan.binding`."""
    views: WorkspaceViews
    spin_timeout_ns: int
    enqueue: Callable[[tuple[int, ...], int, int, int], None]
    """``BoundDecode.enqueue``"""


@dataclass
class Call:
    """Sizes of a call, how its outputs look, and how its tensors reach the kernel."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    s_q: int
    """New tokens of every request; 0 with ``cu_seqlens_q``."""
    total_tokens: int
    num_heads: int
    """All query heads."""
    num_kv_heads: int
    block_size: int
    num_blocks: int
    capacity: int
    """Keys of a request that its block ids can name."""
    capacity_text: str
    out_shape: tuple[int, ...]
    lse_layout: str
    lse_shape: tuple[int, ...]
    copies_q: bool
    """The tokens and heads of ``q`` cannot be counted through as one dimension."""
    names: dict[str, str]
    options: Options
    index: int = -1
    """Of the GPU; -1 on the CPU."""
    num_sms: int = 0
    layouts: dict[int, DecodeLayout] = field(default_factory=dict)
    """By rows of a scratch slot, once a call passed all checks; CUDA, one KV head."""
    launch: Launch | None = None
    """The last one."""
    device_plans: dict[Hashable, DevicePlan] = field(default_factory=dict)
    """Those that calls without a plan use, by stream and ``batch_invariant``."""

    def __post_init__(self) -> None:
        # Half the time of torch.empty, which an eager call would spend on little else.
        self._new_out = torch.empty(0, dtype=self.dtype, device=self.device).new_empty
        self._new_lse = torch.empty(0, dtype=torch.float32, device=self.device).new_empty
        self.fit_key = (
            self.batch,
            self.s_q,
            self.total_tokens,
            self.num_heads,
            self.num_kv_heads,
        )

    @property
    def heads_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    def outputs(
        self, out: torch.Tensor | None, lse: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The caller's outputs, or new ones."""
        if out is None:
            out = self._new_out(*self.out_shape)
        if lse is None:
            lse = self._new_lse(*self.lse_shape)
        return out, lse


@dataclass(frozen=True)
class Inputs:
    """The tensors that a caller hands over, apart from plan, outputs and workspace."""

    q: TensorOrPair
    kv_cache: TensorOrPair
    block_table: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    kv_indptr: torch.Tensor | None
    kv_indices: torch.Tensor | None
    attn_sink: torch.Tensor | None


def make_call(inputs: Inputs, options: Options) -> Call:
    """Check the tensors that the caller sees, by the caller's names, and size the call.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, RangeError, UnsupportedError
        Naming the argument, what was expected and what came.
    """
    _check_lse_options(options)
    q_nope, _ = _checked_q(inputs)
    blocks, block_size, num_kv_heads = _checked_cache(inputs.kv_cache)
    ragged = inputs.cu_seqlens_q is not None
    flat = q_nope.dim() == 3
    num_heads = int(q_nope.shape[-2])
    s_q = 0 if ragged else 1 if flat else int(q_nope.shape[1])
    if num_heads % num_kv_heads:
        raise ShapeError(
            f"q: expected a multiple of {num_kv_heads} heads, the KV heads of kv_cache, got "
            f"{num_heads}"
        )
    if s_q == 0 and not ragged:
        raise ShapeError(f"q: expected at least 1 new token, got shape {list(q_nope.shape)}")
    require_supported_query(num_heads // num_kv_heads, s_q or 1)
    require_supported_block_size("kv_cache", block_size)
    batch = _checked_requests(inputs, None if ragged else int(q_nope.shape[0]))
    total = int(q_nope.shape[0]) * (1 if flat else s_q)
    capacity, text = _capacity(inputs, blocks, block_size)
    lse_layout, lse_shape = _lse(options.lse_layout, flat, batch, s_q, total, num_heads)
    q, kv = inputs.q, inputs.kv_cache
    q_names = ("q[0]", "q[1]") if isinstance(q, tuple) else ("q", "q")
    kv_names = ("kv_cache[0]", "kv_cache[1]") if isinstance(kv, tuple) else ("kv_cache",) * 2
    ids = "block_table" if inputs.kv_indptr is None else "kv_indices"
    fields = ("q_nope", "q_pe", "latent", "rope", "block_ids")
    device = q_nope.device
    return Call(
        device=device,
        dtype=q_nope.dtype,
        batch=batch,
        s_q=s_q,
        total_tokens=total,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        block_size=block_size,
        num_blocks=blocks,
        capacity=capacity,
        capacity_text=text,
        out_shape=(*q_nope.shape[:-1], LATENT_DIM),
        lse_layout=lse_layout,
        lse_shape=lse_shape,
        copies_q=not all(map(_is_mergeable, q if isinstance(q, tuple) else (q,))),
        names=dict(zip(fields, (*q_names, *kv_names, ids), strict=True)),
        options=options,
    )


def kernel_arguments(
    call: Call,
    inputs: Inputs,
    instructions: torch.Tensor,
    views: WorkspaceViews,
    out: torch.Tensor,
    lse: torch.Tensor,
    timings: torch.Tensor | None,
) -> KernelArguments:
    """The launch's arguments; out and lse are written where ``call`` has one KV head.

    With more, they are fresh tensors in the kernel's order: see `write_back`.
    """
    checks.require_shape("out", checks.require_tensor("out", out), list(call.out_shape))
    checks.require_shape("lse", checks.require_tensor("lse", lse), list(call.lse_shape))
    heads, one = call.heads_per_kv, call.num_kv_heads == 1
    rows = call.num_kv_heads * call.total_tokens
    q = dense(inputs.q) if call.copies_q else inputs.q
    q_nope, q_pe = (_by_kv_head(call, part) for part in split(q))
    kernel_lse: torch.Tensor
    if one:
        checks.require_dense("out", out, checks.TMA_BYTES)
        kernel_out = out.view(rows, heads, LATENT_DIM)
        kernel_lse = lse.transpose(1, 2) if call.lse_layout == "bhs" else lse
    else:
        kernel_out = torch.empty(rows, heads, LATENT_DIM, dtype=out.dtype, device=out.device)
        kernel_lse = torch.empty(rows, heads, dtype=torch.float32, device=lse.device)
        checks.require_dtype("out", out, call.dtype)
        checks.require_dtype("lse", lse, torch.float32)
        checks.require_no_overlap("out", out)
        checks.require_no_overlap("lse", lse)
    latent, rope = (
        part if part.dim() == 4 else part.unsqueeze(2) for part in split(inputs.kv_cache)
    )
    ids = inputs.block_table if inputs.kv_indptr is None else inputs.kv_indices
    assert ids is not None, "checked by make_call"
    return KernelArguments(
        instructions=instructions,
        timings=timings,
        queue_state=views.queue_state,
        q_nope=q_nope,
        q_pe=q_pe,
        latent=latent,
        rope=rope,
        block_ids=ids,
        kv_indptr=inputs.kv_indptr,
        cu_seqlens_q=inputs.cu_seqlens_q,
        s_q=call.s_q or 1,
        out=kernel_out,
        lse=kernel_lse,
        attn_sink=inputs.attn_sink,
        o_scratch=views.o_scratch,
        lvec_scratch=views.lvec_scratch,
        completion_flag=views.completion_flag,
        softmax_scale=call.options.softmax_scale,
        tic=0,
        causal=call.options.causal,
        lse_base=call.options.lse_base,
        lse_empty=call.options.lse_empty,
    )


def check(call: Call, arguments: KernelArguments) -> None:
    """Check everything but values, by the caller's names.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, StrideError, AlignmentError, RangeError, UnsupportedError
        Naming the argument, what was expected and what came.
    """
    if call.total_tokens == 0:  # which is no launch; all else is checked as for one token
        arguments = _with_one_token(arguments)
    arguments.check(call.names)


def _with_one_token(arguments: KernelArguments) -> KernelArguments:
    """The same with new queries and outputs, of one token."""

    def like(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(arguments.h_kv, *tensor.shape[1:])

    return replace(
        arguments,
        q_nope=like(arguments.q_nope),
        q_pe=like(arguments.q_pe),
        out=like(arguments.out),
        lse=None if arguments.lse is None else like(arguments.lse),
    )


def write_back(
    call: Call, arguments: KernelArguments, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Put what the kernel wrote by KV head where the caller wants it; one KV head: nothing."""
    if call.num_kv_heads == 1 or arguments.lse is None:
        return
    shape = (call.num_kv_heads, call.total_tokens, call.heads_per_kv)
    by_token = arguments.out.view(*shape, LATENT_DIM).transpose(0, 1)
    out.copy_(by_token.reshape(call.out_shape))
    lses = arguments.lse.view(shape).transpose(0, 1).reshape(call.total_tokens, call.num_heads)
    if call.lse_layout == "bhs":
        lses = lses.view(call.batch, call.s_q, call.num_heads).transpose(1, 2)
    lse.copy_(lses)


def split(value: TensorOrPair) -> tuple[torch.Tensor, torch.Tensor]:
    """The 512 wide and the 64 wide part of a tensor or a pair."""
    if isinstance(value, tuple):
        return value
    return value[..., :LATENT_DIM], value[..., LATENT_DIM:]


def dense(value: TensorOrPair) -> TensorOrPair:
    """A contiguous copy of a tensor or a pair."""
    if isinstance(value, tuple):
        return value[0].contiguous(), value[1].contiguous()
    return value.contiguous()


def _by_kv_head(call: Call, part: torch.Tensor) -> torch.Tensor:
    """``[h_kv * T, G, width]`` of a part of q; a copy with several KV heads."""
    tokens, heads, kv_heads = call.total_tokens, call.heads_per_kv, call.num_kv_heads
    width = part.shape[-1]
    if kv_heads == 1:
        return part if part.dim() == 3 else part.flatten(0, 1)
    grouped = part.reshape(tokens, kv_heads, heads, width).transpose(0, 1)
    return grouped.reshape(kv_heads * tokens, heads, width)


def _is_mergeable(part: torch.Tensor) -> bool:
    """Whether all dimensions but the last can be counted through as one."""
    stride = None
    for dim in reversed(range(part.dim() - 1)):
        if part.shape[dim] == 1:
            continue
        if stride is not None and part.stride(dim) != stride:
            return False
        stride = part.stride(dim) * part.shape[dim]
    return True


def _check_lse_options(options: Options) -> None:
    """Check the types of what is looked up; the numbers are checked with the tensors."""
    for name in ("lse_base", "lse_empty"):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, float | int):
            raise DtypeError(f"{name}: expected a float, got {type(value).__name__}")
    order = options.lse_layout
    if order is not None and not isinstance(order, str):
        raise DtypeError(f"lse_layout: expected a str or None, got {type(order).__name__}")


def _checked_q(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    q = inputs.q
    first = checks.require_tensor("q[0]" if isinstance(q, tuple) else "q", _first("q", q))
    if inputs.cu_seqlens_q is not None or first.dim() == 3:
        leading: list[int | str] = ["T", "H"]
    else:
        leading = ["B", "s_q", "H"]
    _check_widths("q", q, leading)
    q_nope, q_pe = split(q)
    checks.require_device("q", q_pe, q_nope.device)
    checks.require_dtype("q", q_pe, q_nope.dtype)
    if q_nope.dtype not in (torch.bfloat16, torch.float16):
        raise DtypeError(f"q: expected torch.bfloat16 or torch.float16, got {q_nope.dtype}")
    if q_nope.shape[-2] == 0:
        raise ShapeError(f"q: expected at least 1 head, got shape {list(q_nope.shape)}")
    return q_nope, q_pe


def _checked_cache(kv_cache: TensorOrPair) -> tuple[int, int, int]:
    """Blocks, block size and KV heads."""
    first = checks.require_tensor(
        "kv_cache[0]" if isinstance(kv_cache, tuple) else "kv_cache", _first("kv_cache", kv_cache)
    )
    leading: list[int | str] = ["num_blocks", "block_size"]
    if first.dim() == 4:
        leading.append("h_kv")
    if isinstance(kv_cache, tuple) and len(kv_cache) == 2:
        second = checks.require_tensor("kv_cache[1]", kv_cache[1])
        if first.dim() != second.dim():
            raise ShapeError(
                f"kv_cache[1]: expected as many dimensions as kv_cache[0] has, got shapes "
                f"{list(first.shape)} and {list(second.shape)}"
            )
    _check_widths("kv_cache", kv_cache, leading)
    kv_heads = int(first.shape[2]) if first.dim() == 4 else 1
    if kv_heads < 1:
        raise ShapeError(f"kv_cache: expected at least 1 KV head, got shape {list(first.shape)}")
    return int(first.shape[0]), int(first.shape[1]), kv_heads


def _first(name: str, value: object) -> object:
    if not isinstance(value, tuple):
        return value
    if len(value) != 2:
        raise ShapeError(f"{name}: expected a tensor or a pair, got a tuple of {len(value)}")
    return value[0]


def _check_widths(name: str, value: TensorOrPair, leading: list[int | str]) -> None:
    """Check a tensor 576 wide, or a pair of one 512 wide and one 64 wide."""
    if not isinstance(value, tuple):
        checks.require_shape(name, value, [*leading, _WIDTH])
        return
    wide = checks.require_tensor(f"{name}[0]", value[0])
    narrow = checks.require_tensor(f"{name}[1]", value[1])
    checks.require_shape(f"{name}[0]", wide, [*leading, LATENT_DIM])
    checks.require_shape(f"{name}[1]", narrow, [*wide.shape[:-1], ROPE_DIM])


def _checked_requests(inputs: Inputs, rows: int | None) -> int:
    """Number of requests, which all arguments agree on; ``rows`` are those of q."""
    batch = rows
    for name, offsets in (
        ("cu_seqlens_q", inputs.cu_seqlens_q),
        ("kv_indptr", inputs.kv_indptr),
    ):
        if offsets is None:
            continue
        tensor = checks.require_tensor(name, offsets)
        checks.require_dtype(name, tensor, torch.int32)
        if batch is None:
            checks.require_shape(name, tensor, ["B + 1"])
            batch = int(tensor.shape[0]) - 1
        checks.require_shape(name, tensor, [batch + 1])
    assert batch is not None, "either q is uniform or there is cu_seqlens_q"
    if (inputs.kv_indptr is None) != (inputs.kv_indices is None):
        given = "kv_indices" if inputs.kv_indptr is None else "kv_indptr"
        raise DtypeError(f"{given}: expected kv_indptr and kv_indices together")
    if inputs.kv_indptr is None:
        table = checks.require_tensor("block_table", inputs.block_table)
        checks.require_dtype("block_table", table, torch.int32)
        checks.require_shape("block_table", table, [batch, "max_blocks"])
    elif inputs.block_table is not None:
        raise DtypeError("block_table: expected None with kv_indptr and kv_indices")
    if batch < 1:
        raise ShapeError("q: expected at least 1 request, got 0")
    return batch


def _capacity(inputs: Inputs, num_blocks: int, block_size: int) -> tuple[int, str]:
    """Keys that the block ids of a request can name at most, and in words why."""
    if inputs.block_table is not None:
        blocks, where = int(inputs.block_table.shape[1]), "block_table"
    else:
        blocks, where = num_blocks, "kv_cache"
    text = f"{blocks} blocks of {block_size} tokens in {where}"
    return blocks * block_size, text


def _lse(
    wanted: str | None, flat: bool, batch: int, s_q: int, total: int, heads: int
) -> tuple[str, tuple[int, ...]]:
    """Order of the dimensions of lse, and its shape."""
    order = ("th" if flat else "bhs") if wanted is None else wanted
    if order not in LSE_LAYOUTS:
        raise RangeError(f"lse_layout: expected one of {LSE_LAYOUTS}, got {wanted!r}")
    if order == "th":
        return order, (total, heads)
    if s_q == 0:
        raise UnsupportedError("lse_layout: expected 'th' with cu_seqlens_q, got 'bhs'")
    return order, (batch, heads, s_q)
