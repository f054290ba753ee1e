"""Plans: from the lengths of a batch to a validated queue of instructions."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from . import _scheduler, checks, cost, native, plan_file
from .cost import CostModel
from .errors import (
    DeviceError,
    RangeError,
    ScheduleError,
    ShapeError,
    UnsupportedError,
    schedule_errors,
)
from .lengths import NewTokens, SeqLens, host_new_tokens, host_seq_lens
from .row_groups import sizes_to_plan
from .words import (
    GROUP_ROWS,
    MAX_HEADS,
    MAX_NEW_TOKENS,
    MAX_ROWS,
    Fill,
    Instruction,
    Noop,
    Partial,
    Reduction,
    Words,
    decode_queue,
    find_mates,
)
from .workspace import Workspace, workspace_bytes

POLICIES: tuple[str, ...] = _scheduler.POLICIES
DEFAULT_NUM_WORKERS = 132  # SMs of an H100 or H200, for plans made without a GPU
# Clusters of an H200 that run at a time, by their SMs, likewise.
DEFAULT_CLUSTERS = ((2, 66), (8, 15))
MAX_KV_HEADS = 128

# Tiles of 64 keys per piece of a batch-invariant plan. A request of 64k keys is cut into 64
# pieces, enough for half of an H200 when it is alone; a merge costs little beside 1024 keys.
BATCH_INVARIANT_TILES = 16

_FitKey: TypeAlias = tuple[int, int, int, int, int]


@dataclass(frozen=True, eq=False)
class Plan:
    """A queue of instructions for one batch of lengths. Made by `plan` or `Plan.load`."""

    seq_lens: npt.NDArray[np.int32]
    """``[B]`` KV length of every request, new tokens included; 0 for an empty request."""
    num_heads: int
    """Query heads, those of all KV heads together."""
    new_tokens: NewTokens
    """New tokens of every request, or one number for each."""
    num_kv_heads: int
    total_tokens: int
    """Rows of tokens in ``q`` and the outputs; those behind the last request's are padding."""
    num_workers: int
    """SMs that it was balanced for; without clusters it is correct with any number."""
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
    group_rows: int = MAX_ROWS
    """Rows of every row group but a request's last: 64, 32 or 16."""
    _on_device: dict[torch.device, torch.Tensor] = field(
        default_factory=dict, init=False, repr=False
    )
    _queues: dict[torch.device, native.Queue] = field(default_factory=dict, init=False, repr=False)
    _proved: bool = field(default=False, init=False, repr=False)
    cluster_ctas: int = field(default=1, init=False)
    """SMs of a cluster that may share a partial; 1: none do."""
    binding: object = field(default_factory=object, init=False, repr=False)
    """Stands for what a launch needs of the plan: the same object, the same words and sizes."""

    def __post_init__(self) -> None:
        mates, size = find_mates(self.instructions)
        object.__setattr__(self, "cluster_ctas", size)
        if size > 1 and (self.num_workers % size or self.num_workers <= mates[-1]):
            # One of them would run in another cluster, or not as its SM's first instruction.
            raise ScheduleError(
                f"num_workers: expected a multiple of {size}, the mates of a partial, above "
                f"{mates[-1]}, the place of the last one, got {self.num_workers}"
            )
        # Read once: `torch.compile` cannot trace the first reading.
        _ = self.fit_key, self.max_seq_len, self._length_list

    @property
    def batch(self) -> int:
        """Number of requests."""
        return int(self.seq_lens.size)

    @property
    def heads_per_kv(self) -> int:
        """Query heads of one KV head: the ``num_heads`` of the words."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_instructions(self) -> int:
        """Instructions in the queue."""
        return int(self.instructions.shape[0])

    @cached_property
    def slot_rows(self) -> int:
        """Rows of a scratch slot: those of the largest row group, by which a kernel is chosen.

        So where new tokens differ a batch-invariant plan counts with the most that there may be,
        whatever the neighbours of a request have.
        """
        invariant = self._is_ragged and self.policy == "batch_invariant"
        tokens = MAX_NEW_TOKENS if invariant else self.max_new_tokens
        return min(self.group_rows, tokens * self.heads_per_kv)

    @property
    def shares_keys(self) -> bool:
        """Whether several row groups of a request read the same keys."""
        return self.max_new_tokens * self.heads_per_kv > self.group_rows

    @cached_property
    def max_new_tokens(self) -> int:
        """Most new tokens of a request, at least 1."""
        return max(1, *self.tokens) if self._is_ragged else self.tokens[0]

    @property
    def floor_us(self) -> float:
        """See `mla_decode.cost.floor_us`."""
        return cost.floor_us(
            self.seq_lens.tolist(), self.num_heads, self.new_tokens, self.num_kv_heads
        )

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch, flags and queue state that it needs."""
        return workspace_bytes(self.num_slots, self.slot_rows)

    @property
    def _is_ragged(self) -> bool:
        return isinstance(self.new_tokens, tuple)

    @property
    def tokens(self) -> tuple[int, ...]:
        """New tokens of every request."""
        if isinstance(self.new_tokens, tuple):
            return self.new_tokens
        return (self.new_tokens,) * self.batch

    def decoded(self) -> list[Instruction]:
        """The instructions, unpacked."""
        return decode_queue(self.instructions)

    def partials_per_request(self) -> list[int]:
        """Pieces that every request's keys were cut into (per row group)."""
        pieces: list[set[int]] = [set() for _ in range(self.batch)]
        for instruction in self.decoded():
            if isinstance(instruction, Partial) and instruction.mate == 0:
                pieces[instruction.q_batch % self.batch].add(instruction.start)
        return [len(starts) for starts in pieces]

    def summary(self) -> str:
        """The schedule in short, on one line."""
        kinds = Counter(type(instruction) for instruction in self.decoded())
        others = "".join(
            f", {kinds[kind]} {name}"
            for kind, name in ((Fill, "fills"), (Noop, "no-ops"))
            if kinds[kind]
        )
        multiple = self.predicted_us / self.floor_us
        groups = f", rows in groups of {self.group_rows}" if self.group_rows < MAX_ROWS else ""
        return (
            f"{self.num_instructions} instructions ({kinds[Partial]} partials, "
            f"{kinds[Reduction]} reductions{others}{groups}) on {self.num_workers} workers, "
            f"{self.num_slots} scratch slots, "
            f"policy {self.policy}, predicted {self.predicted_us:.1f} us ({multiple:.2f} x floor)"
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
                self.instructions,
                sequence_values(self.seq_lens, self.num_kv_heads),
                self.heads_per_kv,
                sequence_tokens(self.new_tokens, self.num_kv_heads),
                self.num_slots,
                total_tokens=self.total_tokens * self.num_kv_heads,
                num_kv_heads=self.num_kv_heads,
                group_rows=self.group_rows,
            )
        object.__setattr__(self, "_proved", True)

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

    def queue(self, device: torch.device) -> native.Queue:
        """The words on ``device``.

        Raises
        ------
        ScheduleError
            The queue came from elsewhere than the planner and breaks a rule.
        """
        known = self._queues.get(device)
        if known is None:
            if not self._proved:
                self.validate()
            words = self.to(device)
            known = self._queues[words.device] = native.Queue(
                words.data_ptr(), int(words.shape[0]), is_constant=True
            )
        return known

    def workspace(self, device: torch.device | str) -> Workspace:
        """A new workspace of the size that this plan needs."""
        return Workspace(device, self.num_slots, self.slot_rows)

    @cached_property
    def max_seq_len(self) -> int:
        """The longest request's KV length."""
        return int(self.seq_lens.max(initial=0))

    @cached_property
    def fit_key(self) -> _FitKey:
        """What decides whether the plan fits the shapes of a call; see `require_fits`."""
        s_q = self.tokens[0] if len(set(self.tokens)) == 1 else 0
        return (self.batch, s_q, self.total_tokens, self.num_heads, self.num_kv_heads)

    def require_capacity(self, capacity: int, where: str) -> None:
        """Check that the block ids of a call can name the longest request's blocks.

        Raises
        ------
        RangeError
            They cannot; ``where`` says what they are.
        """
        if self.max_seq_len > capacity:
            raise RangeError(
                f"seq_lens: expected at most {capacity} ({where}), got {self.max_seq_len}"
            )

    def require_fits(
        self, batch: int, s_q: int, total_tokens: int, num_heads: int, num_kv_heads: int
    ) -> None:
        """Check that the plan was made for a call of these sizes.

        Parameters
        ----------
        batch, total_tokens, num_heads, num_kv_heads
            Of the call.
        s_q : int
            New tokens of every request; 0 for a call with ``cu_seqlens_q``.

        Raises
        ------
        ScheduleError
            It was made for others.
        """
        require_fits(self.fit_key, (batch, s_q, total_tokens, num_heads, num_kv_heads))

    @cached_property
    def _length_list(self) -> list[int]:
        return list(map(int, self.seq_lens.tolist()))

    def holds(self, seq_lens: list[int]) -> bool:
        """Whether these are the plan's lengths; quick, and False may mean anything."""
        return seq_lens == self._length_list and set(map(type, seq_lens)) == {int}

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
                num_kv_heads=self.num_kv_heads,
                total_tokens=self.total_tokens,
                num_workers=self.num_workers,
                policy=self.policy,
                split_tiles=self.split_tiles,
                instructions=self.instructions,
                num_slots=self.num_slots,
                predicted_us=self.predicted_us,
                worker=self.worker,
                start_us=self.start_us,
                end_us=self.end_us,
                group_rows=self.group_rows,
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
    new_tokens: int | SeqLens = 1,
    *,
    num_kv_heads: int = 1,
    total_tokens: int | None = None,
    num_workers: int | None = None,
    device: torch.device | str | None = None,
    policy: str = "balanced",
    split_tiles: int = 0,
    batch_invariant: bool = False,
    clusters: bool = True,
    group_rows: int | None = None,
    cost_model: CostModel | None = None,
    validate: bool = False,
) -> Plan:
    """Schedule MLA decode of a batch, on the CPU. On the GPU, see `mla_decode.DevicePlan`.

    Parameters
    ----------
    seq_lens : list of int, ndarray or Tensor
        ``[B]`` KV length of every request, its new tokens included; 0 for an empty request,
        whose output is 0.
    num_heads : int
        Query heads on this GPU, those of all KV heads together: 1 to 128 for each KV head.
    new_tokens : int, list of int, ndarray or Tensor
        New tokens per request, 1 to 16; or one number from 0 to 16 for each request.
    num_kv_heads : int
        KV heads, a divisor of ``num_heads``. Query head ``h`` belongs to KV head
        ``h // (num_heads // num_kv_heads)``.
    total_tokens : int, optional
        Rows of tokens in ``q``, at least the sum of the new tokens; those behind it are
        padding and get zeros. The sum when None.
    num_workers : int, optional
        SMs to balance for; those of ``device`` when None, 132 without a GPU.
    device : device, optional
        GPU to plan for: its SM count and its cost model. The current one when None.
    policy : str
        ``balanced`` cuts the keys in pieces of equal cost and keeps the best simulated
        size; ``backward`` grows reduction trees while `__get_quality__` says that it helps;
        ``unsplit`` cuts nothing; ``fixed`` cuts every ``split_tiles`` tiles of 64 tokens;
        ``batch_invariant`` does too, and slices the merges of a request by its own pieces.
    split_tiles : int
        Tiles per piece: needed by ``fixed``, 16 by default for ``batch_invariant``.
    batch_invariant : bool
        Plan every request by itself, with that policy: where it is cut and in which order its
        pieces are summed depend on its own length alone, so the bits of its output do not
        depend on the rest of the batch, on the number of SMs or on the cost model. What that
        costs is in docs/serving.md.
    clusters : bool
        Let ``balanced`` share pieces among the SMs of a thread-block cluster, where that is
        expected to be faster. Such a plan runs on GPUs only that run as many clusters at a time.
    group_rows : int, optional
        Rows that SMs work on together, 64, 32 or 16 (a row is one query head of one new token).
        Several small groups read the same keys, but are merged faster. When None, ``balanced``
        without a ``cost_model`` takes what is expected to be fastest, all else takes 64.
    cost_model : CostModel, optional
        Microseconds that things take, in kernels for so many rows; by default those fitted on
        ``device``.
    validate : bool
        Validate the queue before returning it. The planner's queues are valid by
        construction, so this is off; `Plan.load` always does.

    Returns
    -------
    Plan

    Raises
    ------
    RangeError, DtypeError, ShapeError
        Lengths that are no integers or negative, an unknown policy, no workers.
    UnsupportedError
        More heads or new tokens than the kernels support.
    """
    lengths = host_seq_lens(seq_lens)
    tokens = host_new_tokens(new_tokens, lengths.size)
    heads = require_heads(num_heads, num_kv_heads)
    total = require_total_tokens(total_tokens, tokens, lengths.size)
    if policy not in POLICIES:
        raise RangeError(f"policy: expected one of {POLICIES}, got {policy!r}")
    if batch_invariant:
        if policy not in ("balanced", "batch_invariant"):
            raise RangeError(
                f"policy: expected 'batch_invariant' or none with batch_invariant, got {policy!r}"
            )
        policy = "batch_invariant"
    if policy == "batch_invariant":
        split_tiles = split_tiles or BATCH_INVARIANT_TILES
    checks.require_int("split_tiles", split_tiles, 1 if policy == "fixed" else 0, 1 << 25)
    gpu = _gpu(device)
    if num_workers is None:
        num_workers = native.num_sms(gpu) if gpu is not None else DEFAULT_NUM_WORKERS
    checks.require_int("num_workers", num_workers, 1, 1 << 16)
    if group_rows is not None and group_rows not in GROUP_ROWS:
        raise RangeError(f"group_rows: expected one of {GROUP_ROWS}, got {group_rows!r}")
    seq_tokens = sequence_tokens(tokens, num_kv_heads)
    device_name = torch.cuda.get_device_name(gpu) if gpu is not None else None
    usable_clusters = clusters_of(gpu) if clusters else ()

    def plan_in_groups(rows: int) -> _scheduler.PlanData:
        most = heads * (tokens if isinstance(tokens, int) else max(tokens, default=0))
        return _scheduler.plan(
            sequence_values(lengths, num_kv_heads),
            heads,
            seq_tokens,
            num_workers,
            cost_model or cost.load(device_name, min(most, rows)),
            policy,
            split_tiles,
            total_tokens=total * num_kv_heads,
            num_kv_heads=num_kv_heads,
            clusters=usable_clusters,
            group_rows=rows,
        )

    sizes = [MAX_ROWS if group_rows is None else group_rows]
    if group_rows is None and policy == "balanced" and cost_model is None:
        rows = np.where(sequence_values(lengths, num_kv_heads) > 0, seq_tokens, 0) * heads
        longest = int(lengths.max(initial=0))
        sizes = sizes_to_plan(rows, longest, num_workers, usable_clusters)
    with schedule_errors():
        chosen, data = sizes[0], plan_in_groups(sizes[0])
        for fewer in sizes[1:]:
            other = plan_in_groups(fewer)
            if other.predicted_us < data.predicted_us:
                chosen, data = fewer, other
    made = Plan(
        seq_lens=lengths,
        num_heads=num_heads,
        new_tokens=tokens,
        num_kv_heads=num_kv_heads,
        total_tokens=total,
        num_workers=int(data.num_workers),
        policy=policy,
        split_tiles=split_tiles,
        instructions=np.ascontiguousarray(data.instructions),
        num_slots=int(data.num_slots),
        predicted_us=float(data.predicted_us),
        worker=np.asarray(data.worker),
        start_us=np.asarray(data.start_us),
        end_us=np.asarray(data.end_us),
        group_rows=chosen,
    )
    object.__setattr__(made, "_proved", True)
    if validate:
        made.validate()
    return made


