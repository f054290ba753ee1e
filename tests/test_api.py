"""The public API: plans and their files, decode's forms, workspaces, the floor."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
import threading
import timeit
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import mla_decode
import numpy as np
import pytest
import torch
from mla_decode import arguments as arguments_module
from mla_decode import calls, cost, decoding, native, queue_check, raw
from mla_decode.arguments import KernelArguments
from mla_decode.decoding import DEFAULT_SOFTMAX_SCALE
from mla_decode.errors import (
    MegakernelTimeout,
    MlaDecodeError,
    QueueError,
    QueueVersionError,
    RangeError,
    ScheduleError,
    ShapeError,
    UnsupportedError,
)
from mla_decode.measure import decode_case
from mla_decode.planning import PlanCache
from mla_decode.reference import Case, attention, compare, make_case
from mla_decode.words import Noop, Partial, Reduction, decode_queue, decode_words
from mla_decode.workspace import cached_workspace

from tests.support import Launch, pack, same_bits

DEMO = [4641, 45118, 1730, 1696]
PYTHON_PATH = str(Path(mla_decode.__file__).resolve().parents[1])


@pytest.fixture
def plan() -> mla_decode.Plan:
    return mla_decode.plan([700, 1, 3000], 16, 2, num_workers=20, clusters=False)


def decode(case: Case, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return mla_decode.decode(case.q, case.kv_cache, case.block_table, case.seq_lens, **options)


# Words


def test_words_survive_packing_and_unpacking() -> None:
    queue = [
        Noop(uid=3),
        Partial(0, -1, 2, 64, 100, 130, row_begin=64, num_rows=32, q_seq=1, dst_seq=1),
        Reduction(9, -5, 3, tuple(range(27)), 8, 16, 128, 384),
        Reduction(10, 4, 0, (7,)),
    ]
    assert decode_queue(pack(*queue)) == queue


def test_words_are_where_the_format_says() -> None:
    partial = Partial(5, -3, 2, 64, 100, 130, row_begin=16, num_rows=32).pack()
    assert partial[:12].tolist() == [1, 5, -3, 0, 2, 0, 64, 100, 130, 16, 32, 0]
    merge = Reduction(6, 1, 3, (4, 5), 8, 16, 128, 256).pack()
    packed = 1 | 8 << 8 | 16 << 16 | 2 << 24 | 4 << 27
    assert merge[:8].tolist() == [2, 6, packed, 1, 3, 4, 5, 0]
    assert decode_words([-1, *[0] * 31]) is None


# Plans


def test_plan_says_what_it_holds(plan: mla_decode.Plan) -> None:
    plan.validate()
    assert (plan.batch, plan.num_heads, plan.new_tokens, plan.num_workers) == (3, 16, 2, 20)
    assert plan.instructions.dtype == np.int32
    assert plan.instructions.shape == (plan.num_instructions, 32)
    assert plan.predicted_us == pytest.approx(float(plan.end_us.max()))
    assert f"{plan.num_instructions} instructions" in str(plan)
    assert len(plan.table().splitlines()) == plan.num_instructions + 1
    pieces = plan.partials_per_request()
    assert pieces[1] == 1
    assert pieces[2] > 1
    assert plan.slot_rows == 32
    assert plan.workspace_bytes == mla_decode.workspace_bytes(plan.num_slots, 32)


@pytest.mark.parametrize(
    "lengths",
    [
        np.array([700, 1, 3000], np.int64),
        torch.tensor([700, 1, 3000]),
        torch.tensor([700, 1, 3000], dtype=torch.int32),
        (700, 1, 3000),
    ],
    ids=("numpy", "int64", "int32", "tuple"),
)
def test_lengths_may_come_in_many_forms(lengths: object, plan: mla_decode.Plan) -> None:
    other = mla_decode.plan(lengths, 16, 2, num_workers=20, clusters=False)
    assert np.array_equal(other.instructions, plan.instructions)


def test_constants_of_the_cost_model_change_the_prediction() -> None:
    slow = mla_decode.CostModel(partial_tile_us=1.0)
    assert mla_decode.plan(DEMO, 16, 4, cost_model=slow).predicted_us > 100
    assert mla_decode.plan(DEMO, 16, 4).predicted_us < 100


@pytest.mark.parametrize("name", ("plan.json", "plan.npz"))
def test_saved_plan_loads_as_it_was(plan: mla_decode.Plan, tmp_path: Path, name: str) -> None:
    plan.save(tmp_path / name)
    loaded = mla_decode.Plan.load(tmp_path / name)
    assert np.array_equal(loaded.instructions, plan.instructions)
    assert loaded.seq_lens.tolist() == plan.seq_lens.tolist()
    for field in (
        "num_heads",
        "new_tokens",
        "num_kv_heads",
        "total_tokens",
        "num_workers",
        "num_slots",
        "policy",
        "split_tiles",
    ):
        assert getattr(loaded, field) == getattr(plan, field)
    assert loaded.predicted_us == pytest.approx(plan.predicted_us)
    np.testing.assert_allclose(loaded.end_us, plan.end_us, atol=1e-3)
    assert np.array_equal(loaded.worker, plan.worker)


def test_saved_plan_is_plain_text_with_format_version_and_digest(
    plan: mla_decode.Plan, tmp_path: Path
) -> None:
    plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["format"] == "mla_decode.plan"
    assert document["queue_version"] == 3
    assert len(document["sha256"]) == 64
    assert document["instructions"] == plan.instructions.tolist()


def _edit(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_plan_of_another_version_is_refused(plan: mla_decode.Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    _edit(path, queue_version=99)
    with pytest.raises(QueueVersionError, match=r"expected queue version 3 .*got version 99"):
        mla_decode.Plan.load(path)


def test_mutated_plan_is_refused(plan: mla_decode.Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    words = plan.instructions.copy()
    words[-1, -1] = 1  # no field of the last instruction
    for name, value in (
        ("instructions", words.tolist()),
        ("seq_lens", [700, 2, 3000]),
        ("num_slots", plan.num_slots + 1),
        ("num_heads", 8),
    ):
        plan.save(path)
        _edit(path, **{name: value})
        with pytest.raises(QueueError, match="mutated: expected sha256"):
            mla_decode.Plan.load(path)


def test_plan_with_a_forged_digest_is_still_validated(
    plan: mla_decode.Plan, tmp_path: Path
) -> None:
    words = plan.instructions.copy()
    words[0, 7] -= 1  # one key less
    forged = mla_decode.Plan(**{**_fields(plan), "instructions": words})
    forged.save(tmp_path / "plan.npz")
    with pytest.raises(ScheduleError, match="rule: "):
        mla_decode.Plan.load(tmp_path / "plan.npz")
    mla_decode.Plan.load(tmp_path / "plan.npz", validate=False)


def _fields(plan: mla_decode.Plan) -> dict[str, object]:
    return {field.name: getattr(plan, field.name) for field in fields(plan) if field.init}


@pytest.mark.parametrize("name", ("plan.json", "plan.npz"))
def test_truncated_plan_is_refused(plan: mla_decode.Plan, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    plan.save(path)
    whole = path.read_bytes()
    for keep in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:keep])
        with pytest.raises(QueueError, match=name):
            mla_decode.Plan.load(path)


@pytest.mark.parametrize("entry", ("instructions", "seq_lens", "worker", "policy", "num_slots"))
def test_plan_without_an_entry_is_refused(
    plan: mla_decode.Plan, tmp_path: Path, entry: str
) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    document = json.loads(path.read_text())
    del document[entry]
    path.write_text(json.dumps(document))
    with pytest.raises(QueueError, match=f"expected the entry '{entry}'"):
        mla_decode.Plan.load(path)


@pytest.mark.parametrize("text", ("[]", "{}", '{"format": "other"}', "null"))
def test_file_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(QueueError):
        mla_decode.Plan.load(path)


def test_npz_with_a_pickle_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    np.savez(path, header=np.array([{"format": "mla_decode.plan"}], dtype=object))
    with pytest.raises(QueueError):
        mla_decode.Plan.load(path)


def test_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    for name in ("plan.json", "plan.npz"):
        with pytest.raises(FileNotFoundError):
            mla_decode.Plan.load(tmp_path / name)


def test_npz_is_a_zip_without_object_arrays(plan: mla_decode.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.npz")
    names = zipfile.ZipFile(tmp_path / "plan.npz").namelist()
    assert "header.npy" in names
    assert "instructions.npy" in names


def test_plans_keep_their_device_copy(plan: mla_decode.Plan) -> None:
    assert plan.to("cpu") is plan.to(torch.device("cpu"))
    assert plan.to("cpu").tolist() == plan.instructions.tolist()


def test_plan_cache_returns_the_same_plan_and_forgets_the_oldest() -> None:
    cache, cpu = PlanCache(capacity=2), torch.device("cpu")

    def get(length: int) -> mla_decode.Plan:
        return cache.get(np.array([length], np.int32), 16, 1, 8, cpu)

    first = get(100)
    assert get(100) is first
    get(200)
    get(300)
    assert get(100) is not first


def test_quality_is_reachable_by_its_name() -> None:
    quality = mla_decode.__get_quality__
    near, far = quality([0.0], 8, 1, 4096), quality([-5.0], 8, 1, 4096)
    assert far < near < 0
    assert quality([0.0, 0.0], 1, 1, 4096) < -1e8


# Decode


def test_all_forms_of_the_inputs_give_the_same() -> None:
    case = make_case([130, 65], 8, 2, 128)
    out, lse = decode(case)
    assert compare(out, lse, *attention(case)).passed
    q, kv = case.q, case.kv_cache
    assert isinstance(kv, torch.Tensor)
    q_pair = (q[..., :512].contiguous(), q[..., 512:].contiguous())
    kv_pair = (kv[..., :512].contiguous(), kv[..., 512:].contiguous())
    kv_pair_4d = (kv_pair[0].unsqueeze(2), kv_pair[1].unsqueeze(2))
    padded = torch.zeros(kv.shape[0], 130, 576 + 64, dtype=kv.dtype)
    padded[:, :128, :576] = kv
    lengths = torch.tensor(case.seq_lens, dtype=torch.int32)
    for other_q, other_kv in (
        (q_pair, kv),
        (q, kv.unsqueeze(2)),
        (q_pair, kv_pair),
        (q, kv_pair_4d),
        (q, padded[:, :128, :576]),
        (q.repeat(1, 1, 1, 2)[..., :576], kv),
    ):
        again = mla_decode.decode(other_q, other_kv, case.block_table, lengths)
        assert same_bits(again[0], out)
        assert same_bits(again[1], lse)


FORMS = {
    "3 heads": {"num_heads": 3},
    "126 heads": {"num_heads": 126},
    "16 tokens": {"new_tokens": 16},
    "block size 1": {"block_size": 1},
    "block size 48": {"block_size": 48},
    "fp16": {"dtype": torch.float16},
    "not causal": {"causal": False, "new_tokens": 3},
    "sink": {"attn_sink": [-1.0, 0.0, 2.0, math.inf, -math.inf, 1.0, 3.0, 9.0]},
    "base 2, -inf": {"lse_base": 2.0, "lse_empty": -math.inf},
    "lists of blocks": {"csr": True, "block_size": 16},
    "3 KV heads": {"h_kv": 3, "num_heads": 9, "new_tokens": 2},
    "ragged": {"new_tokens": [1, 0, 3, 16, 2]},
    "ragged, padded": {"new_tokens": [1, 0, 3, 16, 2], "padding_tokens": 7},
    "ragged, 2 KV heads, pairs": {
        "new_tokens": [2, 4, 0, 1, 1],
        "padding_tokens": 3,
        "h_kv": 2,
        "combined": False,
        "csr": True,
        "lse_base": 2.0,
        "attn_sink": [0.0] * 4 + [1.0] * 4,
    },
}


@pytest.mark.parametrize("batch_invariant", (False, True), ids=("balanced", "invariant"))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_batch_is_right(form: str, batch_invariant: bool) -> None:
    """Poisoned caches and outputs; lengths 0, less than the new tokens, and several tiles."""
    case = make_case([130, 0, 700, 17, 1], **{"num_heads": 8, "new_tokens": 2, **FORMS[form]})
    out, lse = case.poisoned_outputs()
    if case.cu_seqlens_q is None:
        lse = lse.contiguous()
    decode_case(case, out=out, lse=lse, batch_invariant=batch_invariant)
    errors = compare(out, lse, *attention(case))
    assert errors.passed, errors


def test_queries_without_offsets_are_one_token_each() -> None:
    case = make_case([130, 65, 0], 8)
    out, lse = decode(case)
    flat_out, flat_lse = mla_decode.decode(
        case.q[:, 0], case.kv_cache, case.block_table, case.seq_lens
    )
    assert flat_out.shape == (3, 8, 512)
    assert flat_lse.shape == (3, 8)
    assert same_bits(flat_out, out[:, 0])
    assert same_bits(flat_lse, lse[:, :, 0])


@pytest.mark.parametrize("h_kv", (1, 2))
def test_lse_comes_in_either_order(h_kv: int) -> None:
    case = make_case([130, 65, 0], 8, 2, h_kv=h_kv)
    _, lse = decode(case)
    _, by_token = decode(case, lse_layout="th")
    assert lse.shape == (3, 8, 2)
    assert by_token.shape == (6, 8)
    assert same_bits(by_token.view(3, 2, 8).transpose(1, 2).contiguous(), lse)
    own = torch.full((6, 9), torch.nan)[:, :8]
    assert decode(case, lse_layout="th", lse=own)[1] is own
    assert same_bits(own.contiguous(), by_token)


def test_offsets_with_one_number_of_tokens_each_give_the_uniform_result() -> None:
    case = make_case([130, 65, 700], 8, 3)
    out, lse = decode(case)
    flat_out, flat_lse = mla_decode.decode(
        case.q.flatten(0, 1),
        case.kv_cache,
        case.block_table,
        case.seq_lens,
        mla_decode.plan(case.seq_lens, 8, 3),
        cu_seqlens_q=torch.arange(0, 12, 3, dtype=torch.int32),
    )
    assert same_bits(flat_out, out.flatten(0, 1))
    assert same_bits(flat_lse, lse.transpose(1, 2).flatten(0, 1).contiguous())


def test_queries_whose_heads_lie_outside_are_copied() -> None:
    case = make_case([130, 65], 8, 2)
    transposed = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    for q in (transposed, (transposed[..., :512], transposed[..., 512:])):
        assert same_bits(decode(replace(case, q=q))[0], decode(case)[0])


def test_batch_invariant_bits_do_not_depend_on_the_batch() -> None:
    case = make_case([3000, 65, 5000, 1], 8, 2)
    out, lse = decode(case, batch_invariant=True)
    for request, length in enumerate(case.seq_lens):
        alone = replace(
            case,
            seq_lens=[length],
            q=case.q[request : request + 1],
            block_table=case.block_table[request : request + 1],
        )
        own_out, own_lse = decode(alone, batch_invariant=True)
        assert same_bits(own_out[0], out[request])
        assert same_bits(own_lse[0], lse[request])


def test_plan_of_a_ragged_batch_with_kv_heads_survives_its_file(tmp_path: Path) -> None:
    made = mla_decode.plan(
        [130, 0, 65], 6, [2, 1, 0], num_kv_heads=2, total_tokens=5, validate=True
    )
    assert (made.num_heads, made.heads_per_kv, made.num_kv_heads) == (6, 3, 2)
    assert (made.new_tokens, made.total_tokens, made.slot_rows) == ((2, 1, 0), 5, 6)
    for name in ("plan.json", "plan.npz"):
        made.save(tmp_path / name)
        loaded = mla_decode.Plan.load(tmp_path / name)
        assert loaded.new_tokens == (2, 1, 0)
        assert loaded.fit_key == made.fit_key
        assert np.array_equal(loaded.instructions, made.instructions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 0}, "num_heads: expected 1 to"),
        ({"num_heads": 129}, "num_heads: expected at most 128"),
        ({"num_kv_heads": 3}, "num_heads: expected a multiple of num_kv_heads = 3, got 8"),
        ({"new_tokens": 0}, "new_tokens: expected 1 to 16, got 0"),
        ({"new_tokens": 17}, "new_tokens: expected 1 to 16, got 17"),
        ({"new_tokens": [1, 17]}, "new_tokens: request 1: expected at most 16, got 17"),
        ({"new_tokens": [1, -1]}, "new_tokens: request 1: expected at least 0, got -1"),
        ({"new_tokens": [1]}, "new_tokens: expected shape [2] as seq_lens, got [1]"),
        ({"new_tokens": True}, "new_tokens: expected an int or one for each request, got bool"),
        ({"seq_lens": [5, -1]}, "seq_lens: request 1: expected a length of at least 0, got -1"),
        ({"total_tokens": 1}, "total_tokens: expected at least 2"),
        ({"total_tokens": 3}, "total_tokens: expected 2 with 1 new tokens for every request"),
        ({"new_tokens": [1, 2], "total_tokens": 2}, "total_tokens: expected at least 3"),
        ({"batch_invariant": True, "policy": "unsplit"}, "policy: expected 'batch_invariant'"),
        ({"batch_invariant": True, "policy": "fixed"}, "policy: expected 'batch_invariant'"),
        ({"policy": "best"}, "policy: expected one of"),
    ],
    ids=str,
)
def test_plan_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MlaDecodeError, match=re.escape(message)):
        mla_decode.plan(**{"seq_lens": [5, 6], "num_heads": 8, **options})


def ragged_arguments(case: Case) -> dict[str, Any]:
    return {
        "q": case.q,
        "kv_cache": case.kv_cache,
        "block_table": case.block_table,
        "seq_lens": case.seq_lens,
        "cu_seqlens_q": case.cu_seqlens_q,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lse_layout": "bhs"}, "lse_layout: expected 'th' with cu_seqlens_q"),
        ({"lse_layout": "ht"}, "lse_layout: expected one of"),
        ({"lse_base": 10}, "lse_base: expected math.e or 2, got 10"),
        ({"lse_empty": 0.0}, "lse_empty: expected inf or -inf, got 0.0"),
        ({"cu_seqlens_q": torch.tensor([0, 2, 5])}, "cu_seqlens_q: expected torch.int32"),
        ({"cu_seqlens_q": torch.tensor([0, 2], dtype=torch.int32)}, "block_table: expected shape"),
        (
            {"cu_seqlens_q": torch.tensor([0, 3, 2], dtype=torch.int32)},
            "cu_seqlens_q: request 1: expected offsets that do not decrease, got 3 and then 2",
        ),
        (
            {"cu_seqlens_q": torch.tensor([1, 3, 5], dtype=torch.int32)},
            "cu_seqlens_q: expected to start at 0, got 1",
        ),
        ({"cu_seqlens_q": None}, "block_table: expected shape [5, max_blocks]"),
        ({"attn_sink": torch.zeros(7)}, "attn_sink: expected shape [8], got [7]"),
        ({"attn_sink": torch.zeros(8).double()}, "attn_sink: expected torch.float32"),
        ({"kv_indptr": torch.zeros(3, dtype=torch.int32)}, "kv_indptr: expected kv_indptr and"),
        ({"block_table": None}, "block_table: expected a torch.Tensor, got NoneType"),
        ({"seq_lens": None}, "seq_lens: expected lengths, or a plan that holds them, got None"),
        ({"plan": "fast"}, "plan: expected a Plan or a DevicePlan, got str"),
        ({"stream": 1}, "stream: expected None for CPU tensors"),
        ({"workspace": torch.empty(9)}, "workspace: expected a Workspace, got Tensor"),
        ({"softmax_scale": [0.1]}, "softmax_scale: expected a float, got list"),
        ({"softmax_scale": np.array(0.1)}, "softmax_scale: expected a float, got ndarray"),
        ({"lse_base": [2]}, "lse_base: expected a float, got list"),
        ({"lse_empty": np.array([1.0, 2.0])}, "lse_empty: expected a float, got ndarray"),
        ({"lse_layout": ["th"]}, "lse_layout: expected a str or None, got list"),
        ({"lse_layout": []}, "lse_layout: expected a str or None, got list"),
        ({"causal": [True]}, "causal: expected a bool, got list"),
        ({"out": torch.zeros(5, 8, 512)}, "out: expected torch.bfloat16, got torch.float32"),
        ({"out": torch.zeros(4, 8, 512).bfloat16()}, "out: expected shape [5, 8, 512]"),
        ({"lse": torch.zeros(8, 5)}, "lse: expected shape [5, 8], got [8, 5]"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_decode_refuses(change: dict[str, Any], message: str) -> None:
    case = make_case([130, 65], 8, [2, 3])
    arguments = ragged_arguments(case)
    with pytest.raises(MlaDecodeError, match=re.escape(message)):
        mla_decode.decode(**{**arguments, **change})
    mla_decode.decode(**arguments)


def test_no_new_token_is_named() -> None:
    case = make_case([130, 65], 8, 2)
    with pytest.raises(ShapeError, match=r"q: expected at least 1 new token, got shape \[2, 0, 8"):
        decode(replace(case, q=case.q[:, :0]))


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        ({"causal": True}, {"causal": 1}, "causal: expected a bool, got int"),
        ({"softmax_scale": 1.0}, {"softmax_scale": True}, "softmax_scale: expected a float"),
        ({"causal": False}, {"causal": 0}, "causal: expected a bool, got int"),
    ],
)
def test_what_equals_an_option_that_passed_is_checked(
    good: dict[str, Any], bad: dict[str, Any], message: str
) -> None:
    case = make_case([130, 65], 8, 2)
    for options in ({}, good, {}, good):
        with pytest.raises(MlaDecodeError, match=message):
            decode(case, **bad)
        decode(case, **options)


@pytest.mark.parametrize("call", (mla_decode.decode, mla_decode.interpret))
@pytest.mark.parametrize("h_kv", (1, 2))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"softmax_scale": -1.0}, "softmax_scale: expected a finite number above 0"),
        ({"causal": 1}, "causal: expected a bool"),
        ({"lse_base": 10.0}, "lse_base: expected math.e or 2"),
        ({"attn_sink": torch.zeros(7)}, "attn_sink: expected shape [8], got [7]"),
        ({"kv_cache": torch.zeros(9, 64, 576)}, "kv_cache: expected torch.bfloat16"),
        ({"out": torch.zeros(5, 5)}, "out: expected shape [0, 8, 512], got [5, 5]"),
        ({"out": torch.zeros(0, 8, 512)}, "out: expected torch.bfloat16, got torch.float32"),
        ({"lse": torch.zeros(0, 8).double()}, "lse: expected torch.float32"),
        ({"timings": torch.zeros(9, 7, dtype=torch.int32)}, "timings: expected shape"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_call_without_tokens_is_checked_as_any_other(
    call: Any, h_kv: int, change: dict[str, Any], message: str
) -> None:
    if call is mla_decode.interpret and change.keys() & {"out", "lse"}:
        pytest.skip("interpret makes its own")
    case = make_case([130, 65], 8, [0, 0], h_kv=h_kv)
    if "kv_cache" in change:
        change = {"kv_cache": case.kv_cache.float()}
    arguments = ragged_arguments(case)
    with pytest.raises(MlaDecodeError, match=re.escape(message)):
        call(**{**arguments, **change})
    out, lse = call(**arguments)
    assert (out.shape, lse.shape) == ((0, 8, 512), (0, 8))


@pytest.mark.parametrize("call", (mla_decode.decode, mla_decode.interpret))
def test_offsets_on_the_host_must_be_the_plans(call: Any) -> None:
    case = make_case([130, 65], 8, [1, 3])
    arguments = (case.q, case.kv_cache, case.block_table, None)
    for tokens in ([2, 2], [3, 1], 2):
        plan = mla_decode.plan(case.seq_lens, 8, tokens)
        with pytest.raises(ScheduleError, match=r"cu_seqlens_q: request 0: expected . new tokens"):
            call(*arguments, plan, cu_seqlens_q=case.cu_seqlens_q)
    padded = mla_decode.plan(case.seq_lens, 8, [1, 0], total_tokens=4)
    with pytest.raises(ScheduleError, match=r"request 1: expected 0 new tokens, .* got 3"):
        call(*arguments, padded, cu_seqlens_q=case.cu_seqlens_q)
    call(*arguments, mla_decode.plan(case.seq_lens, 8, [1, 3]), cu_seqlens_q=case.cu_seqlens_q)


def test_tokens_beyond_a_plans_are_refused() -> None:
    case = make_case([130, 65], 8, 2)
    for sizes in (([130, 65], 8, 1), ([130], 8, 2), ([130, 65], 16, 2), ([130, 65], 8, [1, 3])):
        with pytest.raises(ScheduleError, match="plan: made for"):
            mla_decode.decode(
                case.q, case.kv_cache, case.block_table, None, mla_decode.plan(*sizes)
            )


def test_lists_of_blocks_are_checked_on_request() -> None:
    case = make_case([130, 65], 8, csr=True)
    decode_case(case, check_block_table=True)
    short = case.kv_indptr.clone()
    short[1] = 2
    with pytest.raises(MlaDecodeError, match="kv_indptr: request 0: expected at least 3 blocks"):
        decode_case(replace(case, kv_indptr=short), check_block_table=True)
    wild = case.block_table.clone()
    wild[case.kv_indptr[1]] = 1 << 20
    with pytest.raises(MlaDecodeError, match="kv_indices: request 1, block 0: expected 0 to"):
        decode_case(replace(case, block_table=wild), check_block_table=True)


def test_inputs_that_require_a_gradient_are_refused() -> None:
    case = make_case([65], 8)
    learning = case.q.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="q: expected a tensor that requires no gradient"):
        decode(replace(case, q=learning))
    with torch.no_grad():
        decode(replace(case, q=learning))
    with torch.inference_mode():
        decode(case)


def test_interpret_refuses_inputs_that_require_a_gradient_as_decode_does() -> None:
    case = make_case([65], 8)
    arguments = {"block_table": case.block_table, "seq_lens": case.seq_lens}
    for name in ("q", "kv_cache"):
        inputs = {"q": case.q, "kv_cache": case.kv_cache}
        inputs[name] = inputs[name].clone().requires_grad_()
        with pytest.raises(UnsupportedError, match=f"{name}: expected a tensor that requires no"):
            mla_decode.interpret(**inputs, **arguments)
        with torch.no_grad():
            mla_decode.interpret(**inputs, **arguments)


@pytest.mark.parametrize("h_kv", (1, 2))
@pytest.mark.parametrize("call", (mla_decode.decode, mla_decode.interpret))
def test_a_sink_that_learns_gets_no_graph(call: Any, h_kv: int) -> None:
    case = make_case([3000, 65], 8, h_kv=h_kv)
    arguments = (case.q, case.kv_cache, case.block_table, case.seq_lens)
    workspace = mla_decode.Workspace("cpu")
    sink = torch.nn.Parameter(torch.zeros(8))
    got = call(*arguments, attn_sink=sink, workspace=workspace)
    later = call(*arguments, workspace=workspace)
    assert not any(tensor.requires_grad for tensor in (*got, *later))


def test_autocast_changes_nothing() -> None:
    case = make_case([130, 65], 8)
    expected = decode(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = decode(case)
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_default_softmax_scale_is_of_the_full_width() -> None:
    case = make_case([130], 8)
    assert DEFAULT_SOFTMAX_SCALE == 576**-0.5
    implicit, explicit = decode(case), decode(case, softmax_scale=576**-0.5)
    assert same_bits(implicit[0], explicit[0])
    assert not same_bits(implicit[1], decode(case, softmax_scale=192**-0.5)[1])


def test_outputs_go_where_they_are_asked_to() -> None:
    case = make_case([130, 7], 8, 2)
    out, _ = case.poisoned_outputs()
    transposed = torch.full((2, 2, 8), torch.nan).transpose(1, 2)  # lse with strides of its own
    result = decode(case, out=out, lse=transposed)
    assert result[0] is out
    assert result[1] is transposed
    assert compare(out, transposed, *attention(case)).passed
    fresh_out, fresh_lse = decode(case)
    assert fresh_out.shape == (2, 2, 8, 512)
    assert fresh_lse.shape == (2, 8, 2)
    assert (fresh_out.dtype, fresh_lse.dtype) == (torch.bfloat16, torch.float32)
    assert same_bits(fresh_lse, transposed.contiguous())


def test_not_causal_is_the_same_with_one_new_token() -> None:
    case = make_case([130], 8, 1)
    assert same_bits(decode(case)[0], decode(case, causal=False)[0])


def test_calls_without_a_plan_use_the_one_they_would_make(plan: mla_decode.Plan) -> None:
    case = make_case([700, 1, 3000], 16, 2)
    own = mla_decode.plan(case.seq_lens, 16, 2)
    assert same_bits(decode(case)[0], decode(case, plan=own)[0])


def test_wild_ids_past_a_request_pass_the_block_table_check() -> None:
    decode(make_case([130, 64], 8), check_block_table=True)


def test_eight_heads_launch_equals_the_general_one() -> None:
    case = make_case([700, 64], 8, 2)
    made = mla_decode.plan([700, 64], 8, 2)
    general, eight = Launch.of_plan(case, made), Launch.of_plan(case, made)
    general.run()
    mla_decode.mla_decode_8_heads(**eight.tensors)
    assert same_bits(general.o, eight.o)
    assert same_bits(general.lse, eight.lse)


def test_raw_launch_takes_its_arguments_in_the_original_order() -> None:
    case = make_case([700], 16, 1)
    launch = Launch.of_plan(case, mla_decode.plan([700], 16))
    names = list(launch.tensors)
    values = [launch.tensors[name] for name in names[: names.index("tic") + 1]]
    launch.lse.zero_()
    mla_decode.mla_decode(*values)  # neither lse nor stream
    assert bool((launch.lse == 0).all())
    assert compare(launch.o, decode(case)[1], *attention(case)).passed


# The way to the kernel, as far as it goes without a GPU


def test_references_replace_strides_that_mean_nothing() -> None:
    cache = torch.zeros(1, 64, 576, dtype=torch.bfloat16)
    latent = cache[..., :512].as_strided((1, 64, 512), (7, 576, 1))
    assert native.dense_strides(latent) == [64 * 576, 576, 1]
    q = torch.zeros(2, 1, 8, 512).as_strided((2, 1, 8, 512), (4096, 3, 512, 1))
    assert native.dense_strides(q) == [4096, 4096, 512, 1]
    one_head = torch.zeros(3, 640).as_strided((3, 1, 512), (640, 7, 1))
    assert native.row_stride(one_head) == 640


class FakeLayout:
    """In the place of the extension's: remembers how it was made and what was launched with it."""

    made: ClassVar[list[FakeLayout]] = []

    def __init__(self, **options: object) -> None:
        self.options = options
        self.launches: list[dict[str, object]] = []
        self.made.append(self)


