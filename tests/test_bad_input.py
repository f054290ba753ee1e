"""Bad input: a typed error that names argument, expected and actual; nothing is changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mla_decode
import numpy as np
import pytest
import torch
from mla_decode import _scheduler, native, plan_file, raw
from mla_decode.errors import (
    AlignmentError,
    DeviceError,
    DtypeError,
    MlaDecodeError,
    QueueError,
    RangeError,
    ScheduleError,
    ShapeError,
    StrideError,
    UnsupportedError,
)
from mla_decode.queue_check import as_words
from mla_decode.reference import Case, attention, make_case
from mla_decode.words import Fill, Noop, Partial, Reduction, Words

from tests.support import Launch, cut, pack

Change = Callable[[dict[str, Any]], None]

META = torch.device("meta")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case([130, 65], 8, 2, 64)


@pytest.fixture
def launch(case: Case) -> Launch:
    plan = mla_decode.plan(case.seq_lens, 8, 2, policy="fixed", split_tiles=1)
    assert plan.num_slots > 1
    return Launch.of_plan(case, plan)


def replaced(name: str, change: Callable[[torch.Tensor], Any]) -> Change:
    def apply(tensors: dict[str, Any]) -> None:
        tensors[name] = change(tensors[name])

    return apply


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, 2 or 4 bytes past an aligned address."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.view(tensor.shape).copy_(tensor)


def padded_rows(columns: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same values with ``columns`` more elements between rows."""

    def apply(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] + columns, dtype=tensor.dtype)
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]

    return apply


