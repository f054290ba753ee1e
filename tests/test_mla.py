"""The numerical test of the decode op, against float64: `pytest`, or `python tests/test_mla.py`.

On a Hopper GPU the kernel runs the complete list; on the CPU the interpreter runs a subset of it.
Every case has NaN in its cache past each length, wild block ids past each last block, and NaN in
its outputs before the call. Tolerances and their derivation stand in mla_decode/reference.py.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if __name__ == "__main__":
    sys.exit(pytest.main([str(Path(__file__).resolve()), *sys.argv[1:]]))

import mla_decode
from mla_decode.reference import Case, Errors, attention, compare, make_case
from mla_decode.words import MAX_ROWS

from tests.support import EDGE_LENGTHS, plan_of

HEADS = (8, 16, 32, 64, 128)
NEW_TOKENS = (1, 2, 3, 4)
BLOCK_SIZES = (64, 128, 256)
ODD_HEADS = (1, 7, 12, 96, 127)
ODD_NEW_TOKENS = (5, 16)
ODD_BLOCK_SIZES = (1, 7, 16, 48)
LONG_LENGTHS = [1000, 4095, 4096, 8191, 16384, 32769, 65535, 65536]
DEMO = [4641, 45118, 1730, 1696]

# What a call may have beyond sizes: options of `make_case`, for 6 requests and h heads.
SINKS = (math.inf, -math.inf, -2.0, 0.0, 3.0, 9.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "fp16": {"dtype": torch.float16},
    "all keys": {"causal": False, "new_tokens": 3},
    "one row of block ids": {"csr": True},
    "one row of blocks of 1": {"csr": True, "block_size": 1},
    "two KV heads": {"h_kv": 2, "new_tokens": 2},
    "eight KV heads": {"h_kv": 8, "block_size": 16},
    "ragged": {"new_tokens": [1, 3, 0, 16, 2, 1]},
    "ragged, all keys": {"new_tokens": [1, 3, 0, 16, 2, 1], "causal": False},
    "ragged, padded": {"new_tokens": [1, 3, 0, 2, 2, 1], "padding_tokens": 7},
    "all requests empty": {"new_tokens": [0, 0, 0, 0, 0, 0], "padding_tokens": 3},
    "sinks": {"attn_sink": SINKS, "new_tokens": 2},
    "base 2": {"lse_base": 2.0, "lse_empty": -math.inf},
    "everything": {
        "dtype": torch.float16,
        "causal": False,
        "csr": True,
        "block_size": 48,
        "h_kv": 2,
        "new_tokens": [1, 3, 0, 16, 2, 1],
        "padding_tokens": 5,
        "attn_sink": SINKS,
        "lse_base": 2.0,
        "lse_empty": -math.inf,
    },
}

Record = Callable[[str, float, float, bool], None]


def decode_errors(case: Case, **options: object) -> Errors:
    """Errors of one decode call into poisoned outputs."""
    out, lse = case.poisoned_outputs()
    blocks = {"block_table": case.block_table}
    if case.kv_indptr is not None:
        blocks = {"kv_indptr": case.kv_indptr, "kv_indices": case.block_table}
    result = mla_decode.decode(
        case.q,
        case.kv_cache,
        seq_lens=case.seq_lens,
        softmax_scale=case.softmax_scale,
        causal=case.causal,
        cu_seqlens_q=case.cu_seqlens_q,
        attn_sink=case.attn_sink,
        lse_base=case.lse_base,
        lse_empty=case.lse_empty,
        out=out,
        lse=lse,
        **blocks,
        **options,
    )
    mla_decode.synchronize(case.q.device)
    assert result[0] is out
    assert result[1] is lse
    return compare(out, lse, *attention(case))


def check(name: str, case: Case, record: Record | None = None) -> None:
    errors = decode_errors(case)
    if record is not None:
        record(name, errors.rel_err, errors.lse_max_abs_err, errors.passed)
    assert errors.passed, f"{name}: {errors}"
    # Short batches run in groups of fewer rows, so the kernel for 64 gets them once more.
    if case.q.is_cuda and plan_of(case).group_rows < MAX_ROWS:
        errors = decode_errors(case, plan=plan_of(case, group_rows=MAX_ROWS))
        assert errors.passed, f"{name}, in groups of {MAX_ROWS}: {errors}"


def random_batch(seed: int, max_requests: int, max_length: int) -> tuple[list[int], int, int, int]:
    """Lengths spread over orders of magnitude, heads, new tokens, block size."""
    rng = random.Random(seed)
    count = rng.randint(1, max_requests)
    lengths = [round(max_length ** rng.random()) for _ in range(count)]
    return lengths, rng.choice(HEADS), rng.choice(NEW_TOKENS), rng.choice(BLOCK_SIZES)


def variant(name: str, lengths: list[int], heads_per_kv: int, device: str = "cpu") -> Case:
    """A case of `VARIANTS` with 6 requests."""
    options = dict(VARIANTS[name])
    num_heads = heads_per_kv * options.get("h_kv", 1)
    if "attn_sink" in options:
        sinks = options["attn_sink"]
        options["attn_sink"] = [sinks[head % len(sinks)] for head in range(num_heads)]
    return make_case(lengths, num_heads, **options, seed=heads_per_kv, device=device)


# On the CPU, by the interpreter


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("new_tokens", NEW_TOKENS)
@pytest.mark.parametrize("num_heads", HEADS)
def test_cpu_heads_tokens_and_block_sizes(num_heads: int, new_tokens: int, block_size: int) -> None:
    lengths = [1, 63, 65, 256, 300] if num_heads < 64 else [2, 65, 257]
    check("cpu", make_case(lengths, num_heads, new_tokens, block_size, seed=new_tokens))


@pytest.mark.parametrize("block_size", ODD_BLOCK_SIZES)
@pytest.mark.parametrize("new_tokens", ODD_NEW_TOKENS)
@pytest.mark.parametrize("num_heads", ODD_HEADS)
def test_cpu_odd_sizes(num_heads: int, new_tokens: int, block_size: int) -> None:
    lengths = [0, 1, 63, 65, 257] if num_heads < 64 else [0, 2, 65]
    check("cpu", make_case(lengths, num_heads, new_tokens, block_size, seed=new_tokens))


@pytest.mark.parametrize("heads_per_kv", (1, 12, 16))
@pytest.mark.parametrize("name", VARIANTS)
def test_cpu_variants(name: str, heads_per_kv: int) -> None:
    check("cpu", variant(name, [130, 1, 0, 700, 64, 3], heads_per_kv))


@pytest.mark.parametrize("new_tokens", (1, 4))
def test_cpu_edge_lengths(new_tokens: int) -> None:
    check("cpu", make_case(EDGE_LENGTHS, 16, new_tokens, 64))


@pytest.mark.parametrize("seed", range(6))
def test_cpu_random_batches(seed: int) -> None:
    lengths, heads, tokens, block = random_batch(seed, max_requests=8, max_length=3000)
    check("cpu", make_case(lengths, heads, tokens, block, seed=seed))


@pytest.mark.parametrize("length", (8191, 65536))
def test_cpu_long_request(length: int) -> None:
    check("cpu", make_case([length], 16, 1, 64))


def test_cpu_separate_cache_tensors() -> None:
    check("cpu", make_case([65, 700], 16, 2, 128, combined=False))


@pytest.mark.parametrize("softmax_scale", (192**-0.5, 1.0))
def test_cpu_softmax_scale(softmax_scale: float) -> None:
    check("cpu", make_case([257, 1], 8, 2, 64, softmax_scale=softmax_scale))


# On the GPU, by the kernel


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("new_tokens", NEW_TOKENS)
@pytest.mark.parametrize("num_heads", HEADS)
def test_gpu_heads_tokens_and_block_sizes(
    num_heads: int, new_tokens: int, block_size: int, record_correctness: Record
) -> None:
    lengths = [*EDGE_LENGTHS, 1000, 4097]
    case = make_case(lengths, num_heads, new_tokens, block_size, seed=new_tokens, device="cuda")
    check(f"edges h{num_heads} q{new_tokens} block{block_size}", case, record_correctness)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", ODD_BLOCK_SIZES)
@pytest.mark.parametrize("new_tokens", ODD_NEW_TOKENS)
@pytest.mark.parametrize("num_heads", ODD_HEADS)
def test_gpu_odd_sizes(
    num_heads: int, new_tokens: int, block_size: int, record_correctness: Record
) -> None:
    lengths = [0, *EDGE_LENGTHS, 1000, 4097]
    case = make_case(lengths, num_heads, new_tokens, block_size, seed=new_tokens, device="cuda")
    check(f"edges h{num_heads} q{new_tokens} block{block_size}", case, record_correctness)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[130, 1, 0, 700, 64, 3], [9000, 40, 0, 33000, 1, 64]], ids=str)
@pytest.mark.parametrize("heads_per_kv", (1, 12, 16, 64, 128))
@pytest.mark.parametrize("name", VARIANTS)
def test_gpu_variants(
    name: str, heads_per_kv: int, lengths: list[int], record_correctness: Record
) -> None:
    case = variant(name, lengths, heads_per_kv, "cuda")
    check(f"{name} h{heads_per_kv} longest {max(lengths)}", case, record_correctness)


@pytest.mark.gpu
@pytest.mark.parametrize("new_tokens", NEW_TOKENS)
@pytest.mark.parametrize("length", EDGE_LENGTHS + LONG_LENGTHS)
def test_gpu_single_request(length: int, new_tokens: int, record_correctness: Record) -> None:
    case = make_case([length], 16, new_tokens, 64, device="cuda")
    check(f"B1_{length} h16 q{new_tokens}", case, record_correctness)


@pytest.mark.gpu
@pytest.mark.parametrize("new_tokens", NEW_TOKENS)
@pytest.mark.parametrize("num_heads", HEADS)
def test_gpu_longest_request(num_heads: int, new_tokens: int, record_correctness: Record) -> None:
    case = make_case([65536, 1], num_heads, new_tokens, 64, device="cuda")
    check(f"65536+1 h{num_heads} q{new_tokens}", case, record_correctness)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_gpu_demo_batch(block_size: int, record_correctness: Record) -> None:
    case = make_case(DEMO, 16, 4, block_size, device="cuda")
    check(f"demo block{block_size}", case, record_correctness)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(24))
def test_gpu_random_batches(seed: int, record_correctness: Record) -> None:
    lengths, heads, tokens, block = random_batch(seed, max_requests=64, max_length=20000)
    case = make_case(lengths, heads, tokens, block, seed=seed, device="cuda")
    check(f"random{seed} B{len(lengths)} h{heads} q{tokens}", case, record_correctness)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", (16, 128))
def test_gpu_separate_cache_tensors(num_heads: int, record_correctness: Record) -> None:
    case = make_case([65, 7000, 1], num_heads, 2, 128, device="cuda", combined=False)
    check(f"separate caches h{num_heads}", case, record_correctness)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("softmax_scale", (192**-0.5, 1.0))
def test_gpu_softmax_scale(num_heads: int, softmax_scale: float) -> None:
    case = make_case([3000, 64], num_heads, 2, 64, device="cuda", softmax_scale=softmax_scale)
    check(f"scale {softmax_scale:.3f} h{num_heads}", case)


# The gate itself: a fault put in on purpose must be seen


FAULTS = (
    "wrong scale",
    "one key less",
    "swapped heads",
    "unwritten",
    "finite lse",
    "wrong infinity",
    "wrong base",
    "no sink",
    "not causal",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str) -> None:
    case = make_case([1, 65, 130], 16, 2, 64)
    if fault == "no sink":
        case = make_case([1, 65, 130], 16, 2, 64, attn_sink=[0.0] * 16)
    expected_out, expected_lse = attention(case)
    scale, lengths = case.softmax_scale, case.seq_lens
    if fault == "wrong scale":
        scale *= 1.5
    if fault == "one key less":
        lengths = [1, 65, 129]
    out, lse = mla_decode.decode(
        case.q,
        case.kv_cache,
        case.block_table,
        lengths,
        softmax_scale=scale,
        causal=fault != "not causal",
        lse_base=2.0 if fault == "wrong base" else math.e,
    )
    if fault == "swapped heads":
        out[:, :, [0, 1]] = out[:, :, [1, 0]]
        lse[:, [0, 1]] = lse[:, [1, 0]]
    if fault == "unwritten":
        out[1, 1, 3, 7] = torch.nan
    if fault == "finite lse":  # of the first token of length 1, which sees no key
        lse[0, 0, 0] = 0
    if fault == "wrong infinity":
        lse[0, 0, 0] = -torch.inf
    assert not compare(out, lse, expected_out, expected_lse).passed


def test_without_a_fault_the_same_case_passes() -> None:
    check("cpu", make_case([1, 65, 130], 16, 2, 64))
