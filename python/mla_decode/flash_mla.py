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
from .errors import DtypeError, RangeError, ScheduleError, ShapeError, UnsupportedError
from .lengths import MAX_SEQ_LEN
from .planning import DEFAULT_NUM_WORKERS
from .words import LATENT_DIM, MAX_NEW_TOKENS, MAX_ROWS, ROPE_DIM

__version__ = "1.0.0"  # of the interface

_METADATA_WORDS = 8  # of a row of the older form's metadata
_WIDTH = LATENT_DIM + ROPE_DIM
_TENSORS = ("q", "k_cache", "block_table", "cache_seqlens")

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
    """None: not known, so that every call plans."""
    lengths: torch.Tensor | None = None
    """The caller's, kept so that no other tensor gets the address that stands in ``state``."""


@dataclass
class FlashMLASchedMeta:
    """Scheduling metadata of one batch of lengths; filled by the first call that gets it.

    Later calls must have the same shapes and the same lengths: the layers of one step. Where
    it can be seen that the lengths are others (another tensor, or one written by PyTorch
    since), or that the plan would be missing from a CUDA graph under capture, the call plans
    anew; otherwise it relies on it. Writes to tensors made under ``torch.inference_mode()``
    cannot be seen: as in FlashMLA, a step that writes its lengths there needs a new object.
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
        Where writes cannot be seen, for metadata or lengths made under
        ``torch.inference_mode()``, every call plans.

    Raises
    ------
    ShapeError, DtypeError, RangeError
        An argument of the older form is wrong.
    """
    names = ("cache_seqlens", "num_q_tokens_per_head_k", "num_heads_k")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    lengths = given.get("cache_seqlens")
    if not isinstance(lengths, torch.Tensor) or any(given.get(name) is None for name in names):
        return FlashMLASchedMeta(), None
    if given.get("is_fp8_kvcache") or given.get("topk") is not None:
        return FlashMLASchedMeta(), None  # the call says that it is not supported
    _require_lengths(lengths, "b")
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
        block table, are refused on the CPU; on the GPU they are planned as the nearest
        possible and reported by a later call.
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
    given = (q, k_cache, block_table, cache_seqlens)
    for name, tensor in zip(_TENSORS, given, strict=True):
        checks.require_tensor(name, tensor)
    assert block_table is not None and cache_seqlens is not None
    config = _config(q, k_cache, block_table, causal)
    planned = _plan(
        _known(tile_scheduler_metadata, num_splits, config),
        config,
        min(block_table.shape[1] * config.page_block_size, MAX_SEQ_LEN),
        tile_scheduler_metadata,
        cache_seqlens,
        q.device,
    )
    result = decode(
        q.detach() if q.requires_grad else q,
        k_cache.detach() if k_cache.requires_grad else k_cache,
        block_table,
        None,
        planned.plan,
        softmax_scale,
        causal=causal,
        attn_sink=attn_sink,
    )
    _fill(tile_scheduler_metadata, planned, config)
    return result


def _config(
    q: torch.Tensor, k_cache: torch.Tensor, block_table: torch.Tensor, causal: bool
) -> FlashMLASchedMeta.Config:
    """Check the tensors against one another, by the names they have here, and size the call."""
    q_shape, k_shape, table_shape = q.shape, k_cache.shape, block_table.shape
    fits = (
        (len(q_shape), len(k_shape), len(table_shape)) == (4, 4, 2)
        and q_shape[3] == k_shape[3] == _WIDTH
        and q_shape[0] == table_shape[0]
        and q.dtype is k_cache.dtype
        and q.device == k_cache.device
    )
    if not fits:  # which of them is looked at only then: every layer comes here
        checks.require_shape("q", q, ["b", "s_q", "h_q", _WIDTH])
        checks.require_shape("k_cache", k_cache, ["num_blocks", "page_block_size", "h_k", _WIDTH])
        checks.require_dtype("k_cache", k_cache, q.dtype)
        checks.require_device("k_cache", k_cache, q.device)
        checks.require_shape("block_table", block_table, [q_shape[0], "max_blocks"])
    batch, s_q, h_q, _ = q_shape
    _, page_block_size, h_k, _ = k_shape
    return FlashMLASchedMeta.Config(
        batch, s_q, h_q, page_block_size, h_k, causal, False, None, None, None
    )


def _known(
    metadata: object, num_splits: torch.Tensor | None, config: FlashMLASchedMeta.Config
) -> _Planned | None:
    """What earlier calls with this metadata planned."""
    if isinstance(metadata, torch.Tensor):
        return _planned.get(metadata)
    if not isinstance(metadata, FlashMLASchedMeta):
        raise DtypeError(
            "tile_scheduler_metadata: expected what get_mla_metadata returns, got "
            f"{type(metadata).__name__}"
        )
    if num_splits is not None:
        raise DtypeError("num_splits: expected None with a FlashMLASchedMeta")
    if metadata.have_initialized and metadata.config != config:
        raise ScheduleError(
            f"tile_scheduler_metadata: filled for {metadata.config}, the call has {config}"
        )
    return metadata._planned