def clusters_of(gpu: torch.device | None) -> tuple[tuple[int, int], ...]:
    """Sizes of clusters to plan with, and how many run at a time; an H200's without a GPU."""
    if gpu is None:
        return DEFAULT_CLUSTERS
    if native.missing(torch.cuda.current_device() if gpu.index is None else gpu.index):
        return ()
    return tuple((size, native.max_clusters(size, gpu)) for size, _ in DEFAULT_CLUSTERS)


def require_heads(num_heads: int, num_kv_heads: int) -> int:
    """Check head counts; returns the query heads of one KV head.

    Raises
    ------
    UnsupportedError, RangeError
        ``num_heads`` is no multiple of ``num_kv_heads``, or more than 128 times it.
    """
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        checks.require_int(name, value, 1, MAX_HEADS * MAX_KV_HEADS)
    if num_kv_heads > MAX_KV_HEADS:
        raise UnsupportedError(f"num_kv_heads: expected 1 to {MAX_KV_HEADS}, got {num_kv_heads}")
    if num_heads % num_kv_heads:
        raise RangeError(
            f"num_heads: expected a multiple of num_kv_heads = {num_kv_heads}, got {num_heads}"
        )
    heads = num_heads // num_kv_heads
    if heads > MAX_HEADS:
        raise UnsupportedError(
            f"num_heads: expected at most {MAX_HEADS} for each of {num_kv_heads} KV heads, got "
            f"{num_heads}"
        )
    return heads


