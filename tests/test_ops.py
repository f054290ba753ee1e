"""``torch.ops.mla_decode``: schema, fake tensors, compilation, gradients refused."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import mla_decode
import pytest
import torch
from mla_decode.errors import (
    DtypeError,
    MlaDecodeError,
    RangeError,
    ScheduleError,
    ShapeError,
    UnsupportedError,
)
from mla_decode.reference import Case, attention, compare, make_case

from tests.support import same_bits

OPS = torch.ops.mla_decode
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def lengths_of(case: Case) -> torch.Tensor:
    return torch.tensor(case.seq_lens, dtype=torch.int32, device=case.q.device)


def positional(case: Case) -> tuple[Any, ...]:
    return (
        case.q,
        case.kv_cache,
        None if case.kv_indptr is not None else case.block_table,
        lengths_of(case),
    )


def named(case: Case) -> dict[str, Any]:
    return {
        "cu_seqlens_q": case.cu_seqlens_q,
        "kv_indptr": case.kv_indptr,
        "kv_indices": None if case.kv_indptr is None else case.block_table,
        "attn_sink": case.attn_sink,
        "causal": case.causal,
    }


FORMS: dict[str, dict[str, Any]] = {
    "uniform": {"new_tokens": 2},
    "ragged": {"new_tokens": [1, 3, 0], "padding_tokens": 2, "csr": True},
    "kv heads": {"h_kv": 2, "attn_sink": [0.5] * 8, "dtype": torch.float16},
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> dict[str, Any]:
    return FORMS[request.param]


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_passes(form: dict[str, Any], device: str) -> None:
    # opcheck compares copies with ==, which no NaN survives.
    case = make_case([130, 65, 0], 8, **form, poison=False, device=device)
    results = torch.library.opcheck(OPS.decode.default, positional(case), named(case))
    assert set(results.values()) == {"SUCCESS"}
    out, lse = (
        torch.zeros_like(case.q[..., :512].contiguous()),
        OPS.decode(*positional(case), **named(case))[1],
    )
    options = {**named(case), "out": out, "lse": lse.clone()}
    results = torch.library.opcheck(OPS.decode_out.default, positional(case), options)
    assert set(results.values()) == {"SUCCESS"}
    plan_options = {
        "cu_seqlens_q": case.cu_seqlens_q,
        "num_kv_heads": case.h_kv,
        "total_tokens": case.total_tokens,
        "max_seq_len": 130,
    }
    tokens = 1 if case.cu_seqlens_q is not None else case.new_tokens
    results = torch.library.opcheck(OPS.plan.default, (lengths_of(case), 8, tokens), plan_options)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
def test_ops_give_what_decode_gives(form: dict[str, Any], device: str) -> None:
    case = make_case([130, 65, 0], 8, **form, device=device)
    q, kv, table, lengths = positional(case)
    expected = mla_decode.decode(q, kv, table, lengths, **named(case))
    for got in (OPS.decode(q, kv, table, lengths, **named(case)), case.poisoned_outputs()):
        if bool(got[0].isnan().any()):
            OPS.decode_out(q, kv, table, lengths, **named(case), out=got[0], lse=got[1])
        assert same_bits(got[0], expected[0])
        assert same_bits(got[1].contiguous(), expected[1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("invariant", (False, True), ids=("balanced", "invariant"))
def test_words_of_the_op_plan_serve_the_op_decode(
    form: dict[str, Any], invariant: bool, device: str
) -> None:
    case = make_case([130, 65, 0], 8, **form, device=device)
    limit = 256
    words = OPS.plan(
        lengths_of(case),
        8,
        1 if case.cu_seqlens_q is not None else case.new_tokens,
        cu_seqlens_q=case.cu_seqlens_q,
        num_kv_heads=case.h_kv,
        total_tokens=case.total_tokens,
        max_seq_len=limit,
        batch_invariant=invariant,
    )
    q, kv, table, _ = positional(case)
    options = {**named(case), "max_seq_len": limit, "batch_invariant": invariant}
    out, lse = OPS.decode(q, kv, table, None, words, case.softmax_scale, **options)
    assert compare(out, lse, *attention(case)).passed
    with pytest.raises(ShapeError, match=r"plan: expected .* rows, as mla_decode.plan makes for"):
        OPS.decode(q, kv, table, None, words[:-1], **options)
    # Of another plan, but without the size of its clusters, or the rows of its row groups: a launch
    # without clusters, or with other groups, would be wrong.
    other = {**options, "plan_slots": 1, "plan_workers": 132, "plan_cluster_ctas": 1}
    for missing in ("plan_group_rows", "plan_cluster_ctas"):
        other.pop(missing, None)
        with pytest.raises(ShapeError, match=r"need its plan_slots, .* and plan_group_rows"):
            OPS.decode(q, kv, table, None, words[:-1], **other)


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def around(case: Case, **options: Any) -> Callable[..., Any]:
    """A function with work before and after decode."""

    def function(
        q: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = mla_decode.decode(q * 1, case.kv_cache, case.block_table, lengths, **options)
        return out * 2, lse

    return function


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", ("lengths", "list", "Plan", "DevicePlan", "out", "pair"))
def test_decode_compiles_into_one_graph(given: str, device: str) -> None:
    case = make_case([130, 65, 0], 8, 2, device=device)
    lengths: Any = lengths_of(case)
    options: dict[str, Any] = {"lse_base": 2.0, "lse_empty": -math.inf, "lse_layout": "th"}
    expected, expected_lse = mla_decode.decode(
        case.q, case.kv_cache, case.block_table, lengths, **options
    )
    reference, by_head = attention(Case(**{**vars(case), "lse_base": 2.0, "lse_empty": -math.inf}))
    by_token = by_head.transpose(1, 2).reshape(expected_lse.shape)
    assert compare(expected, expected_lse, reference, by_token).passed
    if given == "list":
        lengths = case.seq_lens
    if given == "Plan":
        options["plan"] = mla_decode.plan(case.seq_lens, 8, 2)
        options["plan"].to(case.q.device)
    if given == "DevicePlan":
        made = mla_decode.DevicePlan(3, 8, 2, max_seq_len=130, device=device)
        options["plan"], lengths = made.update(lengths), None
    if given == "out":
        options["out"] = torch.full_like(expected, math.nan)
    if given == "pair":
        pair = (case.latent.contiguous(), case.rope.contiguous())
        case = Case(**{**vars(case), "kv_cache": pair})
    out, lse = compiled(around(case, **options))(case.q, lengths)
    assert compare(out / 2, lse, expected.double(), expected_lse.double()).passed
    if given == "out":
        assert compare(options["out"], lse, expected.double(), expected_lse.double()).passed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", ("Plan", "DevicePlan"))
def test_plans_of_small_row_groups_compile(given: str, device: str) -> None:
    case = make_case([402], 128, device=device)
    options: dict[str, Any] = {"softmax_scale": case.softmax_scale}
    if given == "Plan":
        options["plan"] = mla_decode.plan(case.seq_lens, 128)
        options["plan"].to(case.q.device)
    else:
        made = mla_decode.DevicePlan(1, 128, max_seq_len=402, device=device)
        options["plan"] = made.update(lengths_of(case))
    assert options["plan"].group_rows == 16
    out, lse = compiled(around(case, **options))(case.q, None)
    assert compare(out / 2, lse, *attention(case)).passed


@pytest.mark.parametrize("device", DEVICES)
def test_inductor_compiles_it(device: str) -> None:
    case = make_case([130, 65], 8, 2, device=device)
    expected = mla_decode.decode(case.q, case.kv_cache, case.block_table, lengths_of(case))
    out, lse = compiled(around(case), "inductor")(case.q, lengths_of(case))
    assert compare(out / 2, lse, expected[0].double(), expected[1].double()).passed


def test_batch_sizes_may_be_symbolic() -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def function(q: Any, kv: Any, table: Any, lengths: Any) -> Any:
        return mla_decode.decode(q, kv, table, lengths)

    for batch in (2, 3, 5):
        case = make_case([65] * batch, 8)
        out, lse = function(*positional(case))
        assert compare(out, lse, *attention(case)).passed
    assert len(graphs) == 1


def test_arguments_that_an_op_cannot_take_are_refused() -> None:
    case = make_case([65], 8)
    function = compiled(around(case, workspace=mla_decode.Workspace("cpu")))
    with pytest.raises(Exception, match="workspace: expected the default in compiled code"):
        function(case.q, lengths_of(case))


def device_plan(*lengths: int, max_seq_len: int = 100, update: bool = True) -> Any:
    made = mla_decode.DevicePlan(len(lengths), 8, 2, max_seq_len=max_seq_len, device="cpu")
    return made.update(torch.tensor(lengths, dtype=torch.int32)) if update else made


@pytest.mark.parametrize(
    ("plan", "seq_lens", "error", "message"),
    [
        (lambda: mla_decode.plan([130], 8, 2), None, ScheduleError, "made for 1 requests"),
        (lambda: mla_decode.plan([130, 65], 8), None, ScheduleError, "made for 1 new tokens"),
        (lambda: mla_decode.plan([130, 65], 16, 2), None, ScheduleError, "made for 16 num_heads"),
        (lambda: mla_decode.plan([130, 999], 8, 2), None, RangeError, "seq_lens: expected at most"),
        (lambda: mla_decode.plan([130, 65], 8, 2), [130, 66], ScheduleError, "plan: made for"),
        (lambda: device_plan(9), None, ScheduleError, "made for 1 requests"),
        (lambda: device_plan(5, 6, max_seq_len=999), None, RangeError, "plan: expected a max_seq"),
        (lambda: device_plan(5, 6, update=False), None, ScheduleError, "expected an update"),
    ],
)
def test_plans_that_do_not_fit_are_refused_when_compiling(
    plan: Callable[[], Any], seq_lens: Any, error: type[MlaDecodeError], message: str
) -> None:
    case = make_case([130, 65], 8, 2)
    made = plan()
    made.to("cpu")
    function = around(case, plan=made)
    with pytest.raises(Exception, match=message):
        compiled(function)(case.q, seq_lens)
    torch._dynamo.reset()
    with pytest.raises(error, match=message):
        torch.compile(function, backend="aot_eager")(case.q, seq_lens)


@pytest.mark.parametrize("seq_lens", (None, [130, 65]))
@pytest.mark.parametrize("dynamic", (False, True))
def test_a_plan_that_nothing_asked_before_compiles(seq_lens: Any, dynamic: bool) -> None:
    case = make_case([130, 65], 8, 2)
    made = mla_decode.plan(case.seq_lens, 8, 2)
    made.to("cpu")
    torch._dynamo.reset()
    function = torch.compile(
        around(case, plan=made, softmax_scale=case.softmax_scale),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager",
    )
    out, lse = function(case.q, seq_lens)
    assert compare(out / 2, lse, *attention(case)).passed


def test_compiled_code_without_lengths_is_refused() -> None:
    case = make_case([65], 8)
    with pytest.raises(Exception, match="seq_lens: expected lengths, or a plan that holds them"):
        compiled(around(case))(case.q, None)


@pytest.mark.parametrize("name", ("decode", "decode_out"))
def test_gradients_are_refused(name: str) -> None:
    case = make_case([65], 8)
    q, kv, table, lengths = positional(case)
    learning = q.clone().requires_grad_()
    out, lse = case.poisoned_outputs()
    options = {"out": out, "lse": lse} if name == "decode_out" else {}
    with pytest.raises(UnsupportedError, match=f"mla_decode::{name}: expected inputs that require"):
        getattr(OPS, name)(learning, kv, table, lengths, **options)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            getattr(OPS, name)(learning, kv, table, lengths, **options)


def test_fake_tensors_get_the_shapes_of_real_ones(form: dict[str, Any]) -> None:
    case = make_case([130, 65, 0], 8, **form)
    layouts = (None, "th") if case.cu_seqlens_q is not None else (None, "th", "bhs")
    for layout in layouts:
        real = OPS.decode(*positional(case), **named(case), lse_layout=layout)
        with torch._subclasses.FakeTensorMode() as mode:
            fake_inputs = [x if x is None else mode.from_tensor(x) for x in positional(case)]
            options = {
                k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
                for k, v in named(case).items()
            }
            fake = OPS.decode(*fake_inputs, **options, lse_layout=layout)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.parametrize("total_tokens", (0, 1, 7))
def test_fake_plans_have_the_rows_of_real_ones(total_tokens: int) -> None:
    lengths = torch.tensor([100, 200], dtype=torch.int32)
    offsets = torch.tensor([0, 0, min(total_tokens, 1)], dtype=torch.int32)
    options: dict[str, Any] = {"total_tokens": total_tokens, "max_seq_len": 256}
    real = OPS.plan(lengths, 16, 4, cu_seqlens_q=offsets, **options)
    with torch._subclasses.FakeTensorMode() as mode:
        fake_offsets = mode.from_tensor(offsets)
        fake = OPS.plan(mode.from_tensor(lengths), 16, 4, cu_seqlens_q=fake_offsets, **options)
    assert real.shape == fake.shape


@pytest.mark.parametrize("shape", ((), (2, 1)))
def test_lengths_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    lengths = torch.full(shape, 65, dtype=torch.int32)
    message = re.escape(f"seq_lens: expected shape [batch], got {list(shape)}")
    with pytest.raises(ShapeError, match=message):
        OPS.plan(lengths, 16, max_seq_len=100)
    with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ShapeError, match=message):
        OPS.plan(mode.from_tensor(lengths), 16, max_seq_len=100)


def test_ragged_plans_need_their_rows() -> None:
    offsets = torch.tensor([0, 1, 3], dtype=torch.int32)
    with pytest.raises(DtypeError, match="total_tokens: expected the rows of q"):
        OPS.plan(torch.tensor([5, 6], dtype=torch.int32), 8, cu_seqlens_q=offsets, max_seq_len=9)


@pytest.mark.gpu
def test_ops_follow_the_current_stream_and_inference_mode() -> None:
    case = make_case([700, 65], 16, device="cuda")
    expected = OPS.decode(*positional(case))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        out, lse = OPS.decode(*positional(case))
    stream.synchronize()
    assert same_bits(out, expected[0])
    assert same_bits(lse, expected[1])


@pytest.mark.gpu
def test_ops_run_on_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = make_case([700, 65], 16, device="cuda:1")
    with torch.cuda.device(0):
        out, lse = OPS.decode(*positional(case))
        mla_decode.synchronize("cuda:1")
    assert compare(out, lse, *attention(case)).passed