def _plan(
    planned: _Planned | None,
    config: FlashMLASchedMeta.Config,
    limit: int,
    metadata: FlashMLASchedMeta | torch.Tensor,
    cache_seqlens: torch.Tensor,
    device: torch.device,
) -> _Planned:
    """The plan of a call, made now if it was not made before."""
    state = _state(metadata, cache_seqlens, limit)
    is_kept = planned is not None and _is_for(planned.plan, config, limit, device)
    if planned is not None and is_kept and state is not None and planned.state == state:
        return planned
    _require_sizes(config)
    _require_lengths(cache_seqlens, config.b)
    checks.require_device("cache_seqlens", cache_seqlens, device)
    lengths = _int32_lengths(cache_seqlens, limit)
    if planned is None or not is_kept:
        planned = _Planned(_new_plan(config, limit, device))
    planned.state = None  # should the update fail, its plan is of no known lengths
    planned.plan.update(lengths)
    planned.state, planned.lengths = state, cache_seqlens
    return planned


def _state(
    metadata: FlashMLASchedMeta | torch.Tensor, cache_seqlens: torch.Tensor, limit: int
) -> Hashable:
    """Changes whenever a plan gets out of date; None where that could happen unseen."""
    capturing = cache_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()
    layout = (cache_seqlens.shape, cache_seqlens.stride(), cache_seqlens.dtype)
    lengths = (cache_seqlens.data_ptr(), layout, _version(cache_seqlens))
    if not isinstance(metadata, torch.Tensor):
        return lengths, capturing, limit
    if cache_seqlens.is_inference() or metadata.is_inference():
        return None
    return lengths, capturing, limit, _version(metadata)


def _require_lengths(cache_seqlens: torch.Tensor, batch: int | str) -> None:
    if cache_seqlens.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"cache_seqlens: expected torch.int32, got {cache_seqlens.dtype}")
    checks.require_shape("cache_seqlens", cache_seqlens, [batch])


def _int32_lengths(cache_seqlens: torch.Tensor, limit: int) -> torch.Tensor:
    """The lengths as a `DevicePlan` takes them; on the CPU their range is checked."""
    if cache_seqlens.device.type == "cpu":
        bad = ((cache_seqlens < 0) | (cache_seqlens > limit)).nonzero()
        if len(bad):
            request = int(bad[0])
            raise RangeError(
                f"cache_seqlens: request {request}: expected 0 to {limit}, got "
                f"{int(cache_seqlens[request])}"
            )
    if cache_seqlens.dtype is torch.int64:
        return cache_seqlens.clamp(-1, (1 << 31) - 1).to(torch.int32)
    checks.require_dense("cache_seqlens", cache_seqlens, 4)
    return cache_seqlens


def _require_sizes(config: FlashMLASchedMeta.Config) -> None:
    """Check sizes by the names that they have here."""
    if config.b < 1:
        raise ShapeError("q: expected at least 1 request, got 0")
    if not 1 <= config.s_q <= MAX_NEW_TOKENS:
        raise UnsupportedError(
            f"q: expected s_q, the new tokens, of 1 to {MAX_NEW_TOKENS}, got {config.s_q}"
        )
    if config.h_k < 1 or config.page_block_size < 1:
        raise ShapeError(
            "k_cache: expected page_block_size and h_k of at least 1, got "
            f"{config.page_block_size} and {config.h_k}"
        )
    if config.h_q < 1 or config.h_q % config.h_k:
        raise ShapeError(
            f"q: expected a multiple of {config.h_k} heads, the KV heads of k_cache, got "
            f"{config.h_q}"
        )


def _new_plan(config: FlashMLASchedMeta.Config, limit: int, device: torch.device) -> DevicePlan:
    return DevicePlan(
        config.b,
        config.h_q,
        config.s_q,
        num_kv_heads=config.h_k,
        max_seq_len=limit,
        device=device,
    )


def _fill(
    metadata: FlashMLASchedMeta | torch.Tensor,
    planned: _Planned,
    config: FlashMLASchedMeta.Config,
) -> None:
    """Let the metadata stand for a plan that a call succeeded with."""
    if isinstance(metadata, torch.Tensor):
        _planned[metadata] = planned
    elif metadata._planned is not planned:
        metadata._planned = planned
        metadata.config = config
        metadata.have_initialized = True
        metadata.tile_scheduler_metadata = planned.plan.instructions
        metadata.num_splits = planned.plan.header


def _is_for(
    plan: DevicePlan, config: FlashMLASchedMeta.Config, limit: int, device: torch.device
) -> bool:
    mine = (plan.num_requests, plan.new_tokens, plan.num_heads, plan.num_kv_heads)
    wanted = (config.b, config.s_q, config.h_q, config.h_k)
    return mine == wanted and plan.max_seq_len == limit and plan.device == device


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
