"""What the interpreter itself costs: nanoseconds per instruction of a queue of no-ops.

python demos/noop_cost.py

A launch of n no-ops per CTA takes a + b * n: a is the launch, b the cost of one instruction with
nothing to hide it. Measured with one CTA, where tickets come without competition, and with one per
SM, where all CTAs draw from the same counter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demos import rms_norm  # noqa: E402

PER_CTA = (64, 128, 256, 512, 1024)


def noop_queue(num_instructions: int) -> torch.Tensor:
    """Return the words of ``num_instructions`` no-ops."""
    queue = torch.zeros(num_instructions, rms_norm.INSTRUCTION_WORDS, dtype=torch.int32)
    queue[:, 1] = torch.arange(num_instructions)
    return queue


def fit_line(x: tuple[int, ...], y: list[float]) -> tuple[float, float]:
    """Return offset and slope of the least-squares line."""
    slope, offset = np.polyfit(np.asarray(x, dtype=np.float64), np.asarray(y), 1)
    return float(offset), float(slope)


def measure(num_ctas: int) -> tuple[float, float]:
    """Return microseconds of an empty launch and nanoseconds per instruction of one CTA."""
    nothing = torch.zeros(1, 4, device="cuda")
    times = []
    for per_cta in PER_CTA:
        queue = noop_queue(per_cta * num_ctas)
        times.append(rms_norm.time_us(rms_norm.Launcher(queue, nothing, nothing, num_ctas)))
        print(f"{num_ctas:4d} CTAs x {per_cta:5d} no-ops: {times[-1]:9.2f} us", flush=True)
    offset, slope = fit_line(PER_CTA, times)
    return offset, slope * 1e3


def main() -> int:
    if reason := rms_norm.why_no_gpu():
        print(f"noop_cost: not measured: {reason}")
        return 0
    device = torch.cuda.get_device_name()
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    for num_ctas in (1, num_sms):
        offset, ns = measure(num_ctas)
        each = f"{ns:.0f} ns per instruction"
        if num_ctas > 1:
            each += f" and CTA, one retired every {ns / num_ctas:.1f} ns"
        print(f"{device}, {num_ctas} CTAs: {each}; {offset:.1f} us for an empty launch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