def last_dim_strided(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


RAW = {
    "q_v rank": (
        replaced("q_v", lambda t: t[0]),
        ShapeError,
        "q_v: expected shape [B, s_q, H, 512], got [2, 8, 512]",
    ),
    "q_v width": (
        replaced("q_v", lambda t: t[..., :256]),
        ShapeError,
        "q_v: expected shape [B, s_q, H, 512]",
    ),
    "q_rot width": (
        replaced("q_rot", lambda t: t[..., :32]),
        ShapeError,
        "q_rot: expected shape [2, 2, 8, 64], got [2, 2, 8, 32]",
    ),
    "q_rot batch": (
        replaced("q_rot", lambda t: t[:1]),
        ShapeError,
        "q_rot: expected shape [2, 2, 8, 64], got [1, 2, 8, 64]",
    ),
    "k_rot blocks": (replaced("k_rot", lambda t: t[:-1]), ShapeError, "k_rot: expected shape"),
    "v rank": (
        replaced("v", lambda t: t[0]),
        ShapeError,
        "v: expected shape [blocks, block_size, 512], got [64, 512]",
    ),
    "v heads": (
        replaced("v", lambda t: torch.stack([t, t], 2)),
        UnsupportedError,
        "v: expected one KV head, got shape [",
    ),
    "table batch": (
        replaced("table", lambda t: t[:1]),
        ShapeError,
        "table: expected shape [2, max_blocks], got [1, ",
    ),
    "o tokens": (
        replaced("o", lambda t: t[:, :1]),
        ShapeError,
        "o: expected shape [2, 2, 8, 512], got [2, 1, 8, 512]",
    ),
    "lse order": (
        replaced("lse", lambda t: t.transpose(1, 2)),
        ShapeError,
        "lse: expected shape [2, 8, 2], got [2, 2, 8]",
    ),
    "o_scratch rank": (
        replaced("o_scratch", lambda t: t.unsqueeze(1)),
        ShapeError,
        "o_scratch: expected shape [slots, slot_rows, 512], got [",
    ),
    "o_scratch rows": (
        lambda tensors: tensors.update(
            {name: tensors[name][:, :8].contiguous() for name in ("o_scratch", "lvec_scratch")}
        ),
        ShapeError,
        "o_scratch: expected at least 16 rows per slot, got shape [",
    ),
    "lvec_scratch rows": (
        replaced("lvec_scratch", lambda t: t[:, :8]),
        ShapeError,
        "lvec_scratch: expected shape [",
    ),
    "lvec_scratch slots": (
        replaced("lvec_scratch", lambda t: t[:-1]),
        ShapeError,
        "lvec_scratch: expected shape",
    ),
    "completion_flag slots": (
        replaced("completion_flag", lambda t: t[:-1]),
        ShapeError,
        "completion_flag: expected shape",
    ),
    "instruction words": (
        replaced("instructions", lambda t: t[:, :31].contiguous()),
        ShapeError,
        "instructions: expected shape [n, 32]",
    ),
    "timings words": (
        replaced("timings", lambda t: t[:, :7].contiguous()),
        ShapeError,
        "timings: expected shape [n, 8]",
    ),
    "timings too few": (
        replaced("timings", lambda t: t[:-1]),
        ShapeError,
        "timings: expected at least",
    ),
    "queue state too small": (
        replaced("global_instruction_index", lambda t: t[:1]),
        ShapeError,
        "global_instruction_index: expected at least 32 int32 words, zeroed once, got shape [1]",
    ),
    "table with kv_indptr": (
        replaced("kv_indptr", lambda _: torch.tensor([0, 3, 5], dtype=torch.int32)),
        ShapeError,
        "table: expected shape [n], got [2, 5]",
    ),
    "cu_seqlens_q with four dimensions": (
        replaced("cu_seqlens_q", lambda _: torch.tensor([0, 2, 4], dtype=torch.int32)),
        ShapeError,
        "q_v: expected shape [T, H, 512], got [2, 2, 8, 512]",
    ),
    "sink heads": (
        replaced("attn_sink", lambda _: torch.zeros(4)),
        ShapeError,
        "attn_sink: expected shape [8], got [4]",
    ),
    "q_v dtype": (
        replaced("q_v", torch.Tensor.float),
        DtypeError,
        "q_v: expected torch.bfloat16 or torch.float16, got torch.float32",
    ),
    "q_rot dtype": (
        replaced("q_rot", torch.Tensor.half),
        DtypeError,
        "q_rot: expected torch.bfloat16, got torch.float16",
    ),
    "sink dtype": (
        replaced("attn_sink", lambda _: torch.zeros(8, dtype=BF16)),
        DtypeError,
        "attn_sink: expected torch.float32, got torch.bfloat16",
    ),
    "sink device": (
        replaced("attn_sink", lambda _: torch.zeros(8, device=META)),
        DeviceError,
        "attn_sink: expected device cpu, got meta",
    ),
    "causal no bool": (
        replaced("causal", lambda _: 1),
        DtypeError,
        "causal: expected a bool, got int",
    ),
    "lse base": (
        replaced("lse_base", lambda _: 10.0),
        RangeError,
        "lse_base: expected math.e or 2, got 10.0",
    ),
    "lse empty": (
        replaced("lse_empty", lambda _: 0.0),
        RangeError,
        "lse_empty: expected inf or -inf, got 0.0",
    ),
    "v dtype": (
        replaced("v", torch.Tensor.half),
        DtypeError,
        "v: expected torch.bfloat16, got torch.float16",
    ),
    "table dtype": (
        replaced("table", torch.Tensor.long),
        DtypeError,
        "table: expected torch.int32, got torch.int64",
    ),
    "o dtype": (replaced("o", torch.Tensor.float), DtypeError, "o: expected torch.bfloat16"),
    "o_scratch dtype": (
        replaced("o_scratch", torch.Tensor.bfloat16),
        DtypeError,
        "o_scratch: expected torch.float32",
    ),
    "instructions dtype": (
        replaced("instructions", torch.Tensor.long),
        DtypeError,
        "instructions: expected torch.int32",
    ),
    "lse dtype": (
        replaced("lse", torch.Tensor.double),
        DtypeError,
        "lse: expected torch.float32, got torch.float64",
    ),
    "o no tensor": (
        replaced("o", torch.Tensor.tolist),
        DtypeError,
        "o: expected a torch.Tensor, got list",
    ),
    "scale no number": (
        replaced("softmax_scale", str),
        DtypeError,
        "softmax_scale: expected a float, got str",
    ),
    "tic no int": (replaced("tic", float), DtypeError, "tic: expected an int, got float"),
    "v device": (
        replaced("v", lambda t: t.to(META)),
        DeviceError,
        "v: expected device cpu, got meta",
    ),
    "completion_flag device": (
        replaced("completion_flag", lambda t: t.to(META)),
        DeviceError,
        "completion_flag: expected device cpu, got meta",
    ),
    "q_v last dim": (
        replaced("q_v", last_dim_strided),
        StrideError,
        "q_v: expected stride 1 in the last dimension",
    ),
    "v last dim": (
        replaced("v", last_dim_strided),
        StrideError,
        "v: expected stride 1 in the last dimension",
    ),
    "v broadcast": (
        replaced("v", lambda t: t[:1].expand_as(t)),
        StrideError,
        "v: expected no broadcast dimension, got stride 0 in 0",
    ),
    "table last dim": (
        replaced("table", last_dim_strided),
        StrideError,
        "table: expected stride 1",
    ),
    "q_v tokens apart": (
        replaced("q_v", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
        StrideError,
        "q_v: expected stride",
    ),
    "q_v requests apart": (
        replaced("q_v", lambda t: t.repeat(1, 2, 1, 1)[:, :2]),
        StrideError,
        "q_v: expected stride",
    ),
    "sink strided": (
        replaced("attn_sink", lambda _: torch.zeros(16)[::2]),
        StrideError,
        "attn_sink: expected a contiguous tensor",
    ),
    "o not contiguous": (
        replaced("o", padded_rows(64)),
        StrideError,
        "o: expected a contiguous tensor",
    ),
    "o_scratch not contiguous": (
        replaced("o_scratch", padded_rows(64)),
        StrideError,
        "o_scratch: expected a contiguous tensor",
    ),
    "lse overlaps": (
        replaced("lse", lambda t: t[:1].expand_as(t)),
        StrideError,
        "lse: written, expected elements at different addresses",
    ),
    "q_rot pointer": (
        replaced("q_rot", misaligned),
        AlignmentError,
        "q_rot: expected a 16-byte aligned pointer, got 0x",
    ),
    "k_rot pointer": (
        replaced("k_rot", misaligned),
        AlignmentError,
        "k_rot: expected a 16-byte aligned pointer",
    ),
    "o pointer": (
        replaced("o", misaligned),
        AlignmentError,
        "o: expected a 16-byte aligned pointer",
    ),
    "v row stride": (
        replaced("v", padded_rows(4)),
        AlignmentError,
        "v: expected the stride of dimension 1 to be a multiple of 16 bytes",
    ),
    "scale nan": (
        replaced("softmax_scale", lambda _: math.nan),
        RangeError,
        "softmax_scale: expected a finite number above 0, got nan",
    ),
    "tic negative": (
        replaced("tic", lambda _: -1),
        RangeError,
        "tic: expected 0 to 2147483646, got -1",
    ),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_launch_refuses(name: str, launch: Launch) -> None:
    change, error, message = RAW[name]
    before = launch.snapshot()
    bad = dict(launch.tensors)
    change(bad)
    with pytest.raises(error) as caught:
        mla_decode.mla_decode(**bad)
    assert isinstance(caught.value, MlaDecodeError)
    assert message in str(caught.value)
    assert launch.changed(before) == []


@pytest.mark.parametrize(
    ("heads", "tokens", "block", "message"),
    [
        (129, 1, 64, "num_heads: expected 1 to 128, got 129"),
        (8, 17, 64, "new_tokens: expected 1 to 16, got 17"),
        (8, 1, 0, "v: expected a block size of at least 1, got 0"),
    ],
)
def test_raw_launch_refuses_sizes_that_no_kernel_has(
    heads: int, tokens: int, block: int, message: str
) -> None:
    case = make_case([100], heads, tokens)
    launch = Launch.of(case, pack(Noop(uid=0)), num_slots=1)
    for name in ("v", "k_rot"):
        launch.tensors[name] = launch.tensors[name][:, :block]
    before = launch.snapshot()
    with pytest.raises(UnsupportedError) as caught:
        launch.run()
    assert message in str(caught.value)
    assert launch.changed(before) == []


def test_eight_heads_launch_refuses_others() -> None:
    launch = Launch.of(make_case([100], 16), pack(Noop(uid=0)), num_slots=1)
    with pytest.raises(
        UnsupportedError, match=r"q_v: expected 8 heads, got shape \[1, 1, 16, 512\]"
    ):
        mla_decode.mla_decode_8_heads(**launch.tensors)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_ctas": -1}, RangeError, "num_ctas: expected 0 to"),
        ({"spin_timeout_ns": 0}, RangeError, "spin_timeout_ns: expected 1 to"),
        ({"stream": 0}, DeviceError, "stream: expected None for CPU tensors"),
    ],
    ids=("num_ctas", "spin_timeout_ns", "stream"),
)
def test_raw_launch_refuses_options(
    options: dict[str, Any], error: type[Exception], message: str, launch: Launch
) -> None:
    before = launch.snapshot()
    with pytest.raises(error, match=message):
        launch.run(**options)
    assert launch.changed(before) == []


# Words out of range

PARTIAL = Partial(uid=0, dst_batch=-1, q_batch=1, start=0, end=65, length=65)
OTHER = Partial(uid=1, dst_batch=-2, q_batch=1, start=0, end=64, length=65)
LIST = Reduction(uid=2, dst_batch=1, dst_seq=1, inputs=(0,))
RUN = Reduction(uid=3, dst_batch=1, dst_seq=0, inputs=range(2), row_offset=8)
FILL = Fill(uid=4, token_begin=2, token_end=4)
QUEUE = pack(PARTIAL, OTHER, LIST, RUN, FILL)

# (instruction of QUEUE, word, value, message)
WORDS = {
    "opcode": (0, 0, 4, "word 0 (opcode): expected an opcode in (0, 1, 2, 3), got 4"),
    "partial dst_batch of another": (
        0,
        2,
        0,
        "word 2 (dst_batch): expected the sequence of q_batch or a scratch slot (-1 to -2), got 0",
    ),
    "partial dst_batch too high": (0, 2, 2, "word 2 (dst_batch)"),
    "partial slot too high": (0, 2, -3, "word 2 (dst_batch)"),
    "partial dst_seq": (0, 3, 1, "word 3 (dst_seq): expected the same as q_seq, got 1"),
    "q_batch": (0, 4, 2, "word 4 (q_batch): expected 0 to 1, got 2"),
    "q_batch negative": (0, 4, -1, "word 4 (q_batch)"),
    "q_seq": (0, 5, 2, "word 5 (q_seq): expected a new token of the sequence, got 2"),
    "q_seq negative": (0, 5, -1, "word 5 (q_seq)"),
    "start no tile": (0, 6, 32, "word 6 (start): expected a multiple of 64, got 32"),
    "start negative": (0, 6, -64, "word 6 (start)"),
    "end before start": (0, 7, 0, "word 7 (end): expected above start, at most length, got 0"),
    "end past length": (0, 7, 66, "word 7 (end)"),
    "end inside a tile": (
        0,
        7,
        32,
        "word 7 (end): expected a multiple of 64 or the length, got 32",
    ),
    "length zero": (0, 8, 0, "word 8 (length): expected 1 to 320, got 0"),
    "length past the table": (0, 8, 321, "word 8 (length): expected 1 to 320, got 321"),
    "row_begin": (
        0,
        9,
        16,
        "word 9 (row_begin): expected a (token, head) row of the sequence, got 16",
    ),
    "row_begin inside a group": (
        0,
        9,
        8,
        "word 9 (row_begin): expected a first row that is a multiple of 16, got 8",
    ),
    "row_begin negative": (0, 9, -8, "word 9 (row_begin)"),
    "num_rows too many": (0, 10, 17, "word 10 (num_rows): expected 16 rows, or all that are left"),
    "num_rows too few": (0, 10, 8, "word 10 (num_rows): expected 16 rows"),
    "num_rows negative": (0, 10, -1, "word 10 (num_rows)"),
    "adopted too high": (
        0,
        13,
        3,
        "word 13 (adopted): expected 0 or 1 + a scratch slot, at most 2, got 3",
    ),
    "adopted negative": (0, 13, -1, "word 13 (adopted)"),
    "too many inputs": (2, 2, 27, "word 2 (shape): expected at most 27 inputs, got 27"),
    "head_begin": (2, 2, 8 << 8, "word 2 (shape): expected a first head below 8"),
    "rows past the end": (
        2,
        2,
        4 << 8 | 5 << 16,
        "word 2 (shape): expected (token, head) rows of the sequence",
    ),
    "columns past the end": (
        2,
        2,
        4 << 24 | 5 << 27,
        "word 2 (shape): expected columns in 0 to 512",
    ),
    "reduction dst_batch": (
        2,
        3,
        2,
        "word 3 (dst_batch): expected a sequence (0 to 1) or a scratch slot (-1 to -2), got 2",
    ),
    "reduction slot": (2, 3, -3, "word 3 (dst_batch)"),
    "reduction dst_seq": (2, 4, 2, "word 4 (dst_seq): expected a new token of the sequence, got 2"),
    "reduction dst_seq negative": (2, 4, -1, "word 4 (dst_seq)"),
    "input too high": (2, 5, 2, "word 5 (input 0): expected a scratch slot, 0 to 1, got 2"),
    "input negative": (2, 5, -1, "word 5 (input 0)"),
    "run with a number in the list's bits": (
        3,
        2,
        1 - 2**31,
        "word 2 (shape): expected bits 0 to 7 of a run to be 0",
    ),
    "run first": (3, 5, -1, "word 5 (first_input): expected a scratch slot, 0 to 1, got -1"),
    "run first too high": (3, 5, 2, "word 5 (first_input)"),
    "run of none": (3, 6, 0, "word 6 (num_inputs): expected 1 to 65536, got 0"),
    "run of too many": (3, 6, 65537, "word 6 (num_inputs): expected 1 to 65536, got 65537"),
    "run too long": (3, 6, 4, "word 6 (num_inputs): expected inputs below 2, the scratch slots"),
    "run step": (3, 7, 0, "word 7 (input_step): expected at least 1, got 0"),
    "run step too wide": (3, 7, 2, "word 6 (num_inputs): expected inputs below 2"),
    "run step far too wide": (3, 7, 2**31 - 1, "word 6 (num_inputs): expected inputs below 2"),
    "run row_offset negative": (3, 8, -8, "word 8 (row_offset): expected at least 0, got -8"),
    "run row_offset too high": (
        3,
        8,
        9,
        "word 2 (shape): expected (token, head) rows of the sequence",
    ),
    "run words behind it": (3, 9, 1, "word 9 (unused): expected 0, got 1"),
    "fill begin": (4, 2, -1, "word 2 (token_begin): expected 0 to 3, got -1"),
    "fill begin too high": (4, 2, 4, "word 2 (token_begin)"),
    "fill of nothing": (4, 3, 2, "word 3 (token_end): expected above token_begin, at most 4"),
    "fill end": (4, 3, 5, "word 3 (token_end): expected above token_begin, at most 4, got 5"),
}


def small_launch(case: Case, words: Words) -> Launch:
    return Launch.of(case, words, num_slots=2)


def test_queue_that_the_word_tests_start_from_is_accepted(case: Case) -> None:
    small_launch(case, QUEUE).run()


@pytest.mark.parametrize("name", WORDS)
def test_word_out_of_range_is_refused(name: str, case: Case) -> None:
    instruction, word, value, message = WORDS[name]
    words = QUEUE.copy()
    words[instruction, word] = value
    launch = small_launch(case, words)
    before = launch.snapshot()
    with pytest.raises(QueueError) as caught:
        launch.run()
    assert f"instruction {instruction} (uid {words[instruction, 1]})" in str(caught.value)
    assert message in str(caught.value)
    assert launch.changed(before) == []


@pytest.mark.parametrize("name", WORDS)
def test_validator_refuses_it_too(name: str) -> None:
    """The same word in the first such instruction of a queue that is valid as a whole."""
    number, word, value, _ = WORDS[name]
    case = make_case([130, 0, 65], 8, 2)
    queue, num_slots = cut(case, 1, runs=number == 3)
    kind = type((PARTIAL, OTHER, LIST, RUN, FILL)[number])
    words = pack(*queue)
    valid = (case.seq_lens, case.num_heads, 2, num_slots)
    _scheduler.validate(words, *valid)
    words[next(i for i, d in enumerate(queue) if isinstance(d, kind)), word] = value
    with pytest.raises(_scheduler.ScheduleError, match="rule: "):
        _scheduler.validate(words, *valid)


# Ragged tokens and block ids in one row: what they hold, and queues against them


def ragged_launch(**changes: Partial | Fill) -> Launch:
    """Tokens 1 and 3 of two requests, 2 tokens of padding; 5 blocks for length 130, 4 for 65."""
    case = make_case([130, 65], 8, [1, 3], padding_tokens=2, csr=True)
    queue = {
        "first": Partial(uid=2, dst_batch=0, q_batch=0, start=0, end=130, length=130),
        "second": Partial(uid=0, dst_batch=-1, q_batch=1, start=0, end=65, length=65),
        "fill": Fill(uid=3, token_begin=4, token_end=6),
        **changes,
    }
    return Launch.of(case, pack(*queue.values()), num_slots=1)


def test_ragged_queue_that_the_tests_start_from_is_accepted() -> None:
    ragged_launch().run()


OFFSETS = {
    "cu_seqlens_q start": ("cu_seqlens_q", [1, 1, 4], "cu_seqlens_q: expected to start with 0"),
    "cu_seqlens_q falls": (
        "cu_seqlens_q",
        [0, 5, 4],
        "cu_seqlens_q: expected not to fall, got 5 and 4 for request 1",
    ),
    "cu_seqlens_q too far": (
        "cu_seqlens_q",
        [0, 1, 7],
        "cu_seqlens_q: expected to end at 6 or below, got 7",
    ),
    "kv_indptr start": ("kv_indptr", [-1, 5, 9], "kv_indptr: expected to start with 0, got -1"),
    "kv_indptr falls": ("kv_indptr", [0, 6, 5], "kv_indptr: expected not to fall, got 6 and 5"),
    "kv_indptr too far": ("kv_indptr", [0, 5, 10], "kv_indptr: expected to end at 9 or below"),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_out_of_range_are_refused(name: str) -> None:
    field, values, message = OFFSETS[name]
    launch = ragged_launch()
    launch.tensors[field] = torch.tensor(values, dtype=torch.int32)
    before = launch.snapshot()
    with pytest.raises(RangeError) as caught:
        launch.run()
    assert message in str(caught.value)
    assert launch.changed(before) == []


def test_more_new_tokens_than_a_request_may_have_are_refused() -> None:
    case = make_case([130, 65], 8, [1, 17])
    launch = Launch.of(case, pack(Noop(uid=0)), num_slots=0)
    with pytest.raises(RangeError, match="request 1: expected at most 16 new tokens, got 17"):
        launch.run()


RAGGED = {
    "length past its own blocks": (
        {"second": Partial(uid=0, dst_batch=-1, q_batch=1, start=0, end=257, length=257)},
        "word 8 (length): expected 1 to its block ids', got 257",
    ),
    "token past its own": (
        {"first": Partial(2, 0, 0, 0, 130, 130, q_seq=1, dst_seq=1)},
        "word 5 (q_seq): expected a new token of the sequence, got 1",
    ),
    "rows of a longer sequence": (
        {"first": Partial(2, 0, 0, 0, 130, 130, num_rows=24)},
        "word 10 (num_rows): expected 64 rows, or all that are left if fewer (0), got 24",
    ),
    "output of another sequence": (
        {"second": Partial(2, 0, 1, 0, 65, 65)},
        "word 2 (dst_batch): expected the sequence of q_batch or a scratch slot (-1 to -1), got 0",
    ),
    "fill past the padding": (
        {"fill": Fill(uid=3, token_begin=4, token_end=7)},
        "word 3 (token_end): expected above token_begin, at most 6, got 7",
    ),
}


@pytest.mark.parametrize("name", RAGGED)
def test_ragged_queue_out_of_range_is_refused(name: str) -> None:
    changes, message = RAGGED[name]
    launch = ragged_launch(**changes)
    before = launch.snapshot()
    with pytest.raises(QueueError) as caught:
        launch.run()
    assert message in str(caught.value)
    assert launch.changed(before) == []


def test_queue_on_a_gpu_is_checked_once_per_tensors_and_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The path of CUDA tensors, with tensors of the host in their place."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    checked = []
    monkeypatch.setattr(raw, "check_words", lambda words, limits: checked.append(limits))
    launch = ragged_launch()

    def times() -> int:
        before = len(checked)
        assert raw._check_device_queue(launch.arguments(), native.Grid(132)) == 3
        return len(checked) - before

    assert (times(), times()) == (1, 0)
    for name in ("instructions", "cu_seqlens_q", "kv_indptr"):
        launch.tensors[name].add_(0)  # another version
        assert (times(), times()) == (1, 0), name
        launch.tensors[name] = launch.tensors[name].clone()  # another tensor
        assert (times(), times()) == (1, 0), name
    with torch.inference_mode():  # where tensors count no versions
        launch.tensors["instructions"] = launch.instructions.clone()
        assert (times(), times()) == (1, 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match="a queue cannot be checked while"):
        times()


def test_slots_with_too_few_rows_for_a_ragged_queue_are_refused() -> None:
    launch = ragged_launch()
    for name in ("o_scratch", "lvec_scratch"):
        launch.tensors[name] = launch.tensors[name][:, :23].contiguous()
    with pytest.raises(QueueError, match=r"expected rows that a scratch slot holds \(23\)"):
        launch.run()


def test_a_slot_tells_the_kernel_how_many_rows_a_ragged_group_has() -> None:
    """Even where nothing is written to one."""
    case = make_case([130, 65], 8, [1, 3])
    plan = mla_decode.plan(case.seq_lens, 8, [1, 3], policy="unsplit")
    assert plan.num_slots == 0
    launch = Launch.of(case, plan.instructions, num_slots=0)
    launch.run()
    launch.tensors["o_scratch"] = torch.empty(0, 23, 512)
    launch.tensors["lvec_scratch"] = torch.empty(0, 23)
    with pytest.raises(QueueError, match=r"expected rows that a scratch slot holds \(23\)"):
        launch.run()


def test_scratch_too_small_is_refused(case: Case) -> None:
    plan = mla_decode.plan(case.seq_lens, 8, 2, policy="fixed", split_tiles=1)
    assert plan.num_slots > 1
    launch = Launch.of(case, plan.instructions, plan.num_slots - 1)
    before = launch.snapshot()
    with pytest.raises(QueueError, match="scratch slot"):
        launch.run()
    assert launch.changed(before) == []


def test_words_after_the_end_mark_do_not_matter(case: Case) -> None:
    words = pack(PARTIAL, Noop(uid=1), Noop(uid=2))
    words[1, 0] = -1
    words[2, 0] = 77
    small_launch(case, words).run()


def test_check_can_be_waived_for_a_trusted_queue(launch: Launch) -> None:
    launch.run(check_queue=False)
    assert not launch.o.isnan().any()


@pytest.mark.parametrize(
    "words", [np.zeros((2, 32), np.int64), np.zeros((2, 31), np.int32), np.zeros(32, np.int32), []]
)
def test_arrays_that_are_no_queue_are_refused(words: object) -> None:
    with pytest.raises(QueueError, match="instructions: expected"):
        as_words(words)


# Plans


@pytest.mark.parametrize(
    ("seq_lens", "error", "message"),
    [
        ([100, -1], RangeError, "seq_lens: request 1: expected a length of at least 0, got -1"),
        ([2**31], RangeError, "seq_lens: request 0: expected at most 2147483392, got 2147483648"),
        ([10**30], RangeError, "seq_lens: request 0: expected at most"),
        ([], ShapeError, "seq_lens: expected shape [B] with B >= 1, got [0]"),
        (torch.ones(2, 2, dtype=torch.int32), ShapeError, "seq_lens: expected shape [B]"),
        (torch.ones(2), DtypeError, "seq_lens: expected int32 or int64, got torch.float32"),
        (np.ones(2), DtypeError, "seq_lens: expected integers, got float64"),
        ([1.5], DtypeError, "seq_lens: request 0: expected an int, got float"),
        ([True], DtypeError, "seq_lens: request 0: expected an int, got bool"),
        (7, DtypeError, "seq_lens: expected a list or a tensor, got int"),
    ],
    ids=str,
)
def test_plan_refuses_lengths(seq_lens: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        mla_decode.plan(seq_lens, 16)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 129}, UnsupportedError, "num_heads: expected at most 128"),
        ({"num_heads": 0}, RangeError, "num_heads: expected 1 to"),
        ({"new_tokens": 0}, UnsupportedError, "new_tokens: expected 1 to 16, got 0"),
        ({"new_tokens": 17}, UnsupportedError, "new_tokens: expected 1 to 16, got 17"),
        ({"new_tokens": [17]}, UnsupportedError, "new_tokens: request 0: expected at most 16"),
        ({"new_tokens": [1, 1]}, ShapeError, "new_tokens: expected shape [1] as seq_lens, got [2]"),
        ({"policy": "best"}, RangeError, "policy: expected one of ("),
        ({"policy": "fixed"}, RangeError, "split_tiles: expected 1 to"),
        ({"split_tiles": -1}, RangeError, "split_tiles: expected 0 to"),
        ({"num_workers": 0}, RangeError, "num_workers: expected 1 to"),
        ({"num_workers": 1.5}, DtypeError, "num_workers: expected an int, got float"),
    ],
    ids=str,
)
def test_plan_refuses_options(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        mla_decode.plan([100], **{"num_heads": 16, **options})
    assert message in str(caught.value)


# Plan files


@pytest.mark.parametrize("name", ("plan.json", "plan.npz"))
@pytest.mark.parametrize("tokens", (2, (2, 0, 3)), ids=str)
def test_plan_file_keeps_every_size(
    tokens: int | tuple[int, ...], name: str, tmp_path: Path
) -> None:
    document = plan_document(new_tokens=tokens)
    plan_file.write(tmp_path / name, document)
    loaded = plan_file.read(tmp_path / name)
    for field, value in vars(document).items():
        got = getattr(loaded, field)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(got, value)
        else:
            assert got == value
            assert type(got) is type(value)


def plan_document(**changes: Any) -> plan_file.PlanDocument:
    fields: dict[str, Any] = {
        "seq_lens": np.array([130, 0, 65], np.int32),
        "num_heads": 16,
        "new_tokens": (2, 0, 3),
        "num_kv_heads": 2,
        "total_tokens": 7,
        "num_workers": 8,
        "policy": "balanced",
        "split_tiles": 0,
        "instructions": QUEUE,
        "num_slots": 2,
        "predicted_us": 12.5,
        "worker": np.arange(5, dtype=np.int32),
        "start_us": np.zeros(5, np.float32),
        "end_us": np.ones(5, np.float32),
        "group_rows": 64,
    }
    return plan_file.PlanDocument(**{**fields, **changes})


MUTATIONS = {
    "new_tokens": ([2, 0, 4], "mutated: expected sha256"),
    "new_tokens uniform": (2, "mutated: expected sha256"),
    "new_tokens too large": ([2, 0, 2**70], "mutated: expected sha256"),
    "new_tokens of another batch": ([2, 0], "new_tokens: expected 3 entries, got 2"),
    "new_tokens no numbers": ([2, 0, "x"], "malformed: "),
    "num_kv_heads": (1, "mutated: expected sha256"),
    "total_tokens": (8, "mutated: expected sha256"),
    "total_tokens too large": (2**70, "mutated: expected sha256"),
    "num_slots": (3, "mutated: expected sha256"),
    "group_rows": (16, "mutated: expected sha256"),
    "queue_version": (1, "expected queue version 3 of 32 words, got version 1 of 32 words"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_plan_file_is_refused(name: str, tmp_path: Path) -> None:
    value, message = MUTATIONS[name]
    path = tmp_path / "plan.json"
    plan_file.write(path, plan_document())
    document = json.loads(path.read_text())
    document[name.split()[0]] = value
    path.write_text(json.dumps(document))
    with pytest.raises(QueueError) as caught:
        plan_file.read(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("entry", ("new_tokens", "num_kv_heads", "total_tokens", "group_rows"))
def test_plan_file_without_a_size_is_refused(entry: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_file.write(path, plan_document())
    document = json.loads(path.read_text())
    del document[entry]
    path.write_text(json.dumps(document))
    with pytest.raises(QueueError, match=f"truncated: expected the entry '{entry}'"):
        plan_file.read(path)


# Decode


def decode(case: Case, **changes: Any) -> None:
    arguments = {
        "q": case.q,
        "kv_cache": case.kv_cache,
        "block_table": case.block_table,
        "seq_lens": case.seq_lens,
        **changes,
    }
    mla_decode.decode(**arguments)


DECODE = {
    "q width": (
        lambda c: {"q": c.q[..., :512]},
        ShapeError,
        "q: expected shape [B, s_q, H, 576], got [2, 2, 8, 512]",
    ),
    "q pair": (
        lambda c: {"q": (c.q[..., :512], c.q[..., :32])},
        ShapeError,
        "q[1]: expected shape [2, 2, 8, 64]",
    ),
    "q three": (
        lambda c: {"q": (c.q, c.q, c.q)},
        ShapeError,
        "q: expected a tensor or a pair, got a tuple of 3",
    ),
    "q no tensor": (lambda c: {"q": [1]}, DtypeError, "q: expected a torch.Tensor, got list"),
    "q heads": (
        lambda c: {"q": torch.zeros(2, 2, 129, 576, dtype=BF16)},
        UnsupportedError,
        "num_heads: expected 1 to 128, got 129",
    ),
    "q dtype": (
        lambda c: {"q": c.q.float()},
        DtypeError,
        "q: expected torch.bfloat16 or torch.float16, got torch.float32",
    ),
    "q dtype of another": (
        lambda c: {"q": c.q.half()},
        DtypeError,
        "kv_cache: expected torch.float16, got torch.bfloat16",
    ),
    "kv heads": (
        lambda c: {"kv_cache": torch.zeros(3, 64, 3, 576, dtype=BF16)},
        ShapeError,
        "q: expected a multiple of 3 heads, the KV heads of kv_cache, got 8",
    ),
    "kv width": (
        lambda c: {"kv_cache": c.kv_cache[..., :575]},
        ShapeError,
        "kv_cache: expected shape [num_blocks, block_size, 576]",
    ),
    "kv block size": (
        lambda c: {"kv_cache": c.kv_cache[:, :0]},
        UnsupportedError,
        "kv_cache: expected a block size of at least 1, got 0",
    ),
    "kv dtype": (
        lambda c: {"kv_cache": c.kv_cache.float()},
        DtypeError,
        "kv_cache: expected torch.bfloat16",
    ),
    "kv device": (
        lambda c: {"kv_cache": c.kv_cache.to(META)},
        DeviceError,
        "kv_cache: expected device cpu, got meta",
    ),
    "kv alignment": (
        lambda c: {"kv_cache": misaligned(c.kv_cache)},
        AlignmentError,
        "expected a 16-byte aligned pointer",
    ),
    "table dtype": (
        lambda c: {"block_table": c.block_table.long()},
        DtypeError,
        "block_table: expected torch.int32, got torch.int64",
    ),
    "table batch": (
        lambda c: {"block_table": c.block_table[:1]},
        ShapeError,
        "block_table: expected shape [2, max_blocks]",
    ),
    "lengths count": (
        lambda c: {"seq_lens": [130]},
        ShapeError,
        "seq_lens: expected shape [2] as q, got [1]",
    ),
    "length negative": (
        lambda c: {"seq_lens": [130, -5]},
        RangeError,
        "seq_lens: request 1: expected a length of at least 0, got -5",
    ),
    "length too long": (
        lambda c: {"seq_lens": [130, 321]},
        RangeError,
        "seq_lens: expected at most 320 (5 blocks of 64 tokens in block_table), got 321",
    ),
    "scale": (
        lambda c: {"softmax_scale": math.inf},
        RangeError,
        "softmax_scale: expected a finite number above 0, got inf",
    ),
    "out shape": (
        lambda c: {"out": torch.zeros(2, 2, 8, 576, dtype=BF16)},
        ShapeError,
        "out: expected shape [2, 2, 8, 512]",
    ),
    "plan of other lengths": (
        lambda c: {"plan": mla_decode.plan([130, 64], 8, 2)},
        ScheduleError,
        "plan: made for length 64 of request 1, seq_lens has 65",
    ),
    "plan of another batch": (
        lambda c: {"plan": mla_decode.plan([130], 8, 2)},
        ScheduleError,
        "plan: made for 1 requests, seq_lens has 2",
    ),
    "plan of other heads": (
        lambda c: {"plan": mla_decode.plan([130, 65], 16, 2)},
        ScheduleError,
        "plan: made for 16 num_heads, the call has 8",
    ),
    "plan of other tokens": (
        lambda c: {"plan": mla_decode.plan([130, 65], 8, 1)},
        ScheduleError,
        "plan: made for 1 new tokens each, the call has 2",
    ),
    "plan no plan": (
        lambda c: {"plan": "fast"},
        DtypeError,
        "plan: expected a Plan or a DevicePlan, got str",
    ),
    "workspace device": (
        lambda c: {"workspace": mla_decode.Workspace(META)},
        DeviceError,
        "workspace: expected device cpu, got meta",
    ),
    "stream": (lambda c: {"stream": 7}, DeviceError, "stream: expected None for CPU tensors"),
}


@pytest.mark.parametrize("name", DECODE)
def test_decode_refuses(name: str, case: Case) -> None:
    change, error, message = DECODE[name]
    out, lse = torch.zeros(2, 2, 8, 512, dtype=BF16), torch.zeros(2, 8, 2)
    workspace = mla_decode.Workspace("cpu", 4, 16)
    views = workspace.views(4, 16)
    views.o_scratch.zero_()
    kept = {"out": out, "lse": lse, "workspace": workspace}
    with pytest.raises(error) as caught:
        decode(case, **{**kept, **change(case)})
    assert isinstance(caught.value, MlaDecodeError)
    assert message in str(caught.value)
    for tensor in (out, lse, views.queue_state, views.completion_flag, views.o_scratch):
        assert bool((tensor == 0).all())


@pytest.mark.parametrize("bad", (-1, 10_000))
def test_block_table_is_checked_when_asked(bad: int, case: Case) -> None:
    table = case.block_table.clone()
    table[1, 1] = bad
    out = torch.zeros(2, 2, 8, 512, dtype=BF16)
    with pytest.raises(
        RangeError, match=rf"block_table: request 1, block 1: expected 0 to \d+, got {bad}"
    ):
        decode(case, block_table=table, out=out, check_block_table=True)
    assert bool((out == 0).all())


# Machines that cannot run it


def test_cuda_tensors_without_a_gpu_name_what_is_missing() -> None:
    if not native.missing():
        pytest.skip("this machine can run the kernels")
    with pytest.raises(UnsupportedError, match=r"cuda:0: \w+"):
        native.require(torch.device("cuda", 0))


def test_other_devices_are_refused() -> None:
    with pytest.raises(DeviceError, match="expected cpu or cuda, got meta"):
        native.require(META)


def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_able", {})
    monkeypatch.setattr(native, "missing", lambda device=0: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    message = r"expected a Hopper GPU \(compute capability 9.0\), got NVIDIA A100 \(8.0\)"
    with pytest.raises(UnsupportedError, match=message):
        native.require(torch.device("cuda", 0))


def test_old_driver_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_able", {})
    monkeypatch.setattr(native, "missing", lambda device=0: "driver too old: 11.4, needs 12.0")
    with pytest.raises(UnsupportedError, match="driver too old"):
        native.require(torch.device("cuda", 0))


@pytest.mark.parametrize("device", ["foo", 1.5])
def test_what_is_no_device_is_named(device: Any) -> None:
    with pytest.raises(DeviceError, match=f"device: expected a device, got {device!r}"):
        mla_decode.plan([100], 16, 1, device=device)


def test_a_plan_for_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError, match="device: expected one of this machine, got cuda"):
        mla_decode.plan([100], 16, 1, device="cuda")


def test_the_reference_takes_a_batch_without_tokens() -> None:
    case = make_case([100, 50], 8, [0, 0])
    out, lse = attention(case)
    assert (out.shape, lse.shape) == ((0, 8, 512), (0, 8))