class FakeBound:
    """Likewise: what it was bound to and what it is given are the launch."""

    def __init__(self, layout: FakeLayout, **bound: object) -> None:
        self.layout, self.bound = layout, bound

    def enqueue(self, tensors: tuple[int, ...], out: int, lse: int, stream: int) -> None:
        given = dict(zip(native.ADDRESSES, tensors, strict=True))
        self.layout.launches.append(
            {**self.bound, **given, "out": out, "lse": lse, "stream": stream}
        )


@pytest.fixture
def fake_kernels(monkeypatch: pytest.MonkeyPatch) -> type[FakeLayout]:
    fake = types.SimpleNamespace(
        DecodeLayout=FakeLayout, BoundDecode=FakeBound, take_error=lambda index: None
    )
    monkeypatch.setattr(native, "_kernels", fake, raising=False)
    monkeypatch.setattr(native, "_layouts", {})
    monkeypatch.setattr(native, "max_clusters", lambda size, device: 132 // size)
    monkeypatch.setattr(FakeLayout, "made", [])
    return FakeLayout


def test_launch_hands_every_tensor_to_its_parameter(fake_kernels: type[FakeLayout]) -> None:
    case = make_case([700, 3], 8, 2, 32, combined=False)
    launch = Launch.of_plan(case, mla_decode.plan([700, 3], 8, 2))
    arguments = launch.arguments()
    native.launch(arguments, 11, native.Grid(12, 4), 13, 14)
    (layout,) = fake_kernels.made
    (seen,) = layout.launches
    fields = [f for f in seen if isinstance(getattr(arguments, f, 0), torch.Tensor)]
    assert len(fields) == 13
    for name in fields:
        assert seen[name] == getattr(arguments, name).data_ptr(), name
    assert seen["kv_indptr"] == seen["cu_seqlens_q"] == seen["attn_sink"] == 0
    assert (seen["num_instructions"], seen["tic"]) == (len(launch.instructions), 0)
    assert (seen["stream"], seen["num_ctas"], seen["spin_timeout_ns"]) == (11, 12, 13)
    assert seen["cluster_ctas"] == 4
    blocks = case.latent.shape[0]
    assert layout.options == {
        "fp16": False,
        "num_heads": 8,
        "h_kv": 1,
        "num_requests": 2,
        "s_q": 2,
        "total_tokens": 4,
        "q_nope_row_stride": 576,
        "q_pe_row_stride": 576,
        "num_blocks": blocks,
        "block_size": 32,
        "latent_strides": (32 * 512, 512, 512),
        "rope_strides": (32 * 64, 64, 64),
        "table_stride": case.block_table.shape[1],
        "lse_strides": (16, 1, 2),
        "slot_rows": 16,
        "softmax_scale": case.softmax_scale,
        "causal": True,
        "lse_base2": False,
        "lse_empty": math.inf,
        "device": 14,
    }
    native.launch(arguments, 11, native.Grid(12), 13, 14)
    assert len(fake_kernels.made) == 1


def as_if_on_a_gpu(call: calls.Call, plan: mla_decode.Plan, layout: Any) -> None:
    """Let the next call of this kind be launched instead of interpreted."""
    call.layouts[plan.slot_rows], call.num_sms = layout, 132


def test_a_layout_seen_before_is_launched_with_the_same_arguments(
    fake_kernels: type[FakeLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast way computes addresses; they must be those of the checked way."""
    monkeypatch.setattr(decoding, "_calls", {})
    case = make_case([700, 65], 8, 2)
    plan, workspace = mla_decode.plan(case.seq_lens, 8, 2), mla_decode.Workspace("cpu")
    pairs = {
        "q": (case.q[..., :512].contiguous(), case.q[..., 512:].contiguous()),
        "kv_cache": (case.latent.contiguous(), case.rope.contiguous()),
    }
    for change in ({}, {"q": pairs["q"]}, pairs):
        variant = replace(case, **change)
        checked: list[KernelArguments] = []
        run_checked = raw.run_checked

        def spy(arguments: KernelArguments, *rest: Any, **options: Any) -> None:
            checked.append(arguments)  # noqa: B023
            run_checked(arguments, *rest, **options)  # noqa: B023

        monkeypatch.setattr(raw, "run_checked", spy)
        out, lse = decode(variant, plan=plan, workspace=workspace)
        options = {"plan": plan, "workspace": workspace, "out": out, "lse": lse}
        decode(variant, **options)
        call = list(decoding._calls.values())[-1]
        layout = FakeLayout()
        as_if_on_a_gpu(call, plan, layout)
        decode(variant, **options)
        (seen,) = layout.launches
        for name, address in seen.items():
            value = getattr(checked[-1], name, None)
            if isinstance(value, torch.Tensor) and name != "timings":
                assert address == value.data_ptr(), name
        assert seen["num_instructions"] == plan.num_instructions
        monkeypatch.setattr(raw, "run_checked", run_checked)


def test_what_a_launch_is_bound_to_is_never_stale(
    fake_kernels: type[FakeLayout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another plan, scratch or time limit, or a plan with other sizes: the launch has that one."""
    monkeypatch.setattr(decoding, "_calls", {})
    case = make_case([700, 65], 8, 2)
    plans = [mla_decode.plan(case.seq_lens, 8, 2), mla_decode.plan(case.seq_lens, 8, 2)]
    workspaces = [mla_decode.Workspace("cpu"), mla_decode.Workspace("cpu")]
    moving = mla_decode.DevicePlan(2, 8, 2, max_seq_len=704, device="cpu")
    moving.update(torch.tensor(case.seq_lens, dtype=torch.int32))
    decode(case, plan=plans[0], workspace=workspaces[0])
    decode(case, plan=moving, workspace=workspaces[0])
    layout = FakeLayout()
    for call in decoding._calls.values():
        as_if_on_a_gpu(call, plans[0], layout)
    for plan, workspace, timeout in (
        (plans[0], workspaces[0], 5),
        (plans[1], workspaces[0], 5),
        (plans[1], workspaces[1], 5),
        (plans[1], workspaces[1], 6),
        (moving, workspaces[1], 6),
        (plans[1], workspaces[1], 6),
    ):
        for _ in range(2):
            decode(case, plan=plan, workspace=workspace, spin_timeout_ns=timeout)
            seen = layout.launches[-1]
            views = workspace.views(plan.num_slots, plan.slot_rows)
            names = ("instructions", "num_instructions", "instructions_are_constant")
            assert tuple(seen[name] for name in names) == plan.queue(case.q.device)
            assert seen["instructions_are_constant"] == (plan is not moving)
            assert seen["queue_state"] == views.queue_state.data_ptr()
            assert seen["o_scratch"] == views.o_scratch.data_ptr()
            assert seen["spin_timeout_ns"] == timeout
    with pytest.raises(RangeError, match="spin_timeout_ns: expected 1 to"):
        decode(case, plan=plans[1], workspace=workspaces[1], spin_timeout_ns=0)
    workspaces[1].views(1000, 64)  # grows: its old buffers are not what is written next
    decode(case, plan=plans[1], workspace=workspaces[1])
    views = workspaces[1].views(plans[1].num_slots, plans[1].slot_rows)
    assert layout.launches[-1]["o_scratch"] == views.o_scratch.data_ptr()
    bound = moving.binding
    moving.rebind(moving.total_tokens, 703)
    assert moving.binding is not bound


def test_an_eager_call_costs_the_host_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the launch itself, with a stub in its place.

    Measured: 4.0 us, of which 2 us are the two outputs. The bound has room for a busy machine;
    the whole call is timed on the GPU.
    """
    monkeypatch.setattr(decoding, "_calls", {})
    case = make_case([700, 65] * 32, 16, 2)
    plan, workspace = mla_decode.plan(case.seq_lens, 16, 2), mla_decode.Workspace("cpu")

    def call() -> None:
        mla_decode.decode(case.q, case.kv_cache, case.block_table, None, plan, workspace=workspace)

    call()
    (known,) = decoding._calls.values()
    bound = types.SimpleNamespace(enqueue=lambda *values: None)
    fake = types.SimpleNamespace(BoundDecode=lambda *values, **options: bound)
    monkeypatch.setattr(native, "_kernels", fake, raising=False)
    monkeypatch.setattr(native, "max_clusters", lambda size, device: 132 // size)
    as_if_on_a_gpu(known, plan, object())
    best = min(timeit.repeat(call, number=200, repeat=20)) / 200 * 1e6
    print(f"eager call without its launch: {best:.1f} us")
    assert best < 40


def test_layouts_that_passed_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([130, 65], 8, 2)
    full: list[object] = []
    whole = arguments_module._Checker.check

    def spy(self: arguments_module._Checker) -> None:
        full.append(self)
        whole(self)

    monkeypatch.setattr(arguments_module._Checker, "check", spy)
    arguments = Launch.of_plan(case, mla_decode.plan([130, 65], 8, 2)).arguments()
    monkeypatch.setattr(arguments_module, "_passed", {})
    arguments.check()
    assert len(full) == 1
    arguments.check()
    assert len(full) == 1
    strided = replace(arguments, q_nope=case.q.repeat(1, 1, 1, 2)[..., :512].flatten(0, 1))
    strided.check()
    assert len(full) == 2


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda case: {"q": case.q.float()}, "DtypeError: q: "),
        (lambda case: {"q": case.q[..., :575]}, "ShapeError: q: "),
        (lambda case: {"q": case.q.tolist()}, "DtypeError: q: "),
        (lambda case: {"q": case.q.repeat(1, 1, 1, 2)[..., ::2]}, "StrideError: q: "),
        (lambda case: {"q": one_element_further(case.q)}, "AlignmentError: q: "),
        (lambda case: {"kv_cache": one_element_further(case.kv_cache)}, "AlignmentError: "),
        (lambda case: {"block_table": case.block_table[:1]}, "ShapeError: block_table: "),
        (lambda case: {"block_table": case.block_table[:, :1]}, "RangeError: seq_lens: "),
        (lambda case: {"seq_lens": [130, 66]}, "ScheduleError: plan: "),
        (lambda case: {"seq_lens": [130.0, 65.0]}, "DtypeError: seq_lens: "),
        (lambda case: {"softmax_scale": float("nan")}, "RangeError: softmax_scale: "),
        (lambda case: {"out": case.q[..., :512]}, "StrideError: out: "),
        (lambda case: {"lse": torch.zeros(2, 8, 2).double()}, "DtypeError: lse: "),
    ],
)
def test_a_call_that_passed_does_not_hide_a_bad_one(
    change: Callable[[Case], dict[str, object]], error: str
) -> None:
    case = make_case([130, 65], 8, 2)
    arguments: dict[str, object] = {
        "q": case.q,
        "kv_cache": case.kv_cache,
        "block_table": case.block_table,
        "seq_lens": case.seq_lens,
        "plan": mla_decode.plan([130, 65], 8, 2),
    }
    for _ in range(2):
        mla_decode.decode(**arguments)  # type: ignore[arg-type]
    with pytest.raises(MlaDecodeError) as caught:
        mla_decode.decode(**{**arguments, **change(case)})  # type: ignore[arg-type]
    assert f"{type(caught.value).__name__}: {caught.value}".startswith(error)
    mla_decode.decode(**arguments)  # type: ignore[arg-type]


def one_element_further(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is a multiple of 2 bytes only."""
    storage = torch.zeros(tensor.numel() + 8, dtype=tensor.dtype)
    return storage[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)


GRID = native.Grid(120, 8)


def test_device_queue_is_checked_once_per_version_and_sizes(
    monkeypatch: pytest.MonkeyPatch, plan: mla_decode.Plan
) -> None:
    checked: list[object] = []
    monkeypatch.setattr(raw, "check_words", lambda words, limits: checked.append(limits))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    arguments = Launch.of_plan(make_case([700, 1, 3000], 16, 2), plan).arguments()
    queue = arguments.instructions
    for _ in range(3):
        raw._check_device_queue(arguments, GRID)
    assert len(checked) == 1
    queue[0, 0] = 0  # another version
    raw._check_device_queue(arguments, GRID)
    raw._check_device_queue(replace(arguments, o_scratch=arguments.o_scratch[:1]), GRID)
    raw._check_device_queue(replace(arguments, instructions=queue.clone()), GRID)
    raw._check_device_queue(replace(arguments, instructions=queue), native.Grid(120, 2))
    assert len(checked) == 5


def test_device_queue_cannot_be_checked_during_capture(
    monkeypatch: pytest.MonkeyPatch, plan: mla_decode.Plan
) -> None:
    arguments = Launch.of_plan(make_case([700, 1, 3000], 16, 2), plan).arguments()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match="check_queue=False"):
        raw._check_device_queue(arguments, GRID)


# Workspaces


def test_workspace_grows_and_keeps_what_it_outgrew() -> None:
    workspace = mla_decode.Workspace("cpu", 2, 8)
    small = workspace.views(2, 8)
    assert small.o_scratch.shape == (2, 8, 512)
    assert small.lvec_scratch.shape == (2, 8)
    assert small.completion_flag.tolist() == [0, 0]
    big = workspace.views(10, 64)
    assert big.o_scratch.shape == (10, 64, 512)
    assert big.queue_state is small.queue_state
    assert big.o_scratch.data_ptr() != small.o_scratch.data_ptr()
    again = workspace.views(2, 8)
    assert again.o_scratch.data_ptr() == big.o_scratch.data_ptr()
    both = mla_decode.workspace_bytes(10, 64) + mla_decode.workspace_bytes(2, 8)
    assert workspace.nbytes == both - 4 * 32  # one queue state


def test_new_memory_of_a_workspace_bears_no_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier workspace left in it would be taken for this one's: epochs begin anew."""
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: torch.ones(*sizes, **options))
    workspace = mla_decode.Workspace("cpu", 2, 8)
    for sizes in ((2, 8), (10, 16)):
        views = workspace.views(*sizes)
        assert not views.o_scratch.any()
        assert not views.completion_flag.any()


def test_one_workspace_serves_batches_of_other_sizes() -> None:
    workspace = mla_decode.Workspace("cpu")
    for lengths, heads, tokens in (([3000], 16, 4), ([700, 900], 8, 1), ([3000, 5], 64, 2)):
        case = make_case(lengths, heads, tokens)
        workspace.poison()
        out, lse = decode(case, workspace=workspace)
        assert compare(out, lse, *attention(case)).passed


def test_calls_without_a_workspace_share_one() -> None:
    mla_decode.release_workspaces()
    case = make_case([3000], 8)
    first = decode(case)[0]
    again = decode(case)[0]
    assert same_bits(first, again)
    mla_decode.release_workspaces()


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_first_calls_inside_of_inference_mode_hide_no_later_ones(mode: Any) -> None:
    mla_decode.release_caches()
    case, longer = make_case([130, 65], 8), make_case([9000, 700], 16, 4)
    expected = attention(case)
    with torch.inference_mode():
        assert compare(*decode(case), *expected).passed
    assert compare(*decode(case), *expected).passed
    with mode():
        decode(longer)  # the workspace grows
    assert compare(*decode(case), *expected).passed
    assert compare(*decode(longer), *attention(longer)).passed
    mla_decode.release_caches()


def test_threads_share_no_workspace() -> None:
    device = torch.device("cpu")
    mine = cached_workspace(device, 0)
    both = threading.Barrier(2)

    def get(_: int) -> mla_decode.Workspace:
        both.wait()
        assert cached_workspace(device, 0) is cached_workspace(device, 0)
        return cached_workspace(device, 0)

    with ThreadPoolExecutor(2) as pool:
        others = list(pool.map(get, range(2)))
    assert len({id(workspace) for workspace in (mine, *others)}) == 3
    mla_decode.release_workspaces()
    assert cached_workspace(device, 0) is not mine


def test_threads_without_workspaces_decode_at_the_same_time() -> None:
    cases = [make_case([700 + 300 * i, 64 + i], 16, 2, seed=i) for i in range(3)]
    expected = [attention(case) for case in cases]

    def work(i: int) -> bool:
        return all(compare(*decode(cases[i]), *expected[i]).passed for _ in range(4))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(3)))


