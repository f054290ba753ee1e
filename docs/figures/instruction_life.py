"""Draws docs/figures/instruction-life.svg: one instruction and its successor on one SM.

python docs/figures/instruction_life.py [--out FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

OUT = Path(__file__).parent / "instruction-life.svg"

BEFORE, THIS, NEXT = "#c9ced6", "#1f5fa8", "#3f8a8c"
INK, FAINT, MARK = "#222222", "#8a8f98", "#d1651a"

LANES = ("controller", "launcher", "loader", "consumers", "storer")
LANE_HEIGHT, PAGE_HEIGHT = 0.62, 0.3
LANE_STEP, PAGE_STEP = 1.0, 0.4
FIRST_PAGE = -LANE_STEP * len(LANES) - 0.15
END = 20.0

# (lane, instruction, begin, end, text); times have no unit
BOXES = [
    ("controller", THIS, 0.3, 2.2, "decode n"),
    ("controller", NEXT, 7.2, 9.1, "decode n+1"),
    ("launcher", THIS, 2.5, 4.3, "inputs?"),
    ("launcher", NEXT, 9.4, 11.2, "inputs?"),
    ("loader", BEFORE, 0.0, 0.6, ""),
    ("loader", THIS, 2.5, 7.0, "loads n"),
    ("loader", NEXT, 9.4, 14.6, "loads n+1 as pages come free"),
    ("consumers", BEFORE, 0.0, 2.7, "compute n-1"),
    ("consumers", THIS, 3.9, 10.9, "compute n"),
    ("consumers", NEXT, 11.5, 18.0, "compute n+1"),
    ("storer", BEFORE, 2.8, 4.2, "store n-1"),
    ("storer", THIS, 11.0, 13.6, "store n"),
    ("storer", NEXT, 18.1, 20.0, "store n+1"),
]
# Release by the instruction before, by n and by n+1.
PAGES = [
    (2.0, 9.0, 16.8),
    (2.0, 9.0, 16.8),
    (2.4, 10.9, 17.6),
    (2.4, 10.9, 17.6),
    (4.2, 13.6, 20.0),
    (4.2, 13.6, 20.0),
]
# (from lane, at), (to lane, at), text, text position
ARROWS = [
    (("controller", 2.2), ("loader", 2.55), "1", (1.95, -0.62)),
    (("loader", 3.5), ("consumers", 3.95), "2", (3.35, -2.55)),
    (("loader", 7.0), ("controller", 7.25), "3", (6.75, -1.0)),
    (("consumers", 10.9), ("storer", 11.05), "4", (10.55, -3.55)),
]
CAPTION = [
    ("1", "decoded: words, pages and semaphores are ready"),
    ("2", "a semaphore of the opcode: the first tile is in"),
    ("3", "prefetch gate: loads are issued, draw the next ticket"),
    ("4", "a semaphore: the result is staged in a page"),
    ("5", "a page is let go of: the next instruction loads into it"),
    ("6", "done flag: an SM that waits for n goes on"),
]


def lane_y(lane: str) -> float:
    return -LANE_STEP * LANES.index(lane)


def draw_lanes(axes: Axes) -> None:
    for lane in LANES:
        y = lane_y(lane)
        axes.plot([0, END], [y, y], color="#e6e8eb", linewidth=1, zorder=0)
        axes.text(-0.25, y, lane, ha="right", va="center", fontsize=10.5, color=INK)
    for lane, color, begin, end, text in BOXES:
        y = lane_y(lane) - LANE_HEIGHT / 2
        axes.add_patch(
            FancyBboxPatch(
                (begin, y),
                end - begin,
                LANE_HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.1",
                facecolor=color,
                edgecolor="none",
                zorder=2,
            )
        )
        axes.text(
            (begin + end) / 2,
            lane_y(lane),
            text,
            ha="center",
            va="center",
            fontsize=9,
            color=INK if color == BEFORE else "white",
        )


def draw_pages(axes: Axes) -> None:
    for page, (before, this, after) in enumerate(PAGES):
        y = FIRST_PAGE - PAGE_STEP * page
        spans = ((0.0, before, BEFORE), (before, this, THIS), (this, after, NEXT))
        for begin, end, color in spans:
            axes.barh(y, end - begin - 0.06, PAGE_HEIGHT, begin + 0.03, color=color, alpha=0.6)
            if page == 0:
                name = {BEFORE: "n-1", THIS: "held by instruction n", NEXT: "held by n+1"}[color]
                center = (begin + end) / 2
                axes.text(center, y - 0.01, name, ha="center", va="center", fontsize=7.5, color=INK)
        axes.text(-0.25, y, f"page {page}", ha="right", va="center", fontsize=9, color=FAINT)
    axes.annotate(
        "",
        (9.42, lane_y("loader") - LANE_HEIGHT / 2),
        (9.0, FIRST_PAGE + PAGE_HEIGHT / 2),
        arrowprops={"arrowstyle": "-|>", "color": MARK, "linewidth": 1.2, "shrinkA": 0},
        zorder=1,
    )
    number(axes, "5", (8.8, FIRST_PAGE + 0.42))


def number(axes: Axes, text: str, position: tuple[float, float]) -> None:
    axes.text(
        *position,
        text,
        ha="center",
        va="center",
        fontsize=8.5,
        color="white",
        bbox={"boxstyle": "circle,pad=0.22", "facecolor": MARK, "edgecolor": "none"},
        zorder=5,
    )


def draw_arrows(axes: Axes) -> None:
    for (from_lane, begin), (to_lane, end), text, position in ARROWS:
        down = lane_y(from_lane) > lane_y(to_lane)
        half = LANE_HEIGHT / 2 * (1 if down else -1)
        axes.annotate(
            "",
            (end, lane_y(to_lane) + half),
            (begin, lane_y(from_lane) - half),
            arrowprops={"arrowstyle": "-|>", "color": MARK, "linewidth": 1.2, "shrinkA": 0},
        )
        number(axes, text, position)
    y = lane_y("storer")
    axes.annotate(
        "",
        (15.2, y),
        (13.6, y),
        arrowprops={"arrowstyle": "-|>", "color": MARK, "linewidth": 1.2, "shrinkA": 0},
    )
    axes.text(15.3, y, "other SMs", va="center", fontsize=9, color=INK)
    number(axes, "6", (14.2, y + 0.36))


def draw_caption(axes: Axes) -> None:
    top = FIRST_PAGE - PAGE_STEP * len(PAGES) - 0.45
    for i, (mark, text) in enumerate(CAPTION):
        x, y = (0.0 if i < 3 else 10.2), top - 0.5 * (i % 3)
        number(axes, mark, (x + 0.15, y))
        axes.text(x + 0.6, y, text, va="center", fontsize=9.5, color=INK)
    axes.set_ylim(top - 1.4, 0.75)
    axes.text(END, 0.55, "time \N{RIGHTWARDS ARROW}", ha="right", fontsize=9, color=FAINT)


def draw(out: Path) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "instruction-life"  # the same file every time
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axis("off")
    axes.set_xlim(-2.0, END + 0.1)
    draw_lanes(axes)
    draw_pages(axes)
    draw_arrows(axes)
    draw_caption(axes)
    metadata = {"Date": None} if out.suffix == ".svg" else None
    figure.savefig(out, dpi=110, facecolor="white", metadata=metadata)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="draw an instruction's life")
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)
