"""Planner, simulator and validator of MLA decode queues (C++).

Times are microseconds. Instruction words are those of ``instructions/layout.h``. Everything counts
sequences: one KV head of one request each, ``sequence = kv_head * num_requests + request``. Flat
tokens are the first dimension of the outputs: those of one KV head, request after request, with
padding behind them, then those of the next.
"""

from collections.abc import Sequence
from typing import Final, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

INSTRUCTION_WORDS: Final[int]
QUEUE_VERSION: Final[int]
OPCODE_END_OF_QUEUE: Final[int]
OPCODE_NOOP: Final[int]
OPCODE_MLA_PARTIAL: Final[int]
OPCODE_MLA_REDUCTION: Final[int]
OPCODE_MLA_FILL: Final[int]
LATENT_DIM: Final[int]
ROPE_DIM: Final[int]
KV_TILE: Final[int]
MAX_ROWS: Final[int]
NARROW_ROWS: Final[int]
NARROWEST_ROWS: Final[int]
MAX_REDUCTION_INPUTS: Final[int]
MAX_MATES: Final[int]
MAX_RUN_INPUTS: Final[int]
COLUMN_CHUNK: Final[int]
MAX_HEADS: Final[int]
MAX_NEW_TOKENS: Final[int]
MAX_WORKERS: Final[int]

WORDS: Final[dict[str, tuple[str, ...]]]
"""Field names by opcode name; word ``i`` is field ``i``, what has no name is 0.

A reduction with bit 31 of ``shape`` has the fields of ``"mla_reduction_run"``.
"""

RULES: Final[dict[str, str]]
"""Names of the validator's rules, and what each demands."""

POLICIES: Final[tuple[str, ...]]

_Integers = Sequence[int] | npt.NDArray[np.integer]
_Words = npt.NDArray[np.int32]

class ScheduleError(ValueError):
    """A queue breaks a rule. The message ends in ``(rule: <name>)``."""

class _CostFields(TypedDict, total=False):
    launch_us: float
    instruction_us: float
    partial_fixed_us: float
    partial_next_us: float
    partial_store_kib_us: float
    mates_fixed_us: float
    mates_kib_us: float
    mates_flag_us: float
    adopt_fixed_us: float
    adopt_kib_us: float
    partial_tile_us: float
    partial_tile_compute_us: float
    partial_tile_contention_us: float
    reduction_fixed_us: float
    reduction_next_us: float
    reduction_stamps_us: float
    reduction_kib_us: float
    dependency_us: float

class CostModel:
    """What things cost on one GPU, in microseconds; immutable.

    Attributes
    ----------
    launch_us
        Until the CTAs of a launch hold their first instructions.
    instruction_us
        Fetch and decode of one instruction when nothing hides it; all of a no-op.
    partial_fixed_us, partial_next_us
        A partial before its first tile, as an SM's first instruction and as a later one.
    partial_store_kib_us
        One KiB of a partial's result: 2 KiB per row in scratch, 1 KiB in the output.
    mates_fixed_us, mates_kib_us
        What mates take to merge a partial that they share; and one KiB of what one sends, counted
        as floats.
    mates_flag_us
        What they take longer than that where their result is merged further.
    adopt_fixed_us, adopt_kib_us
        What a partial takes to adopt another's result; and one KiB of that, 2 KiB per row.
    partial_tile_us
        One 64-token KV tile, if the memory did nothing else. Streaming SMs share this.
    partial_tile_compute_us
        The least time per tile of one SM, alone on the machine.
    partial_tile_contention_us
        What every other SM that streams adds to that.
    reduction_fixed_us, reduction_next_us
        A reduction without its bytes, after waiting, and right after another instruction.
    reduction_stamps_us
        What a reduction takes less, having waited, that finds its inputs by their stamps.
    reduction_kib_us
        One KiB of a reduction's input.
    dependency_us
        From the end of an instruction until a waiting SM has seen its flag.
    """

    launch_us: float
    instruction_us: float
    partial_fixed_us: float
    partial_next_us: float
    partial_store_kib_us: float
    mates_fixed_us: float
    mates_kib_us: float
    mates_flag_us: float
    adopt_fixed_us: float
    adopt_kib_us: float
    partial_tile_us: float
    partial_tile_compute_us: float
    partial_tile_contention_us: float
    reduction_fixed_us: float
    reduction_next_us: float
    reduction_stamps_us: float
    reduction_kib_us: float
    dependency_us: float

    def __init__(self, **fields: Unpack[_CostFields]) -> None:
        """Fields that are not named keep their defaults.

        Raises
        ------
        ValueError
            An unknown field, or a time that is negative or not finite.
        """

    @staticmethod
    def from_dict(values: dict[str, float]) -> CostModel:
        """The inverse of `as_dict`; absent fields keep their defaults."""

    def as_dict(self) -> dict[str, float]: ...