def test_a_capture_on_a_new_stream_takes_the_spare_workspace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(device: torch.device, stream: int) -> mla_decode.Workspace:
        raise UnsupportedError("workspace: cannot grow while a CUDA graph is captured")

    spare, device = mla_decode.Workspace("cpu", 4), torch.device("cpu")
    monkeypatch.setattr(decoding, "cached_workspace", refuse)
    monkeypatch.setattr(decoding, "_spares", {})
    monkeypatch.setattr(decoding, "_claimed", {})
    with pytest.raises(UnsupportedError, match="cannot grow"):
        decoding._own_views(device, 5, 2, 64)
    decoding._spares[device] = spare
    views = decoding._own_views(device, 5, 2, 64)
    assert views.queue_state is spare.views(2, 64).queue_state
    assert decoding._own_views(device, 5, 2, 64) is views
    with pytest.raises(UnsupportedError, match="cannot grow"):
        decoding._own_views(device, 6, 2, 64)


# Cost, floor, errors


def test_floor_is_that_of_the_published_shapes() -> None:
    # Lengths, heads, new tokens, floor: what a stream of the bytes took on an H200.
    for lengths, heads, tokens, floor in (
        ([65536], 16, 1, 18.5),
        (DEMO, 16, 4, 15.4),
        ([4096] * 128, 16, 1, 134),
        ([4096] * 128, 128, 1, 185),
        ([8192] * 128, 128, 2, 739),
    ):
        assert mla_decode.floor_us(lengths, heads, tokens) == pytest.approx(floor, rel=0.05)


