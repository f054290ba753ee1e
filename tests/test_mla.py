"""The numerical test of the decode op, against float64: `pytest`, or `python tests/test_mla.py`.

On a Hopper GPU the kernel runs the complete list; on the CPU the interpreter runs a subset of it.
Every case has NaN in its cache past each length, wild block ids past each last block, and NaN in
its outputs before the call. Tolerances and their derivation stand in mla_decode/reference.py.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.exit(pytest.main([str(Path(__file__).resolve()), *sys.argv[1:]]))

import mla_decode
from mla_decode.reference import Case, Errors, attention, compare, make_case

from tests.support import EDGE_LENGTHS

HEADS = (8, 16, 32, 64, 128)
NEW_TOKENS = (1, 2, 3, 4)
BLOCK_SIZES = (64, 128, 256)
LONG_LENGTHS = [1000, 4095, 4096, 8191, 16384, 32769, 65535, 65536]
DEMO = [4641, 45118, 1730, 1696]

Record = Callable[[str, float, float, bool], None]


def decode_errors(case: Case, **options: object) -> Errors:
    """Errors of one decode call into poisoned outputs."""
    out, lse = case.poisoned_outputs()
    result = mla_decode.decode(
        case.q,
        case.kv_cache,
        case.block_table,
        case.seq_lens,
        softmax_scale=case.softmax_scale,
        out=out,
        lse=lse,
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


def random_batch(seed: int, max_requests: int, max_length: int) -> tuple[list[int], int, int, int]:
    """Lengths spread over orders of magnitude, heads, new tokens, block size."""
    rng = random.Random(seed)
    count = rng.randint(1, max_requests)
    lengths = [round(max_length ** rng.random()) for _ in range(count)]
    return lengths, rng.choice(HEADS), rng.choice(NEW_TOKENS), rng.choice(BLOCK_SIZES)


# On the CPU, by the interpreter


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("new_tokens", NEW_TOKENS)
@pytest.mark.parametrize("num_heads", HEADS)
def test_cpu_heads_tokens_and_block_sizes(num_heads: int, new_tokens: int, block_size: int) -> None:
    lengths = [1, 63, 65, 256, 300] if num_heads < 64 else [2, 65, 257]
    check("cpu", make_case(lengths, num_heads, new_tokens, block_size, seed=new_tokens))


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
)


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault: str) -> None:
    case = make_case([1, 65, 130], 16, 2, 64)
    expected_out, expected_lse = attention(case)
    scale, lengths = case.softmax_scale, case.seq_lens
    if fault == "wrong scale":
        scale *= 1.5
    if fault == "one key less":
        lengths = [1, 65, 129]
    out, lse = mla_decode.decode(
        case.q, case.kv_cache, case.block_table, lengths, softmax_scale=scale
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
