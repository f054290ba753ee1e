"""Stamped partial results, those of kernels for 16 rows: what lies in scratch, and merges of it."""

from __future__ import annotations

from dataclasses import replace

import mla_decode
import pytest
import torch
from mla_decode.reference import Case, attention, compare, make_case
from mla_decode.words import KV_TILE, Instruction, Partial, Reduction

from tests.support import Launch, cut, pack, require_attention, run_queue, same_bits
from tests.test_adoption import chained
from tests.test_mates import shared

pytestmark = pytest.mark.gpu

STAMPED, NARROW, WIDE = 16, 32, 64  # rows of a row group


def words_of(launch: Launch, rows: int) -> torch.Tensor:
    """What rows of all slots hold, four columns at a time: bits ``[slots, rows, 128, 4]``."""
    return launch.o_scratch[:, :rows].view(torch.int32).unflatten(-1, (128, 4)).cpu()


def joined(parts: torch.Tensor, bits: int) -> torch.Tensor:
    """Parts of so many bits in the last dimension, the lowest first, as one int32."""
    shifts = torch.arange(parts.shape[-1]) * bits
    return (parts.long() << shifts).sum(-1).to(torch.int32)


def stamps_of(words: torch.Tensor) -> torch.Tensor:
    """``[slots, rows, 128]``"""
    return joined(words & 0xFF, 8)


def lses_of(words: torch.Tensor) -> torch.Tensor:
    """``[slots, rows, 32]``: as often as a row holds its LSE."""
    pairs = words >> 8 & 3  # [.., 4 of 16 bytes, column]: bits 8 * column + 2 * which
    return joined(pairs.unflatten(2, (32, 4)).transpose(-1, -2).flatten(-2), 2).view(torch.float32)


def queues(heads: int, tokens: int = 1) -> dict[str, tuple[Case, list[Instruction], int]]:
    """Queues whose slots are written in all the ways that there are."""
    case = make_case([1300, 700], heads, tokens, device="cuda")
    plain, num_slots = cut(case, 3)
    merged = [i for i in plain if isinstance(i, Reduction)]
    # Its first two inputs by a reduction of their own, to a slot that it reads instead.
    first = merged[0]
    slots = list(first.inputs)
    to_slot = replace(
        first, uid=num_slots, dst_batch=-num_slots - 1, inputs=tuple(slots[:2]), row_offset=0
    )
    rest = replace(first, inputs=(*slots[2:], num_slots), row_offset=0)
    levels = [*[i for i in plain if i not in merged], to_slot, rest, *merged[1:]]
    return {
        "partials": (case, plain, num_slots),
        "levels": (case, levels, num_slots + 1),
        "adoption": (case, *chained(case, 3, 2)),
        "mates": (case, *shared(case, 2, 3)),
    }


KINDS = ("partials", "levels", "adoption", "mates")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", (16, 8, 5))
def test_scratch_bears_the_stamp_and_the_lse(heads: int, kind: str) -> None:
    case, queue, num_slots = queues(heads)[kind]
    launch = require_attention(run_queue(case, queue, num_slots))
    epoch = int(launch.global_instruction_index[1])
    words = words_of(launch, heads)
    assert bool((stamps_of(words) == 2 * epoch + 1).all())
    lse = launch.lvec_scratch[:, :heads].cpu()
    assert same_bits(lses_of(words), lse[..., None].expand(-1, -1, 32).contiguous())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", (NARROW, WIDE))
def test_other_kernels_write_what_is_no_stamp(heads: int, kind: str) -> None:
    case, queue, num_slots = queues(heads)[kind]
    launch = require_attention(run_queue(case, queue, num_slots))
    words = words_of(launch, heads)
    assert bool((words[..., 0] & 1 == 0).all())
    assert bool((words[..., 1:] & 1 == 1).any()), "the other columns keep all of their bits"


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_epoch(kind: str) -> None:
    """The stamp is in the inputs' last bits; nothing of it is in the output's."""
    case, queue, num_slots = queues(STAMPED)[kind]
    launch = run_queue(case, queue, num_slots)
    first = launch.o.clone(), launch.lse.clone()
    for tic in (0, 1, 0x5A5A5A, 0x7FFFFFFF - 0x1000000):
        launch.poison()
        launch.tensors["tic"] = tic
        launch.run()
        assert same_bits(launch.o, first[0])
        assert same_bits(launch.lse, first[1])


