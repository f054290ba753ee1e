"""Draws docs/figures/demo-predicted.png: the plan of `make demo`'s batch, for 132 SMs.

PYTHONPATH=python python docs/figures/demo_timeline.py [--cost-model DEVICE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mla_decode import cost, plan, timeline
from mla_decode.cli import DEMO_HEADS, DEMO_NEW_TOKENS, DEMO_SEQ_LENS
from mla_decode.picture import write_png

OUT = Path(__file__).parent / "demo-predicted.png"


def main() -> None:
    parser = argparse.ArgumentParser(description="draw the predicted timeline of the demo's batch")
    parser.add_argument("--cost-model", default="NVIDIA H200", metavar="DEVICE")
    made = plan(
        DEMO_SEQ_LENS,
        DEMO_HEADS,
        DEMO_NEW_TOKENS,
        num_workers=132,
        device="cpu",
        cost_model=cost.load(parser.parse_args().cost_model),
    )
    print(write_png(timeline.predicted(made), OUT))


if __name__ == "__main__":
    main()