def test_traffic_counts_cache_q_and_o_once() -> None:
    assert cost.traffic_bytes([100, 28], 8, 2) == 1152 * 128 + 2 * 2 * 8 * (1152 + 1024)
    assert cost.work_flop([100], 8, 2) == 2 * 2 * 8 * 100 * (576 + 512)


def test_cost_models_are_found_by_device_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stem, value in (("nvidia-h200", 1.0), ("nvidia-h100", 2.0), ("nvidia-h100-nvl", 3.0)):
        (tmp_path / f"{stem}.json").write_text(json.dumps({"launch_us": value}))
    monkeypatch.setattr(cost, "_DIRECTORIES", (tmp_path,))
    for name, value in (
        ("NVIDIA H100 80GB HBM3", 2.0),
        ("NVIDIA H100 NVL", 3.0),
        ("NVIDIA H1000", 1.0),
        (None, 1.0),
    ):
        assert cost.load(name).launch_us == value
    monkeypatch.setenv("MLA_DECODE_COST_MODEL", str(tmp_path / "nvidia-h100.json"))
    assert cost.load("anything").launch_us == 2.0
    (tmp_path / "nvidia-h100.json").write_text('{"launch_us": "soon"}')
    with pytest.raises(MlaDecodeError, match=r"nvidia-h100\.json"):
        cost.load("anything")


