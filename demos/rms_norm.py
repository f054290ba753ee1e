"""The tutorial megakernel: layers of RMS-norm as one queue of instructions.

python demos/rms_norm.py [--rows N] [--cols N] [--layers N]

Every layer is cut in instructions of up to 24 rows. An instruction of a higher layer waits for the
flag of the instruction that wrote its rows, usually on another SM; no-ops are strewn in between.
The queue is first checked and executed on the CPU, then on a Hopper GPU if there is one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

try:
    from demos import _rms_norm
except ImportError:  # built where nvcc is
    _rms_norm = None

# Numbers that demos/rms_norm.cuh defines; a test holds them together.
INSTRUCTION_WORDS = 32
QUEUE_STATE_WORDS = 32
OPCODE_NOOP, OPCODE_RMS_NORM = 0, 1
MAX_ROWS = 24  # of one instruction
LAYER, ROW_BEGIN, NUM_ROWS, WAIT_FLAG, RAISE_FLAG = 2, 3, 4, 5, 6  # words
NO_FLAG = -1

EPS = 1e-6
REPLAYS = 20
# Per layer a sum of `cols` squares, two products and a square root in fp32: far below this.
MAX_REL_ERR = 1e-5


def why_no_gpu() -> str:
    """Return why the megakernel cannot run here; empty if it can."""
    if _rms_norm is None:
        return "the demo's kernel is not built (run make where nvcc is installed)"
    return str(_rms_norm.available(0))


def build_queue(num_rows: int, num_layers: int, noop_every: int = 7) -> torch.Tensor:
    """Return the words ``[n, 32]`` int32, layer after layer, a no-op after every few."""
    per_layer = -(-num_rows // MAX_ROWS)
    words: list[list[int]] = []
    for number in range(num_layers * per_layer):
        layer, piece = divmod(number, per_layer)
        row_begin = piece * MAX_ROWS
        instruction = [0] * INSTRUCTION_WORDS
        instruction[:2] = OPCODE_RMS_NORM, len(words)
        instruction[LAYER] = layer
        instruction[ROW_BEGIN] = row_begin
        instruction[NUM_ROWS] = min(MAX_ROWS, num_rows - row_begin)
        instruction[WAIT_FLAG] = number - per_layer if layer > 0 else NO_FLAG
        instruction[RAISE_FLAG] = number if layer + 1 < num_layers else NO_FLAG
        words.append(instruction)
        if number % noop_every == noop_every - 1:
            words.append([OPCODE_NOOP, len(words)] + [0] * (INSTRUCTION_WORDS - 2))
    return torch.tensor(words, dtype=torch.int32)


def reference(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return all layers in float64: ``[layers, rows, cols]``."""
    layers = [x.double()]
    for weight in weights.double():
        layers.append(torch.nn.functional.rms_norm(layers[-1], x.shape[-1:], weight, EPS))
    return torch.stack(layers[1:])


def interpret(queue: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> None:
    """Execute the words on the CPU, in queue order; ``x`` ``[layers + 1, rows, cols]``.

    A flag that is not up when it is waited for would be a deadlock waiting to happen: on the GPU
    every input must stand before its reader in the queue.
    """
    raised = {NO_FLAG}
    for words in queue.tolist():
        if words[0] == OPCODE_NOOP:
            continue
        if words[WAIT_FLAG] not in raised:
            raise ValueError(f"uid {words[1]} waits for flag {words[WAIT_FLAG]}, not raised before")
        layer, begin, end = words[LAYER], words[ROW_BEGIN], words[ROW_BEGIN] + words[NUM_ROWS]
        rows = x[layer, begin:end]
        scale = torch.rsqrt((rows * rows).mean(-1, keepdim=True) + EPS)
        x[layer + 1, begin:end] = rows * scale * weights[layer]
        raised.add(words[RAISE_FLAG])


@dataclass
class Launcher:
    """A queue on the GPU with the state that it needs; call it to enqueue one launch."""

    queue: torch.Tensor
    x: torch.Tensor
    weights: torch.Tensor
    num_ctas: int = 0  # 0: one per SM

    def __post_init__(self) -> None:
        self.queue = self.queue.to(self.x.device)
        zeros = {"dtype": torch.int32, "device": self.x.device}
        self.state = torch.zeros(QUEUE_STATE_WORDS, **zeros)
        self.flags = torch.zeros(max(1, len(self.queue)), **zeros)

    def __call__(self) -> None:
        _rms_norm.run(
            self.queue.data_ptr(),
            len(self.queue),
            self.state.data_ptr(),
            self.x.data_ptr(),
            self.weights.data_ptr(),
            self.flags.data_ptr(),
            self.x.shape[-2],
            self.x.shape[-1],
            EPS,
            self.num_ctas,
            torch.cuda.current_stream().cuda_stream,
            self.x.device.index,
        )


def synchronize() -> None:
    """Wait for the GPU and raise what a megakernel reported."""
    torch.cuda.synchronize()
    if error := _rms_norm.take_error(torch.cuda.current_device()):
        raise RuntimeError(f"megakernel: {error}")


def time_us(launch: Callable[[], None], calls: int = 10) -> float:
    """Return the median microseconds of a launch, in a CUDA graph of several."""
    launch()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            launch()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / calls)
    synchronize()
    return statistics.median(times)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def passed(where: str, error: float) -> bool:
    ok = error <= MAX_REL_ERR  # NaN is not
    print(f"{where}: relative error {error:.1e}, {'passed' if ok else 'FAILED'}")
    return ok


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="RMS-norm on the megakernel framework")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--cols", type=int, default=2048, help="a multiple of 4, at most 2304")
    parser.add_argument("--layers", type=int, default=3)
    arguments = parser.parse_args(argv)
    rows, cols, layers = arguments.rows, arguments.cols, arguments.layers
    queue = build_queue(rows, layers)
    noops = int((queue[:, 0] == OPCODE_NOOP).sum())
    print(f"queue: {len(queue)} instructions ({noops} no-ops), {layers} layers of {rows} x {cols}")

    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(layers, cols, generator=generator) + 0.5
    x = torch.full((layers + 1, rows, cols), torch.nan)
    x[0] = torch.randn(rows, cols, generator=generator)
    expected = reference(x[0], weights)
    on_cpu = x.clone()
    interpret(queue, on_cpu, weights)
    ok = passed("CPU, the same words in queue order", relative_error(on_cpu[1:], expected))

    if reason := why_no_gpu():
        print(f"GPU: not run: {reason}")
        return 0 if ok else 1
    launch = Launcher(queue, x.cuda(), weights.cuda())
    launch()
    synchronize()
    name = torch.cuda.get_device_name()
    ok = passed(name, relative_error(launch.x[1:].cpu(), expected)) and ok
    us = time_us(launch)
    moved = 2 * layers * rows * cols * 4
    print(f"{name}: {us:.1f} us per launch, {moved / us / 1e3:.0f} GB/s read and written")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
