"""Context parallelism on four gloo ranks, against float64 attention over the whole cache."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mla_decode import distributed, reference
from mla_decode.errors import (
    DtypeError,
    MlaDecodeError,
    RangeError,
    ShapeError,
    UnsupportedError,
)

from tests.several_ranks import SCALE, Batch, make_batch, paged, run_ranks
from tests.support import same_bits

RANKS = 4
HEADS = 16


@dataclass(frozen=True)
class Split:
    """A batch spread over the ranks, and how the ranks say so."""

    lengths: list[int]
    new_tokens: int | list[int] = 1
    interleave: int = 0
    """Keys per turn; 0: in chunks that end at ``cuts``."""
    cuts: list[list[int]] | None = None
    """Where the chunks of ranks 0 to 2 of each request end; random when None."""
    says: str = "visible"
    padding: int = 0
    dtype: torch.dtype = torch.bfloat16
    options: dict[str, Any] = field(default_factory=dict)

    def batch(self) -> Batch:
        tokens = self.new_tokens
        if isinstance(tokens, int):
            tokens = [tokens] * len(self.lengths)
        return make_batch(self.lengths, tokens, HEADS, padding=self.padding, dtype=self.dtype)

    def chunks(self) -> list[list[int]]:
        """Ends of the chunks of each request."""
        rng = random.Random(5)
        cuts = self.cuts or [
            sorted(rng.randint(0, length) for _ in range(RANKS - 1)) for length in self.lengths
        ]
        return [[*own, length] for own, length in zip(cuts, self.lengths, strict=True)]

    def keys_of(self, rank: int, batch: Batch) -> list[torch.Tensor]:
        if self.interleave:
            return [k[self.turns(rank, len(k))] for k in batch.keys]
        ends = self.chunks()
        return [
            keys[(own[rank - 1] if rank else 0) : own[rank]]
            for keys, own in zip(batch.keys, ends, strict=True)
        ]

    def turns(self, rank: int, length: int) -> torch.Tensor:
        position = torch.arange(length)
        return position // self.interleave % RANKS == rank

    def masks(self, rank: int, batch: Batch) -> dict[str, Any]:
        if self.says == "nothing":
            return {}
        if self.says == "causal":
            return {"causal": rank == RANKS - 1}
        if self.interleave:
            return {
                "visible": distributed.visible_interleaved(
                    batch.lengths, batch.tokens, rank, RANKS, interleave=self.interleave
                )
            }
        own = [len(keys) for keys in self.keys_of(rank, batch)]
        behind = [
            length - ends[rank] for length, ends in zip(batch.lengths, self.chunks(), strict=True)
        ]
        return {"visible": distributed.visible_in_chunk(own, batch.tokens, behind)}


LENGTHS = [1, 3, 64, 65, 200, 331]
SPLITS = {
    "chunks_q1": Split(LENGTHS, says="nothing"),
    "chunks_q1_visible": Split(LENGTHS),
    "interleaved_q1": Split(LENGTHS, interleave=1, says="nothing"),
    "interleaved_16_q1": Split(LENGTHS, interleave=16, says="nothing"),
    "one_rank_holds_all": Split(
        [5, 70, 90, 300],
        cuts=[[0, 0, 0], [70, 70, 70], [0, 90, 90], [0, 0, 300]],
        says="nothing",
    ),
    "an_empty_request": Split([0, 7, 0, 130], says="nothing"),
    "chunks_q3": Split([3, 4, 64, 70, 200, 331], 3),
    "chunks_q3_end_on_the_last_rank": Split(
        [70, 200], 3, cuts=[[10, 20, 67], [64, 128, 130]], says="causal"
    ),
    "new_tokens_on_two_ranks": Split(
        [70, 200, 90], 3, cuts=[[10, 20, 69], [64, 198, 198], [88, 88, 88]]
    ),
    "new_tokens_on_all_ranks": Split([4, 68, 9], 4, cuts=[[1, 2, 3], [65, 66, 67], [0, 6, 7]]),
    "ends_on_every_rank": Split(
        [70, 80, 90, 100], 3, cuts=[[70, 70, 70], [20, 80, 80], [0, 0, 90], [10, 30, 50]]
    ),
    "interleaved_q3": Split([3, 5, 64, 131], 3, interleave=1),
    "interleaved_2_q4": Split([4, 5, 64, 131], 4, interleave=2),
    "ragged": Split([9, 40, 70, 130, 66], [1, 4, 0, 3, 2], padding=3),
    "ragged_interleaved": Split([9, 40, 70, 130], [1, 4, 0, 3], interleave=1),
    "ragged_end_on_the_last_rank": Split(
        [9, 40, 70], [1, 4, 2], cuts=[[1, 2, 3], [0, 0, 30], [50, 60, 68]], says="causal"
    ),
    "fp16": Split([70, 131], 2, dtype=torch.float16),
    "base_2": Split([70, 131], says="nothing", options={"lse_base": 2.0}),
    "empty_is_minus_inf": Split([0, 131], says="nothing", options={"lse_empty": -math.inf}),
    "sink": Split([70, 0, 331], 2, options={"attn_sink": torch.linspace(-3, 9, HEADS)}),
    "lse_by_token": Split([70, 131], 2, options={"lse_layout": "th"}),
    "flat_q": Split([70, 131], says="nothing", options={"flat": True}),
    "pairs_and_buffers": Split([70, 131], 2, options={"buffers": True}),
}


def call(split: Split, rank: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The call of one rank."""
    batch = split.batch()
    keys = split.keys_of(rank, batch)
    cache, table = paged(keys, seed=rank)
    q: Any = batch.q
    kv: Any = cache
    options = {**split.masks(rank, batch), **split.options, **options}
    if isinstance(split.new_tokens, int):
        q = q.view(len(keys), split.new_tokens, *q.shape[1:])
    else:
        options["cu_seqlens_q"] = batch.cu_seqlens_q
    if options.pop("flat", False):
        q = batch.q
    if options.pop("buffers", False):
        options["out"] = torch.full((*q.shape[:-1], 512), math.nan, dtype=q.dtype)
        options["lse"] = torch.full((len(keys), HEADS, q.shape[1]), math.nan)
        q = (q[..., :512].contiguous(), q[..., 512:].contiguous())
        kv = (cache[..., :512].contiguous(), cache[..., 512:].contiguous())
    seq_lens = options.pop("seq_lens", [len(own) for own in keys])
    out, lse = distributed.context_parallel_decode(
        q, kv, table, seq_lens, softmax_scale=SCALE, **options
    )
    if "out" in options:
        assert out is options["out"]
        assert lse is options["lse"]
    return out, lse


