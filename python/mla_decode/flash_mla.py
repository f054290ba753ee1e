"""FlashMLA's interface for dense decoding, by this package's kernels.

    sys.modules["flash_mla"] = mla_decode.flash_mla

lets programs that import ``flash_mla`` run as they are: names, defaults, shapes and the LSE
(natural, +inf where no key is seen) are those of its present interface, and metadata as two
tensors, as it had before, works too. Beyond it: block sizes other than 64, any number of heads,
fp16, and ``attn_sink`` in dense decoding. FP8 caches, sparse indices, extra caches and prefill
are refused with `NotSupportedError`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch.utils.weak import WeakIdKeyDictionary

from . import checks, native
from .decoding import decode
from .device_plan import DevicePlan
from .errors import DtypeError, ScheduleError, UnsupportedError
from .lengths import MAX_SEQ_LEN
from .planning import DEFAULT_NUM_WORKERS
from .words import LATENT_DIM, MAX_ROWS

__version__ = "1.0.0"  # of the interface

_METADATA_WORDS = 8  # of a row of the older form's metadata

# What the package has and this one has not.
_ABSENT = (
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "fused_norm_rope_attn_rope_cast",
)


class NotSupportedError(UnsupportedError, NotImplementedError):
    """FlashMLA can do it, this package cannot."""


@dataclass
class _Planned:
    """A plan, and what it was made from."""

    plan: DevicePlan
    state: Hashable = None


@dataclass
class FlashMLASchedMeta:
    """Scheduling metadata of one batch of lengths; filled by the first call that gets it.

    Later calls must have the same shapes and the same lengths: the layers of one step. Where
    it can be seen that the lengths are others (another tensor, or one written by PyTorch
    since), or that the plan would be missing from a CUDA graph under capture, the call plans
    anew; otherwise it relies on it.
    """

    @dataclass
    class Config:
        """Sizes that all calls with one object share."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: torch.Tensor | None = None
    """The words of the plan, once there is one."""
    num_splits: torch.Tensor | None = None
    _planned: _Planned | None = field(default=None, repr=False)


# Plans of the older form, by the metadata tensor that stands for them.
_planned: MutableMapping[torch.Tensor, _Planned] = WeakIdKeyDictionary()