def require_total_tokens(total_tokens: int | None, tokens: NewTokens, batch: int) -> int:
    """Check the rows of tokens in ``q``; the sum of the new tokens when None.

    Raises
    ------
    RangeError, ShapeError
        Fewer than the new tokens; or padding, where all requests have the same number.
    """
    used = sum(tokens) if isinstance(tokens, tuple) else tokens * batch
    if total_tokens is None:
        return used
    checks.require_int("total_tokens", total_tokens, 0, (1 << 31) - 1)
    if total_tokens < used:
        raise RangeError(
            f"total_tokens: expected at least {used}, the sum of new_tokens, got {total_tokens}"
        )
    if isinstance(tokens, int) and total_tokens != used:
        raise ShapeError(
            f"total_tokens: expected {used} with {tokens} new tokens for every request, got "
            f"{total_tokens}; padding needs new_tokens for each request"
        )
    return total_tokens


def sequence_values(values: npt.NDArray[np.int32], num_kv_heads: int) -> npt.NDArray[np.int32]:
    """Values ``[B]`` of requests as those ``[num_kv_heads * B]`` of sequences."""
    return values if num_kv_heads == 1 else np.tile(values, num_kv_heads)


def sequence_tokens(tokens: NewTokens, num_kv_heads: int) -> int | npt.NDArray[np.int32]:
    """New tokens of requests as those of sequences."""
    if isinstance(tokens, int):
        return tokens
    return sequence_values(np.asarray(tokens, dtype=np.int32), num_kv_heads)


