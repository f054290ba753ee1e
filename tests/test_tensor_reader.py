"""The reader of a call's tensors: its key tells apart what checks tell apart, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mla_decode
import pytest
import torch
from mla_decode import decoding, native
from mla_decode.reference import make_case

NAMES = (
    "q",
    "kv_cache",
    "block_table",
    "cu_seqlens_q",
    "kv_indptr",
    "kv_indices",
    "attn_sink",
    "out",
    "lse",
)

pytestmark = pytest.mark.skipif(
    native.read_tensors is native._no_reader,
    reason="no reader: the kernels are not built, or torch is older than 2.10",
)


def tensors() -> dict[str, Any]:
    """One of each, in storage with room behind it."""
    bf16, fp32, int32 = torch.bfloat16, torch.float32, torch.int32
    return {
        "q": torch.zeros(2, 1, 16, 576, dtype=bf16),
        "kv_cache": torch.zeros(9, 64, 576, dtype=bf16),
        "block_table": torch.zeros(2, 4, dtype=int32),
        "cu_seqlens_q": torch.zeros(3, dtype=int32),
        "kv_indptr": torch.zeros(3, dtype=int32),
        "kv_indices": torch.zeros(8, dtype=int32),
        "attn_sink": torch.zeros(16, dtype=fp32),
        "out": torch.zeros(2, 1, 16, 512, dtype=bf16),
        "lse": torch.zeros(2, 16, 1, dtype=fp32),
    }


def read(given: dict[str, Any]) -> tuple[Any, tuple[int, ...]]:
    found = native.read_tensors(*(given[name] for name in NAMES))
    assert found is not None
    return found


def test_calls_of_one_layout_have_one_key_and_addresses_of_their_own() -> None:
    first, second = tensors(), tensors()
    (key, addresses), (other_key, other_addresses) = read(first), read(second)
    assert key == other_key
    assert not set(addresses) & set(other_addresses)
    assert addresses == (
        first["q"].data_ptr(),
        first["q"][..., 512:].data_ptr(),
        first["kv_cache"].data_ptr(),
        first["kv_cache"][..., 512:].data_ptr(),
        first["kv_indices"].data_ptr(),
        first["kv_indptr"].data_ptr(),
        first["cu_seqlens_q"].data_ptr(),
        first["attn_sink"].data_ptr(),
    )
    assert addresses == decoding._addresses(
        *(first[n] for n in ("q", "kv_cache", "kv_indices", "kv_indptr", "cu_seqlens_q")),
        first["attn_sink"],
    )


def test_pairs_and_missing_tensors() -> None:
    given = dict.fromkeys(NAMES)
    whole = tensors()
    pair = (whole["q"][..., :512].contiguous(), whole["q"][..., 512:].contiguous())
    given.update(q=pair, kv_cache=whole["kv_cache"], block_table=whole["block_table"])
    key, addresses = read(given)
    assert addresses[:2] == (pair[0].data_ptr(), pair[1].data_ptr())
    assert addresses[4:] == (whole["block_table"].data_ptr(), 0, 0, 0)
    swapped = {**given, "q": whole["q"], "kv_cache": pair}
    assert read(swapped)[0] != key
    assert read({**given, "q": whole["q"]})[0] != key


def one_element_further(tensor: torch.Tensor) -> torch.Tensor:
    storage = torch.zeros(tensor.numel() + 64, dtype=tensor.dtype)
    return storage[1 : 1 + tensor.numel()].view(tensor.shape)


CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "none": lambda t: None,
    "dtype": lambda t: t.to(torch.float16 if t.is_floating_point() else torch.int64),
    "another float": lambda t: t.to(torch.float64),
    "rank": lambda t: t.unsqueeze(0) if t.dim() < 4 else t[0],
    "shape": lambda t: torch.cat([t, t]),
    "strides": lambda t: torch.cat([t, t], -1)[..., ::2],
    "device": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_check_looks_at_is_in_the_key(name: str, change: str) -> None:
    given = tensors()
    key, _ = read(given)
    changed = {**given, name: CHANGES[change](given[name])}
    found = native.read_tensors(*(changed[n] for n in NAMES))
    if (name, change) == ("kv_indices", "shape"):
        assert found is not None
        assert found[0] == key, "the number of block ids changes from step to step"
    else:
        assert found is None or found[0] != key


@pytest.mark.parametrize("name", ["q", "kv_cache", "out"])
def test_the_copy_engine_s_tensors_are_told_apart_by_alignment(name: str) -> None:
    given = tensors()
    assert read({**given, name: one_element_further(given[name])})[0] != read(given)[0]
    table = one_element_further(given["block_table"])
    assert read({**given, "block_table": table})[0] == read(given)[0]


class Named(torch.Tensor):
    """A subclass, which may mean anything by its attributes."""


@pytest.mark.parametrize(
    "value",
    [
        [[1.0]],
        torch.nn.Parameter(torch.zeros(2, 1, 16, 576, dtype=torch.bfloat16), requires_grad=False),
        torch.zeros(2, 1, 16, 576, dtype=torch.bfloat16).as_subclass(Named),
        torch.zeros(1, 1, 1, 1, 1),
        torch.eye(3).to_sparse(),
        (torch.zeros(1), torch.zeros(1), torch.zeros(1)),
        (torch.zeros(1), None, 3),
    ],
    ids=["list", "parameter", "subclass", "rank 5", "sparse", "triple", "no pair"],
)
def test_what_is_no_plain_tensor_is_left_to_python(value: object) -> None:
    given = tensors()
    assert native.read_tensors(*({**given, "q": value}[name] for name in NAMES)) is None


def test_tensors_that_are_not_read_decode_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case([130, 65], 8, 2)
    arguments = (case.kv_cache, case.block_table, case.seq_lens)
    expected, _ = mla_decode.decode(case.q, *arguments)
    for q in (torch.nn.Parameter(case.q, requires_grad=False), case.q.as_subclass(Named)):
        out, _ = mla_decode.decode(q, *arguments)
        assert torch.equal(out.as_subclass(torch.Tensor), expected)
    monkeypatch.setattr(native, "read_tensors", native._no_reader)
    out, _ = mla_decode.decode(case.q, *arguments)
    assert torch.equal(out, expected)
