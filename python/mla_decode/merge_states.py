"""Merging attention states: outputs and log-sum-exps over disjoint sets of keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch

from . import checks
from .errors import DtypeError, RangeError, ShapeError, UnsupportedError

States: TypeAlias = torch.Tensor | Sequence[torch.Tensor]

LSE_BASES = (2.0, math.e)

_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LSE_DTYPES = (torch.float32, torch.float64)
_PADDED_DIMS = 5  # [n, B, s_q, H, D], whose lses are [n, B, H, s_q]


def merge_states(
    outs: States,
    lses: States,
    *,
    lse_base: float = math.e,
    lse_empty: float = -math.inf,
    attn_sink: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of several sets of keys, from the attention over each.

    State ``i`` is the normalised output and the log-sum-exp of the scores over the keys of
    set ``i``. With ``w_i = exp(lse_i)`` the result is ``sum(w_i * out_i) / sum(w_i)`` and
    ``log(sum(w_i))``: exact, up to the rounding of the states. No device is waited for.

    Parameters
    ----------
    outs : Tensor or sequence of Tensor
        ``[n, B, s_q, H, D]`` or ``[n, T, H, D]`` (or any ``[n, ..., D]`` of another number
        of dimensions), bf16, fp16, fp32 or fp64; or the ``n`` states one by one.
    lses : Tensor or sequence of Tensor
        ``[n, B, H, s_q]`` for outs of five dimensions, else one for each row of ``outs``,
        ``[n, T, H]``; fp32 or fp64. A state with -inf or +inf saw no key: it counts for
        nothing, whatever its output holds, NaN included.
    lse_base : float
        Base of the logarithm of ``lses``, ``math.e`` or 2.
    lse_empty : float
        The LSE of a row that no state has a key for: -inf, or +inf as FlashMLA has it.
        The row's output is 0.
    attn_sink : Tensor, optional
        ``[H]`` fp32, natural log: the outputs are scaled by
        ``exp(lse) / (exp(lse) + exp(attn_sink))`` once, after merging; ``lse`` is left
        alone. States whose outputs were scaled already must not be given.
    out, lse : Tensor, optional
        Where to write, of the shapes and dtypes returned.

    Returns
    -------
    out : Tensor
        ``[B, s_q, H, D]`` or ``[T, H, D]``, the dtype of ``outs``.
    lse : Tensor
        ``[B, H, s_q]`` or ``[T, H]``, the dtype of ``lses``.

    Raises
    ------
    ShapeError, DtypeError, DeviceError, RangeError
        An argument is wrong; named with what was expected.
    UnsupportedError
        A state requires a gradient; there is none.

    Notes
    -----
    Sums are made in fp32 (fp64 if ``outs`` or ``lses`` are), in an order that depends on
    ``n`` alone: the same states in the same order give the same bits, on a GPU whatever else
    is in the batch.
    """
    stacked_outs, stacked_lses = _stacked("outs", outs), _stacked("lses", lses)
    _check(stacked_outs, stacked_lses, lse_base, lse_empty, attn_sink)
    _check_buffer("out", out, stacked_outs.shape[1:], stacked_outs)
    _check_buffer("lse", lse, stacked_lses.shape[1:], stacked_lses)
    attn_sink = None if attn_sink is None else attn_sink.detach()
    # The registered op is opaque to torch.compile, and costs more than it does without it.
    merge = torch.ops.mla_decode.merge_states if torch.compiler.is_compiling() else _merge
    merged_out, merged_lse = merge(stacked_outs, stacked_lses, lse_base, lse_empty, attn_sink)
    return (
        merged_out if out is None else out.copy_(merged_out),
        merged_lse if lse is None else lse.copy_(merged_lse),
    )