def get_mla_metadata(
    *args: Any, **kwargs: Any
) -> tuple[FlashMLASchedMeta, None] | tuple[torch.Tensor, torch.Tensor]:
    """Metadata for `flash_mla_with_kvcache`.

    Parameters
    ----------
    *args, **kwargs
        Nothing, in the present form. In the older one ``cache_seqlens`` ``[b]`` int32,
        ``num_q_tokens_per_head_k`` (``s_q * h_q // h_k``) and ``num_heads_k``, and then
        ``num_heads_q``, ``is_fp8_kvcache`` and ``topk``, which do not matter here.

    Returns
    -------
    (FlashMLASchedMeta, None)
        In the present form: to be filled by the first call.
    (Tensor, Tensor)
        In the older form: ``tile_scheduler_metadata`` ``[parts, 8]`` int32 and ``num_splits``
        ``[b + 1]`` int32. Their sizes are FlashMLA's, so that they can be copied into
        buffers kept for CUDA graphs; what they hold means nothing: the first call with them
        plans from the lengths that it gets, and so does the first one after they were written.
    """
    names = ("cache_seqlens", "num_q_tokens_per_head_k", "num_heads_k")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    lengths = given.get("cache_seqlens")
    if not isinstance(lengths, torch.Tensor) or any(given.get(name) is None for name in names):
        return FlashMLASchedMeta(), None
    if given.get("is_fp8_kvcache") or given.get("topk") is not None:
        return FlashMLASchedMeta(), None  # the call says that it is not supported
    checks.require_shape("cache_seqlens", lengths, ["b"])
    rows = checks.require_int(
        "num_q_tokens_per_head_k", given["num_q_tokens_per_head_k"], 1, 1 << 20
    )
    heads = checks.require_int("num_heads_k", given["num_heads_k"], 1, 1 << 10)
    parts = max(_num_sms(lengths.device) // heads // -(-rows // MAX_ROWS), 1)
    metadata = torch.zeros(parts, _METADATA_WORDS, dtype=torch.int32, device=lengths.device)
    num_splits = torch.arange(int(lengths.shape[0]) + 1, dtype=torch.int32, device=lengths.device)
    return metadata, num_splits


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of new tokens over a paged cache.

    Parameters
    ----------
    q : Tensor
        ``[b, s_q, h_q, 576]`` bf16 or fp16.
    k_cache : Tensor
        ``[num_blocks, page_block_size, h_k, 576]``.
    block_table : Tensor
        ``[b, max_blocks]`` int32.
    cache_seqlens : Tensor
        ``[b]`` int32 KV lengths, new tokens included. Negative ones, and those beyond the
        block table, are planned as the nearest possible and reported by a later call.
    head_dim_v : int
        512.
    tile_scheduler_metadata, num_splits
        What `get_mla_metadata` returned, in either form.
    softmax_scale : float, optional
        ``576 ** -0.5`` when None.
    causal : bool
        The mask is aligned to the end: token ``t`` sees ``cache_seqlen - s_q + t + 1`` keys.
    attn_sink : Tensor, optional
        ``[h_q]`` fp32: scales the output by ``exp(lse) / (exp(lse) + exp(attn_sink))``.
    is_fp8_kvcache, indices, extra_k_cache, extra_indices_in_kvcache, topk_length, \
extra_topk_length
        Not supported; to be left at their defaults.

    Returns
    -------
    out : Tensor
        ``[b, s_q, h_q, 512]``.
    lse : Tensor
        ``[b, h_q, s_q]`` fp32, natural log; +inf where no key is seen, and the output 0.

    Raises
    ------
    NotSupportedError
        An argument asks for what this package does not do.
    ScheduleError
        The metadata was filled for calls of other sizes.
    ShapeError, DtypeError, DeviceError, RangeError, MegakernelTimeout
        As `mla_decode.decode`.
    """
    _refuse(
        is_fp8_kvcache=is_fp8_kvcache or None,
        indices=indices,
        extra_k_cache=extra_k_cache,
        extra_indices_in_kvcache=extra_indices_in_kvcache,
        topk_length=topk_length,
        extra_topk_length=extra_topk_length,
    )
    if head_dim_v != LATENT_DIM:
        raise NotSupportedError(f"head_dim_v: expected {LATENT_DIM}, got {head_dim_v}")
    for name, tensor in (("block_table", block_table), ("cache_seqlens", cache_seqlens)):
        checks.require_tensor(name, tensor)
    assert block_table is not None and cache_seqlens is not None
    if q.dim() != 4 or k_cache.dim() != 4:
        checks.require_shape("q", q, ["b", "s_q", "h_q", "head_dim"])
        checks.require_shape("k_cache", k_cache, ["num_blocks", "page_block_size", "h_k", 576])
    plan = _plan(
        tile_scheduler_metadata, num_splits, q, k_cache, block_table, cache_seqlens, causal
    )
    return decode(
        q.detach() if q.requires_grad else q,
        k_cache.detach() if k_cache.requires_grad else k_cache,
        block_table,
        None,
        plan,
        softmax_scale,
        causal=causal,
        attn_sink=attn_sink,
    )


def _plan(
    metadata: FlashMLASchedMeta | torch.Tensor,
    num_splits: torch.Tensor | None,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    causal: bool,
) -> DevicePlan:
    """The plan that the metadata stands for, made now if it was not made before."""
    batch, s_q, h_q, _ = q.shape
    _, page_block_size, h_k, _ = k_cache.shape
    limit = min(block_table.shape[1] * page_block_size, MAX_SEQ_LEN)
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    state: Hashable = (cache_seqlens.data_ptr(), _version(cache_seqlens), capturing, limit)
    planned: _Planned | None
    if isinstance(metadata, FlashMLASchedMeta):
        if num_splits is not None:
            raise DtypeError("num_splits: expected None with a FlashMLASchedMeta")
        config = FlashMLASchedMeta.Config(
            batch, s_q, h_q, page_block_size, h_k, causal, False, None, None, None
        )
        if metadata.have_initialized and metadata.config != config:
            raise ScheduleError(
                f"tile_scheduler_metadata: filled for {metadata.config}, the call has {config}"
            )
        planned = metadata._planned
    else:
        if not isinstance(metadata, torch.Tensor):
            kind = type(metadata).__name__
            raise DtypeError(
                f"tile_scheduler_metadata: expected what get_mla_metadata returns, got {kind}"
            )
        state = (state, _version(metadata))
        planned = _planned.get(metadata)
    sizes = (batch, s_q, h_q, h_k)
    if planned is None or not _is_for(planned.plan, sizes, limit, q.device):
        planned = _Planned(
            DevicePlan(batch, h_q, s_q, num_kv_heads=h_k, max_seq_len=limit, device=q.device)
        )
    if planned.state != state:
        lengths = cache_seqlens
        if lengths.dtype is torch.int64:
            lengths = lengths.clamp(-1, (1 << 31) - 1).to(torch.int32)
        planned.plan.update(lengths)
        planned.state = state
    if isinstance(metadata, FlashMLASchedMeta):
        if metadata._planned is not planned:
            metadata._planned = planned
            metadata.config = config
            metadata.have_initialized = True
            metadata.tile_scheduler_metadata = planned.plan.instructions
            metadata.num_splits = planned.plan.header
    else:
        _planned[metadata] = planned
    return planned.plan


def _is_for(
    plan: DevicePlan, sizes: tuple[int, int, int, int], limit: int, device: torch.device
) -> bool:
    mine = (plan.num_requests, plan.new_tokens, plan.num_heads, plan.num_kv_heads)
    return mine == sizes and plan.max_seq_len == limit and plan.device == device


def _version(tensor: torch.Tensor) -> int:
    """Rises with every write by PyTorch; -1 for tensors that do not count them."""
    return -1 if tensor.is_inference() else tensor._version


def _num_sms(device: torch.device) -> int:
    return native.num_sms(device) if device.type == "cuda" else DEFAULT_NUM_WORKERS


def _refuse(**given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise NotSupportedError(
                f"{name}: expected the default: FP8 caches, sparse attention and extra caches are "
                "not supported"
            )


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """A function that refuses, for what FlashMLA has and this package has not."""
    if name not in _ABSENT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotSupportedError(
            f"{name}: not supported; mla_decode.flash_mla has dense decoding alone"
        )

    refuse.__name__ = name
    return refuse


__all__ = [
    "FlashMLASchedMeta",
    "NotSupportedError",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
