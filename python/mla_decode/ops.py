"""The operators ``torch.ops.mla_decode.*``: what `torch.compile` and exported graphs see.

``decode`` returns new outputs, ``decode_out`` writes the caller's, ``plan`` makes a queue
from lengths. On CUDA tensors they run the kernels, on CPU tensors the interpreter and the C++
planner. Shapes follow from shapes alone, so that they can be traced with fake tensors. They
have no gradients, and say so when an input requires one.

    words = torch.ops.mla_decode.plan(seq_lens, num_heads, s_q, max_seq_len=max_seq_len)
    out, lse = torch.ops.mla_decode.decode(
        q, kv_cache, block_table, None, words, max_seq_len=max_seq_len
    )

`mla_decode.decode` becomes a call of them by itself where it is compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import decoding, native
from .calls import TensorOrPair
from .device_plan import DevicePlan, PlannedWords, device_plan_capacity
from .errors import DtypeError, ScheduleError, ShapeError, UnsupportedError
from .lengths import MAX_SEQ_LEN, SeqLens
from .planning import BATCH_INVARIANT_TILES, DEFAULT_NUM_WORKERS, Plan, require_heads
from .words import INSTRUCTION_WORDS, LATENT_DIM, MAX_NEW_TOKENS, MAX_ROWS

# Arguments of both forms of decode, as those of `mla_decode.decode`, but: with q_pe and k_pe, q
# and kv_cache are the 512 wide parts; ``plan`` are words, by default those of the op ``plan`` for
# the same sizes and ``max_seq_len`` (what the block ids can name when None), or any with
# ``plan_slots``, ``plan_workers``, ``plan_cluster_ctas`` and ``plan_group_rows`` of their plan.
_INPUTS = (
    "Tensor q, Tensor kv_cache, Tensor? block_table, Tensor? seq_lens, Tensor? plan=None, "
    "float? softmax_scale=None, *, Tensor? q_pe=None, Tensor? k_pe=None, bool causal=True, "
    "Tensor? cu_seqlens_q=None, Tensor? kv_indptr=None, Tensor? kv_indices=None, "
    "Tensor? attn_sink=None, bool lse_base_2=False, bool lse_empty_negative=False, "
    "str? lse_layout=None, bool batch_invariant=False, int? max_seq_len=None, "
    "int? plan_slots=None, int? plan_workers=None, "
    "int? plan_cluster_ctas=None, int? plan_group_rows=None"
)

# With cu_seqlens_q, ``new_tokens`` counts for nothing: a request may have up to 16. kv_indptr and
# block_size as of `DevicePlan.update`.
_PLAN = (
    "Tensor seq_lens, int num_heads, int new_tokens=1, *, Tensor? cu_seqlens_q=None, "
    "int num_kv_heads=1, int? total_tokens=None, int max_seq_len, bool batch_invariant=False, "
    "Tensor? kv_indptr=None, int? block_size=None"
)

_library: Any = torch.library.Library("mla_decode", "DEF")  # type: ignore[no-untyped-call]


def _decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    plan: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    *,
    q_pe: torch.Tensor | None = None,
    k_pe: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    lse_base_2: bool = False,
    lse_empty_negative: bool = False,
    batch_invariant: bool = False,
    max_seq_len: int | None = None,
    plan_slots: int | None = None,
    plan_workers: int | None = None,
    plan_cluster_ctas: int | None = None,
    plan_group_rows: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    planned = None
    if plan is not None:
        sizes = _call_sizes(q, kv_cache, cu_seqlens_q)
        if (
            plan_slots is None
            or plan_workers is None
            or plan_cluster_ctas is None
            or plan_group_rows is None
        ):
            if max_seq_len is None:
                max_seq_len = _capacity(kv_cache, block_table)
            plan_workers, plan_cluster_ctas = _num_workers(q.device), 1
            plan_group_rows = MAX_ROWS
            capacity, plan_slots = _room(sizes, max_seq_len, plan_workers, batch_invariant)
            if plan.shape[0] != capacity:
                raise ShapeError(
                    f"plan: expected {capacity} rows, as mla_decode.plan makes for "
                    f"max_seq_len={max_seq_len}, got shape {list(plan.shape)}; words of another "
                    "plan need its plan_slots, plan_workers, plan_cluster_ctas and plan_group_rows"
                )
        planned = PlannedWords(
            plan, sizes, plan_slots, plan_workers, plan_cluster_ctas, plan_group_rows
        )
    return decoding.decode(
        q if q_pe is None else (q, q_pe),
        kv_cache if k_pe is None else (kv_cache, k_pe),
        block_table,
        seq_lens if planned is None else None,
        planned,
        softmax_scale,
        cu_seqlens_q=cu_seqlens_q,
        lse_base=2.0 if lse_base_2 else math.e,
        lse_empty=-math.inf if lse_empty_negative else math.inf,
        batch_invariant=batch_invariant,
        **options,
    )


def _decode_out(
    *inputs: Any,
    out: torch.Tensor,
    lse: torch.Tensor,
    **options: Any,
) -> None:
    _decode(*inputs, out=out, lse=lse, **options)


def _plan(
    seq_lens: torch.Tensor,
    num_heads: int,
    new_tokens: int = 1,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    num_kv_heads: int = 1,
    total_tokens: int | None = None,
    max_seq_len: int,
    batch_invariant: bool = False,
    kv_indptr: torch.Tensor | None = None,
    block_size: int | None = None,
) -> torch.Tensor:
    _require_total_tokens(cu_seqlens_q, total_tokens)
    made = DevicePlan(
        _batch_of(seq_lens),
        num_heads,
        new_tokens if cu_seqlens_q is None else MAX_NEW_TOKENS,
        num_kv_heads=num_kv_heads,
        total_tokens=total_tokens,
        max_seq_len=max_seq_len,
        ragged=cu_seqlens_q is not None,
        batch_invariant=batch_invariant,
        clusters=False,  # words alone do not say what they need
        device=seq_lens.device,
    )
    made.update(seq_lens, cu_seqlens_q, kv_indptr=kv_indptr, block_size=block_size)
    return made.instructions


def _batch_of(seq_lens: torch.Tensor) -> int:
    if seq_lens.dim() != 1:
        raise ShapeError(f"seq_lens: expected shape [batch], got {list(seq_lens.shape)}")
    return int(seq_lens.shape[0])


# Shapes, for fake tensors


def _fake_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    plan: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    *,
    lse_layout: str | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    del kv_cache, block_table, seq_lens, plan, softmax_scale, options
    out = q.new_empty((*q.shape[:-1], LATENT_DIM))
    heads = q.shape[-2]
    if q.dim() == 4:
        batch, s_q = q.shape[:2]
        shape = (batch * s_q, heads) if lse_layout == "th" else (batch, heads, s_q)
    else:
        shape = (q.shape[0], heads, 1) if lse_layout == "bhs" else (q.shape[0], heads)
    return out, q.new_empty(shape, dtype=torch.float32)


def _fake_decode_out(*inputs: Any, **options: Any) -> None:
    del inputs, options


def _fake_plan(
    seq_lens: torch.Tensor,
    num_heads: int,
    new_tokens: int = 1,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    num_kv_heads: int = 1,
    total_tokens: int | None = None,
    max_seq_len: int,
    batch_invariant: bool = False,
    kv_indptr: torch.Tensor | None = None,
    block_size: int | None = None,
) -> torch.Tensor:
    del kv_indptr, block_size
    _require_total_tokens(cu_seqlens_q, total_tokens)
    s_q = new_tokens if cu_seqlens_q is None else 0
    batch = _batch_of(seq_lens)
    total = batch * new_tokens if total_tokens is None else int(total_tokens)
    sizes = (batch, s_q, total, int(num_heads), int(num_kv_heads))
    workers = _num_workers(seq_lens.device)
    rows, _ = _room(sizes, int(max_seq_len), workers, batch_invariant)
    return seq_lens.new_empty((rows, INSTRUCTION_WORDS), dtype=torch.int32)


# Registration


def _tensors(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> list[torch.Tensor]:
    return [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor)]


def _without_gradient(name: str) -> Callable[..., Any]:
    """The op's autograd: refuses what requires a gradient and passes on the rest."""

    def run(*arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(arguments, options)):
            raise UnsupportedError(
                f"mla_decode::{name}: expected inputs that require no gradient: it has none; call "
                "it under torch.no_grad() or torch.inference_mode(), or detach"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.mla_decode, name).default(*arguments, **options)

    return run


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    _library.impl(name, _without_gradient(name), "Autograd")
    torch.library.register_fake(f"mla_decode::{name}", fake, lib=_library)


