"""Which keys of a rank new tokens see, against counting them one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from mla_decode import visible_keys
from mla_decode.errors import DtypeError, RangeError, ShapeError
from mla_decode.visible_keys import visible_in_chunk, visible_interleaved


def counted(owned: list[int], length: int, new_tokens: int) -> list[int]:
    """Keys at the positions ``owned`` that each new token sees, one by one."""
    return [
        sum(position <= length - new_tokens + token for position in owned)
        for token in range(new_tokens)
    ]


@pytest.mark.parametrize("new_tokens", [0, 1, 2, 3, 5])
def test_a_chunk_is_seen_as_counted(new_tokens: int) -> None:
    requests = [
        (length, begin, end)
        for length in range(new_tokens, 9)
        for begin in range(length + 1)
        for end in range(begin, length + 1)
    ]
    got = visible_in_chunk(
        [end - begin for _, begin, end in requests],
        new_tokens,
        torch.tensor([length - end for length, _, end in requests]),
    )
    expected = [counted(list(range(b, e)), length, new_tokens) for length, b, e in requests]
    assert got.tolist() == [count for request in expected for count in request]


@pytest.mark.parametrize("interleave", [1, 2, 3, 64])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_interleaved_keys_are_seen_as_counted(world_size: int, interleave: int) -> None:
    lengths, tokens = [0, 1, 5, 6, 23, 100, 129, 300], [0, 1, 4, 2, 5, 3, 1, 4]
    for rank in range(world_size):
        expected = []
        for length, new in zip(lengths, tokens, strict=True):
            owned = [p for p in range(length) if p // interleave % world_size == rank]
            expected += counted(owned, length, new)
        got = visible_interleaved(lengths, tokens, rank, world_size, interleave=interleave)
        assert got.tolist() == expected


def rebuilt(made: tuple[visible_keys.Part, ...], count: int) -> list[int]:
    """What decode calls of the parts let each token see; 0 for tokens in none."""
    seen = [0] * count
    for part in made:
        for i, length in enumerate(part.seq_lens):
            begin, end = part.cu_seqlens_q[i : i + 2]
            for token, row in enumerate(part.rows[begin:end]):
                assert seen[row] == 0, "a token is in two runs"
                hidden = (end - begin) - token - 1 if part.causal else 0
                seen[row] = max(0, int(length) - int(hidden))
    return seen


def fewest_runs(visible: list[int]) -> int:
    """Fewest runs that are constant or grow by one, among all ways to cut; zeros are free."""
    if not visible:
        return 0
    best = len(visible)
    for end in range(1, len(visible) + 1):
        head = visible[:end]
        steps = {b - a for a, b in pairwise(head)}
        if len(steps) <= 1 and steps <= {0, 1}:
            best = min(best, bool(head[-1]) + fewest_runs(visible[end:]))
    return best


def test_parts_show_each_token_its_keys_in_the_fewest_runs() -> None:
    rng = random.Random(3)
    for _ in range(300):
        tokens = np.array([rng.randint(0, 5) for _ in range(rng.randint(1, 4))])
        visible: list[int] = []
        for count in tokens:
            first = rng.choice([0, 0, 1, 70])
            steps = [rng.choice([0, 0, 1, 1, 2]) for _ in range(count)]
            visible += [first + sum(steps[:i]) for i in range(count)]
        array = visible_keys.require_visible(visible, tokens)
        made = visible_keys.parts(array, tokens)
        assert rebuilt(made, len(visible)) == visible
        starts = np.cumsum(tokens) - tokens
        runs = [
            fewest_runs(visible[s : s + n])
            for s, n in zip(starts.tolist(), tokens.tolist(), strict=True)
        ]
        assert sum(len(part.seq_lens) for part in made) <= sum(runs)
        for part in made:
            assert part.requests.tolist() == sorted(part.requests.tolist())


def test_alike_masks_take_one_call() -> None:
    tokens = np.array([3, 3])
    assert visible_keys.one_mask(np.array([5, 5, 5, 0, 0, 0]), tokens) is False
    assert visible_keys.one_mask(np.array([3, 4, 5, 0, 1, 2]), tokens) is True
    assert visible_keys.one_mask(np.array([3, 4, 5, 2, 2, 2]), tokens) is None
    assert visible_keys.one_mask(np.array([4, 5, 5, 2, 2, 2]), tokens) is None
    assert visible_keys.one_mask(np.array([5, 2]), np.array([1, 1])) is False
    assert visible_keys.one_mask(np.array([4, 5]), np.array([0, 2])) is True


def test_single_tokens_make_no_call_of_their_own() -> None:
    tokens = np.array([1, 2, 2])
    chunks = visible_keys.parts(np.array([7, 1, 2, 3, 4]), tokens)
    assert [part.causal for part in chunks] == [True]
    mixed = visible_keys.parts(np.array([7, 1, 2, 3, 3]), tokens)
    assert [(part.causal, part.seq_lens.tolist()) for part in mixed] == [
        (False, [7, 3]),
        (True, [2]),
    ]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: visible_in_chunk([1.5], 1, [0]), DtypeError, "seq_lens: expected integers"),
        (lambda: visible_in_chunk([[1]], 1, [0]), ShapeError, "seq_lens: expected one dimension"),
        (lambda: visible_in_chunk([1], -1, [0]), RangeError, "new_tokens: expected 0 to"),
        (lambda: visible_in_chunk([1], [1, 1], [0]), ShapeError, r"new_tokens: expected shape \[1"),
        (lambda: visible_in_chunk([1], 1, [-1]), RangeError, "keys_behind: entry 0: expected 0"),
        (lambda: visible_interleaved([4], 1, 2, 2), RangeError, "rank: expected 0 to 1, got 2"),
        (
            lambda: visible_interleaved([4], 1, 0, 2, interleave=0),
            RangeError,
            "interleave: expected 1",
        ),
        (
            lambda: visible_interleaved(torch.ones(1, dtype=torch.int32, device="meta"), 1, 0, 1),
            DtypeError,
            "seq_lens: expected numbers on the host, got a meta tensor",
        ),
        (
            lambda: visible_keys.require_visible([1, 2], np.array([1, 2])),
            ShapeError,
            "visible: expected 3 numbers, one a token, got 2",
        ),
        (
            lambda: visible_keys.require_visible([1, 3, 2], np.array([1, 2])),
            RangeError,
            r"visible: request 1: expected numbers that never fall .* got \[3, 2\]",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()