def require_fits(planned: _FitKey, called: _FitKey) -> None:
    """Check a plan's sizes against those of a call, both in the order of `Plan.fit_key`.

    Raises
    ------
    ScheduleError
        Names the first size that differs.
    """
    names = ("requests", "new tokens each", "tokens", "num_heads", "num_kv_heads")
    for name, have, want in zip(names, planned, called, strict=True):
        if name == "new tokens each" and want == 0:
            continue  # what the offsets are is not looked at
        if have != want:
            made_for = f"{have} {name}" if have else "different new tokens per request"
            raise ScheduleError(f"plan: made for {made_for}, the call has {want}")


def describe(instruction: Instruction) -> str:
    """What an instruction does, in a few words."""
    if isinstance(instruction, Partial):
        to = f"slot {instruction.slot}" if instruction.slot is not None else "output"
        rows = f" rows {instruction.row_begin}+{instruction.num_rows or 'group'}"
        shared = instruction.num_mates > 0
        mate = f", mate {instruction.mate} of {instruction.num_mates}" if shared else ""
        adopts = instruction.adopted is not None
        adopted = f", adopts slot {instruction.adopted}" if adopts else ""
        return (
            f"partial  sequence {instruction.q_batch} keys [{instruction.start}, "
            f"{instruction.end}){rows} -> {to}{mate}{adopted}"
        )
    if isinstance(instruction, Reduction):
        to = (
            f"slot {instruction.slot}"
            if instruction.slot is not None
            else f"output of sequence {instruction.dst_batch}"
        )
        columns = instruction.columns()
        first = instruction.head_begin + instruction.row_offset
        return (
            f"reduction of {len(instruction.inputs)}, token {instruction.dst_seq} rows "
            f"{first}+{instruction.num_rows or 'all'} columns "
            f"[{columns.start}, {columns.stop}) -> {to}"
        )
    if isinstance(instruction, Fill):
        return f"fill     tokens [{instruction.token_begin}, {instruction.token_end}) with zeros"
    return "no-op"


