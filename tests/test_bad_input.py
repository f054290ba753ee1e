"""Bad input: a typed error that names argument, expected and actual; nothing is changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mla_decode
import numpy as np
import pytest
import torch
from mla_decode import native
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
from mla_decode.reference import Case, make_case
from mla_decode.words import Noop, Partial, Reduction, Words

from tests.support import Launch, pack

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
        replaced("v", lambda t: t.unsqueeze(2)),
        ShapeError,
        "v: expected shape [blocks, block_size, 512]",
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
    "o_scratch heads": (
        replaced("o_scratch", lambda t: t[:, :, :4]),
        ShapeError,
        "o_scratch: expected shape [slots, 2, 8, 512]",
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
    "q_v dtype": (
        replaced("q_v", torch.Tensor.float),
        DtypeError,
        "q_v: expected torch.bfloat16, got torch.float32",
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
        (12, 1, 64, "num_heads: expected one of (8, 16, 32, 64, 128), got 12"),
        (256, 1, 64, "num_heads: expected one of (8, 16, 32, 64, 128), got 256"),
        (8, 5, 64, "new_tokens: expected one of (1, 2, 3, 4), got 5"),
        (8, 1, 16, "v: expected a block size of (64, 128, 256), got 16"),
    ],
)
def test_raw_launch_refuses_sizes_that_no_kernel_has(
    heads: int, tokens: int, block: int, message: str
) -> None:
    case = make_case([100], heads, tokens, block)
    launch = Launch.of(case, pack(Noop(uid=0)), num_slots=1)
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
REDUCTION = Reduction(uid=1, dst_batch=1, dst_seq=1, inputs=(0,))
QUEUE = pack(PARTIAL, REDUCTION)

WORDS = {
    "opcode": (0, 0, 3, "word 0 (opcode): expected an opcode in (0, 1, 2), got 3"),
    "partial dst_batch too high": (
        0,
        2,
        2,
        "word 2 (dst_batch): expected a request (0 to 1) or a scratch slot (-1 to -2), got 2",
    ),
    "partial slot too high": (0, 2, -3, "word 2 (dst_batch)"),
    "partial dst_seq": (0, 3, 1, "word 3 (dst_seq): expected the same as q_seq, got 1"),
    "q_batch": (0, 4, 2, "word 4 (q_batch): expected 0 to 1, got 2"),
    "q_batch negative": (0, 4, -1, "word 4 (q_batch)"),
    "q_seq": (0, 5, 2, "word 5 (q_seq): expected 0 to 1, got 2"),
    "start no tile": (0, 6, 32, "word 6 (start): expected a multiple of 64, got 32"),
    "start negative": (0, 6, -64, "word 6 (start)"),
    "end before start": (0, 7, 0, "word 7 (end): expected above start, at most length, got 0"),
    "end past length": (0, 7, 66, "word 7 (end)"),
    "length zero": (0, 8, 0, "word 8 (length): expected 1 to 320, got 0"),
    "length past the table": (0, 8, 321, "word 8 (length): expected 1 to 320, got 321"),
    "row_begin": (
        0,
        9,
        16,
        "word 9 (row_begin): expected a (token, head) row of the request, got 16",
    ),
    "row_begin negative": (0, 9, -8, "word 9 (row_begin)"),
    "num_rows too many": (0, 10, 17, "word 10 (num_rows): expected 16 rows"),
    "num_rows too few": (0, 10, 8, "word 10 (num_rows): expected 16 rows"),
    "num_rows negative": (0, 10, -1, "word 10 (num_rows)"),
    "too many inputs": (1, 2, 27, "word 2 (shape): expected at most 27 inputs, got 27"),
    "head_begin": (1, 2, 8 << 8, "word 2 (shape): expected heads in 0 to 8"),
    "heads past the end": (1, 2, 4 << 8 | 5 << 16, "word 2 (shape): expected heads in 0 to 8"),
    "columns past the end": (
        1,
        2,
        4 << 24 | 5 << 27,
        "word 2 (shape): expected columns in 0 to 512",
    ),
    "bit 31": (1, 2, -(2**31), "word 2 (shape): expected bit 31 to be 0"),
    "reduction dst_batch": (1, 3, 2, "word 3 (dst_batch)"),
    "reduction dst_seq": (1, 4, 2, "word 4 (dst_seq): expected 0 to 1, got 2"),
    "input too high": (1, 5, 2, "word 5 (input 0): expected a scratch slot, 0 to 1, got 2"),
    "input negative": (1, 5, -1, "word 5 (input 0)"),
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
def test_validator_refuses_it_too(name: str, case: Case) -> None:
    instruction, word, value, _ = WORDS[name]
    plan = mla_decode.plan(case.seq_lens, 8, 2, policy="fixed", split_tiles=1)
    kinds = {0: Partial, 1: Reduction}
    decoded = plan.decoded()
    index = next(i for i, d in enumerate(decoded) if isinstance(d, kinds[instruction]))
    plan.instructions[index, word] = value
    with pytest.raises(ScheduleError, match="rule: "):
        plan.validate()


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
        ([100, -1], RangeError, "seq_lens: request 1: expected a length of at least 1, got -1"),
        ([0], RangeError, "seq_lens: request 0: expected a length of at least 1, got 0"),
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
        ({"num_heads": 12}, UnsupportedError, "num_heads: expected one of (8, 16, 32, 64, 128)"),
        ({"num_heads": 256}, UnsupportedError, "num_heads: "),
        ({"new_tokens": 0}, UnsupportedError, "new_tokens: expected one of (1, 2, 3, 4), got 0"),
        ({"new_tokens": 5}, UnsupportedError, "new_tokens: "),
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
    "q heads": (lambda c: {"q": c.q[:, :, :7]}, UnsupportedError, "num_heads: expected one of"),
    "q dtype": (
        lambda c: {"q": c.q.half()},
        DtypeError,
        "q: expected torch.bfloat16, got torch.float16",
    ),
    "kv heads": (
        lambda c: {"kv_cache": torch.zeros(3, 64, 2, 576, dtype=BF16)},
        ShapeError,
        "kv_cache: expected shape [num_blocks, block_size, 1, 576], got [3, 64, 2, 576]",
    ),
    "kv width": (
        lambda c: {"kv_cache": c.kv_cache[..., :575]},
        ShapeError,
        "kv_cache: expected shape [num_blocks, block_size, 576]",
    ),
    "kv block size": (
        lambda c: {"kv_cache": c.kv_cache[:, :16]},
        UnsupportedError,
        "kv_cache: expected a block size of (64, 128, 256), got 16",
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
        "seq_lens: request 1: expected a length of at least 1, got -5",
    ),
    "length too long": (
        lambda c: {"seq_lens": [130, 321]},
        RangeError,
        "seq_lens: expected at most 320 (5 blocks of 64 tokens in block_table), got 321",
    ),
    "not causal": (
        lambda c: {"causal": False},
        UnsupportedError,
        "causal: expected True with 2 new tokens",
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
        "plan: made for 1 new_tokens, the call has 2",
    ),
    "plan no plan": (
        lambda c: {"plan": "fast"},
        DtypeError,
        "plan: expected a mla_decode.Plan, got str",
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
    workspace = mla_decode.Workspace("cpu", 4, 2, 8)
    views = workspace.views(4, 2, 8)
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
