"""Timing without a GPU, for tests of the tools that compare."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.case import CACHE_FACTOR, Case, make_case, relative_error
from benchmarks.implementations import Prepared
from benchmarks.measure import MAX_REL_ERR, Row
from benchmarks.shapes import Shape

L2_BYTES = 1 << 20  # of the made-up GPU


def fake_measure(
    us: dict[str, float], error: str = "", *, in_turns: bool = False
) -> Callable[..., list[Row]]:
    """As `benchmarks.measure.measure`, on the CPU: checks what is prepared, and makes times up.

    Implementations come in the order of ``us``; with ``in_turns``, in every other call in the
    other one.
    """
    orders = itertools.cycle([list(us), list(reversed(us))] if in_turns else [list(us)])

    def measure(
        shape: Shape,
        impls: list[str],
        *,
        replays: int,
        prepare: Mapping[str, Callable[[Case], Prepared]],
    ) -> list[Row]:
        assert list(prepare) == impls == next(orders)
        case = make_case(shape, torch.device("cpu"), copies=2)
        for make in prepare.values():
            prepared = make(case)
            for i in range(case.copies):
                assert relative_error(prepared.call(i), case.reference[i]) < MAX_REL_ERR
        return [Row(shape, name, error=error, replays_us=[us[name]] * replays) for name in impls]

    return measure


@dataclass
class FakeGpu:
    """What stands in for torch.cuda; ``log`` tells what the timing did.

    A graph is a list of calls on the CPU, an event reads a clock that only replays move.
    """

    us: list[float] = field(default_factory=lambda: [10.0])  # of the replays, the last ones repeat
    now_us: float = 0.0
    replayed: int = 0
    capturing: list[Callable[[], object]] | None = None
    log: list[str] = field(default_factory=list)

    def enqueue(self, work: Callable[[], object]) -> None:
        """Do it, or note it for replays."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def replay(self, calls: list[Callable[[], object]]) -> None:
        self.log.append("replay")
        for call in calls:
            call()
        self.now_us += self.us[min(self.replayed, len(self.us) - 1)]
        self.replayed += 1


class Watch(TorchDispatchMode):
    """Notes what touches the flush buffer, and what poisons outputs."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.sum.default and args[0].nbytes == CACHE_FACTOR * L2_BYTES:
            self.gpu.log.append("flush")
        if func is torch.ops.aten.fill_.Scalar and args[1] != args[1]:
            self.gpu.log.append("poison")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    """Put a made-up GPU in the place of torch.cuda."""
    importlib.import_module("torch._dynamo")  # by `Watch` at its first call, without a GPU then
    fake = FakeGpu()

    class Graph:
        def __init__(self) -> None:
            self.calls: list[Callable[[], object]] = []

        def replay(self) -> None:
            fake.replay(self.calls)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            fake.log.append("event")
            self.us = fake.now_us

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return (end.us - self.us) / 1e3

    @contextlib.contextmanager
    def capture(graph: Graph, stream: object) -> Iterator[None]:
        fake.capturing = graph.calls
        yield
        fake.capturing = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    properties = SimpleNamespace(L2_cache_size=L2_BYTES, total_memory=1 << 34)
    for name, value in {
        "CUDAGraph": Graph,
        "Event": Event,
        "graph": capture,
        "Stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "current_stream": lambda: stream,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "is_available": lambda: True,
        "get_device_name": lambda: "a made-up GPU",
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    with Watch(fake):
        yield fake