def _merge(
    outs: torch.Tensor,
    lses: torch.Tensor,
    lse_base: float,
    lse_empty: float,
    attn_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    padded = outs.dim() == _PADDED_DIMS
    ln_base = math.log(lse_base)
    dtype = torch.promote_types(torch.promote_types(outs.dtype, lses.dtype), torch.float32)
    states = (lses.transpose(-1, -2) if padded else lses).to(dtype)  # one for each row of outs
    states = states.nan_to_num(nan=math.nan, posinf=-math.inf, neginf=-math.inf)
    top = states.amax(0)
    # NaN in a row that no state has a key for, which nothing below lets through.
    shares = ((states - top) * ln_base).softmax(0)
    # The share of the largest state is its part of the sum.
    lse = top - shares.amax(0).log() / ln_base
    if attn_sink is not None:
        shares = shares * (lse * ln_base - attn_sink).sigmoid()
    saw_no_key = (states == -math.inf).unsqueeze(-1)
    out = (outs * shares.unsqueeze(-1)).masked_fill_(saw_no_key, 0.0).sum(0)
    lse = lse.masked_fill_(top == -math.inf, lse_empty).to(lses.dtype)
    return out.to(outs.dtype).contiguous(), (lse.transpose(-1, -2) if padded else lse).contiguous()


_operator = torch.library.custom_op("mla_decode::merge_states", _merge, mutates_args=())


@_operator.register_fake
def _fake(
    outs: torch.Tensor,
    lses: torch.Tensor,
    lse_base: float,
    lse_empty: float,
    attn_sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return outs.new_empty(outs.shape[1:]), lses.new_empty(lses.shape[1:])


def _stacked(name: str, states: States) -> torch.Tensor:
    if isinstance(states, torch.Tensor):
        return states
    if not isinstance(states, list | tuple):
        kind = type(states).__name__
        raise DtypeError(f"{name}: expected a tensor or a list of tensors, got {kind}")
    if not states:
        raise ShapeError(f"{name}: expected at least 1 state, got an empty list")
    first = checks.require_tensor(f"{name}[0]", states[0])
    for i, state in enumerate(states[1:], 1):
        tensor = checks.require_tensor(f"{name}[{i}]", state)
        checks.require_shape(f"{name}[{i}]", tensor, list(first.shape))
        checks.require_dtype(f"{name}[{i}]", tensor, first.dtype)
        checks.require_device(f"{name}[{i}]", tensor, first.device)
    return torch.stack(list(states))


def _check(
    outs: torch.Tensor,
    lses: torch.Tensor,
    lse_base: float,
    lse_empty: float,
    attn_sink: torch.Tensor | None,
) -> None:
    if outs.dim() < 2:
        raise ShapeError(f"outs: expected shape [n, ..., D], got {list(outs.shape)}")
    if outs.shape[0] < 1:
        raise ShapeError(f"outs: expected at least 1 state, got shape {list(outs.shape)}")
    rows = list(outs.shape[:-1])
    if outs.dim() == _PADDED_DIMS:
        rows[-1], rows[-2] = rows[-2], rows[-1]
    checks.require_shape("lses", lses, rows)
    if outs.dtype not in _OUT_DTYPES:
        raise DtypeError(f"outs: expected bf16, fp16, fp32 or fp64, got {outs.dtype}")
    if lses.dtype not in _LSE_DTYPES:
        raise DtypeError(f"lses: expected torch.float32 or torch.float64, got {lses.dtype}")
    checks.require_device("lses", lses, outs.device)
    for name, tensor in (("outs", outs), ("lses", lses)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise UnsupportedError(
                f"{name}: expected tensors that require no gradient: merge_states has none; call "
                "it under torch.no_grad() or torch.inference_mode(), or detach"
            )
    if lse_base not in LSE_BASES:
        raise RangeError(f"lse_base: expected 2 or math.e, got {lse_base!r}")
    if lse_empty not in (math.inf, -math.inf):
        raise RangeError(f"lse_empty: expected inf or -inf, got {lse_empty!r}")
    if attn_sink is not None:
        sink = checks.require_tensor("attn_sink", attn_sink)
        checks.require_shape("attn_sink", sink, [outs.shape[-2]])
        checks.require_dtype("attn_sink", sink, torch.float32)
        checks.require_device("attn_sink", sink, outs.device)


def copied_into(name: str, buffer: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    """``value``, or ``buffer`` with it, checked for shape, dtype and device."""
    _check_buffer(name, buffer, value.shape, value)
    return value if buffer is None else buffer.copy_(value)


def _check_buffer(
    name: str, buffer: torch.Tensor | None, shape: Sequence[int], like: torch.Tensor
) -> None:
    """Check shape, dtype and device, the last two those of ``like``; and None is no buffer."""
    if buffer is None:
        return
    target = checks.require_tensor(name, buffer)
    checks.require_shape(name, target, list(shape))
    checks.require_dtype(name, target, like.dtype)
    checks.require_device(name, target, like.device)
    checks.require_no_overlap(name, target)
