"""Block ids that the kernel before writes while this one is already up.

The loader asks for its first keys by the ids that were there before that kernel ended, and looks
afterwards whether they still are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mla_decode
import pytest
import torch
from mla_decode.reference import Case, Errors, attention, compare, make_case

pytestmark = pytest.mark.gpu

LATE_NS = 300_000  # long after the next launch's CTAs are up
REPEATS = 8


def write_late(to: torch.Tensor, what: torch.Tensor) -> None:
    """Overwrite int32 ``to``, long after the next kernel of the stream has begun."""
    from tests import _late_write

    stream = torch.cuda.current_stream().cuda_stream
    assert to.is_contiguous() and what.is_contiguous()
    addresses = to.data_ptr(), what.data_ptr()
    _late_write.run(*addresses, to.numel(), LATE_NS, stream, torch.cuda.current_device())


def decode_behind(case: Case, ids: torch.Tensor, **options: Any) -> Errors:
    """Decode while another kernel is about to write these ids into the block table."""
    expected = attention(replace(case, block_table=ids))
    out, lse = case.poisoned_outputs()
    write_late(case.block_table, ids)
    arguments = case.q, case.kv_cache, case.block_table, case.seq_lens
    mla_decode.decode(*arguments, softmax_scale=case.softmax_scale, out=out, lse=lse, **options)
    mla_decode.synchronize()
    return compare(out, lse, *expected)


@pytest.mark.parametrize("old", ("other blocks", "no blocks"))
@pytest.mark.parametrize("block_size", (64, 128, 32, 16, 1))
@pytest.mark.parametrize("num_heads", (16, 32, 128))
def test_the_ids_that_count_are_those_of_the_kernel_before(
    num_heads: int, block_size: int, old: str
) -> None:
    lengths = [700, 65, 3000, 1, 128]
    case = make_case(lengths, num_heads, 1, block_size, device="cuda")
    plan = mla_decode.plan(lengths, num_heads)
    right = case.block_table.clone()
    if old == "other blocks":
        wrong = right.flip(0).roll(1, 1).contiguous()
    else:
        wrong = torch.where(right % 2 == 0, torch.iinfo(torch.int32).max, -right - 1)
    for _ in range(REPEATS):
        case.block_table.copy_(wrong)
        assert decode_behind(case, right, plan=plan).passed


def test_ids_that_stay_are_right_at_once() -> None:
    case = make_case([700, 65, 3000], 16, 1, 64, device="cuda")
    assert decode_behind(case, case.block_table.clone()).passed
