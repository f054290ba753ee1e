"""Executes a queue's words on CPU tensors, in queue order or under an interleaving.

It models what is shared between SMs: the ticket counter, the completion flags with their
epochs, the order in which each CTA finishes its own instructions. A CTA takes its next
instruction while it still runs one, as on the GPU. What runs here under every interleaving,
the GPU can run without a deadlock and with the same result.
"""

from __future__ import annotations

import enum
import random
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from . import checks, numerics
from .arguments import KernelArguments
from .errors import DeadlockError, DeviceError
from .words import Fill, Instruction, Partial, Reduction, decode_queue

# Words of the queue state, as megakernel/args.h lays them out.
STATE_NEXT_TICKET = 0
STATE_EPOCH = 1
STATE_FAILED_EPOCH = 3

PREFETCH = 1  # instructions that a worker may hold besides the one that it runs


class _Action(enum.Enum):
    TAKE = "take"
    EXECUTE = "execute"
    PUBLISH = "publish"


@dataclass(frozen=True)
class Step:
    """One instruction as it was executed: who and when, in steps of the interleaving."""

    index: int
    worker: int
    executed: int
    published: int


@dataclass(frozen=True)
class Run:
    """What an interpreted launch did."""

    epoch: int
    steps: tuple[Step, ...]
    """In the order of publication."""


@dataclass
class _Worker:
    """A CTA: instructions that it has taken and not finished, oldest first."""

    number: int
    held: deque[int] = field(default_factory=deque)
    executed_at: int | None = None
    started: bool = False
    drained: bool = False


@dataclass
class _Mates:
    """Partials that share a destination: the last to execute writes it for all."""

    states: dict[int, numerics.State] = field(default_factory=dict)  # by mate
    published: int = 0


