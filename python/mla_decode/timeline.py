"""What ran where and when: predicted by the simulation or measured on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from . import checks
from .errors import QueueError, ShapeError
from .planning import Plan, describe
from .words import TIMING_WORDS, Fill, Instruction, Noop, Partial, Reduction

_KINDS = {Partial: "partial", Reduction: "reduction", Fill: "fill", Noop: "no-op"}


@dataclass(frozen=True)
class Phase:
    """Part of an instruction's life, in microseconds."""

    name: str  # "load", "compute" or "store"
    start_us: float
    end_us: float


@dataclass(frozen=True)
class Slice:
    """One instruction on one SM; microseconds from the start of the timeline."""

    index: int  # in the queue
    worker: int
    start_us: float
    end_us: float
    ready_us: float
    """When a reduction's last input was there; until then it only held its SM. Otherwise
    ``start_us``: a partial that adopts a result has keys of its own to begin with."""
    instruction: Instruction
    phases: tuple[Phase, ...] = ()
    """Measured only; the phases of neighbours overlap, and so may these."""
    fetched_us: float | None = None
    request: int | None = None
    """That a partial works for, and the KV head of it."""
    kv_head: int | None = None

    @property
    def kind(self) -> str:
        """``partial``, ``reduction``, ``fill`` or ``no-op``."""
        return _KINDS[type(self.instruction)]

    @property
    def label(self) -> str:
        """Name in a trace: uid and what it does."""
        return f"uid {self.instruction.uid}: {describe(self.instruction)}"


@dataclass(frozen=True)
class Timeline:
    """Slices of one launch, ordered by queue position."""

    source: str  # "predicted", "measured" or "interpreter"
    device: str
    shape: str  # the batch in words
    num_workers: int
    num_kv_heads: int
    slices: tuple[Slice, ...]
    flows: tuple[tuple[int, int], ...]
    """(partial or reduction, reader of its slot), as indices into ``slices``. The reader is a
    reduction, or a partial that adopts the result."""
    floor_us: float

    @property
    def makespan_us(self) -> float:
        """Time of the last end."""
        return max((s.end_us for s in self.slices), default=0.0)

    @property
    def idle_share(self) -> float:
        """Share of SM time until the makespan in which nothing ran, or only waited."""
        whole = self.makespan_us * self.num_workers
        return 1 - self.busy_us() / whole if whole else 0.0

    def busy_us(self) -> float:
        """SM microseconds in which something ran, overlaps counted once, waits not."""
        total = 0.0
        for row in self.rows():
            reached = 0.0
            for s in sorted(row, key=lambda s: s.ready_us):
                total += max(0.0, s.end_us - max(s.ready_us, reached))
                reached = max(reached, s.end_us)
        return total

    def rows(self) -> Iterator[list[Slice]]:
        """Slices of every SM, SM by SM."""
        by_worker: list[list[Slice]] = [[] for _ in range(self.num_workers)]
        for s in self.slices:
            by_worker[s.worker].append(s)
        yield from by_worker


def predicted(plan: Plan) -> Timeline:
    """The timeline that the plan's simulation predicts."""
    decoded = plan.decoded()
    slices = [
        Slice(i, int(plan.worker[i]), start, end, start, instruction)
        for i, (start, end, instruction) in enumerate(
            zip(plan.start_us.tolist(), plan.end_us.tolist(), decoded, strict=True)
        )
    ]
    flows = _flows(slices)
    workers = max(plan.num_workers, 1 + max((s.worker for s in slices), default=0))
    return Timeline(
        source="predicted",
        device=f"{plan.num_workers} SMs",
        shape=describe_shape(plan),
        num_workers=workers,
        num_kv_heads=plan.num_kv_heads,
        slices=_finished(slices, flows, plan.batch),
        flows=flows,
        floor_us=plan.floor_us,
    )