_register(f"decode({_INPUTS}) -> (Tensor out, Tensor lse)", _decode, _fake_decode)
_register(
    f"decode_out({_INPUTS}, Tensor(a!) out, Tensor(b!) lse) -> ()", _decode_out, _fake_decode_out
)
_register(f"plan({_PLAN}) -> Tensor", _plan, _fake_plan)


# Sizes


def _require_total_tokens(cu_seqlens_q: torch.Tensor | None, total_tokens: int | None) -> None:
    if cu_seqlens_q is not None and total_tokens is None:
        raise DtypeError("total_tokens: expected the rows of q with cu_seqlens_q, got None")


def _call_sizes(
    q: torch.Tensor, kv_cache: torch.Tensor, cu_seqlens_q: torch.Tensor | None
) -> tuple[int, int, int, int, int]:
    """Sizes of a call as `mla_decode.Plan.fit_key` has them, unchecked."""
    kv_heads = int(kv_cache.shape[2]) if kv_cache.dim() == 4 else 1
    heads = int(q.shape[-2])
    if cu_seqlens_q is not None:
        return (int(cu_seqlens_q.shape[0]) - 1, 0, int(q.shape[0]), heads, kv_heads)
    s_q = int(q.shape[1]) if q.dim() == 4 else 1
    return (int(q.shape[0]), s_q, int(q.shape[0]) * s_q, heads, kv_heads)


