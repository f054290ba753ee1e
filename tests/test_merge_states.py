"""States over disjoint sets of keys merge to the state over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import mla_decode
import pytest
import torch
from mla_decode.errors import (
    DeviceError,
    DtypeError,
    MlaDecodeError,
    RangeError,
    ShapeError,
    UnsupportedError,
)
from mla_decode.merge_states import merge_states

from tests.support import same_bits

H, D = 4, 512
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def attention(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output ``[..., D]`` and natural LSE ``[...]`` of float64 scores ``[..., keys]``."""
    if scores.shape[-1] == 0:
        return scores.new_zeros(*scores.shape[:-1], D), scores.new_full(
            scores.shape[:-1], -math.inf
        )
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def make_states(
    cuts: list[int], rows: tuple[int, ...], spread: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 states of consecutive pieces of ``cuts`` keys, and the state of all keys."""
    scores = torch.randn(*rows, sum(cuts), dtype=torch.float64) * spread
    values = torch.randn(sum(cuts), D, dtype=torch.float64)
    pieces = zip(scores.split(cuts, -1), values.split(cuts), strict=True)
    outs, lses = zip(*(attention(s, v) for s, v in pieces), strict=True)
    return torch.stack(outs), torch.stack(lses), *attention(scores, values)


@pytest.mark.parametrize("rows", [(3, H), (2, 3, H), (H,), (1, 1, H)], ids=str)
@pytest.mark.parametrize("cuts", [[5], [1, 7], [4, 0, 9], [0, 3, 0, 0, 2], [1] * 9], ids=str)
@pytest.mark.parametrize("lse_base", [2.0, math.e])
def test_states_of_pieces_merge_to_the_whole(
    cuts: list[int], rows: tuple[int, ...], lse_base: float
) -> None:
    outs, lses, expected_out, expected_lse = make_states(cuts, rows)
    if len(rows) == 3:  # [n, B, s_q, H] becomes [n, B, H, s_q]
        lses, expected_lse = lses.transpose(-1, -2), expected_lse.transpose(-1, -2)
    out, lse = merge_states(outs, lses / math.log(lse_base), lse_base=lse_base)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lse * math.log(lse_base), expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_is_rounded_once(dtype: torch.dtype) -> None:
    outs, lses, *_ = make_states([3, 8, 2], (5, H))
    outs = outs.to(dtype)
    expected, _ = merge_states(outs.double(), lses)
    out, lse = merge_states(outs, lses.float())
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    # One rounding to the dtype; fp32 sums of three terms are far below it, but for fp32 itself.
    eps = max(torch.finfo(dtype).eps, 2 * torch.finfo(torch.float32).eps)
    bound = expected.abs() * eps + outs.double().abs().amax(0) * 1e-6
    assert bool(((out.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("no_key", [math.inf, -math.inf])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
def test_nothing_leaks_out_of_an_empty_state(no_key: float, garbage: float) -> None:
    outs, lses, expected_out, expected_lse = make_states([6, 0, 5], (3, H))
    outs, lses = outs.float(), lses.float()
    outs[1], lses[1] = garbage, no_key
    outs[:, 2], lses[:, 2] = garbage, no_key  # a row that no state has a key for
    out, lse = merge_states(outs, lses)
    torch.testing.assert_close(out[:2].double(), expected_out[:2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse[:2].double(), expected_lse[:2], rtol=1e-5, atol=1e-6)
    assert not out[2].any()
    assert bool((lse[2] == -math.inf).all())
    _, as_flash_mla = merge_states(outs, lses, lse_empty=math.inf)
    assert bool((as_flash_mla[2] == math.inf).all())


def test_a_state_alone_or_beside_empty_ones_keeps_its_bits() -> None:
    outs, lses, *_ = make_states([6], (3, H))
    outs, lses = outs.bfloat16(), lses.float()
    empty_out, empty_lse = torch.full_like(outs, math.nan), torch.full_like(lses, -math.inf)
    for order in ([outs], [outs, empty_out], [empty_out, empty_out, outs]):
        lse_of = {id(outs): lses, id(empty_out): empty_lse}
        out, lse = merge_states(torch.cat(order), torch.cat([lse_of[id(o)] for o in order]))
        assert same_bits(out, outs[0])
        assert same_bits(lse, lses[0])


@pytest.mark.parametrize("shift", [-3e4, 3e4, 1e30])
def test_large_scores_neither_overflow_nor_vanish(shift: float) -> None:
    outs, lses, expected_out, _ = make_states([4, 4], (3, H), spread=1.0)
    out, lse = merge_states(outs.float(), (lses + shift).float())
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())
    if abs(shift) < 1e5:
        torch.testing.assert_close(out.double(), expected_out, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sink", [-math.inf, -2.0, 3.0, 200.0, math.inf])
def test_the_sink_scales_the_output_once(sink: float) -> None:
    outs, lses, expected_out, expected_lse = make_states([4, 7, 0], (3, H))
    sinks = torch.full((H,), sink)
    for lse_base in (2.0, math.e):
        out, lse = merge_states(outs, lses / math.log(lse_base), lse_base=lse_base, attn_sink=sinks)
        factor = torch.sigmoid(expected_lse - sinks.double())
        torch.testing.assert_close(out, expected_out * factor[..., None], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(lse * math.log(lse_base), expected_lse)
    nothing, _ = merge_states(outs, torch.full_like(lses, -math.inf), attn_sink=sinks)
    assert not nothing.any()


def test_the_same_states_give_the_same_bits() -> None:
    outs, lses, *_ = make_states([3, 1, 4, 1, 5], (13, H))
    outs, lses = outs.bfloat16(), lses.float()
    first = merge_states(outs, lses)
    for _ in range(3):
        again = merge_states(outs.clone(), lses.clone())
        assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


def test_a_list_and_strided_states_merge_as_a_dense_tensor_does() -> None:
    outs, lses, *_ = make_states([3, 1, 4], (2, 3, H))
    outs, lses = outs.bfloat16(), lses.transpose(-1, -2).float()
    expected = merge_states(outs.contiguous(), lses.contiguous())
    wide = torch.full((3, 2, 3, H, D + 64), math.nan).bfloat16()
    wide[..., :D] = outs
    for got in (
        merge_states(list(outs), tuple(lses)),
        merge_states(wide[..., :D], lses),
    ):
        assert all(same_bits(g, e) for g, e in zip(got, expected, strict=True))
        assert all(g.is_contiguous() for g in got)


def test_results_are_written_into_the_buffers_given() -> None:
    outs, lses, *_ = make_states([3, 4], (5, H))
    expected = merge_states(outs, lses)
    out = torch.full_like(outs[0], math.nan)
    lse = torch.full((H, 5), math.nan, dtype=lses.dtype).T
    got = merge_states(outs, lses, out=out, lse=lse)
    assert got[0] is out
    assert got[1] is lse
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize("name", ["out", "lse"])
def test_a_wrong_buffer_leaves_the_other_as_it_was(name: str) -> None:
    outs, lses, *_ = make_states([3, 4], (5, H))
    wrong = {"out": outs[0, :2], "lse": lses[0, :1].expand(5, H)}
    buffers = {"out": torch.full_like(outs[0], 7), "lse": torch.full_like(lses[0], 7)}
    with pytest.raises(MlaDecodeError, match=f"{name}: "):
        merge_states(outs, lses, **{**buffers, name: wrong[name]})
    assert all(bool((buffer == 7).all()) for buffer in buffers.values())


def test_a_sink_that_learns_gets_no_graph() -> None:
    outs, lses, *_ = make_states([3, 4], (5, H))
    sink = torch.nn.Parameter(torch.zeros(H, dtype=torch.float32))
    buffer = torch.empty_like(outs[0])
    merge_states(outs, lses, attn_sink=sink, out=buffer)
    got = merge_states(outs, lses, attn_sink=sink)
    assert not any(tensor.requires_grad for tensor in (buffer, *got))
    assert torch.equal(got[0], merge_states(outs, lses, attn_sink=sink.detach())[0])


@pytest.mark.parametrize("padded", [False, True])
def test_torch_compile_sees_one_graph_and_keeps_the_bits(padded: bool) -> None:
    outs, lses, *_ = make_states([3, 0, 4], (2, 3, H) if padded else (5, H))
    outs, lses = outs.bfloat16(), lses.float()
    if padded:
        lses = lses.transpose(-1, -2).contiguous()

    def step(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = merge_states(outs * 1, lses, lse_empty=math.inf)
        return out + 0, lse

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(outs, lses), step(outs, lses), strict=True):
        assert same_bits(got, expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("with_sink", [False, True])
def test_the_registered_op_passes_opcheck(padded: bool, with_sink: bool) -> None:
    outs, lses, *_ = make_states([3, 4], (2, 3, H) if padded else (5, H))
    lses = lses.transpose(-1, -2) if padded else lses
    sink = torch.zeros(H) if with_sink else None
    torch.library.opcheck(
        torch.ops.mla_decode.merge_states.default,
        (outs.bfloat16(), lses.float(), math.e, -math.inf, sink),
    )


def test_the_package_exports_it() -> None:
    assert mla_decode.merge_states is merge_states


GOOD_OUTS, GOOD_LSES = torch.zeros(2, 3, H, D), torch.zeros(2, 3, H)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: merge_states([], []), ShapeError, "outs: expected at least 1 state"),
        (lambda: merge_states(GOOD_OUTS[:0], GOOD_LSES[:0]), ShapeError, "at least 1 state"),
        (lambda: merge_states(None, GOOD_LSES), DtypeError, "outs: expected a tensor or a list"),
        (lambda: merge_states([GOOD_OUTS, 1], GOOD_LSES), DtypeError, r"outs\[1\]: expected a"),
        (
            lambda: merge_states([GOOD_OUTS[0], GOOD_OUTS[0, :2]], GOOD_LSES),
            ShapeError,
            r"outs\[1\]: expected shape \[3, 4, 512\], got \[2, 4, 512\]",
        ),
        (
            lambda: merge_states([GOOD_OUTS[0], GOOD_OUTS[1].half()], GOOD_LSES),
            DtypeError,
            r"outs\[1\]: expected torch.float32",
        ),
        (
            lambda: merge_states(GOOD_OUTS, GOOD_LSES[:, :2]),
            ShapeError,
            r"lses: expected shape \[2, 3, 4\], got \[2, 2, 4\]",
        ),
        (
            lambda: merge_states(torch.zeros(2, 5, 3, H, D), torch.zeros(2, 5, 3, H)),
            ShapeError,
            r"lses: expected shape \[2, 5, 4, 3\], got \[2, 5, 3, 4\]",
        ),
        (lambda: merge_states(GOOD_OUTS.int(), GOOD_LSES), DtypeError, "outs: expected bf16"),
        (
            lambda: merge_states(GOOD_OUTS, GOOD_LSES.bfloat16()),
            DtypeError,
            "lses: expected torch.float32 or torch.float64, got torch.bfloat16",
        ),
        (
            lambda: merge_states(GOOD_OUTS, GOOD_LSES.to("meta")),
            DeviceError,
            "lses: expected device cpu, got meta",
        ),
        (
            lambda: merge_states(GOOD_OUTS, GOOD_LSES, lse_base=10.0),
            RangeError,
            "lse_base: expected 2 or math.e, got 10.0",
        ),
        (
            lambda: merge_states(GOOD_OUTS, GOOD_LSES, lse_empty=0.0),
            RangeError,
            "lse_empty: expected inf or -inf, got 0.0",
        ),
        (
            lambda: merge_states(GOOD_OUTS.clone().requires_grad_(), GOOD_LSES),
            UnsupportedError,
            "outs: expected tensors that require no gradient",
        ),
        (
            lambda: merge_states(GOOD_OUTS, GOOD_LSES, attn_sink=torch.zeros(3)),
            ShapeError,
            r"attn_sink: expected shape \[4\], got \[3\]",
        ),
        (
            lambda: merge_states(GOOD_OUTS, GOOD_LSES, out=torch.zeros(3, H, D).half()),
            DtypeError,
            "out: expected torch.float32, got torch.float16",
        ),
        (
            lambda: merge_states(GOOD_OUTS, GOOD_LSES, lse=torch.zeros(H, 3)),
            ShapeError,
            r"lse: expected shape \[3, 4\], got \[4, 3\]",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], object], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_merge() -> None:
    outs, lses, *_ = make_states([3, 0, 40], (2, 3, H))
    outs, lses = outs.bfloat16().cuda(), lses.transpose(-1, -2).float().contiguous().cuda()
    merge_states(outs, lses)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = merge_states(outs, lses)
    for seed in range(3):
        torch.manual_seed(seed)
        lses.normal_()
        outs.normal_()
        graph.replay()
        eager = merge_states(outs, lses)
        assert same_bits(out, eager[0])
        assert same_bits(lse, eager[1])


@pytest.mark.gpu
def test_a_row_has_the_same_bits_in_every_batch_on_the_gpu() -> None:
    for states in (2, 4, 8):
        outs = torch.randn(states, 300, H, D, device="cuda").bfloat16()
        lses = torch.randn(states, 300, H, device="cuda")
        out, lse = merge_states(outs, lses)
        for row in (0, 1, 151, 299):
            alone = merge_states(outs[:, row : row + 1], lses[:, row : row + 1])
            assert same_bits(alone[0][0], out[row])
            assert same_bits(alone[1][0], lse[row])
