"""An attention layer under torch.compile(fullgraph=True), with the decode op inside.

python demos/examples/torch_compile.py

The layer absorbs W_UK into the query, decodes, and applies W_UV to the latent output, as
DeepSeek-V3 does. The op stays one node of the graph; what surrounds it is compiled.
"""

from __future__ import annotations

import sys

import mla_decode
import torch
from mla_decode.reference import make_case
from torch import nn

HEADS, NOPE, ROPE, LATENT, VALUE = 8, 128, 64, 512, 128


class Attention(nn.Module):
    """From queries of 128 + 64 per head to values of 128 per head."""

    def __init__(self) -> None:
        super().__init__()
        self.w_uk = nn.Parameter(torch.randn(HEADS, NOPE, LATENT) * NOPE**-0.5)
        self.w_uv = nn.Parameter(torch.randn(HEADS, LATENT, VALUE) * LATENT**-0.5)

    def forward(
        self,
        q: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
    ) -> torch.Tensor:
        q_nope = torch.einsum("bshn,hnl->bshl", q[..., :NOPE], self.w_uk).contiguous()
        q_pe = q[..., NOPE:].contiguous()
        latent, _ = mla_decode.decode(
            (q_nope, q_pe),
            kv_cache,
            block_table,
            seq_lens,
            softmax_scale=(NOPE + ROPE) ** -0.5,
        )
        return torch.einsum("bshl,hlv->bshv", latent, self.w_uv)


@torch.inference_mode()
def main() -> int:
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    torch.manual_seed(0)
    layer = Attention().to(device, torch.bfloat16)
    # Without a GPU, a backend that traces everything and needs no C++ compiler.
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if on_gpu else "aot_eager")
    worst = 0.0
    for lengths in ([70, 5, 300], [71, 6, 301]):
        case = make_case(lengths, HEADS, seed=len(lengths), device=device)
        inputs = (
            torch.randn(3, 1, HEADS, NOPE + ROPE, device=device).bfloat16(),
            case.kv_cache,
            case.block_table,
            torch.tensor(lengths, dtype=torch.int32, device=device),
        )
        out, expected = compiled(*inputs).double(), layer(*inputs).double()
        worst = max(worst, float((out - expected).norm() / expected.norm()))
        print(f"lengths {lengths}: out {list(out.shape)}, compiled against eager {worst:.1e}")
    mla_decode.synchronize()
    passed = worst < 1e-2  # the compiler may round a product of bf16 at another place
    print(f"one graph on {device}: {'passed' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
