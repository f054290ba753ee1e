"""Plans: from the lengths of a batch to a validated queue of instructions."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from . import _scheduler, checks, cost, native, plan_file
from .arguments import require_supported_query
from .cost import CostModel
from .errors import RangeError, ScheduleError, UnsupportedError, schedule_errors
from .lengths import SeqLens, host_seq_lens
from .words import (
    Instruction,
    Partial,
    Reduction,
    Words,
    decode_queue,
)
from .workspace import Workspace, workspace_bytes

POLICIES: tuple[str, ...] = _scheduler.POLICIES
DEFAULT_NUM_WORKERS = 132  # SMs of an H100 or H200, for plans made without a GPU


@dataclass(frozen=True, eq=False)
class Plan:
    """A queue of instructions for one batch of lengths. Made by `plan` or `Plan.load`."""

    seq_lens: npt.NDArray[np.int32]
    """``[B]`` KV length of every request, new tokens included."""
    num_heads: int
    new_tokens: int
    num_workers: int
    """SMs that it was balanced for; it is correct with any number."""
    policy: str
    split_tiles: int
    instructions: Words
    """``[n, 32]`` int32 words, in execution order."""
    num_slots: int
    """Scratch slots that it writes."""
    predicted_us: float
    worker: npt.NDArray[np.int32]
    """``[n]`` predicted SM of every instruction."""
    start_us: npt.NDArray[np.float32]
    end_us: npt.NDArray[np.float32]
    """``[n]`` predicted times, microseconds from the launch."""
    _on_device: dict[torch.device, torch.Tensor] = field(
        default_factory=dict, init=False, repr=False
    )

    @property
    def batch(self) -> int:
        """Number of requests."""
        return int(self.seq_lens.size)

    @property
    def num_instructions(self) -> int:
        """Instructions in the queue."""
        return int(self.instructions.shape[0])

    @property
    def floor_us(self) -> float:
        """See `mla_decode.cost.floor_us`."""
        return cost.floor_us(self.seq_lens.tolist(), self.num_heads, self.new_tokens)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch, flags and queue state that it needs."""
        return workspace_bytes(self.num_slots, self.new_tokens, self.num_heads)

    def decoded(self) -> list[Instruction]:
        """The instructions, unpacked."""
        return decode_queue(self.instructions)

    def partials_per_request(self) -> list[int]:
        """Pieces that every request's keys were cut into (per row group)."""
        pieces: list[set[int]] = [set() for _ in range(self.batch)]
        for instruction in self.decoded():
            if isinstance(instruction, Partial):
                pieces[instruction.q_batch].add(instruction.start)
        return [len(starts) for starts in pieces]

    def summary(self) -> str:
        """The schedule in short, on one line."""
        decoded = self.decoded()
        partials = sum(isinstance(i, Partial) for i in decoded)
        reductions = sum(isinstance(i, Reduction) for i in decoded)
        multiple = self.predicted_us / self.floor_us
        return (
            f"{self.num_instructions} instructions ({partials} partials, {reductions} reductions) "
            f"on {self.num_workers} workers, {self.num_slots} scratch slots, policy {self.policy}, "
            f"predicted {self.predicted_us:.1f} us ({multiple:.2f} x floor)"
        )

    def table(self) -> str:
        """One line per instruction: when, where, what."""
        lines = ["   #    uid  SM   start us     end us  what"]
        for i, instruction in enumerate(self.decoded()):
            lines.append(
                f"{i:4d} {instruction.uid:6d} {self.worker[i]:3d} {self.start_us[i]:10.2f} "
                f"{self.end_us[i]:10.2f}  {describe(instruction)}"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"Plan({self.summary()})"

    def validate(self) -> None:
        """Prove that the queue computes attention of these lengths and cannot deadlock.

        Raises
        ------
        ScheduleError
            Names the first rule that is broken, and by which uid.
        """
        with schedule_errors():
            _scheduler.validate(
                self.instructions, self.seq_lens, self.num_heads, self.new_tokens, self.num_slots
            )

    def to(self, device: torch.device | str) -> torch.Tensor:
        """The words as a ``[n, 32]`` int32 tensor on ``device``; copied once and kept."""
        if isinstance(device, torch.device) and device in self._on_device:
            return self._on_device[device]
        # An empty tensor resolves "cuda" to the current device.
        key = torch.empty(0, device=device).device
        if key not in self._on_device:
            if key.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise UnsupportedError(
                    "plan: its words cannot be copied to the GPU while a CUDA graph is captured; "
                    "call once before, or plan.to(device)"
                )
            self._on_device[key] = torch.from_numpy(self.instructions.copy()).to(key)
        return self._on_device[key]

    def workspace(self, device: torch.device | str) -> Workspace:
        """A new workspace of the size that this plan needs."""
        return Workspace(device, self.num_slots, self.new_tokens, self.num_heads)

    @cached_property
    def _longest(self) -> int:
        """The longest request's KV length."""
        return int(self.seq_lens.max())

    def require_capacity(self, max_blocks: int, block_size: int) -> None:
        """Check that a row of the block table can name the longest request's blocks.

        Raises
        ------
        RangeError
            It cannot.
        """
        capacity = max_blocks * block_size
        if self._longest > capacity:
            raise RangeError(
                f"seq_lens: expected at most {capacity} ({max_blocks} blocks of {block_size} "
                f"tokens in block_table), got {self._longest}"
            )

    def require_fits(self, batch: int, new_tokens: int, num_heads: int) -> None:
        """Check that the plan was made for a call of these sizes.

        Raises
        ------
        ScheduleError
            It was made for others.
        """
        made_for = (self.batch, self.new_tokens, self.num_heads)
        sizes = (batch, new_tokens, num_heads)
        names = ("requests", "new_tokens", "num_heads")
        for name, planned, called in zip(names, made_for, sizes, strict=True):
            if planned != called:
                raise ScheduleError(f"plan: made for {planned} {name}, the call has {called}")

    def require_seq_lens(self, seq_lens: npt.NDArray[np.int32]) -> None:
        """Check that the plan was made for these lengths.

        Raises
        ------
        ScheduleError
            Names the first request that differs.
        """
        if seq_lens is self.seq_lens:
            return
        if self.seq_lens.shape != seq_lens.shape:
            raise ScheduleError(
                f"plan: made for {self.batch} requests, seq_lens has {seq_lens.size}"
            )
        for i in np.flatnonzero(self.seq_lens != seq_lens)[:1]:
            raise ScheduleError(
                f"plan: made for length {self.seq_lens[i]} of request {i}, seq_lens has "
                f"{seq_lens[i]}"
            )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, or as npz if ``path`` ends so; no pickle in either."""
        plan_file.write(
            Path(path),
            plan_file.PlanDocument(
                seq_lens=self.seq_lens,
                num_heads=self.num_heads,
                new_tokens=self.new_tokens,
                num_workers=self.num_workers,
                policy=self.policy,
                split_tiles=self.split_tiles,
                instructions=self.instructions,
                num_slots=self.num_slots,
                predicted_us=self.predicted_us,
                worker=self.worker,
                start_us=self.start_us,
                end_us=self.end_us,
            ),
        )

    @staticmethod
    def load(path: str | Path, *, validate: bool = True) -> Plan:
        """Read a plan that `save` wrote.

        Raises
        ------
        QueueVersionError
            Written for another version of the instruction format.
        QueueError
            Not a plan, truncated or mutated.
        ScheduleError
            ``validate`` is set and the queue breaks a rule.
        """
        document = plan_file.read(Path(path))
        loaded = Plan(**vars(document))
        if validate:
            loaded.validate()
        return loaded


def plan(
    seq_lens: SeqLens,
    num_heads: int,
    new_tokens: int = 1,
    *,
    num_workers: int | None = None,
    device: torch.device | str | None = None,
    policy: str = "balanced",
    split_tiles: int = 0,
    cost_model: CostModel | None = None,
    validate: bool = False,
) -> Plan:
    """Schedule MLA decode of a batch.

    Parameters
    ----------
    seq_lens : list of int, ndarray or Tensor
        ``[B]`` KV length of every request, its new tokens included; at least 1.
    num_heads : int
        Query heads on this GPU: 8, 16, 32, 64 or 128.
    new_tokens : int
        Query tokens per request, 1 to 4.
    num_workers : int, optional
        SMs to balance for; those of ``device`` when None, 132 without a GPU.
    device : device, optional
        GPU to plan for: its SM count and its cost model. The current one when None.
    policy : str
        ``balanced`` cuts the keys in pieces of equal cost and keeps the best simulated
        size; ``backward`` grows reduction trees while `__get_quality__` says that it helps;
        ``unsplit`` cuts nothing; ``fixed`` cuts every ``split_tiles`` tiles of 64 tokens.
    split_tiles : int
        Tiles per piece, for ``fixed``.
    cost_model : CostModel, optional
        Microseconds that things take; by default those fitted on ``device``.
    validate : bool
        Validate the queue before returning it. The planner's queues are valid by
        construction, so this is off; `Plan.load` always does.

    Returns
    -------
    Plan

    Raises
    ------
    RangeError, DtypeError, ShapeError
        Lengths that are no positive integers, an unknown policy, no workers.
    UnsupportedError
        More heads or new tokens than the kernels support.
    """
    lengths = host_seq_lens(seq_lens)
    require_supported_query(num_heads, new_tokens)
    if policy not in POLICIES:
        raise RangeError(f"policy: expected one of {POLICIES}, got {policy!r}")
    checks.require_int("split_tiles", split_tiles, 1 if policy == "fixed" else 0, 1 << 25)
    gpu = _gpu(device)
    if num_workers is None:
        num_workers = native.num_sms(gpu) if gpu is not None else DEFAULT_NUM_WORKERS
    checks.require_int("num_workers", num_workers, 1, 1 << 16)
    if cost_model is None:
        cost_model = cost.load(torch.cuda.get_device_name(gpu) if gpu is not None else None)
    with schedule_errors():
        data = _scheduler.plan(
            lengths, num_heads, new_tokens, num_workers, cost_model, policy, split_tiles
        )
    made = Plan(
        seq_lens=lengths,
        num_heads=num_heads,
        new_tokens=new_tokens,
        num_workers=num_workers,
        policy=policy,
        split_tiles=split_tiles,
        instructions=np.ascontiguousarray(data.instructions),
        num_slots=int(data.num_slots),
        predicted_us=float(data.predicted_us),
        worker=np.asarray(data.worker),
        start_us=np.asarray(data.start_us),
        end_us=np.asarray(data.end_us),
    )
    if validate:
        made.validate()
    return made


def describe(instruction: Instruction) -> str:
    """What an instruction does, in a few words."""
    if isinstance(instruction, Partial):
        to = f"slot {instruction.slot}" if instruction.slot is not None else "output"
        rows = f" rows {instruction.row_begin}+{instruction.num_rows or 'all'}"
        return (
            f"partial  request {instruction.q_batch} tokens [{instruction.start}, "
            f"{instruction.end}){rows} -> {to}"
        )
    if isinstance(instruction, Reduction):
        to = (
            f"slot {instruction.slot}"
            if instruction.slot is not None
            else f"output of request {instruction.dst_batch}"
        )
        columns = instruction.columns()
        return (
            f"reduction of {len(instruction.inputs)}, token {instruction.dst_seq} heads "
            f"{instruction.head_begin}+{instruction.num_heads or 'all'} columns "
            f"[{columns[0]}, {columns[1]}) -> {to}"
        )
    return "no-op"


class PlanCache:
    """The plans that `decode` made last, by lengths and sizes."""

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._plans: OrderedDict[tuple[bytes, int, int, int, torch.device], Plan] = OrderedDict()

    def get(
        self,
        seq_lens: npt.NDArray[np.int32],
        num_heads: int,
        new_tokens: int,
        num_workers: int | None,
        device: torch.device,
    ) -> Plan:
        """The plan of these sizes for this device, made now or before."""
        key = (seq_lens.tobytes(), num_heads, new_tokens, num_workers or 0, device)
        made = self._plans.get(key)
        if made is None:
            target = device if device.type == "cuda" else None
            made = plan(seq_lens, num_heads, new_tokens, num_workers=num_workers, device=target)
            self._plans[key] = made
            if len(self._plans) > self._capacity:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return made


def _gpu(device: torch.device | str | None) -> torch.device | None:
    """The CUDA device to plan for; None without one."""
    if device is not None:
        chosen = torch.device(device)
        return chosen if chosen.type == "cuda" else None
    return torch.device("cuda") if torch.cuda.is_available() else None
