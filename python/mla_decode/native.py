"""Access to the CUDA extension, which may be absent or unable to run here."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import checks
from .arguments import KernelArguments
from .errors import DeviceError, MegakernelTimeout, RangeError, UnsupportedError

_import_error = ""
try:
    from . import _kernels
except ImportError as error:
    _import_error = str(error)

if TYPE_CHECKING:
    from ._kernels import BoundDecode, DecodeLayout
    from .workspace import WorkspaceViews

REQUIRED_CAPABILITY = (9, 0)  # Hopper: wgmma exists nowhere else

# The tensors whose addresses `BoundDecode.enqueue` is given together, fields of `KernelArguments`.
ADDRESSES = (
    "q_nope",
    "q_pe",
    "latent",
    "rope",
    "block_ids",
    "kv_indptr",
    "cu_seqlens_q",
    "attn_sink",
)

_able: dict[torch.device, int] = {}  # index of each device that was found to be able
_layouts: dict[Hashable, DecodeLayout] = {}


def is_built() -> bool:
    """Whether the CUDA extension was built (it needs nvcc)."""
    return not _import_error


def missing(device: int = 0) -> str:
    """Why the CUDA kernels cannot run on a GPU; empty if they can."""
    if _import_error:
        return (
            "the CUDA kernels are not built (run make where nvcc is installed); "
            f"the scheduler and the interpreter work [{_import_error}]"
        )
    return _kernels.available(device)


def require(device: torch.device) -> int:
    """Check that ``device`` can run the kernels; returns its index.

    Raises
    ------
    UnsupportedError
        The extension is not built, or the machine or this GPU cannot run it.
    """
    if device in _able:
        return _able[device]
    if device.type != "cuda":
        raise DeviceError(f"device: expected cpu or cuda, got {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = missing(index)
    if reason:
        raise UnsupportedError(f"{device}: {reason}")
    capability = torch.cuda.get_device_capability(device)
    if capability != REQUIRED_CAPABILITY:
        raise UnsupportedError(
            f"{device}: expected a Hopper GPU (compute capability 9.0), got "
            f"{torch.cuda.get_device_name(device)} ({capability[0]}.{capability[1]})"
        )
    if device.index is not None:
        _able[device] = index
    return index


def num_sms(device: torch.device) -> int:
    """Number of SMs of a CUDA device."""
    return _num_sms(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _num_sms(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def max_clusters(cluster_ctas: int, device: torch.device) -> int:
    """Clusters of so many CTAs that a CUDA device runs at a time, one CTA per SM."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _max_clusters(cluster_ctas, index)


@cache
def _max_clusters(cluster_ctas: int, index: int) -> int:
    return int(_kernels.max_clusters(cluster_ctas, index))


class Queue(NamedTuple):
    """Instructions on a GPU."""

    instructions: int
    """Their address."""
    num_instructions: int
    is_constant: bool
    """No kernel writes them: a launch may read them while the kernels before it still run."""


class Grid(NamedTuple):
    """CTAs of a launch, 0 for one per SM, and how many make a cluster."""

    num_ctas: int = 0
    cluster_ctas: int = 1


def launch(
    arguments: KernelArguments,
    stream: int,
    grid: Grid,
    spin_timeout_ns: int,
    device: int,
    num_instructions: int | None = None,
) -> None:
    """Enqueue one kernel on the GPU ``device``. The arguments were checked.

    ``num_instructions`` are those to run, where the tensor holds more.
    """
    words = arguments.instructions
    bound = _kernels.BoundDecode(
        layout_of(arguments, device),
        instructions=words.data_ptr(),
        num_instructions=int(words.shape[0]) if num_instructions is None else num_instructions,
        instructions_are_constant=False,
        timings=address(arguments.timings),
        queue_state=arguments.queue_state.data_ptr(),
        o_scratch=arguments.o_scratch.data_ptr(),
        lvec_scratch=arguments.lvec_scratch.data_ptr(),
        completion_flag=arguments.completion_flag.data_ptr(),
        tic=arguments.tic,
        num_ctas=grid.num_ctas,
        cluster_ctas=grid.cluster_ctas,
        spin_timeout_ns=spin_timeout_ns,
    )
    tensors = tuple(address(getattr(arguments, name)) for name in ADDRESSES)
    out, lse = arguments.out.data_ptr(), address(arguments.lse)
    bound.enqueue(tensors, out, lse, stream)


def bind(
    layout: DecodeLayout,
    queue: Queue,
    views: WorkspaceViews,
    grid: Grid,
    spin_timeout_ns: int,
) -> BoundDecode:
    """A queue and its scratch, for launches of one layout."""
    return _kernels.BoundDecode(
        layout,
        instructions=queue.instructions,
        num_instructions=queue.num_instructions,
        instructions_are_constant=queue.is_constant,
        timings=0,
        queue_state=views.queue_state.data_ptr(),
        o_scratch=views.o_scratch.data_ptr(),
        lvec_scratch=views.lvec_scratch.data_ptr(),
        completion_flag=views.completion_flag.data_ptr(),
        tic=0,
        num_ctas=grid.num_ctas,
        cluster_ctas=grid.cluster_ctas,
        spin_timeout_ns=spin_timeout_ns,
    )


