"""MLA decode on Hopper: a megakernel, its scheduler, and an interpreter without a GPU."""

from __future__ import annotations

try:
    from . import _scheduler as _scheduler
except ImportError as error:
    raise ImportError(
        f"mla_decode: the scheduler extension is not built; run make, or pip install . [{error}]"
    ) from error

from . import cost, errors, reference
from ._scheduler import get_quality as __get_quality__
from .cost import CostModel, floor_us
from .decoding import decode, interpret
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
    "errors",
    "floor_us",
    "interpret",
    "mla_decode",
    "mla_decode_8_heads",
    "plan",
    "reference",
    "release_workspaces",
    "synchronize",
    "workspace_bytes",
]