class PlanCache:
    """The plans that `decode` made last, by lengths and sizes."""

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._lock = threading.Lock()

    def get(
        self,
        seq_lens: npt.NDArray[np.int32],
        num_heads: int,
        new_tokens: NewTokens,
        num_workers: int | None,
        device: torch.device,
        *,
        num_kv_heads: int = 1,
        total_tokens: int | None = None,
        batch_invariant: bool = False,
    ) -> Plan:
        """The plan of these sizes for this device, made now or before."""
        sizes = (num_heads, new_tokens, num_workers, num_kv_heads, total_tokens, batch_invariant)
        key = (seq_lens.tobytes(), sizes, device)
        made = self._plans.get(key)
        if made is None:
            made = plan(
                seq_lens,
                num_heads,
                new_tokens,
                num_kv_heads=num_kv_heads,
                total_tokens=total_tokens,
                num_workers=num_workers,
                device=device if device.type == "cuda" else None,
                batch_invariant=batch_invariant,
            )
        with self._lock:
            self._plans[key] = made  # another thread may have evicted it
            self._plans.move_to_end(key)
            if len(self._plans) > self._capacity:
                self._plans.popitem(last=False)
        return made


def _gpu(device: torch.device | str | None) -> torch.device | None:
    """The CUDA device to plan for; None without one."""
    if device is not None:
        try:
            chosen = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise DeviceError(f"device: expected a device, got {device!r}: {error}") from None
        if chosen.type != "cuda":
            return None
        if not torch.cuda.is_available():
            raise DeviceError(f"device: expected one of this machine, got {chosen}: no CUDA GPU")
        return chosen
    return torch.device("cuda") if torch.cuda.is_available() else None