def test_shipped_cost_models_load() -> None:
    for name in ("NVIDIA H200", "NVIDIA H100 80GB HBM3", "unknown", None):
        assert cost.load(name).partial_tile_compute_us > 0


def test_failures_name_the_role_that_the_kernel_means() -> None:
    root = Path(__file__).resolve().parents[1]
    config = (root / "megakernel" / "config.cuh").read_text(encoding="utf-8")
    bindings = (root / "python" / "bindings" / "kernels.cu").read_text(encoding="utf-8")
    roles = re.findall(r"k(\w+)", re.findall(r"enum class Role : int \{(.*?)\}", config)[0])
    table, modulus = re.findall(r"kRoles\[\] = \{(.*?)\}.*?role % (\d+)", bindings, re.DOTALL)[0]
    assert re.findall(r'"(\w+)"', table) == [role.lower() for role in roles]
    assert int(modulus) == len(roles)


def test_timeout_error_carries_the_record() -> None:
    record = {
        "sm": 7,
        "role": "launcher",
        "instruction": 3,
        "uid": 11,
        "opcode": 2,
        "wait": "completion flag of scratch slot 5",
        "expected": 1,
        "seen": 0,
    }
    error = MegakernelTimeout(record)
    assert {name: getattr(error, name) for name in record} == record
    for part in ("SM 7", "launcher", "uid 11", "completion flag of scratch slot 5", "saw 0"):
        assert part in str(error)


