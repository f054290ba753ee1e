"""Checks of single tensors. Each raises a typed error naming argument, expected and actual."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch

from .errors import AlignmentError, DeviceError, DtypeError, RangeError, ShapeError, StrideError

TMA_BYTES = 16  # the TMA's granularity for base addresses and outer strides
MAX_TMA_STRIDE_BYTES = 1 << 40

_MAX_REMEMBERED = 1024  # layouts; more than a model's steps have

T = TypeVar("T")


def layout(value: object) -> Hashable:
    """Everything that the checks of this module look at in a tensor.

    Two tensors of one layout pass or fail alike, so that only the first need be checked.
    """
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return value.shape, value.stride(), value.dtype, value.device, value.data_ptr() % TMA_BYTES


def remember(passed: dict[Hashable, T], key: Hashable, value: T) -> T:
    """Keep what is known of layouts that passed; forgets all when there are many."""
    if len(passed) >= _MAX_REMEMBERED:
        passed.clear()
    passed[key] = value
    return value


def require_tensor(name: str, value: object) -> torch.Tensor:
    """Check that ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise DtypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    return value


def require_shape(name: str, tensor: torch.Tensor, shape: Sequence[int | str]) -> None:
    """Check sizes; a string in ``shape`` is the name of a size that may be anything."""
    fits = len(shape) == tensor.dim() and all(
        isinstance(want, str) or want == have
        for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise ShapeError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")


def require_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Check the dtype."""
    if tensor.dtype != dtype:
        raise DtypeError(f"{name}: expected {dtype}, got {tensor.dtype}")


def require_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Check the device."""
    if tensor.device != device:
        raise DeviceError(f"{name}: expected device {device}, got {tensor.device}")


def require_last_dim(name: str, tensor: torch.Tensor) -> None:
    """Check that the last dimension is contiguous."""
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise StrideError(
            f"{name}: expected stride 1 in the last dimension, got strides {list(tensor.stride())}"
        )


def require_layout(name: str, tensor: torch.Tensor) -> None:
    """Check what the TMA needs of a tensor that it reads.

    Last dimension contiguous; base address and outer strides multiples of 16 bytes; no
    broadcast dimension.
    """
    require_last_dim(name, tensor)
    if tensor.numel() == 0:
        return
    if tensor.data_ptr() % TMA_BYTES:
        raise AlignmentError(
            f"{name}: expected a {TMA_BYTES}-byte aligned pointer, got {tensor.data_ptr():#x}"
        )
    for dim in range(tensor.dim() - 1):
        if tensor.shape[dim] == 1:
            continue
        step = tensor.stride(dim) * tensor.element_size()
        if step == 0:
            raise StrideError(f"{name}: expected no broadcast dimension, got stride 0 in {dim}")
        if step % TMA_BYTES or step >= MAX_TMA_STRIDE_BYTES:
            raise AlignmentError(
                f"{name}: expected the stride of dimension {dim} to be a multiple of {TMA_BYTES} "
                f"bytes below 2**40, got {step} bytes"
            )


def require_merged(name: str, tensor: torch.Tensor, dim: int) -> None:
    """Check that dimensions ``dim`` and ``dim + 1`` can be counted through as one."""
    if tensor.shape[dim] == 1 or tensor.shape[dim + 1] == 1:
        return
    expected = tensor.stride(dim + 1) * tensor.shape[dim + 1]
    if tensor.stride(dim) != expected:
        raise StrideError(
            f"{name}: expected stride {expected} in dimension {dim}, so that it continues "
            f"dimension {dim + 1}, got strides {list(tensor.stride())}"
        )


def require_no_overlap(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor to write has its elements at different addresses."""
    reach = 0
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted((stride, size) for stride, size in dims if size > 1):
        if stride <= reach:
            raise StrideError(
                f"{name}: written, expected elements at different addresses, got sizes "
                f"{list(tensor.shape)} with strides {list(tensor.stride())}"
            )
        reach += stride * (size - 1)


def require_dense(name: str, tensor: torch.Tensor, alignment: int) -> None:
    """Check that a tensor is contiguous and its pointer aligned to ``alignment`` bytes."""
    if tensor.numel() == 0:
        return
    if not tensor.is_contiguous():
        raise StrideError(
            f"{name}: expected a contiguous tensor, got strides {list(tensor.stride())}"
        )
    if tensor.data_ptr() % alignment:
        raise AlignmentError(
            f"{name}: expected a {alignment}-byte aligned pointer, got {tensor.data_ptr():#x}"
        )


def require_int(name: str, value: object, low: int, high: int) -> int:
    """Check an integer in ``[low, high]``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise DtypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise RangeError(f"{name}: expected {low} to {high}, got {value}")
    return value
