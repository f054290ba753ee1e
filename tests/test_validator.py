"""Every rule of the validator, proved by a queue that breaks it and nothing else before it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_decode import _scheduler

Words = npt.NDArray[np.int32]

HEADS = 24
# Rows: 72 (a row group of 64 and one of 8), 24, 48 without keys, none.
SEQ_LENS = [130, 64, 0, 500]
TOKENS = [3, 1, 2, 0]
TOTAL_TOKENS = 8  # the last two are padding
NUM_SLOTS = 5
INT32_MAX = 2**31 - 1
INT32_MIN = -(2**31)

# Positions in the queue of valid_queue().
(
    EARLY,
    LATE,
    EARLY_TAIL,
    LATE_TAIL,
    WHOLE,
    LOW_ROWS,
    HIGH_ROWS,
    TAIL_RUN,
    INNER,
    TAIL_LEFT,
    TAIL_RIGHT,
    EMPTY,
    PADDING,
) = range(13)


def words_of(*words: int) -> list[int]:
    return [*words] + [0] * (32 - len(words))


def partial(
    uid: int,
    dst: int,
    sequence: int,
    kv: tuple[int, int],
    length: int,
    rows: tuple[int, int],
    token: int = 0,
) -> list[int]:
    return words_of(1, uid, dst, token, sequence, token, *kv, length, *rows)


def shape_of(first_head: int, num_rows: int, cols: tuple[int, int]) -> int:
    return first_head << 8 | num_rows << 16 | cols[0] // 64 << 24 | cols[1] // 64 << 27


def listed(
    uid: int,
    dst: int,
    first: tuple[int, int],
    num_rows: int,
    inputs: list[int],
    cols: tuple[int, int] = (0, 0),
) -> list[int]:
    """``first``: token and head of the first row."""
    shape = (len(inputs) - 1) | shape_of(first[1], num_rows, cols)
    return words_of(2, uid, shape, dst, first[0], *inputs)


def run(
    uid: int,
    dst: int,
    row: int,
    num_rows: int,
    inputs: tuple[int, int, int],
    cols: tuple[int, int] = (0, 0),
    first: tuple[int, int] = (0, 0),
) -> list[int]:
    """``inputs``: first, number, step."""
    shape = shape_of(first[1], num_rows, cols) + INT32_MIN
    return words_of(2, uid, shape, dst, first[0], *inputs, row)


def fill(uid: int, begin: int, end: int) -> list[int]:
    return words_of(3, uid, begin, end)


def slot(index: int) -> int:
    return -index - 1


def valid_queue() -> Words:
    """Sequence 0 in two pieces of two row groups, whose slots are runs with step 2. The first is
    merged by slices of rows; the second by a run into scratch, a list that reads it, and a run that
    reads the other half of the columns. Sequence 1 in one piece; fills."""
    queue = [[0] * 32] * 13
    queue[EARLY] = partial(0, slot(0), 0, (0, 64), 130, (0, 64))
    queue[EARLY_TAIL] = partial(1, slot(1), 0, (0, 64), 130, (64, 8))
    queue[LATE] = partial(2, slot(2), 0, (64, 130), 130, (0, 0))
    # Row 64 is that of token 2, head 16; all rows that are left.
    queue[LATE_TAIL] = partial(3, slot(3), 0, (64, 130), 130, (16, 0), token=2)
    queue[WHOLE] = partial(5, 1, 1, (0, 64), 64, (0, 24))
    queue[LOW_ROWS] = run(6, 0, 0, 40, (0, 2, 2))
    # From token 1, head 16: row 40.
    queue[HIGH_ROWS] = run(7, 0, 0, 24, (0, 2, 2), first=(1, 16))
    queue[TAIL_RUN] = run(4, slot(4), 64, 8, (1, 2, 2), cols=(0, 256))
    queue[INNER] = listed(8, 0, (2, 16), 0, [4], cols=(0, 256))
    queue[TAIL_LEFT] = run(9, 0, 64, 8, (1, 2, 2), cols=(256, 192))
    queue[TAIL_RIGHT] = listed(10, 0, (2, 16), 8, [3, 1], cols=(448, 0))
    queue[EMPTY] = fill(11, 4, 6)
    queue[PADDING] = fill(12, 6, 8)
    return np.array(queue, dtype=np.int32)


def check(queue: Words, **changes: object) -> None:
    arguments: dict[str, object] = {
        "seq_lens": SEQ_LENS,
        "num_heads": HEADS,
        "new_tokens": TOKENS,
        "num_slots": NUM_SLOTS,
        "total_tokens": TOTAL_TOKENS,
    }
    _scheduler.validate(queue, **(arguments | changes))  # type: ignore[arg-type]


def set_word(position: int, word: int, value: int) -> Callable[[Words], Words]:
    def mutate(queue: Words) -> Words:
        queue[position, word] = value
        return queue

    return mutate


def set_words(position: int, words: list[int]) -> Callable[[Words], Words]:
    def mutate(queue: Words) -> Words:
        queue[position] = words
        return queue

    return mutate


def move(position: int, to: int) -> Callable[[Words], Words]:
    def mutate(queue: Words) -> Words:
        order = [i for i in range(len(queue)) if i != position]
        order.insert(to, position)
        return queue[order]

    return mutate


def drop(position: int) -> Callable[[Words], Words]:
    return lambda queue: np.delete(queue, position, axis=0)


def append(words: list[int]) -> Callable[[Words], Words]:
    return lambda queue: np.vstack([queue, np.array([words], dtype=np.int32)])


def end_then(words: list[int]) -> Callable[[Words], Words]:
    end = [-1] + [0] * 31
    return lambda queue: np.vstack([queue, np.array([end, words], dtype=np.int32)])


VIOLATIONS: list[tuple[str, str, Callable[[Words], Words]]] = [
    ("opcode", "unknown", set_word(EARLY, 0, 4)),
    ("opcode", "negative", set_word(EARLY, 0, -2)),
    ("end-of-queue", "work behind it", end_then(partial(13, 1, 1, (0, 64), 64, (0, 24)))),
    ("end-of-queue", "no-op behind it", end_then([0] * 32)),
    ("reserved", "partial", set_word(WHOLE, 31, 1)),
    ("reserved", "behind a list", set_word(INNER, 6, 1)),
    ("reserved", "behind a run", set_word(LOW_ROWS, 9, 1)),
    ("reserved", "a run that lists", set_word(LOW_ROWS, 2, (40 << 16 | 1) + INT32_MIN)),
    ("reserved", "behind a fill", set_word(PADDING, 4, 1)),
    ("uid", "negative", set_word(WHOLE, 1, -1)),
    ("uid", "used twice", set_word(WHOLE, 1, 1)),
    ("uid", "of a fill", set_word(PADDING, 1, 11)),
    ("slot", "too high", set_words(EARLY, partial(20, slot(20), 0, (0, 64), 130, (0, 64)))),
    ("slot", "not the uid", set_word(EARLY, 2, slot(2))),
    ("slot", "lowest integer", set_word(EARLY, 2, INT32_MIN)),
    ("request", "too high", set_word(WHOLE, 4, 4)),
    ("request", "negative", set_word(WHOLE, 4, -1)),
    ("token", "q_seq too high", set_word(WHOLE, 5, 1)),
    ("token", "sequence without tokens", set_word(WHOLE, 4, 3)),
    ("token", "dst_seq is not q_seq", set_word(WHOLE, 3, 1)),
    ("token", "reduction of no token", set_word(LOW_ROWS, 4, 17)),
    ("token", "not of this sequence", set_words(INNER, listed(8, 0, (3, 0), 1, [4], (0, 256)))),
    ("token", "negative", set_word(LOW_ROWS, 4, -1)),
    ("rows", "begin past the last", set_word(WHOLE, 9, 24)),
    ("rows", "negative begin", set_word(WHOLE, 9, -1)),
    ("rows", "negative count", set_word(WHOLE, 10, -1)),
    ("rows", "too many", set_word(WHOLE, 10, 25)),
    ("rows", "overflow", set_word(WHOLE, 10, INT32_MAX)),
    ("rows", "part of a group", set_word(EARLY, 10, 63)),
    ("rows", "more than a group", set_word(EARLY, 10, 72)),
    ("row-group", "begin inside one", set_words(EARLY, partial(0, -1, 0, (0, 64), 130, (8, 64)))),
    (
        "row-group",
        "begin at a token",
        set_words(LATE_TAIL, partial(3, -4, 0, (64, 130), 130, (0, 0), 2)),
    ),
    ("row-group", "a run in two", set_words(HIGH_ROWS, run(7, 0, 40, 25, (0, 2, 2)))),
    ("row-group", "a list in two", set_words(INNER, listed(8, 0, (2, 15), 9, [4], (0, 256)))),
    ("row-group", "all heads of a token", set_words(INNER, listed(8, 0, (2, 0), 0, [4], (0, 256)))),
    ("length", "too long", set_word(WHOLE, 8, 65)),
    ("length", "another sequence's", set_word(EARLY, 8, 64)),
    ("kv-range", "empty", set_word(EARLY, 7, 0)),
    ("kv-range", "backwards", set_word(LATE, 7, 1)),
    ("kv-range", "past the end", set_word(WHOLE, 7, 65)),
    ("kv-range", "negative", set_word(EARLY, 6, -64)),
    ("kv-range", "sequence of length 0", append(partial(13, 2, 2, (0, 64), 0, (0, 48)))),
    ("kv-alignment", "start", set_word(LATE, 6, 32)),
    ("kv-alignment", "end", set_word(EARLY, 7, 63)),
    ("destination", "partial", set_word(WHOLE, 2, 0)),
    ("destination", "reduction", set_word(LOW_ROWS, 3, 1)),
    ("destination", "of no sequence", set_word(LOW_ROWS, 3, INT32_MAX)),
    ("input-count", "28 listed", set_word(INNER, 2, 27 | 8 << 16)),
    ("input-count", "256 listed", set_word(INNER, 2, 255)),
    ("input-count", "an empty run", set_word(LOW_ROWS, 6, 0)),
    ("input-count", "a negative run", set_word(LOW_ROWS, 6, -1)),
    ("input-count", "too long a run", set_word(LOW_ROWS, 6, _scheduler.MAX_RUN_INPUTS + 1)),
    ("run", "step 0", set_word(LOW_ROWS, 7, 0)),
    ("run", "step back", set_word(LOW_ROWS, 7, -1)),
    ("run", "row offset", set_word(TAIL_RUN, 8, -1)),
    ("slice", "rows of no token", set_word(TAIL_RUN, 8, 65)),
    ("slice", "row offset", set_word(LOW_ROWS, 8, INT32_MAX - 127)),
    ("slice", "first head", set_words(LOW_ROWS, run(6, 0, 0, 0, (0, 2, 2), first=(0, 24)))),
    ("slice", "columns", set_words(LOW_ROWS, run(6, 0, 0, 40, (0, 2, 2), cols=(448, 128)))),
    ("input", "no slot", set_word(INNER, 5, NUM_SLOTS)),
    ("input", "negative", set_word(INNER, 5, -1)),
    ("input", "first of a run", set_word(LOW_ROWS, 5, -1)),
    ("input", "last of a run", set_word(LOW_ROWS, 6, 4)),
    ("input", "step too long", set_word(LOW_ROWS, 7, INT32_MAX)),
    ("order", "reader first", move(LATE, PADDING)),
    ("order", "reads itself", set_words(TAIL_RUN, run(4, slot(4), 64, 8, (4, 1, 1), (0, 256)))),
    ("order", "writer missing", drop(EARLY)),
    ("input-request", "two", set_words(LATE, partial(2, slot(2), 1, (0, 64), 64, (0, 0)))),
    ("input-rows", "another row group", set_word(LOW_ROWS, 7, 1)),
    ("input-rows", "columns", set_words(INNER, listed(8, 0, (2, 16), 0, [4], (0, 320)))),
    ("input-rows", "rows", set_words(TAIL_RUN, run(4, slot(4), 64, 7, (1, 2, 2), (0, 256)))),
    ("fill", "none", set_word(PADDING, 3, 6)),
    ("fill", "backwards", set_word(PADDING, 3, 5)),
    ("fill", "negative", set_word(PADDING, 2, -1)),
    ("fill", "behind the last", set_word(PADDING, 3, 9)),
    ("fill", "a token with keys", set_word(EMPTY, 2, 3)),
    ("fill", "all tokens", set_words(EMPTY, fill(11, 0, 8))),
    ("read-once", "overlapping slices", set_words(HIGH_ROWS, run(7, 0, 39, 25, (0, 2, 2)))),
    ("read-once", "twice in one", set_words(INNER, listed(8, 0, (2, 16), 0, [4, 4], (0, 256)))),
    ("output-once", "two partials", append(partial(13, 1, 1, (0, 64), 64, (0, 24)))),
    ("output-once", "besides a merge", append(partial(13, 0, 0, (0, 64), 130, (64, 8)))),
    ("output-once", "overlapping fills", set_word(PADDING, 2, 5)),
    ("output-once", "a fill twice", append(fill(13, 6, 7))),
    ("unread", "no reader", drop(TAIL_RIGHT)),
    ("unread", "one slice short", drop(HIGH_ROWS)),
    ("unread", "an inner result", drop(INNER)),
    ("unfilled", "padding", drop(PADDING)),
    ("unfilled", "an empty sequence", drop(EMPTY)),
    ("unfilled", "one token", set_word(EMPTY, 2, 5)),
    ("covered-twice", "positions", set_word(LATE, 6, 0)),
    ("uncovered", "no partial", drop(WHOLE)),
    ("uncovered", "last positions", set_word(LATE, 7, 128)),
]


# Positions in the queue of valid_mates().
FOUR, TWO, ALONE, MERGE = 0, 4, 6, 7


def shared(queue: list[list[int]]) -> list[list[int]]:
    """Make mates of partials."""
    return [[*words[:11], len(queue), mate, *words[13:]] for mate, words in enumerate(queue)]


def valid_mates() -> Words:
    """Four mates that write slot 0, and two that write the output, one of them with the uid of a
    slot; a partial and a merge."""
    cuts = [0, 64, 192, 256, 384]
    uids = [0, 4, 5, 6]
    queue = [
        *shared(
            [
                partial(uid, -1, 0, (cuts[i], cuts[i + 1]), 500, (0, 64))
                for i, uid in enumerate(uids)
            ]
        ),
        *shared(
            [partial(2, 1, 1, (0, 64), 130, (0, 64)), partial(7, 1, 1, (64, 130), 130, (0, 64))]
        ),
        partial(1, slot(1), 0, (384, 500), 500, (0, 64)),
        listed(8, 0, (0, 0), 64, [0, 1]),
    ]
    return np.array(queue, dtype=np.int32)


def check_mates(queue: Words, **changes: object) -> None:
    arguments: dict[str, object] = {
        "seq_lens": [500, 130],
        "num_heads": 64,
        "new_tokens": 1,
        "num_slots": 3,
    }
    _scheduler.validate(queue, **(arguments | changes))  # type: ignore[arg-type]


def both(*mutations: Callable[[Words], Words]) -> Callable[[Words], Words]:
    def mutate(queue: Words) -> Words:
        for mutation in mutations:
            queue = mutation(queue)
        return queue

    return mutate


def keep(*positions: int) -> Callable[[Words], Words]:
    return lambda queue: queue[list(positions)]


def behind_noops(count: int) -> Callable[[Words], Words]:
    noops = np.zeros((count, 32), np.int32)
    return lambda queue: np.vstack([noops, queue])


MATE_VIOLATIONS: list[tuple[str, str, Callable[[Words], Words]]] = [
    ("reserved", "behind a mate", set_word(FOUR, 14, 1)),
    ("uid", "used twice", set_word(FOUR + 1, 1, 0)),
    ("uid", "negative", set_word(FOUR + 1, 1, -1)),
    ("slot", "not the uid of mate 0", both(set_word(FOUR, 1, 4), set_word(FOUR + 1, 1, 3))),
    ("slot", "the uid of mate 1", set_word(FOUR + 1, 1, 2)),
    ("kv-range", "empty", both(set_word(FOUR, 7, 64), set_word(FOUR + 1, 7, 64))),
    ("kv-alignment", "a cut", both(set_word(FOUR, 7, 63), set_word(FOUR + 1, 6, 63))),
    ("mates", "one", set_word(ALONE, 11, 1)),
    ("mates", "three", set_word(FOUR, 11, 3)),
    ("mates", "sixteen", set_word(FOUR, 11, 16)),
    ("mates", "a negative number", set_word(FOUR, 11, -2)),
    ("mates", "a lowest number", set_word(FOUR, 11, INT32_MIN)),
    ("mates", "mate of none", set_word(ALONE, 12, 1)),
    ("mates", "negative mate", set_word(ALONE, 12, -1)),
    ("mates", "mate 1 is first", set_word(FOUR, 12, 1)),
    ("mates", "mate 0 twice", set_word(FOUR + 1, 12, 0)),
    ("mates", "out of order", move(FOUR + 1, FOUR + 2)),
    ("mates", "one is missing", drop(FOUR + 2)),
    ("mates", "the last is missing", drop(FOUR + 3)),
    ("mates", "one too many", set_word(TWO, 12, 4)),
    ("mates", "of two numbers", set_word(FOUR + 1, 11, 2)),
    ("mates", "the next is not shared", set_word(TWO + 1, 11, 0)),
    ("mates", "a no-op between", set_words(TWO + 1, [0] * 32)),
    ("mates", "a merge between", move(MERGE, TWO + 1)),
    ("mates", "the array ends", keep(FOUR, FOUR + 1)),
    ("mates", "the end mark", set_words(TWO + 1, [-1] + [0] * 31)),
    ("mates", "dst_batch", set_word(FOUR + 1, 2, slot(1))),
    ("mates", "output and scratch", set_word(FOUR + 1, 2, 0)),
    ("mates", "dst_seq", set_word(FOUR + 1, 3, 1)),
    ("mates", "q_batch", set_word(FOUR + 1, 4, 1)),
    ("mates", "q_seq", set_word(FOUR + 1, 5, 1)),
    ("mates", "length", set_word(FOUR + 1, 8, 130)),
    ("mates", "row_begin", set_word(FOUR + 1, 9, 64)),
    ("mates", "num_rows", set_word(FOUR + 1, 10, 0)),
    ("mates", "one adopts", set_word(FOUR, 13, 2)),
    ("mates", "a gap between", set_word(TWO + 1, 6, 128)),
    ("mates", "an overlap", set_word(FOUR + 1, 6, 0)),
    ("mates-first", "behind a no-op", behind_noops(1)),
    ("mates-first", "four behind two no-ops", behind_noops(2)),
    ("mates-first", "behind a partial", move(ALONE, TWO)),
    ("mates-first", "four behind two", keep(4, 5, 0, 1, 2, 3, 6, 7)),
    ("output-once", "besides a partial", append(partial(9, 1, 1, (0, 130), 130, (0, 64)))),
    ("unread", "no reader", drop(MERGE)),
    ("covered-twice", "by a partial", set_word(ALONE, 6, 320)),
    ("uncovered", "behind mates", set_word(ALONE, 6, 448)),
]


# Positions in the queue of valid_adoptions().
LAST, LOW_LAST, MIDDLE, FIRST, LOW_FIRST, MERGED, OTHER = range(7)


def adopting(slot: int, words: list[int]) -> list[int]:
    """Make a partial adopt a slot."""
    return [*words[:13], slot + 1, *words[14:]]


def valid_adoptions() -> Words:
    """Sequence 0 has two row groups. In the one, the first keys adopt those in the middle, which
    adopt the last, and write the output. In the other, the first adopt the last and write a slot,
    for a merge. Sequence 1 in one piece."""
    queue = [[0] * 32] * 7
    queue[LAST] = partial(0, slot(0), 0, (320, 500), 500, (0, 64))
    queue[LOW_LAST] = partial(2, slot(2), 0, (64, 500), 500, (64, 32))
    queue[MIDDLE] = adopting(0, partial(1, slot(1), 0, (128, 320), 500, (0, 64)))
    queue[FIRST] = adopting(1, partial(6, 0, 0, (0, 128), 500, (0, 0)))
    queue[LOW_FIRST] = adopting(2, partial(3, slot(3), 0, (0, 64), 500, (64, 0)))
    queue[MERGED] = run(7, 0, 64, 32, (3, 1, 1))
    queue[OTHER] = partial(8, 1, 1, (0, 130), 130, (0, 0))
    return np.array(queue, dtype=np.int32)


def check_adoptions(queue: Words) -> None:
    _scheduler.validate(queue, [500, 130], 48, [2, 1], 4)


ADOPTION_VIOLATIONS: list[tuple[str, str, Callable[[Words], Words]]] = [
    ("reserved", "behind the slot", set_word(FIRST, 14, 1)),
    ("input", "too high", set_word(FIRST, 13, 5)),
    ("input", "highest integer", set_word(FIRST, 13, INT32_MAX)),
    ("input", "negative", set_word(FIRST, 13, -1)),
    ("input", "lowest integer", set_word(FIRST, 13, INT32_MIN)),
    ("order", "its own slot", set_word(MIDDLE, 13, 2)),
    ("order", "the writer behind it", move(MIDDLE, FIRST)),
    ("order", "the writer missing", drop(LAST)),
    ("input-request", "of another sequence", set_word(OTHER, 13, 3)),
    ("input-rows", "of another row group", set_word(FIRST, 13, 3)),
    ("input-rows", "some of the rows", set_words(MIDDLE, run(1, slot(1), 0, 40, (0, 1, 1)))),
    (
        "input-rows",
        "some of the columns",
        set_words(MIDDLE, run(1, slot(1), 0, 64, (0, 1, 1), cols=(0, 256))),
    ),
    ("read-once", "adopted twice", set_word(FIRST, 13, 1)),
    ("read-once", "merged as well", set_word(MERGED, 5, 2)),
    ("unread", "not adopted", set_word(FIRST, 13, 0)),
    ("unread", "what adopted", drop(MERGED)),
    ("covered-twice", "adopted keys", set_word(FIRST, 7, 192)),
    ("uncovered", "a gap between", set_word(FIRST, 7, 64)),
]


def test_the_unmutated_queue_is_valid() -> None:
    check(valid_queue())


def test_the_unmutated_mates_are_valid() -> None:
    check_mates(valid_mates())


def test_the_unmutated_adoptions_are_valid() -> None:
    check_adoptions(valid_adoptions())


@pytest.mark.parametrize("num_mates", [2, 4, 8])
def test_mates_write_once(num_mates: int) -> None:
    cuts = [64 * i for i in range(num_mates)] + [500]
    mates = [partial(i, 0, 0, (cuts[i], cuts[i + 1]), 500, (0, 0)) for i in range(num_mates)]
    batch = {"seq_lens": [500], "num_slots": 0}
    check_mates(np.array(shared(mates), dtype=np.int32), **batch)
    with pytest.raises(_scheduler.ScheduleError, match=r"\(rule: output-once\)$"):
        check_mates(np.array(mates, dtype=np.int32), **batch)


@pytest.mark.parametrize(
    ("rule", "mutate"),
    [(rule, mutate) for rule, _, mutate in MATE_VIOLATIONS],
    ids=[f"{rule}: {what}" for rule, what, _ in MATE_VIOLATIONS],
)
def test_wrong_mates_are_rejected_by_their_rule(
    rule: str, mutate: Callable[[Words], Words]
) -> None:
    with pytest.raises(_scheduler.ScheduleError, match=rf"\(rule: {rule}\)$"):
        check_mates(mutate(valid_mates()))


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (drop(FOUR + 1), "instruction 1, uid 5: stands in the place of mate 1 of 4 "),
        (keep(FOUR), "the queue ends before mate 1 of 4 "),
        (set_word(FOUR + 1, 8, 130), "uid 4: length 130 is not the 500 of the mate before "),
        (set_word(FOUR + 1, 6, 0), "uid 4: starts at 0, the mate before ends at 64 "),
        (move(ALONE, TWO), "uid 2: 2 mates stand behind what is not shared "),
        (keep(4, 5, 0), "uid 0: 4 mates stand behind 2 "),
        (set_word(FOUR, 13, 2), "uid 0: adopts slot 1, which mates cannot "),
    ],
)
def test_messages_name_mates(mutate: Callable[[Words], Words], message: str) -> None:
    with pytest.raises(_scheduler.ScheduleError, match=message):
        check_mates(mutate(valid_mates()))


@pytest.mark.parametrize(
    ("rule", "mutate"),
    [(rule, mutate) for rule, _, mutate in ADOPTION_VIOLATIONS],
    ids=[f"{rule}: {what}" for rule, what, _ in ADOPTION_VIOLATIONS],
)
def test_wrong_adoptions_are_rejected_by_their_rule(
    rule: str, mutate: Callable[[Words], Words]
) -> None:
    with pytest.raises(_scheduler.ScheduleError, match=rf"\(rule: {rule}\)$"):
        check_adoptions(mutate(valid_adoptions()))


def test_padding_behind_the_end_is_valid() -> None:
    end = np.full((3, 32), -1, dtype=np.int32)
    check(np.vstack([valid_queue(), end]))


def test_noops_are_valid_anywhere() -> None:
    noops = np.zeros((2, 32), dtype=np.int32)
    check(np.vstack([noops, valid_queue(), noops]))


@pytest.mark.parametrize(
    ("rule", "mutate"),
    [(rule, mutate) for rule, _, mutate in VIOLATIONS],
    ids=[f"{rule}: {what}" for rule, what, _ in VIOLATIONS],
)
def test_a_violation_is_rejected_by_its_rule(rule: str, mutate: Callable[[Words], Words]) -> None:
    with pytest.raises(_scheduler.ScheduleError, match=rf"\(rule: {rule}\)$"):
        check(mutate(valid_queue()))


def test_tensors_too_small_for_the_batch_are_rejected() -> None:
    with pytest.raises(_scheduler.ScheduleError, match=r"\(rule: batch\)$"):
        check(valid_queue(), batch=3)
    check(valid_queue(), batch=5)


def test_every_rule_has_a_violation() -> None:
    violated = {rule for rule, _, _ in VIOLATIONS + MATE_VIOLATIONS}
    assert violated | {"batch"} == set(_scheduler.RULES)


def test_the_message_names_instruction_and_uid() -> None:
    queue = set_word(LATE, 6, 32)(valid_queue())
    with pytest.raises(_scheduler.ScheduleError, match=r"instruction 1, uid 2: \[32, 130\)"):
        check(queue)


def test_a_gap_is_named_by_sequence_row_and_position() -> None:
    queue = set_word(LATE, 7, 128)(valid_queue())
    with pytest.raises(_scheduler.ScheduleError, match="sequence 0, token 0 head 0: position 128"):
        check(queue)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads: expected 1 to 128, got 0"),
        ({"new_tokens": 17}, "new_tokens: expected 1 to 16, got 17"),
        ({"new_tokens": [3, 1, 2, 17]}, r"new_tokens\[3\]: expected 0 to 16, got 17"),
        ({"new_tokens": [3, 1, 2]}, "new_tokens: expected one for each of 4 sequences, got 3"),
        ({"total_tokens": 5}, "total_tokens: 5 are too few"),
        ({"num_slots": -1}, "num_slots: expected 0 to"),
        ({"seq_lens": [130, -1, 0, 0]}, r"seq_lens\[1\]: expected 0 to \d+, got -1"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(valid_queue(), **changes)


def test_one_fill_may_cover_padding_of_a_head_and_empty_tokens_of_the_next() -> None:
    whole = partial(0, 1, 1, (0, 5), 5, (0, 16))
    other = partial(1, 3, 3, (0, 5), 5, (0, 16))
    queue = np.array([whole, other, fill(2, 0, 1), fill(3, 2, 4), fill(4, 5, 6)], dtype=np.int32)
    shape = {"seq_lens": [0, 5] * 2, "new_tokens": 1, "num_heads": 16, "num_slots": 0}
    check(queue, **shape, total_tokens=6, num_kv_heads=2)
    # As one KV head the second sequence is followed by the third, and padding comes last.
    with pytest.raises(_scheduler.ScheduleError, match=r"\(rule: fill\)$"):
        check(queue, **shape, total_tokens=6)


def test_words_of_another_shape_or_type_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"instructions: expected shape \[n, 32\]"):
        check(valid_queue()[:, :31].copy())
    with pytest.raises(TypeError):
        check(valid_queue().astype(np.int64))


EDGE_WORDS = st.sampled_from([0, 1, -1, 2, 3, 27, 64, 2**16, 2**24, INT32_MAX, INT32_MIN])
ANY_WORD = EDGE_WORDS | st.integers(INT32_MIN, INT32_MAX)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_a_changed_word_is_rejected_or_leaves_a_valid_queue(data: st.DataObject) -> None:
    queue, check_queue = data.draw(
        st.sampled_from(
            [
                (valid_queue(), check),
                (valid_mates(), check_mates),
                (valid_adoptions(), check_adoptions),
            ]
        )
    )
    position = data.draw(st.integers(0, len(queue) - 1))
    queue[position, data.draw(st.integers(0, 31))] = data.draw(ANY_WORD)
    try:
        check_queue(queue)
    except _scheduler.ScheduleError as error:
        assert str(error).rpartition("(rule: ")[2].rstrip(")") in _scheduler.RULES


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.lists(ANY_WORD, min_size=32, max_size=32), max_size=12))
def test_garbage_is_rejected_without_harm(words: list[list[int]]) -> None:
    queue = np.array(words, dtype=np.int32).reshape(-1, 32)
    with pytest.raises(_scheduler.ScheduleError):
        check(queue, num_slots=INT32_MAX)


def attended(queue: Words, num_heads: int, tokens: list[int]) -> dict[tuple[int, int, int], list]:
    """KV ranges that reach each (sequence, row, column chunk) of the outputs, by brute force."""
    slots: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    out: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    sequence_of: dict[int, int] = {}
    for words in queue.tolist():
        if words[0] == 1:
            sequence, dst = words[4], words[2]
            first = words[5] * num_heads + words[9]
            rows = range(
                first, first + (words[10] or min(64, tokens[sequence] * num_heads - first))
            )
            read = {(r, c): [words[6:8]] for r in rows for c in range(8)}
            if words[13]:
                read = {(r, c): kvs + slots[words[13] - 1, r, c] for (r, c), kvs in read.items()}
        elif words[0] == 2:
            dst, shape = words[3], words[2] % 2**32
            inputs, offset = words[5 : 6 + (shape & 0xFF)], 0
            if shape >> 31:
                inputs, offset = [words[5] + i * words[7] for i in range(words[6])], words[8]
            head = shape >> 8 & 0xFF
            first = words[4] * num_heads + head + offset
            rows = range(first, first + ((shape >> 16 & 0xFF) or num_heads - head))
            chunk = shape >> 24 & 7
            chunks = range(chunk, chunk + (shape >> 27 & 15) if shape >> 27 & 15 else 8)
            sequence = sequence_of[inputs[0]]
            read = {
                (r, c): [kv for i in inputs for kv in slots[i, r, c]] for r in rows for c in chunks
            }
        else:
            continue
        for (row, chunk), found in read.items():
            if dst >= 0:
                assert dst == sequence
                out.setdefault((dst, row, chunk), []).extend(found)
            else:
                assert (-dst - 1, row, chunk) not in slots
                slots[-dst - 1, row, chunk] = found
                sequence_of[-dst - 1] = sequence
    return out


@settings(max_examples=400, deadline=None)
@given(data=st.data(), policy=st.sampled_from(_scheduler.POLICIES))
def test_what_is_accepted_attends_to_everything_once(data: st.DataObject, policy: str) -> None:
    heads = data.draw(st.sampled_from([1, 3, 24, 63, 126]))
    lens = data.draw(st.lists(st.sampled_from([0, 1, 64, 200, 700]), min_size=1, max_size=4))
    tokens = [data.draw(st.integers(0, 4)) for _ in lens]
    plan = _scheduler.plan(lens, heads, tokens, 5, _scheduler.CostModel(), policy, 2)
    queue = plan.instructions
    for _ in range(data.draw(st.integers(0, 2)) if len(queue) else 0):
        position = data.draw(st.integers(0, len(queue) - 1))
        word = data.draw(st.integers(2, 10) | st.just(13))
        was = int(queue[position, word])
        changed = data.draw(st.integers(was - 64, was + 64) | EDGE_WORDS)
        queue[position, word] = np.uint32(changed % 2**32).astype(np.int32)
    try:
        _scheduler.validate(queue, lens, heads, tokens, plan.num_slots)
    except _scheduler.ScheduleError:
        return
    out = attended(queue, heads, tokens)
    expected = {
        (sequence, row, chunk): length
        for sequence, length in enumerate(lens)
        for row in range(tokens[sequence] * heads)
        for chunk in range(8)
        if length > 0
    }
    assert out.keys() == expected.keys()
    for key, ranges in out.items():
        ends = [0, *(end for _, end in sorted(ranges))]
        assert [start for start, _ in sorted(ranges)] == ends[:-1]
        assert ends[-1] == expected[key]