CHUNKED_Q3 = Split([70, 131], 3, cuts=[[10, 20, 69], [0, 64, 100]])
ENDS_HERE_Q3 = Split([70, 131], 3, cuts=[[10, 20, 30], [0, 64, 100]], says="nothing")
ERRORS: dict[str, tuple[type, str, Split, dict[str, Any]]] = {
    "no mask": (RangeError, "causal: with several new tokens and ranks", ENDS_HERE_Q3, {}),
    "two masks": (
        RangeError,
        "visible: expected None beside causal=",
        CHUNKED_Q3,
        {"causal": True},
    ),
    "a stream": (UnsupportedError, "stream: expected none", CHUNKED_Q3, {"stream": 0}),
    "other lengths": (
        RangeError,
        r"visible: request 0: expected the last token to see all 5[0-9]* keys|visible: request 1",
        CHUNKED_Q3,
        {"seq_lens": [500, 500]},
    ),
    "too many lengths": (
        ShapeError,
        r"seq_lens: expected shape \[2\] as q, got \[3\]",
        CHUNKED_Q3,
        {"seq_lens": [1, 2, 3]},
    ),
    "an output of another shape": (
        ShapeError,
        r"out: expected shape \[2, 3, 16, 512\], got \[2, 3, 8, 512\]",
        CHUNKED_Q3,
        {"out": torch.zeros(2, 3, 8, 512).bfloat16()},
    ),
    "a straddling request called causal": (
        RangeError,
        "causal: request 0 has 1 keys on this rank, expected at least its 3 new tokens",
        ENDS_HERE_Q3,
        {"causal": True, "seq_lens": [1, 31]},
    ),
}


