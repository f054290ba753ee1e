"""One decode call: new tokens of a batch of requests attend to their paged latent cache.

python demos/examples/plain_call.py

Runs the kernel on a Hopper GPU, and the interpreter of the same instructions without one.
"""

from __future__ import annotations

import sys

import mla_decode
import torch

HEADS, BLOCK_SIZE = 16, 64
SOFTMAX_SCALE = 192**-0.5  # DeepSeek-V3: of the head before W_UK is absorbed into q


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lengths = [4641, 45118, 1730, 1696] if device == "cuda" else [70, 451, 17, 64]
    torch.manual_seed(0)

    # An engine has these: a pool of blocks of 64 tokens x 576, and the blocks of each request.
    needed = [-(-length // BLOCK_SIZE) for length in lengths]
    kv_cache = torch.randn(sum(needed), BLOCK_SIZE, 576, device=device).bfloat16() / 8
    pool = torch.randperm(sum(needed), device=device).int().split(needed)
    block_table = torch.zeros(len(lengths), max(needed), dtype=torch.int32, device=device)
    for row, blocks in zip(block_table, pool, strict=True):
        row[: len(blocks)] = blocks
    q = torch.randn(len(lengths), 1, HEADS, 576, device=device).bfloat16() / 8

    out, lse = mla_decode.decode(q, kv_cache, block_table, lengths, softmax_scale=SOFTMAX_SCALE)
    mla_decode.synchronize()  # raises what the kernel may have reported

    worst = 0.0
    for request, blocks in enumerate(pool):
        keys = kv_cache[blocks.long()].view(-1, 576)[: lengths[request]].double()
        weights = (q[request, 0].double() @ keys.T * SOFTMAX_SCALE).softmax(-1)
        expected = weights @ keys[:, :512]
        error = (out[request, 0].double() - expected).norm() / expected.norm()
        worst = max(worst, float(error))
    print(f"{device}: out {list(out.shape)} {out.dtype}, lse {list(lse.shape)} {lse.dtype}")
    print(mla_decode.plan(lengths, HEADS).summary())
    passed = worst < 3e-3
    print(f"relative error against float64: {worst:.1e}: {'passed' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