def measured(plan: Plan, timings: torch.Tensor, device: str) -> Timeline:
    """The timeline in the records of one launch.

    Parameters
    ----------
    plan : Plan
        What was launched.
    timings : Tensor
        ``[>= num_instructions, 8]`` int32, as the launch filled it. Time 0 is the first
        fetch: the launch itself is not in it.
    device : str
        Name to print; ``cpu`` for records of the interpreter.

    Raises
    ------
    ShapeError, DtypeError
        Not such a tensor.
    QueueError
        An instruction has no record: the launch did not finish, or was another.
    """
    checks.require_dtype("timings", checks.require_tensor("timings", timings), torch.int32)
    if timings.dim() != 2 or timings.shape[1] != TIMING_WORDS:
        raise ShapeError(f"timings: expected [n, {TIMING_WORDS}], got {list(timings.shape)}")
    decoded = plan.decoded()
    records = timings[: len(decoded)].cpu().numpy()
    if len(records) < len(decoded):
        raise ShapeError(f"timings: expected {len(decoded)} records, got {len(records)}")
    missing = np.flatnonzero(records[:, 0] <= 0)
    if missing.size:
        raise QueueError(
            f"timings: instruction {missing[0]} was not executed ({missing.size} of "
            f"{len(decoded)} are missing)"
        )
    times = _microseconds(records[:, 1:])
    times[records[:, 1:] == 0] = np.nan  # an opcode without that phase leaves 0
    workers = records[:, 0] - 1
    slices = [
        _measured_slice(i, int(workers[i]), times[i], instruction)
        for i, instruction in enumerate(decoded)
    ]
    flows = _flows(slices)
    interpreted = device == "cpu"
    return Timeline(
        source="interpreter" if interpreted else "measured",
        device=device,
        shape=describe_shape(plan),
        num_workers=max(0 if interpreted else plan.num_workers, int(workers.max()) + 1),
        num_kv_heads=plan.num_kv_heads,
        slices=_finished(slices, flows, plan.batch),
        flows=flows,
        floor_us=plan.floor_us,
    )


def describe_shape(plan: Plan) -> str:
    """The batch in a few words."""
    lengths = [int(length) for length in plan.seq_lens]
    if len(lengths) <= 4:
        text = ", ".join(f"{length:,}" for length in lengths)
        requests = f"{len(lengths)} request{'s' * (len(lengths) > 1)} of {text} tokens"
    else:
        requests = f"{len(lengths)} requests of {min(lengths):,} to {max(lengths):,} tokens"
    return f"{requests}, {_describe_tokens(plan.new_tokens)}, {plan.num_heads} heads" + (
        f" of {plan.num_kv_heads} KV heads" if plan.num_kv_heads > 1 else ""
    )


def _describe_tokens(new_tokens: int | tuple[int, ...]) -> str:
    if isinstance(new_tokens, tuple) and len(set(new_tokens)) > 1:
        return f"{min(new_tokens)} to {max(new_tokens)} new tokens"
    count = new_tokens[0] if isinstance(new_tokens, tuple) else new_tokens
    return f"{count} new token{'s' * (count != 1)}"


def _microseconds(records: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Low 32 bits of nanoseconds to microseconds from the first fetch, across a wrap."""
    ticks = records.astype(np.int64)
    relative = (ticks - ticks[0, 0] + 2**31) % 2**32 - 2**31
    return np.asarray((relative - relative[:, 0].min()) / 1e3)


def _measured_slice(
    index: int, worker: int, t: npt.NDArray[np.float64], instruction: Instruction
) -> Slice:
    names = ("load", "compute", "store")
    phases = tuple(
        Phase(name, float(t[1 + 2 * k]), float(t[2 + 2 * k]))
        for k, name in enumerate(names)
        if t[2 + 2 * k] > t[1 + 2 * k]  # false for NaN
    )
    start = min((p.start_us for p in phases), default=float(t[0]))
    end = max((p.end_us for p in phases), default=float(t[0]))
    return Slice(index, worker, start, end, start, instruction, phases, float(t[0]))


def _flows(slices: list[Slice]) -> tuple[tuple[int, int], ...]:
    # Of mates, who share a slot, the one that ends last.
    by_end = sorted(slices, key=lambda s: s.end_us)
    writers = {s.instruction.slot: s.index for s in by_end if s.instruction.slot is not None}
    return tuple(
        (writers[slot], s.index) for s in slices for slot in s.instruction.inputs if slot in writers
    )


def _finished(
    slices: list[Slice], flows: tuple[tuple[int, int], ...], batch: int
) -> tuple[Slice, ...]:
    """Set a reduction's ``ready_us`` to the end of its last input; say whom a partial is for."""
    ready = [s.start_us for s in slices]
    for source, target in flows:
        if isinstance(slices[target].instruction, Reduction):
            ready[target] = max(ready[target], slices[source].end_us)
    finished = []
    for s in slices:
        kv_head = request = None
        if isinstance(s.instruction, Partial):
            kv_head, request = divmod(s.instruction.q_batch, batch)
        ready_us = min(ready[s.index], s.end_us)
        finished.append(replace(s, ready_us=ready_us, request=request, kv_head=kv_head))
    return tuple(finished)