def run(
    arguments: KernelArguments,
    *,
    num_workers: int = 1,
    seed: int | None = None,
) -> Run:
    """Execute ``arguments.instructions``; writes what the kernel would write.

    Parameters
    ----------
    arguments : KernelArguments
        CPU tensors, checked.
    num_workers : int
        Workers that share the queue.
    seed : int or None
        None steps the workers in turn; with one worker that is queue order. A seed picks
        a random worker and step each time, among those that may go on.

    Returns
    -------
    Run
        Who executed what, and in which order. What was written has no gradient.

    Raises
    ------
    DeadlockError
        No worker can go on; names what each one waits for. The queue state is left as a
        launch that failed leaves it: the next launch works.
    RangeError
        A block id inside a request's length lies outside the cache.
    """
    if arguments.device.type != "cpu":
        raise DeviceError(f"interpreter: expected CPU tensors, got {arguments.device}")
    checks.require_int("num_workers", num_workers, 1, 1 << 16)
    with _one_thread(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _Interpreter(arguments, num_workers, seed).run()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Instructions are small: on a busy machine, threads that wait for each other cost ten
    times what they save (demo batch, 2 cores: 0.2 s alone, 9 s beside a compiler)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Interpreter:
    def __init__(self, arguments: KernelArguments, num_workers: int, seed: int | None) -> None:
        self.arguments = arguments
        self.queue: list[Instruction] = decode_queue(arguments.instructions.numpy())
        self.state = arguments.queue_state
        self.epoch = _int32(int(self.state[STATE_EPOCH]) + arguments.tic + 1)
        self.workers = [_Worker(number) for number in range(num_workers)]
        self.random = None if seed is None else random.Random(seed)
        self.clock = 0
        self.actions = (_Action.PUBLISH, _Action.EXECUTE, _Action.TAKE)
        self.flags = arguments.completion_flag.numpy()
        self.kv_rows = numerics.KvCache(arguments)
        self.mates: defaultdict[int, _Mates] = defaultdict(_Mates)  # by the position of mate 0
        self.steps: list[Step] = []
        if arguments.timings is not None:
            arguments.timings.zero_()

    def run(self) -> Run:
        try:
            while not all(worker.drained and not worker.held for worker in self.workers):
                self._step()
                self.clock += 1
        except DeadlockError:
            self.state[STATE_FAILED_EPOCH] = self.epoch
            raise
        finally:
            self.state[STATE_NEXT_TICKET] = 0
            self.state[STATE_EPOCH] = self.epoch
        return Run(self.epoch, tuple(self.steps))

    # One step: some worker takes a ticket, executes, or publishes.

    def _step(self) -> None:
        if self.random is None:
            self._step_in_turn()
            return
        # Draw until something is possible: cheap, and uniform over what is possible.
        for _ in range(4 * len(self.workers)):
            worker = self.random.choice(self.workers)
            action = self.random.choice(self.actions)
            if self._possible(worker, action):
                self._act(worker, action)
                return
        choices = [(w, a) for w in self.workers for a in self.actions if self._possible(w, a)]
        if not choices:
            raise DeadlockError(self._explain())
        self._act(*self.random.choice(choices))

    def _step_in_turn(self) -> None:
        progressed = False
        for worker in self.workers:
            for action in self.actions:
                if self._possible(worker, action):
                    self._act(worker, action)
                    progressed = True
                    break
        if not progressed:
            raise DeadlockError(self._explain())

    def _possible(self, worker: _Worker, action: _Action) -> bool:
        if action is _Action.TAKE:
            return not worker.drained and len(worker.held) <= PREFETCH
        if not worker.held:
            return False
        if action is _Action.PUBLISH:
            return worker.executed_at is not None
        return worker.executed_at is None and not self._missing(worker.held[0]).size

    def _act(self, worker: _Worker, action: _Action) -> None:
        if action is _Action.TAKE:
            self._take(worker)
        elif action is _Action.EXECUTE:
            self._execute(worker)
        else:
            self._publish(worker)

    def _take(self, worker: _Worker) -> None:
        if worker.started:
            ticket = int(self.state[STATE_NEXT_TICKET])
            self.state[STATE_NEXT_TICKET] = ticket + 1
            index = len(self.workers) + ticket
        else:
            worker.started = True
            index = worker.number  # the first instruction needs no ticket
        if index < len(self.queue):
            worker.held.append(index)
            self._record(index, {0: worker.number + 1, 1: _now()})
        else:
            worker.drained = True

    def _execute(self, worker: _Worker) -> None:
        index = worker.held[0]
        instruction = self.queue[index]
        begin = _now()
        if isinstance(instruction, Partial):
            self._run_partial(index, instruction)
        elif isinstance(instruction, Reduction):
            numerics.run_reduction(self.arguments, instruction)
        elif isinstance(instruction, Fill):
            numerics.run_fill(self.arguments, instruction)
        end = _now()
        self._record(index, {2: begin, 3: begin, 4: begin, 5: end, 6: end})
        worker.executed_at = self.clock

    def _run_partial(self, index: int, partial: Partial) -> None:
        state = numerics.attend(self.arguments, partial, self.kv_rows)
        if partial.num_mates:
            states = self.mates[index - partial.mate].states
            states[partial.mate] = state
            if len(states) < partial.num_mates:
                return
            # In their order, not that of execution: every interleaving gives the same bits.
            state = numerics.merge([states[mate] for mate in range(partial.num_mates)])
            states.clear()
        state = numerics.adopt(self.arguments, partial, state)
        numerics.store_partial(self.arguments, partial, state)

    def _publish(self, worker: _Worker) -> None:
        index = worker.held.popleft()
        executed, worker.executed_at = worker.executed_at, None
        assert executed is not None
        slot = self.queue[index].slot
        if slot is not None and self._is_last(index):
            self.flags[slot] = self.epoch
        self._record(index, {7: _now()})
        self.steps.append(Step(index, worker.number, executed, self.clock))

    def _is_last(self, index: int) -> bool:
        """Count an instruction as published; whether all its mates are, if it has any."""
        instruction = self.queue[index]
        if not isinstance(instruction, Partial) or not instruction.num_mates:
            return True
        mates = self.mates[index - instruction.mate]
        mates.published += 1
        return mates.published == instruction.num_mates

    # What instructions wait for.

    def _missing(self, index: int) -> npt.NDArray[np.intp]:
        """Positions of the inputs whose flags an instruction still waits for."""
        slots = numerics.slot_index(self.queue[index].inputs)
        return np.flatnonzero(self.flags[slots] != self.epoch)

    def _explain(self) -> tuple[str, ...]:
        lines = []
        for worker in self.workers:
            if not worker.held:
                continue
            index = worker.held[0]
            instruction = self.queue[index]
            kind = "partial" if isinstance(instruction, Partial) else "reduction"
            slot = instruction.inputs[self._missing(index)[0]]
            lines.append(
                f"worker {worker.number}: instruction {index} (uid {instruction.uid}, {kind}) "
                f"waits for flag [slot {slot}] == {self.epoch}, sees {self.flags[slot]}: "
                f"{self._explain_writer(slot)}"
            )
        return tuple(lines)

    def _explain_writer(self, slot: int) -> str:
        holders = {index: worker for worker in self.workers for index in worker.held}
        published = {step.index for step in self.steps}  # mates, before the last of them
        for index, instruction in enumerate(self.queue):
            if instruction.slot != slot or index in published:
                continue
            uid = instruction.uid
            if index not in holders:
                return f"uid {uid} writes it, at position {index} that no free worker can reach"
            holder = holders[index]
            return f"uid {uid} writes it, held by worker {holder.number} behind its own wait"
        return "nothing in the queue writes it"

    def _record(self, index: int, words: dict[int, int]) -> None:
        timings = self.arguments.timings
        if timings is not None:
            for word, value in words.items():
                timings[index, word] = value


def _now() -> int:
    """Low 32 bits of a nanosecond clock, as a signed int32."""
    return _int32(time.perf_counter_ns())


def _int32(value: int) -> int:
    """``value`` wrapped around as the GPU's counters wrap."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