def layout_of(arguments: KernelArguments, device: int) -> DecodeLayout:
    """Sizes, strides and constants of a launch as the extension keeps them; made once."""
    blocks, block_size, num_kv_heads, _ = arguments.latent.shape
    table, lse = arguments.block_ids, arguments.lse
    options = {
        "fp16": arguments.q_nope.dtype == torch.float16,
        "num_heads": int(arguments.q_nope.shape[1]),
        "h_kv": int(num_kv_heads),
        "num_requests": _num_requests(arguments),
        "s_q": int(arguments.s_q),
        "total_tokens": int(arguments.q_nope.shape[0]) // int(num_kv_heads),
        "q_nope_row_stride": row_stride(arguments.q_nope),
        "q_pe_row_stride": row_stride(arguments.q_pe),
        "num_blocks": int(blocks),
        "block_size": int(block_size),
        "latent_strides": tuple(dense_strides(arguments.latent)[:3]),
        "rope_strides": tuple(dense_strides(arguments.rope)[:3]),
        "table_stride": int(dense_strides(table)[0]) if table.dim() == 2 else 0,
        "lse_strides": (0, 0, 0) if lse is None else (0, *lse.stride())[-3:],
        "slot_rows": int(arguments.o_scratch.shape[1]),
        "softmax_scale": float(arguments.softmax_scale),
        "causal": bool(arguments.causal),
        "lse_base2": arguments.lse_base == 2,
        "lse_empty": float(arguments.lse_empty),
        "device": device,
    }
    key = tuple(options.values())
    layout = _layouts.get(key)
    if layout is None:
        values: Any = options
        layout = checks.remember(_layouts, key, _kernels.DecodeLayout(**values))
    return layout


def _num_requests(arguments: KernelArguments) -> int:
    if arguments.kv_indptr is not None:
        return int(arguments.kv_indptr.shape[0]) - 1
    return int(arguments.block_ids.shape[0])


def _no_reader(*tensors: object) -> None:
    return None


def _tensor_reader() -> Callable[..., tuple[Hashable, tuple[int, ...]] | None]:
    try:
        return _kernels.TensorReader(torch.Tensor).read
    except RuntimeError:  # torch before 2.10
        return _no_reader


# Layouts and addresses of a call's tensors; None for what it cannot read. See `TensorReader.read`.
read_tensors = _no_reader if _import_error else _tensor_reader()


def address(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's data; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dense_strides(tensor: torch.Tensor) -> list[int]:
    """Strides in elements, those that mean nothing replaced by those of a dense tensor.

    The stride of a dimension of size 1 may be anything; the TMA still checks it.
    """
    strides = list(tensor.stride())
    dense = 1
    for dim in reversed(range(tensor.dim())):
        if tensor.shape[dim] == 1:
            strides[dim] = dense
        dense = max(dense, strides[dim] * tensor.shape[dim])
    return strides


def row_stride(tensor: torch.Tensor) -> int:
    """Elements from one row of ``[tokens, heads, width]`` to the next, which are mergeable."""
    tokens, heads, width = tensor.shape
    if heads > 1:
        return tensor.stride(1)
    return tensor.stride(0) if tokens > 1 else int(width)


def enqueue_plan(*arguments: Any) -> None:
    """Enqueue the planning kernel; arguments as `_kernels.plan`."""
    _kernels.plan(*arguments)


def _public_raw_stream(index: int) -> int:
    return int(torch.cuda.current_stream(index).cuda_stream)


# ``cudaStream_t`` of the current stream of a GPU, as an integer. A tenth of the time of the public
# way, which makes an object of the stream first.
current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", _public_raw_stream
)


def raise_pending(device: torch.device) -> None:
    """Raise what an earlier launch on ``device`` recorded, if anything."""
    if not _import_error and device.type == "cuda":
        raise_pending_on(torch.cuda.current_device() if device.index is None else device.index)


def raise_pending_on(index: int) -> None:
    """`raise_pending` for the GPU of that index; the extension is there."""
    record = _kernels.take_error(index)
    if record is None:
        return
    if record.get("kind") == "length":
        raise bad_length(int(record["request"]), int(record["expected"]), int(record["seen"]))
    raise MegakernelTimeout(dict(record))


def bad_length(request: int, limit: int, length: int) -> RangeError:
    """The error of a length that was clamped to what the plan allows."""
    return RangeError(
        f"seq_lens: request {request}: expected 0 to {limit}, got {length}; planned as "
        f"{min(max(length, 0), limit)}"
    )


def synchronize(device: torch.device | str | int | None = None) -> None:
    """Wait for all work on ``device`` and raise what the megakernel reported.

    Launches are asynchronous, so a wait that expired inside the kernel, or a length that the
    planner had to clamp, surfaces here or at the next launch on that device, whichever comes first.

    Parameters
    ----------
    device : device or None
        The current CUDA device when None. Does nothing for the CPU.

    Raises
    ------
    MegakernelTimeout
        A bounded wait expired; names SM, role, instruction and flag.
    RangeError
        A length on the GPU was negative or beyond its plan's limit; it was planned as the
        nearest one that is allowed.
    """
    if device is None:
        if not torch.cuda.is_available():
            return
        device = torch.cuda.current_device()
    chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if chosen.type != "cuda":
        return
    torch.cuda.synchronize(chosen)
    raise_pending(chosen)


def stream_handle(stream: torch.cuda.Stream | int | None, device: torch.device) -> int:
    """``cudaStream_t`` as an integer; the current stream when None."""
    if stream is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        return current_stream(index)
    if isinstance(stream, int) and not isinstance(stream, bool):
        if stream < 0:
            raise RangeError(f"stream: expected a cudaStream_t, got {stream}")
        return stream
    if isinstance(stream, torch.cuda.Stream):
        if stream.device != torch.device("cuda", require(device)):
            raise DeviceError(f"stream: expected one of {device}, got one of {stream.device}")
        return int(stream.cuda_stream)
    raise DeviceError(f"stream: expected a torch.cuda.Stream, got {type(stream).__name__}")