class PlanData:
    """A queue and what the simulation predicts for it.

    Attributes
    ----------
    instructions
        ``[n, 32]`` int32, without an end of queue.
    num_slots
        Scratch slots that the queue writes.
    num_workers
        CTAs that it was planned for. Any number runs it, if nothing is shared by mates.
    predicted_us
        From the launch to the end of the last instruction; 0 for an empty batch.
    worker, start_us, end_us
        ``[n]`` int32, float32, float32: the predicted SM and times of each instruction.
    """

    @property
    def instructions(self) -> _Words: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def predicted_us(self) -> float: ...
    @property
    def worker(self) -> npt.NDArray[np.int32]: ...
    @property
    def start_us(self) -> npt.NDArray[np.float32]: ...
    @property
    def end_us(self) -> npt.NDArray[np.float32]: ...

def plan(
    seq_lens: _Integers,
    num_heads: int,
    new_tokens: int | _Integers,
    num_workers: int,
    cost: CostModel,
    policy: str = "balanced",
    split_tiles: int = 0,
    total_tokens: int | None = None,
    num_kv_heads: int = 1,
    clusters: Sequence[tuple[int, int]] = (),
    group_rows: int = MAX_ROWS,
) -> PlanData:
    """Plan a batch.

    Parameters
    ----------
    seq_lens
        KV length of each sequence, its new tokens included; 0: it is empty, and its tokens are
        filled.
    num_heads
        Query heads per KV head, 1 to 128.
    new_tokens
        Of every sequence, 1 to 16; or of each, 0 to 16.
    num_workers
        SMs.
    policy
        One of `POLICIES`. ``"balanced"`` keeps the best of many cuts by simulation,
        ``"backward"`` grows a reduction tree per sequence while `get_quality` rises,
        ``"unsplit"`` leaves sequences whole, ``"fixed"`` cuts every `split_tiles` tiles.
        ``"batch_invariant"`` does so as well, and slices a sequence's reductions by its own rows
        and pieces: of its instructions only slots, uids and places in the queue depend on the
        rest of the batch.
    split_tiles
        KV tiles of 64 tokens per piece. ``"fixed"`` needs it, 0 is 16 for ``"batch_invariant"``,
        the others ignore it.
    total_tokens
        Flat tokens of the outputs, all KV heads; those that no sequence has are filled. None:
        the sum of `new_tokens`.
    num_kv_heads
        A divisor of ``len(seq_lens)`` and of `total_tokens`.
    clusters
        SMs of a cluster, 2, 4 or 8, and how many such run at a time. Where it is better,
        ``"balanced"`` lets those of one size share partials, and then uses no other SMs.
    group_rows
        Rows of every row group but a sequence's last: 16, 32 or 64. `cost` is that of kernels for
        so many.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came.
    """

