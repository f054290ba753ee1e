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

HEADS = 16
TOKENS = 2
SEQ_LENS = [130, 64, 0]
NUM_SLOTS = 3
INT32_MAX = 2**31 - 1

# Positions in the queue of valid_queue().
EARLY, LATE, WHOLE, LOW_HEADS, HIGH_HEADS, SECOND_TOKEN, INNER, END = range(8)


def partial(
    uid: int, dst: int, request: int, kv: tuple[int, int], length: int, rows: tuple[int, int]
) -> list[int]:
    words = [1, uid, dst, 0, request, 0, *kv, length, *rows]
    return words + [0] * (32 - len(words))


def reduction(
    uid: int,
    dst: int,
    token: int,
    inputs: list[int],
    heads: tuple[int, int] = (0, 0),
    cols: tuple[int, int] = (0, 0),
) -> list[int]:
    shape = (len(inputs) - 1) | heads[0] << 8 | heads[1] << 16
    shape |= cols[0] // 64 << 24 | cols[1] // 64 << 27
    words = [2, uid, shape, dst, token, *inputs]
    return words + [0] * (32 - len(words))


def slot(index: int) -> int:
    return -index - 1


def valid_queue() -> Words:
    """Request 0 in two pieces, merged by slices and by a small tree; request 1 in one."""
    queue = [[0] * 32] * 8
    queue[EARLY] = partial(0, slot(0), 0, (0, 64), 130, (0, 32))
    queue[LATE] = partial(1, slot(1), 0, (64, 130), 130, (0, 0))
    queue[WHOLE] = partial(3, 1, 1, (0, 64), 64, (0, 32))
    queue[LOW_HEADS] = reduction(4, 0, 0, [0, 1], heads=(0, 8))
    queue[HIGH_HEADS] = reduction(5, 0, 0, [0, 1], heads=(8, 8))
    queue[SECOND_TOKEN] = reduction(2, slot(2), 1, [0, 1], cols=(0, 256))
    queue[INNER] = reduction(6, 0, 1, [2], cols=(0, 256))
    queue[END] = reduction(7, 0, 1, [0, 1], cols=(256, 256))
    return np.array(queue, dtype=np.int32)


