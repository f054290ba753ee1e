"""Access to the CUDA extension, which may be absent or unable to run here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from .arguments import Geometry, KernelArguments
from .errors import DeviceError, MegakernelTimeout, RangeError, UnsupportedError

_import_error = ""
try:
    from . import _kernels
except ImportError as error:
    _import_error = str(error)

REQUIRED_CAPABILITY = (9, 0)  # Hopper: wgmma exists nowhere else

_able: dict[torch.device, int] = {}  # index of each device that was found to be able


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


def launch(
    arguments: KernelArguments,
    geometries: Sequence[Geometry | None],
    stream: int,
    num_ctas: int,
    spin_timeout_ns: int,
    device: int,
) -> None:
    """Enqueue one kernel. ``geometries`` are what the arguments' check returned."""
    references = [
        None if tensor is None or geometry is None else (tensor.data_ptr(), *geometry)
        for tensor, geometry in zip(arguments.tensors(), geometries, strict=True)
    ]
    lse = references.pop()
    numbers = (float(arguments.softmax_scale), arguments.tic)
    launched_on = (stream, num_ctas, spin_timeout_ns, device)
    values: Any = (*references, *numbers, lse, *launched_on)
    _kernels.mla_decode(*values)


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