def test_what_earlier_launches_left_is_not_taken() -> None:
    """Launches of all three kernels take turns with one scratch, with other queries each time."""
    cases = [make_case([9000], heads, device="cuda", seed=heads) for heads in (16, 64, 32, 8)]
    queues = [cut(case, 2) for case in cases]
    num_slots = max(slots for _, slots in queues)
    workspace = mla_decode.Workspace("cuda", num_slots, WIDE)
    for turn in range(3):
        for case, (queue, slots) in zip(cases, queues, strict=True):
            case.q.mul_(-1)
            launch = Launch.of(case, pack(*queue), slots)
            views = workspace.views(slots, case.heads_per_kv)
            launch.tensors |= {
                "global_instruction_index": views.queue_state,
                "o_scratch": views.o_scratch,
                "lvec_scratch": views.lvec_scratch,
                "completion_flag": views.completion_flag,
            }
            launch.run()
            errors = compare(*launch.result(), *attention(case))
            assert errors.passed, (turn, case.heads_per_kv, errors)


def sliced(
    case: Case, tiles: int, rows: int, columns: int, listed: bool
) -> tuple[list[Instruction], int]:
    """The queue of `cut`, merges in slices of so many rows and columns."""
    queue, num_slots = cut(case, tiles)
    slices: list[Instruction] = []
    for merge in (i for i in queue if isinstance(i, Reduction)):
        of_case = case.heads_per_kv * case.tokens[0]
        for row in range(0, of_case, rows):
            for col in range(0, 512, columns):
                at = {"num_rows": min(rows, of_case - row), "col_begin": col, "num_cols": columns}
                uid = 3_000_000 + len(slices)
                if listed:
                    inputs = tuple(merge.inputs)
                    made = replace(
                        merge, uid=uid, inputs=inputs, row_offset=0, head_begin=row, **at
                    )
                else:
                    made = replace(merge, uid=uid, row_offset=row, **at)
                slices.append(made)
    return [i for i in queue if not isinstance(i, Reduction)] + slices, num_slots


# Around 16 chunks, 8 and 16 inputs of a team, and as many teams as share a chunk.
@pytest.mark.parametrize("inputs", (2, 7, 8, 9, 16, 17, 31, 33, 128, 129, 255, 256, 257, 300))
@pytest.mark.parametrize(("rows", "columns"), ((1, 64), (1, 512), (2, 512), (3, 256), (16, 64)))
def test_merges_of_all_sizes(inputs: int, rows: int, columns: int) -> None:
    case = make_case([inputs * KV_TILE - 5], 16, device="cuda")
    queue, num_slots = sliced(case, 1, rows, columns, listed=False)
    assert num_slots == inputs
    require_attention(run_queue(case, queue, num_slots))


@pytest.mark.parametrize("inputs", (2, 9, 27))
def test_merges_of_listed_inputs(inputs: int) -> None:
    sinks = torch.linspace(-3, 9, 16)
    case = make_case([inputs * KV_TILE - 5], 16, attn_sink=sinks, device="cuda")
    require_attention(run_queue(case, *sliced(case, 1, 2, 512, listed=True)))


def test_inputs_that_saw_no_key_count_nothing() -> None:
    """Of four new tokens the last input's two keys are hidden from two."""
    case = make_case([20 * KV_TILE + 2], 4, 4, device="cuda")
    launch = require_attention(run_queue(case, *sliced(case, 1, 2, 512, listed=False)))
    assert bool((launch.lvec_scratch[20, :8] == -torch.inf).all())
    assert bool((lses_of(words_of(launch, 16))[20, :8] == -torch.inf).all())


def test_late_input_is_awaited() -> None:
    """Of one input of all merges, long after the other one is there and all have begun."""
    length = 400 * KV_TILE
    case = make_case([length], 16, device="cuda")
    short = Partial(0, -1, 0, 0, KV_TILE, length)
    long = Partial(1, -2, 0, KV_TILE, length, length)
    merge = Reduction(2, 0, 0, range(2), num_rows=16)
    slices = [replace(merge, uid=2 + i, num_rows=2, row_offset=2 * i) for i in range(8)]
    for _ in range(3):
        require_attention(run_queue(case, [long, short, *slices], 2))
