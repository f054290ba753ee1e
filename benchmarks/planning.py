"""How long planning takes on the GPU, beside FlashMLA's metadata kernel.

A graph of several plannings is replayed, and its time divided by their number. FlashMLA plans
inside its first call with fresh metadata and has no entry point for the kernel alone: its time is
that of such a call less that of a call whose metadata is there, both for requests of one block.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import mla_decode
import torch

from benchmarks.case import make_case
from benchmarks.implementations import UnavailableError, call_flash_mla, import_or_explain
from benchmarks.measure import describe, median_replay_us
from benchmarks.shapes import Shape

BATCHES = (1, 64, 256, 1024)
NUM_HEADS = 16
MAX_SEQ_LEN = 65536
CALLS = 20  # in a graph, over which its start is spread
SEED = 0


def lengths(batch: int) -> list[int]:
    """Return lengths with a heavy tail, the same each time."""
    rng = random.Random(SEED + batch)
    return [min(MAX_SEQ_LEN, 1 + round(2000 * rng.lognormvariate(0, 1))) for _ in range(batch)]


def call_us(call: Callable[[], object], replays: int) -> float:
    """Return the median microseconds of one call in a replayed graph of many."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for _ in range(CALLS)]
    us = median_replay_us(graph, replays) / CALLS
    del kept
    return us


def ours(batch: int, replays: int) -> float:
    """Return microseconds of `DevicePlan.update`; the last plan is validated."""
    device = torch.device("cuda", torch.cuda.current_device())
    planned = mla_decode.DevicePlan(batch, NUM_HEADS, max_seq_len=MAX_SEQ_LEN, device=device)
    seq_lens = torch.tensor(lengths(batch), dtype=torch.int32, device=device)
    us = call_us(lambda: planned.update(seq_lens), replays)
    mla_decode.synchronize(device)
    planned.to_host().validate()
    return us


def flash_mla(batch: int, replays: int) -> float:
    """Return microseconds that fresh metadata add to a call of FlashMLA."""
    flash = import_or_explain("flash_mla", "sgl-flash-mla")
    device = torch.device("cuda", torch.cuda.current_device())
    case = make_case(Shape("one block", (64,) * batch, 1, NUM_HEADS), device, copies=1)

    def fresh() -> object:
        metadata, _ = flash.get_mla_metadata()
        return call_flash_mla(flash, case, 0, metadata), metadata

    made, _ = flash.get_mla_metadata()

    def planned() -> object:
        return call_flash_mla(flash, case, 0, made)

    return call_us(fresh, replays) - call_us(planned, replays)


def run(replays: int) -> int:
    """Print microseconds by number of requests; 1 if ours failed."""
    print(f"planning on {torch.cuda.get_device_name()}, us per plan, {CALLS} in a replayed graph")
    print(f"{'requests':>8} {'mla_decode':>12} {'flash_mla':>12}")
    failed = 0
    for batch in BATCHES:
        cells, why = [], []
        for measured in (ours, flash_mla):
            us = math.nan
            try:
                us = measured(batch, replays)
            except UnavailableError as error:
                why.append(str(error).splitlines()[0])
            except Exception as error:  # the others go on
                why.append(describe(error))
                failed |= measured is ours
            cells.append("–" if math.isnan(us) else f"{us:.2f}")
        text = f"{batch:>8} " + " ".join(f"{cell:>12}" for cell in cells)
        print(text + "".join(f"  ** {reason}" for reason in why), flush=True)
    return int(failed)
