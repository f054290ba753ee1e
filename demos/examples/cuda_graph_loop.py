"""A decode loop in a CUDA graph: captured once, replayed while the batch changes.

python demos/examples/cuda_graph_loop.py

The graph holds one plan, made on the GPU, and the calls of all layers. Between replays lengths
grow, a request ends, another takes its row; nothing is planned, copied or waited for on the host.
Without a GPU the same step runs on the interpreter, without a graph.
"""

from __future__ import annotations

import sys

import mla_decode
import torch
from mla_decode.reference import attention, compare, make_case

HEADS, LAYERS, ROWS = 16, 2, 4
STEPS = [  # lengths by row; 0 is a row that only pads the batch
    [70, 300, 5, 0],
    [71, 301, 6, 0],
    [72, 0, 7, 190],  # one ended, one came
    [73, 0, 8, 191],
]


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    longest = max(max(step) for step in STEPS)
    layers = [
        make_case([longest] * ROWS, HEADS, seed=layer, poison=False, device=device)
        for layer in range(LAYERS)
    ]
    seq_lens = torch.zeros(ROWS, dtype=torch.int32, device=device)
    planned = mla_decode.DevicePlan(ROWS, HEADS, max_seq_len=longest, device=device)

    def step() -> list[tuple[torch.Tensor, torch.Tensor]]:
        planned.update(seq_lens)  # once for all layers
        return [
            mla_decode.decode(layer.q, layer.kv_cache, layer.block_table, plan=planned)
            for layer in layers
        ]

    replay, results = step, step()
    if device == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()  # first calls allocate; a capture must not
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = step()
        replay = graph.replay

    passed = True
    for number, lengths in enumerate(STEPS):
        seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        results = replay() or results  # a graph writes the same tensors again
        mla_decode.synchronize()
        for layer, (out, lse) in zip(layers, results, strict=True):
            layer.seq_lens[:] = lengths
            errors = compare(out, lse, *attention(layer))
            passed &= errors.passed
        print(f"step {number}, lengths {lengths}: relative error {errors.rel_err:.1e}")
    how = "one graph, replayed" if device == "cuda" else "interpreter, no graph"
    print(f"{LAYERS} layers, {how}: {'passed' if passed else 'FAILED'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
