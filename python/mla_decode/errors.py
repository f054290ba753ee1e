"""Typed errors. Every message names the argument, what was expected and what came.

All derive from `MlaDecodeError` and from the built-in exception that callers
would expect, so both ``except MlaDecodeError`` and ``except ValueError`` work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from . import _scheduler


class MlaDecodeError(Exception):
    """Base of every error that this package raises on purpose."""


class ShapeError(MlaDecodeError, ValueError):
    """A tensor has the wrong number of dimensions or the wrong sizes."""


class DtypeError(MlaDecodeError, TypeError):
    """An argument has the wrong type, or a tensor the wrong dtype."""


class DeviceError(MlaDecodeError, RuntimeError):
    """A tensor lies on the wrong device."""


class StrideError(MlaDecodeError, ValueError):
    """A tensor's strides cannot be read or written by the kernel."""


class AlignmentError(MlaDecodeError, ValueError):
    """A pointer or an outer stride is no multiple of the 16 bytes that the TMA needs."""


class RangeError(MlaDecodeError, ValueError):
    """A number lies outside its range: a length, a block id, a count."""


class ScheduleError(MlaDecodeError, _scheduler.ScheduleError):
    """A schedule breaks a rule of the validator, or does not fit the call."""


class QueueError(MlaDecodeError, ValueError):
    """A queue is malformed: other version, mutated, truncated, or words out of range."""


class QueueVersionError(QueueError):
    """A queue was written for another version of the instruction format."""


class UnsupportedError(MlaDecodeError, RuntimeError):
    """The machine or this version cannot do it (no Hopper GPU, too many heads, ...)."""


class DeadlockError(MlaDecodeError, RuntimeError):
    """The interpreter found that no worker can ever go on.

    Attributes
    ----------
    waits : tuple of str
        One line per stuck worker: what it runs and what it waits for.
    """

    def __init__(self, waits: tuple[str, ...]) -> None:
        self.waits = waits
        super().__init__("deadlock: " + "; ".join(waits))


class MegakernelTimeout(MlaDecodeError, RuntimeError):
    """A bounded wait inside the kernel expired; all CTAs left, the GPU stays usable.

    Attributes
    ----------
    sm, role, instruction, uid, opcode, wait, expected, seen
        Where it happened (SM, warp role, queue position, uid, opcode), what was waited
        for, the value expected and the value last seen.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.sm = int(record["sm"])
        self.role = str(record["role"])
        self.instruction = int(record["instruction"])
        self.uid = int(record["uid"])
        self.opcode = int(record["opcode"])
        self.wait = str(record["wait"])
        self.expected = int(record["expected"])
        self.seen = int(record["seen"])
        super().__init__(
            f"SM {self.sm}, {self.role}: instruction {self.instruction} (uid {self.uid}, opcode "
            f"{self.opcode}) waited too long for {self.wait}: expected {self.expected}, "
            f"saw {self.seen}"
        )


@contextmanager
def schedule_errors() -> Iterator[None]:
    """Re-raise the C++ scheduler's errors as this package's own."""
    try:
        yield
    except _scheduler.ScheduleError as error:
        if isinstance(error, MlaDecodeError):
            raise
        raise ScheduleError(str(error)) from None
    except ValueError as error:
        if isinstance(error, MlaDecodeError):
            raise
        raise RangeError(str(error)) from None