def _capacity(kv_cache: torch.Tensor, block_table: torch.Tensor | None) -> int:
    blocks = kv_cache.shape[0] if block_table is None else block_table.shape[1]
    return min(int(blocks) * int(kv_cache.shape[1]), MAX_SEQ_LEN)


def _room(
    sizes: tuple[int, int, int, int, int], max_seq_len: int, workers: int, batch_invariant: bool
) -> tuple[int, int]:
    """Instructions and slots of the op ``plan`` for a call of these sizes."""
    batch, s_q, total_tokens, heads, kv_heads = sizes
    return device_plan_capacity(
        batch,
        require_heads(heads, kv_heads),
        s_q or MAX_NEW_TOKENS,
        kv_heads,
        total_tokens,
        max_seq_len,
        workers,
        BATCH_INVARIANT_TILES if batch_invariant else 0,
    )


def _num_workers(device: torch.device) -> int:
    return native.num_sms(device) if device.type == "cuda" else DEFAULT_NUM_WORKERS


# `mla_decode.decode` while it is compiled


def traced_decode(
    q: TensorOrPair,
    kv_cache: TensorOrPair,
    block_table: torch.Tensor | None,
    seq_lens: SeqLens | None,
    plan: Plan | DevicePlan | PlannedWords | None,
    softmax_scale: float | None,
    *,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    lse_base: float,
    lse_empty: float,
    lse_layout: str | None,
    unsupported: Mapping[str, object],
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mla_decode.decode` as one of the ops; arguments as there.

    Raises
    ------
    UnsupportedError
        An argument that an op cannot take.
    ScheduleError, RangeError
        The plan was made for another batch, other lengths in a list, or more keys than the block
        ids can name. Lengths in a tensor beside a plan are not looked at.
    """
    for name, value in unsupported.items():
        if value is not None:
            raise UnsupportedError(f"{name}: expected the default in compiled code")
    if lse_base not in (2, math.e) or lse_empty not in (math.inf, -math.inf):
        raise UnsupportedError("lse_base, lse_empty: expected e or 2, and inf or -inf")
    q_wide, q_pe = q if isinstance(q, tuple) else (q, None)
    latent, k_pe = kv_cache if isinstance(kv_cache, tuple) else (kv_cache, None)
    words = slots = workers = cluster_ctas = group_rows = None
    if plan is not None:
        _require_traced_plan(plan, seq_lens, q_wide, latent, block_table, options["cu_seqlens_q"])
        words = plan.instructions if isinstance(plan, DevicePlan) else plan.to(q_wide.device)
        slots, workers = plan.num_slots, plan.num_workers
        cluster_ctas, group_rows = plan.cluster_ctas, plan.group_rows
    elif seq_lens is None:
        raise DtypeError("seq_lens: expected lengths, or a plan that holds them, got None")
    elif not isinstance(seq_lens, torch.Tensor):
        seq_lens = torch.as_tensor(seq_lens, dtype=torch.int32, device=q_wide.device)
    arguments: tuple[Any, ...] = (
        q_wide,
        latent,
        block_table,
        seq_lens if words is None else None,
        words,
        softmax_scale,
    )
    options = {
        **options,
        "q_pe": q_pe,
        "k_pe": k_pe,
        "lse_base_2": lse_base == 2,
        "lse_empty_negative": lse_empty < 0,
        "lse_layout": lse_layout,
        "plan_slots": slots,
        "plan_workers": workers,
        "plan_cluster_ctas": cluster_ctas,
        "plan_group_rows": group_rows,
    }
    if out is None and lse is None:
        made_out, made_lse = torch.ops.mla_decode.decode(*arguments, **options)
        return made_out, made_lse
    new_out, new_lse = _fake_decode(*arguments, lse_layout=lse_layout)
    out = new_out if out is None else out
    lse = new_lse if lse is None else lse
    torch.ops.mla_decode.decode_out(*arguments, **options, out=out, lse=lse)
    return out, lse


def _require_traced_plan(
    plan: Plan | DevicePlan | PlannedWords,
    seq_lens: SeqLens | None,
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
) -> None:
    """Check what the sizes alone say of a plan, as a call that is not compiled does."""
    plan.require_fits(*_call_sizes(q, kv_cache, cu_seqlens_q))
    plan.require_capacity(_capacity(kv_cache, block_table), "what the block ids can name")
    given = list(seq_lens) if isinstance(seq_lens, list | tuple) else None
    if isinstance(plan, Plan) and given is not None and not plan.holds(given):
        raise ScheduleError("plan: made for other lengths than the ints in seq_lens")