def test_every_error_is_caught_by_the_base_class() -> None:
    for name in mla_decode.__all__:
        value = getattr(mla_decode, name)
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, MlaDecodeError)


def test_synchronize_without_a_gpu_does_nothing() -> None:
    mla_decode.synchronize("cpu")


def test_package_works_without_the_cuda_extension() -> None:
    """In a process of its own in which the extension cannot be imported."""
    code = """
        import sys
        sys.modules["mla_decode._kernels"] = None
        import mla_decode
        from mla_decode import native
        from mla_decode.reference import make_case
        case = make_case([65], 8)
        out, _ = mla_decode.decode(case.q, case.kv_cache, case.block_table, case.seq_lens)
        assert not out.isnan().any()
        assert not native.is_built()
        print(native.missing())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the CUDA kernels are not built" in done.stdout


def test_every_planned_queue_passes_the_word_check(plan: mla_decode.Plan) -> None:
    limits = queue_check.QueueLimits(3, 16, 32, 3008, 6, plan.num_slots, plan.slot_rows)
    queue_check.check_words(plan.instructions, limits)


def test_a_plan_that_another_thread_evicts_is_found_all_the_same() -> None:
    class Evicting(OrderedDict[Any, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            return self.pop(key, default)

    cache = PlanCache()
    cache._plans = Evicting()
    made, again = (
        cache.get(np.array([64], dtype=np.int32), 8, 1, 4, torch.device("cpu")) for _ in range(2)
    )
    assert again is made
