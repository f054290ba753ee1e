"""Code that was written for FlashMLA, running on mla_decode unchanged.

python demos/examples/flash_mla_dropin.py

One line before the first import of flash_mla puts this package in its place.
"""

from __future__ import annotations

import sys

import mla_decode
import mla_decode.flash_mla
import torch
from mla_decode.reference import attention, compare, make_case

sys.modules["flash_mla"] = mla_decode.flash_mla  # the one line

from flash_mla import flash_mla_with_kvcache, get_mla_metadata  # noqa: E402


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = make_case([70, 451, 0, 64], num_heads=16, new_tokens=2, device=device)
    cache_seqlens = torch.tensor(case.seq_lens, dtype=torch.int32, device=device)
    k_cache = case.kv_cache.unsqueeze(2)  # [num_blocks, 64, 1, 576]

    # From here on, what FlashMLA's users write: one planning for all layers of a step.
    tile_scheduler_metadata, num_splits = get_mla_metadata()
    for _ in range(2):
        out, lse = flash_mla_with_kvcache(
            case.q,
            k_cache,
            case.block_table,
            cache_seqlens,
            512,
            tile_scheduler_metadata,
            num_splits,
            causal=True,
        )

    mla_decode.synchronize()
    errors = compare(out, lse, *attention(case))
    print(f"{device}: out {list(out.shape)}, lse {list(lse.shape)}; of no keys: {lse[2].max()}")
    print(f"against float64: {errors}: {'passed' if errors.passed else 'FAILED'}")
    return 0 if errors.passed else 1


if __name__ == "__main__":
    sys.exit(main())
