"""The benchmark's serving shapes: what they are, their references, and who runs them."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import bench, case, implementations, planning, shapes
from benchmarks.measure import MAX_REL_ERR, Row

SMALL = {
    "block size 1": shapes.Shape("a", (3, 70), 2, 4, block_size=1),
    "block size 16": shapes.Shape("b", (3, 70), 1, 4, block_size=16),
    "mixed": shapes.Shape("c", (5, 70, 9), (1, 4, 2), 4),
    "batch invariant": shapes.Shape("d", (5, 2070), 1, 4, batch_invariant=True),
}


def test_a_mixed_batch_is_the_sum_of_its_parts() -> None:
    mixed, *parts = (
        shapes.SERVING_SHAPES[name]
        for name in ("B64_4k_q1or4_h16", "B32_4k_q1_h16", "B32_4k_q4_h16")
    )
    assert mixed.is_mixed
    assert not any(part.is_mixed for part in parts)
    for quantity in ("kv_bytes", "bytes", "flop"):
        assert getattr(mixed, quantity) == sum(getattr(part, quantity) for part in parts)


def test_serving_shapes_differ_from_the_table_in_what_their_names_say() -> None:
    assert not set(shapes.SERVING_SHAPES) & set(shapes.SHAPES)
    for name, shape in shapes.SERVING_SHAPES.items():
        assert shape.name == name
        base = shapes.SHAPES.get(name.rpartition("_")[0])
        if base is not None:
            assert (shape.seq_lens, shape.bytes) == (base.seq_lens, base.bytes)
            assert (shape.block_size != base.block_size) != shape.batch_invariant


@pytest.mark.parametrize("shape", SMALL.values(), ids=SMALL)
def test_ours_runs_every_kind_of_shape(shape: shapes.Shape) -> None:
    made = case.make_case(shape, torch.device("cpu"), copies=1)
    prepared = implementations.mla_decode(made)
    error = case.relative_error(prepared.call(0), made.reference[0])
    assert error <= MAX_REL_ERR


def test_the_reference_of_a_mixed_shape_is_that_of_its_requests() -> None:
    shape = SMALL["mixed"]
    made = case.make_case(shape, torch.device("cpu"), copies=1)
    first = 0
    for row, (length, tokens) in enumerate(zip(shape.seq_lens, shape.tokens, strict=True)):
        alone = case.Case(
            shapes.Shape("one", (length,), tokens, shape.num_heads),
            q=[made.q[0][first : first + tokens].unsqueeze(0)],
            kv_cache=made.kv_cache,
            block_table=made.block_table[row : row + 1],
            seq_lens=made.seq_lens[row : row + 1],
            cu_seqlens_q=torch.tensor([0, tokens]),
            reference=[],
        )
        expected = case.reference(alone, alone.q[0], alone.kv_cache[0])[0]
        torch.testing.assert_close(made.reference[0][first : first + tokens], expected)
        first += tokens


def test_a_peer_without_the_operation_leaves_a_dash() -> None:
    for name in ("block size 16", "mixed", "batch invariant"):
        made = case.make_case(SMALL[name], torch.device("cpu"), copies=1)
        with pytest.raises(implementations.NotOfferedError, match="flash_mla"):
            implementations.flash_mla(made)
    shape = shapes.SERVING_SHAPES["B32_4k_q1_h16"]
    ours, dash = bench.table_lines(
        [Row(shape, "mla_decode", us=40.0, rel_err=1e-3), Row(shape, "flash_mla")]
    )
    assert " 40.00 " in ours
    assert dash.split() == [shape.name, "flash_mla", *"–––––"]


def test_planning_lengths_repeat_and_fit() -> None:
    for batch in planning.BATCHES:
        lengths = planning.lengths(batch)
        assert lengths == planning.lengths(batch)
        assert len(lengths) == batch
        assert 1 <= min(lengths) <= max(lengths) <= planning.MAX_SEQ_LEN


def test_a_number_that_is_missing_is_no_wrong_result() -> None:
    shape = shapes.SERVING_SHAPES["B32_4k_q1_h16"]
    assert math.isnan(Row(shape, "flash_mla").us)
    assert bench.speedups([Row(shape, "mla_decode", us=2.0), Row(shape, "flash_mla")]) == ""