def check(queue: Words, **changes: object) -> None:
    arguments: dict[str, object] = {
        "seq_lens": SEQ_LENS,
        "num_heads": HEADS,
        "new_tokens": TOKENS,
        "num_slots": NUM_SLOTS,
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


INT32_MIN = -(2**31)
VIOLATIONS: list[tuple[str, str, Callable[[Words], Words]]] = [
    ("opcode", "unknown", set_word(EARLY, 0, 3)),
    ("opcode", "negative", set_word(EARLY, 0, -2)),
    ("end-of-queue", "work behind it", end_then(partial(9, 1, 1, (0, 64), 64, (0, 32)))),
    ("end-of-queue", "no-op behind it", end_then([0] * 32)),
    ("reserved", "partial", set_word(WHOLE, 31, 1)),
    ("reserved", "behind the inputs", set_word(LOW_HEADS, 7, 1)),
    ("reserved", "bit 31", set_word(LOW_HEADS, 2, INT32_MIN)),
    ("uid", "negative", set_word(WHOLE, 1, -1)),
    ("uid", "used twice", set_word(WHOLE, 1, 1)),
    ("slot", "too high", set_words(EARLY, partial(9, slot(9), 0, (0, 64), 130, (0, 32)))),
    ("slot", "not the uid", set_word(EARLY, 2, slot(2))),
    ("slot", "lowest integer", set_word(EARLY, 2, INT32_MIN)),
    ("request", "too high", set_word(WHOLE, 4, 3)),
    ("request", "negative", set_word(WHOLE, 4, -1)),
    ("token", "q_seq too high", set_word(WHOLE, 5, TOKENS)),
    ("token", "dst_seq is not q_seq", set_word(WHOLE, 3, 1)),
    ("token", "reduction of no token", set_word(LOW_HEADS, 4, TOKENS)),
    ("token", "negative", set_word(LOW_HEADS, 4, -1)),
    ("rows", "begin past the last", set_word(WHOLE, 9, TOKENS * HEADS)),
    ("rows", "negative begin", set_word(WHOLE, 9, -1)),
    ("rows", "negative count", set_word(WHOLE, 10, -1)),
    ("rows", "too many", set_word(WHOLE, 10, 33)),
    ("rows", "overflow", set_word(WHOLE, 10, INT32_MAX)),
    ("rows", "part of a group", set_word(WHOLE, 10, 31)),
    ("length", "too long", set_word(WHOLE, 8, 65)),
    ("length", "another request's", set_word(EARLY, 8, 64)),
    ("kv-range", "empty", set_word(EARLY, 7, 0)),
    ("kv-range", "backwards", set_word(LATE, 7, 1)),
    ("kv-range", "past the end", set_word(WHOLE, 7, 65)),
    ("kv-range", "negative", set_word(EARLY, 6, -64)),
    ("kv-range", "request of length 0", append(partial(9, 2, 2, (0, 64), 0, (0, 32)))),
    ("kv-alignment", "start", set_word(LATE, 6, 32)),
    ("kv-alignment", "end", set_word(EARLY, 7, 63)),
    ("destination", "partial", set_word(WHOLE, 2, 0)),
    ("destination", "reduction", set_word(LOW_HEADS, 3, 1)),
    ("destination", "of no request", set_word(LOW_HEADS, 3, INT32_MAX)),
    ("input-count", "28", set_word(LOW_HEADS, 2, 27 | 8 << 16)),
    ("input-count", "256", set_word(LOW_HEADS, 2, 255)),
    ("slice", "heads", set_words(LOW_HEADS, reduction(4, 0, 0, [0, 1], heads=(9, 8)))),
    ("slice", "head begin", set_words(LOW_HEADS, reduction(4, 0, 0, [0, 1], heads=(16, 0)))),
    ("slice", "columns", set_words(LOW_HEADS, reduction(4, 0, 0, [0, 1], cols=(448, 128)))),
    ("input", "no slot", set_word(LOW_HEADS, 5, NUM_SLOTS)),
    ("input", "negative", set_word(LOW_HEADS, 5, -1)),
    ("order", "reader first", move(LATE, END)),
    ("order", "reads itself", set_word(SECOND_TOKEN, 5, 2)),
    ("order", "writer missing", drop(EARLY)),
    ("input-request", "two requests", set_words(LATE, partial(1, slot(1), 1, (0, 64), 64, (0, 0)))),
    ("input-rows", "token", set_word(INNER, 4, 0)),
    ("input-rows", "columns", set_words(INNER, reduction(6, 0, 1, [2], cols=(0, 320)))),
    ("input-rows", "heads", set_words(EARLY, partial(0, slot(0), 0, (0, 64), 130, (1, 31)))),
    ("read-once", "overlapping slices", set_words(HIGH_HEADS, reduction(5, 0, 0, [0, 1], (7, 9)))),
    ("read-once", "twice in one", set_words(LOW_HEADS, reduction(4, 0, 0, [0, 0], (0, 8)))),
    ("output-once", "two partials", append(partial(9, 1, 1, (0, 64), 64, (16, 16)))),
    ("output-once", "besides a merge", append(partial(9, 0, 0, (0, 64), 130, (0, 32)))),
    ("unread", "no reader", drop(END)),
    ("unread", "one slice short", drop(HIGH_HEADS)),
    ("unread", "an inner result", drop(INNER)),
    ("covered-twice", "positions", set_word(LATE, 6, 0)),
    ("uncovered", "no partial", drop(WHOLE)),
    ("uncovered", "rows", set_words(WHOLE, partial(3, 1, 1, (0, 64), 64, (1, 31)))),
    ("uncovered", "last positions", set_word(LATE, 7, 128)),
]


def test_the_unmutated_queue_is_valid() -> None:
    check(valid_queue())


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
        check(valid_queue(), batch=2)
    check(valid_queue(), batch=4)


def test_every_rule_has_a_violation() -> None:
    assert {rule for rule, _, _ in VIOLATIONS} | {"batch"} == set(_scheduler.RULES)


def test_the_message_names_instruction_and_uid() -> None:
    queue = set_word(LATE, 6, 32)(valid_queue())
    with pytest.raises(_scheduler.ScheduleError, match=r"instruction 1, uid 1: \[32, 130\)"):
        check(queue)


def test_a_gap_is_named_by_request_row_and_position() -> None:
    queue = set_word(LATE, 7, 128)(valid_queue())
    with pytest.raises(_scheduler.ScheduleError, match="request 0, token 0 head 0: position 128"):
        check(queue)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads: expected 1 to 128, got 0"),
        ({"new_tokens": 65}, "new_tokens: expected 1 to 64, got 65"),
        ({"num_slots": -1}, "num_slots: expected 0 to"),
        ({"seq_lens": [130, -1]}, r"seq_lens\[1\]: expected 0 to \d+, got -1"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(valid_queue(), **changes)


def test_words_of_another_shape_or_type_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"instructions: expected shape \[n, 32\]"):
        check(valid_queue()[:, :31].copy())
    with pytest.raises(TypeError):
        check(valid_queue().astype(np.int64))


EDGE_WORDS = st.sampled_from([0, 1, -1, 2, 27, 64, 2**24, INT32_MAX, INT32_MIN])
ANY_WORD = EDGE_WORDS | st.integers(INT32_MIN, INT32_MAX)


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_a_changed_word_is_rejected_or_leaves_a_valid_queue(data: st.DataObject) -> None:
    queue = valid_queue()
    position = data.draw(st.integers(0, len(queue) - 1))
    queue[position, data.draw(st.integers(0, 31))] = data.draw(ANY_WORD)
    try:
        check(queue)
    except _scheduler.ScheduleError as error:
        assert str(error).rpartition("(rule: ")[2].rstrip(")") in _scheduler.RULES


@settings(max_examples=200, deadline=None)
@given(words=st.lists(st.lists(ANY_WORD, min_size=32, max_size=32), max_size=12))
def test_garbage_is_rejected_without_harm(words: list[list[int]]) -> None:
    queue = np.array(words, dtype=np.int32).reshape(-1, 32)
    with pytest.raises(_scheduler.ScheduleError):
        check(queue, num_slots=INT32_MAX)