def validate(
    instructions: _Words,
    seq_lens: _Integers,
    num_heads: int,
    new_tokens: int | _Integers,
    num_slots: int,
    batch: int | None = None,
    total_tokens: int | None = None,
    num_kv_heads: int = 1,
    group_rows: int = MAX_ROWS,
) -> None:
    """Prove that a queue computes the batch's attention and cannot deadlock.

    Parameters
    ----------
    instructions
        ``[n, 32]`` int32. Untrusted: any words are safe to pass.
    seq_lens, num_heads, new_tokens, total_tokens, num_kv_heads, group_rows
        As in `plan`.
    num_slots
        Scratch slots that exist.
    batch
        Sequences that the tensors hold; None: ``len(seq_lens)``.

    Raises
    ------
    ScheduleError
        The first violation, naming instruction, uid and rule (see `RULES`).
    ValueError, TypeError
        As `plan`.
    """

def simulate(
    instructions: _Words,
    num_heads: int,
    new_tokens: int | _Integers,
    num_workers: int,
    cost: CostModel,
    group_rows: int = MAX_ROWS,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32], float]:
    """Predict a queue's execution under the GPU's policy of tickets in queue order.

    Parameters
    ----------
    new_tokens
        Of every sequence, or of each.

    Returns
    -------
    worker, start_us, end_us
        ``[n]`` per instruction, up to the end of the queue if it has one.
    makespan_us
        End of the last instruction.

    Raises
    ------
    ScheduleError
        An unknown opcode, a sequence that `new_tokens` lacks, or an input that no earlier
        instruction writes.
    """

def group_rows_of(slot_rows: int) -> int:
    """Rows of every row group but a sequence's last, by those of a scratch slot."""

def get_quality(
    next_times: Sequence[float],
    num_processors: int,
    num_tokens: int,
    seq_length: int,
) -> float:
    """Estimated start of the earliest partial, counted back from the finish.

    Partials of one sequence, one on each processor, feed ``len(next_times)`` reductions
    for each new token. Each takes the latest time at which an input is still wanted; a
    reduction wants its next input at ``next_times[i]``, and further ones earlier and
    earlier. The sequence's tiles are dealt out so that the earliest start is latest.
    The formula is in ``scheduler/quality.h``.

    Parameters
    ----------
    next_times
        When each reduction's next input is due; the finish is 0, so usually negative.
    num_processors
        Processors that work on the sequence.
    num_tokens, seq_length
        New tokens and KV length of the sequence.

    Returns
    -------
    float
        Higher is better; -999999999.0 if there are more reductions than processors.
    """

DEVICE_PLAN_HEADER_WORDS: Final[int]

def device_plan_capacity(
    *,
    num_requests: int,
    num_kv_heads: int,
    s_q: int,
    total_tokens: int,
    num_heads: int,
    max_seq_len: int,
    num_workers: int,
    split_tiles: int,
    group_rows: int = MAX_ROWS,
) -> tuple[int, int]:
    """Rows of instructions, end marks included, and slots that `device_plan` may need."""

def device_plan(
    *,
    seq_lens: _Words,
    cu_seqlens_q: _Words | None,
    num_kv_heads: int,
    s_q: int,
    total_tokens: int,
    num_heads: int,
    max_seq_len: int,
    num_workers: int,
    split_tiles: int,
    cluster_ctas: int,
    group_rows: int = MAX_ROWS,
    cost: Sequence[float],
    instructions: _Words,
    header: _Words,
) -> None:
    """Plan on the CPU as the GPU does, word for word.

    Parameters
    ----------
    seq_lens, cu_seqlens_q
        ``[B]`` and ``[B + 1]`` int32, by request; without the latter all have `s_q` tokens.
    total_tokens
        Of one KV head, padding included.
    cluster_ctas
        SMs of a cluster that may share partials, a divisor of `num_workers`; 1: none do.
    group_rows
        As of `plan`.
    cost
        The values of `CostModel.as_dict`, in its order.
    instructions, header
        Written: the queue with its end marks, and instructions, slots, bad lengths.
    """
