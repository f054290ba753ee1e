"""Access to the CUDA extension, which may be absent or unable to run here."""

from __future__ import annotations

import torch

from .arguments import KernelArguments
from .errors import DeviceError, MegakernelTimeout, RangeError, UnsupportedError

_import_error = ""
try:
    from . import _kernels
except ImportError as error:
    _import_error = str(error)

REQUIRED_CAPABILITY = (9, 0)  # Hopper: wgmma exists nowhere else


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
    return index


def num_sms(device: torch.device) -> int:
    """Number of SMs of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def tensor_ref(tensor: torch.Tensor) -> tuple[int, list[int], list[int]]:
    """Pointer, sizes and strides (in elements) as the extension takes them.

    The stride of a dimension of size 1 means nothing to torch and may be anything;
    the TMA still checks it, so it is replaced by that of a dense tensor.
    """
    sizes, strides = list(tensor.shape), list(tensor.stride())
    dense = 1
    for dim in reversed(range(len(sizes))):
        if sizes[dim] == 1:
            strides[dim] = dense
        dense = max(dense, strides[dim] * sizes[dim])
    return tensor.data_ptr(), sizes, strides


def launch(
    arguments: KernelArguments, stream: int, num_ctas: int, spin_timeout_ns: int, device: int
) -> None:
    """Enqueue one kernel. The arguments must have been checked."""
    a = arguments
    _kernels.mla_decode(
        tensor_ref(a.instructions),
        None if a.timings is None else tensor_ref(a.timings),
        tensor_ref(a.global_instruction_index),
        tensor_ref(a.q_rot),
        tensor_ref(a.q_v),
        tensor_ref(a.k_rot),
        tensor_ref(a.v),
        tensor_ref(a.table),
        tensor_ref(a.o),
        tensor_ref(a.o_scratch),
        tensor_ref(a.lvec_scratch),
        tensor_ref(a.completion_flag),
        float(a.softmax_scale),
        a.tic,
        None if a.lse is None else tensor_ref(a.lse),
        stream,
        num_ctas,
        spin_timeout_ns,
        device,
    )


def raise_pending(device: torch.device) -> None:
    """Raise the timeout that an earlier launch on ``device`` recorded, if any."""
    if _import_error or device.type != "cuda":
        return
    record = _kernels.take_error(
        torch.cuda.current_device() if device.index is None else device.index
    )
    if record is not None:
        raise MegakernelTimeout(dict(record))


def synchronize(device: torch.device | str | int | None = None) -> None:
    """Wait for all work on ``device`` and raise what the megakernel reported.

    Launches are asynchronous, so a wait that expired inside the kernel surfaces here,
    or at the next launch on that device, whichever comes first.

    Parameters
    ----------
    device : device or None
        The current CUDA device when None. Does nothing for the CPU.

    Raises
    ------
    MegakernelTimeout
        A bounded wait expired; names SM, role, instruction and flag.
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
        return int(torch.cuda.current_stream(device).cuda_stream)
    if isinstance(stream, int) and not isinstance(stream, bool):
        if stream < 0:
            raise RangeError(f"stream: expected a cudaStream_t, got {stream}")
        return stream
    if isinstance(stream, torch.cuda.Stream):
        if stream.device != torch.device("cuda", require(device)):
            raise DeviceError(f"stream: expected one of {device}, got one of {stream.device}")
        return int(stream.cuda_stream)
    raise DeviceError(f"stream: expected a torch.cuda.Stream, got {type(stream).__name__}")