def all_calls(rank: int, folder: Path) -> None:
    """What each rank does: every split, then every error."""
    for name, split in SPLITS.items():
        torch.save(call(split, rank), folder / f"{name}-{rank}.pt")
    for name, (_, _, split, options) in ERRORS.items():
        try:
            call(split, rank, **options)
            raised = None
        except MlaDecodeError as error:
            raised = (type(error).__name__, str(error))
        torch.save(raised, folder / f"{name}-{rank}.pt")
        dist.barrier()
    pair = dist.new_group([0, 1])
    if rank >= 2:
        pair = dist.GroupMember.NON_GROUP_MEMBER
        try:
            call(SPLITS["chunks_q1"], rank, group=pair)
            raised = None
        except UnsupportedError as error:
            raised = (type(error).__name__, str(error))
        torch.save(raised, folder / f"outsider-{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What the ranks got, by the name of the case; they run once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(all_calls, RANKS, folder, timeout_s=300)

    def load(name: str) -> list[Any]:
        paths = sorted(folder.glob(f"{name}-[0-9].pt"))
        return [torch.load(path, weights_only=True) for path in paths]

    return load


@pytest.mark.parametrize("name", SPLITS)
def test_every_rank_gets_attention_over_the_whole_cache(
    name: str, results: Callable[[str], list[Any]]
) -> None:
    split = SPLITS[name]
    batch = split.batch()
    expected_out, expected_lse = batch.attention(split.options.get("attn_sink"))
    expected_lse = expected_lse / math.log(split.options.get("lse_base", math.e))
    empty = split.options.get("lse_empty", math.inf)
    expected_lse = expected_lse.masked_fill(expected_lse == -math.inf, empty)
    every = results(name)
    assert len(every) == RANKS
    out, lse = every[0]
    if out.dim() == 4:
        assert out.shape[:2] == (len(batch.tokens), split.new_tokens)
        out = out.flatten(0, 1)
    if lse.dim() == 3:
        lse = lse.transpose(1, 2).flatten(0, 1)
    errors = reference.compare(out, lse, expected_out, expected_lse)
    assert errors.passed, str(errors)


@pytest.mark.parametrize("name", SPLITS)
def test_all_ranks_get_the_same_bits(name: str, results: Callable[[str], list[Any]]) -> None:
    first, *others = results(name)
    for other in others:
        assert same_bits(other[0].view(torch.int16), first[0].view(torch.int16))
        assert same_bits(other[1], first[1])


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_is_named_on_every_rank(name: str, results: Callable[[str], list[Any]]) -> None:
    error, message, _, _ = ERRORS[name]
    for raised in results(name):
        assert raised is not None, "nothing was raised"
        assert raised[0] == error.__name__
        with pytest.raises(RangeError, match=message):
            raise RangeError(raised[1])


def test_a_process_outside_the_group_is_told(results: Callable[[str], list[Any]]) -> None:
    raised = results("outsider")
    assert [kind for kind, _ in raised] == ["UnsupportedError"] * 2
    assert all("expected one that this process belongs to" in text for _, text in raised)


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(UnsupportedError, match=r"group: expected torch\.distributed to be init"):
        call(SPLITS["chunks_q1"], 0)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_q": offsets(1, 2, 4)}, RangeError, "cu_seqlens_q: expected to start at 0"),
        ({"cu_seqlens_q": offsets(0, 3, 2)}, RangeError, "cu_seqlens_q: request 1: expected off"),
        (
            {"cu_seqlens_q": offsets(0, 2, 5), "visible": [99, 100, 200, 200, 200]},
            RangeError,
            "cu_seqlens_q: expected to end at 4, the tokens of q, or before, got 5",
        ),
        ({"cu_seqlens_q": offsets(0)}, ShapeError, r"cu_seqlens_q: expected shape \[B \+ 1\]"),
        ({"block_table": [[0]]}, DtypeError, "block_table: expected a torch.Tensor, got list"),
        (
            {"block_table": torch.zeros(1, 4, dtype=torch.int32)},
            ShapeError,
            r"block_table: expected shape \[2, max_blocks\]",
        ),
        ({"kv_cache": None}, DtypeError, "kv_cache: expected a torch.Tensor, got NoneType"),
        ({"visible": [[99, 100], [200]]}, ShapeError, "visible: expected rows of the same length"),
        ({"visible": None, "causal": "no"}, DtypeError, "causal: expected a bool or None, got str"),
    ],
)
def test_what_masks_of_several_parts_are_made_of_is_checked(
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[MlaDecodeError],
    message: str,
) -> None:
    monkeypatch.setattr(distributed, "_world_size", lambda group: 1)
    arguments: dict[str, Any] = {
        "q": torch.zeros(4, HEADS, 576, dtype=torch.bfloat16),
        "kv_cache": torch.zeros(8, 64, 576, dtype=torch.bfloat16),
        "block_table": torch.arange(8, dtype=torch.int32).view(2, 4),
        "seq_lens": [100, 200],
        "cu_seqlens_q": offsets(0, 2, 4),
        "visible": [99, 100, 200, 200],  # of one request a causal mask, of the other none
    }
    distributed.context_parallel_decode(**arguments)
    with pytest.raises(error, match=message):
        distributed.context_parallel_decode(**{**arguments, **changes})


def test_new_tokens_of_all_requests_may_be_any_integer() -> None:
    seen = distributed.visible_interleaved([100, 200], np.int64(2), 0, 2)
    assert seen.tolist() == distributed.visible_interleaved([100, 200], 2, 0, 2).tolist()


def test_a_wrong_mask_is_caught_by_these_tests() -> None:
    """The reference sees the difference between the masks that the splits test."""
    batch = make_batch([70], [3], HEADS)
    causal, _ = batch.attention()
    every = Batch(batch.q, batch.keys * 3, [1, 1, 1])
    blind, _ = every.attention()
    assert not reference.compare(blind, causal[..., 0], causal, causal[..., 0]).passed


def test_ranks_that_never_end_do_not_hang_the_tests(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match="wait_for_ever: ranks still run after 2 s"):
        run_ranks(wait_for_ever, 1, tmp_path, timeout_s=2)


def wait_for_ever(rank: int, folder: Path) -> None:
    """What a rank does whose peers do not come."""
    threading.Event().wait()
