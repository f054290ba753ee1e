"""Cost models of the GPUs, and the floor that no kernel can be faster than."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from ._scheduler import CostModel
from .errors import MlaDecodeError
from .words import LATENT_DIM, MAX_ROWS, NARROW_ROWS, NARROWEST_ROWS, ROPE_DIM

__all__ = [
    "KERNELS",
    "CostModel",
    "device_slug",
    "file_key",
    "floor_us",
    "kernel_of",
    "load",
    "traffic_bytes",
    "work_flop",
]

KERNELS = {"wide": MAX_ROWS, "narrow": NARROW_ROWS, "narrowest": NARROWEST_ROWS}
"""Most rows of a row group that each kind of kernel takes."""

_HERE = Path(__file__).resolve().parent
_DIRECTORIES = (_HERE / "cost_models", _HERE.parents[1] / "scheduler" / "cost_models")
_ENVIRONMENT = "MLA_DECODE_COST_MODEL"
_FALLBACK = "nvidia-h200"  # for GPUs that nothing was fitted on

# Measured on an H200 with a grid that does nothing but stream bytes into shared memory, launch
# included, and with large bf16 matrix products of random data.
FLOOR_LAUNCH_US = 1.6
FLOOR_BYTES_PER_US = 4.6e6
FLOOR_FLOP_PER_US = 790e6


def load(device_name: str | None = None, rows: int | None = None) -> CostModel:
    """Load the cost model fitted on a GPU.

    Parameters
    ----------
    device_name : str or None
        As `torch.cuda.get_device_name` says it. Names are compared without case and
        punctuation; the file whose name is the longest beginning of it wins, then that of
        the H200, then the scheduler's built-in constants. The file that the environment
        variable ``MLA_DECODE_COST_MODEL`` names wins over all.
    rows : int or None
        Rows (new tokens times query heads per KV head) of the largest row group. Each kind of
        kernel has constants of its own, where a file has them: those of wide kernels as ``cost``,
        of the others as ``narrow_cost`` and ``narrowest_cost``. Wide ones when None.

    Returns
    -------
    CostModel
        Constants in microseconds.
    """
    path = _find(device_name)
    if path is None:
        return CostModel()
    try:
        models = _read(path, path.stat().st_mtime_ns)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise MlaDecodeError(f"cost model {path}: expected a JSON cost model: {error}") from error
    return models[kernel_of(MAX_ROWS if rows is None else rows)]


def kernel_of(rows: int) -> str:
    """Kind of the kernel that runs row groups of at most so many rows."""
    return next(kind for kind, most in reversed(KERNELS.items()) if min(rows, MAX_ROWS) <= most)


def file_key(kernel: str) -> str:
    """What the constants of a kind of kernels are called in a file."""
    return "cost" if kernel == "wide" else f"{kernel}_cost"


@lru_cache(maxsize=32)
def _read(path: Path, mtime_ns: int) -> dict[str, CostModel]:
    """Return the model of each kind of kernels; one without constants has the next wider one's."""
    del mtime_ns  # part of the key: a file that changed is read again
    document = json.loads(path.read_text(encoding="utf-8"))
    constants = document.get("cost", document)
    models = {}
    for kernel in KERNELS:
        constants = document.get(file_key(kernel), constants)
        models[kernel] = _model(constants)
    return models


def _model(constants: dict[str, float]) -> CostModel:
    return CostModel.from_dict({name: float(us) for name, us in constants.items()})


def device_slug(device_name: str) -> str:
    """File name of a device: ``NVIDIA H200`` is ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def traffic_bytes(
    seq_lens: Sequence[int],
    num_heads: int,
    new_tokens: int | Sequence[int],
    num_kv_heads: int = 1,
) -> int:
    """Bytes that must move at least: the cache, Q and O, each once, in bf16 or fp16.

    ``num_heads`` are those of all KV heads together; ``new_tokens`` those of every request,
    or one number for each.
    """
    rows = sum(_tokens(new_tokens, len(seq_lens))) * num_heads
    width = LATENT_DIM + ROPE_DIM
    return 2 * (width * num_kv_heads * sum(seq_lens) + rows * (width + LATENT_DIM))


def work_flop(seq_lens: Sequence[int], num_heads: int, new_tokens: int | Sequence[int]) -> int:
    """Floating point operations of Q @ K and P @ V, the causal mask ignored."""
    tokens = _tokens(new_tokens, len(seq_lens))
    scores = sum(length * count for length, count in zip(seq_lens, tokens, strict=True))
    return 2 * num_heads * (2 * LATENT_DIM + ROPE_DIM) * scores


def floor_us(
    seq_lens: Sequence[int],
    num_heads: int,
    new_tokens: int | Sequence[int],
    num_kv_heads: int = 1,
) -> float:
    """Microseconds below which no kernel that reads the cache can come on an H200.

    The larger of ``1.6 + bytes / 4.6e6`` and ``flop / 790e6``; sizes as in `traffic_bytes`.
    """
    moved = traffic_bytes(seq_lens, num_heads, new_tokens, num_kv_heads)
    compute = work_flop(seq_lens, num_heads, new_tokens) / FLOOR_FLOP_PER_US
    return max(FLOOR_LAUNCH_US + moved / FLOOR_BYTES_PER_US, compute)


def _tokens(new_tokens: int | Sequence[int], batch: int) -> Sequence[int]:
    return (new_tokens,) * batch if isinstance(new_tokens, int) else new_tokens


def _find(device_name: str | None) -> Path | None:
    override = os.environ.get(_ENVIRONMENT)
    if override:
        return Path(override)
    models = {p.stem: p for directory in reversed(_DIRECTORIES) for p in directory.glob("*.json")}
    slug = device_slug(device_name or _FALLBACK)
    fits = [stem for stem in models if slug == stem or slug.startswith(stem + "-")]
    return models[max(fits, key=len)] if fits else models.get(_FALLBACK)
