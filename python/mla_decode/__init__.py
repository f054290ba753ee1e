"""MLA decode on Hopper: a megakernel, its scheduler, and an interpreter without a GPU."""

from __future__ import annotations

try:
    from . import _scheduler as _scheduler
except ImportError as error:
    raise ImportError(
        f"mla_decode: the scheduler extension is not built; run make, or pip install . [{error}]"
    ) from error

from . import cost, distributed, errors, flash_mla, flashinfer, ops, reference
from ._scheduler import get_quality as __get_quality__
from .cost import CostModel, floor_us
from .decoding import decode, interpret, release_caches
from .device_plan import DevicePlan
from .errors import (
    AlignmentError,
    DeadlockError,
    DeviceError,
    DtypeError,
    MegakernelTimeout,
    MlaDecodeError,
    QueueError,
    QueueVersionError,
    RangeError,
    ScheduleError,
    ShapeError,
    StrideError,
    UnsupportedError,
)
from .merge_states import merge_states
from .native import synchronize
from .planning import Plan, plan
from .raw import mla_decode, mla_decode_8_heads
from .workspace import Workspace, release_workspaces, workspace_bytes

__version__ = "0.1.0"

__all__ = [
    "AlignmentError",
    "CostModel",
    "DeadlockError",
    "DeviceError",
    "DevicePlan",
    "DtypeError",
    "MegakernelTimeout",
    "MlaDecodeError",
    "Plan",
    "QueueError",
    "QueueVersionError",
    "RangeError",
    "ScheduleError",
    "ShapeError",
    "StrideError",
    "UnsupportedError",
    "Workspace",
    "__get_quality__",
    "cost",
    "decode",
    "distributed",
    "errors",
    "flash_mla",
    "flashinfer",
    "floor_us",
    "interpret",
    "merge_states",
    "mla_decode",
    "mla_decode_8_heads",
    "ops",
    "plan",
    "reference",
    "release_caches",
    "release_workspaces",
    "synchronize",
    "workspace_bytes",
]
