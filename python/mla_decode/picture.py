"""Timelines as a picture: one row per SM, and how many SMs are busy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import UnsupportedError
from .timeline import Slice, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Partials in blues, told apart by request; reductions in orange, fills in green.
_REQUEST_COLORS = ("#1f5fa8", "#6ea6db", "#3f8a8c", "#9cc9c1", "#5b5ea6", "#a9a6d8")
_COLORS = {
    "reduction": "#f08c2e",
    "fill": "#7fb069",
    "no-op": "#999999",
    "wait": "#fde3c8",
    "idle": "#f0f0f0",
    "load": "#7db8e8",
    "compute": "#1f5fa8",
    "store": "#4a4a4a",
    "reduction load": "#fbc58b",
    "reduction compute": "#e8701a",
}
_ROW = 0.86  # height of a row's bar; the rest is the gap


def write_png(timeline: Timeline, path: str | Path) -> Path:
    """Draw a timeline and save it as PNG.

    Raises
    ------
    UnsupportedError
        matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("pictures: expected matplotlib, it is not installed") from None
    rows = timeline.num_workers
    figure = Figure(figsize=(14, min(3.6 + 0.075 * max(rows, 24), 14)), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [5, 1]})
    _draw_rows(top, timeline)
    _draw_marks(top, timeline)
    _draw_busy(bottom, timeline)
    figure.suptitle(_title(timeline), fontsize=12, x=0.01, ha="left")
    _legend(figure, timeline)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    return target


def _title(timeline: Timeline) -> str:
    multiple = timeline.makespan_us / timeline.floor_us
    what = {
        "predicted": "Predicted",
        "measured": "Measured",
        "interpreter": "CPU interpreter (not a GPU's time)",
    }[timeline.source]
    if timeline.source == "interpreter":
        return f"{timeline.shape}\n{what}: {timeline.makespan_us / 1e6:.2f} s"
    line = f"{what}, {timeline.device}: {timeline.makespan_us:.1f} us = {multiple:.2f} x floor, "
    line += f"SMs idle {100 * timeline.idle_share:.0f}%"
    return f"{timeline.shape}\n{line}"


def _draw_rows(axes: Axes, timeline: Timeline) -> None:
    end = timeline.makespan_us
    half = _ROW / 2
    idle = [(0.0, row - half, end, _ROW) for row in range(timeline.num_workers)]
    _rectangles(axes, idle, _COLORS["idle"])
    if any(s.phases for s in timeline.slices):
        _draw_phases(axes, timeline.slices)
    else:
        _draw_bars(axes, timeline.slices)
    axes.set_ylim(timeline.num_workers - 0.4, -0.6)
    axes.set_xlim(0, end * 1.03)
    axes.set_ylabel("worker" if timeline.source == "interpreter" else "SM")
    step = max(1, -(-timeline.num_workers // 12))
    axes.set_yticks(range(0, timeline.num_workers, step))
    axes.tick_params(labelbottom=True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _draw_bars(axes: Axes, slices: Sequence[Slice]) -> None:
    by_color: dict[str, list[tuple[float, float, float, float]]] = {}
    for s in slices:
        y = s.worker - _ROW / 2
        if s.ready_us > s.start_us:
            wait = (s.start_us, y, s.ready_us - s.start_us, _ROW)
            by_color.setdefault(_COLORS["wait"], []).append(wait)
        by_color.setdefault(_color(s), []).append((s.ready_us, y, s.end_us - s.ready_us, _ROW))
    for color, boxes in by_color.items():
        # A thin white edge keeps neighbours on one SM apart.
        _rectangles(axes, boxes, color, edge="white")


def _draw_phases(axes: Axes, slices: Sequence[Slice]) -> None:
    """Computing over loading, storing over both: what shows of a load, nothing hides."""
    boxes: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}

    def add(layer: str, color: str, s: Slice, start: float, end: float) -> None:
        box = (start, s.worker - _ROW / 2, end - start, _ROW)
        boxes.setdefault((layer, color), []).append(box)

    for s in slices:
        if s.ready_us > s.start_us:
            add("wait", _COLORS["wait"], s, s.start_us, s.ready_us)
        for phase in s.phases:
            color = _COLORS.get(f"{s.kind} {phase.name}", _COLORS[phase.name])
            add(phase.name, color, s, max(phase.start_us, s.ready_us), phase.end_us)
    for layer in ("wait", "load", "compute", "store"):
        for (of_layer, color), found in boxes.items():
            if of_layer == layer:
                _rectangles(axes, found, color)


def _draw_marks(axes: Axes, timeline: Timeline) -> None:
    end, floor = timeline.makespan_us, timeline.floor_us
    axes.axvline(end, color="black", linewidth=1.2)
    axes.annotate(
        f"end {end:.1f} us",
        (end, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    if timeline.source == "interpreter":
        return  # no GPU's floor applies
    axes.axvline(floor, color="#1a7f37", linewidth=1.4, linestyle="--")
    axes.annotate(
        f"floor {floor:.1f} us",
        (floor, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color="#1a7f37",
    )


def _draw_busy(axes: Axes, timeline: Timeline) -> None:
    """Instructions that run, over time; those that only wait are not counted."""
    grid = np.linspace(0, timeline.makespan_us, 800)
    partials, reductions = (_running(timeline, kind, grid) for kind in ("partial", "reduction"))
    axes.stackplot(
        grid, partials, reductions, colors=[_REQUEST_COLORS[0], _COLORS["reduction"]], linewidth=0
    )
    axes.axhline(timeline.num_workers, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_ylabel("running")
    axes.set_xlabel("microseconds")
    axes.set_ylim(0, max(timeline.num_workers, int((partials + reductions).max())) * 1.08)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _running(timeline: Timeline, kind: str, grid: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    chosen = [s for s in timeline.slices if s.kind == kind]
    starts = np.sort([s.ready_us for s in chosen])
    ends = np.sort([s.end_us for s in chosen])
    started = np.searchsorted(starts, grid, "right")
    return np.asarray(started - np.searchsorted(ends, grid, "right"), dtype=np.int64)


def _legend(figure: Figure, timeline: Timeline) -> None:
    from matplotlib.patches import Patch

    handles = []
    if any(s.phases for s in timeline.slices):
        for kind in ("partial", "reduction"):
            for phase in ("load", "compute"):
                color = _COLORS.get(f"{kind} {phase}", _COLORS[phase])
                text = f"{kind}: {phase}" + " (exposed)" * (phase == "load")
                handles.append(Patch(color=color, label=text))
        handles.append(Patch(color=_COLORS["store"], label="store"))
    else:
        requests = sorted({s.request for s in timeline.slices if s.request is not None})
        if len(requests) <= len(_REQUEST_COLORS):
            for r in requests:
                color = _REQUEST_COLORS[r % len(_REQUEST_COLORS)]
                handles.append(Patch(color=color, label=f"partial, request {r}"))
        else:
            handles.append(Patch(color=_REQUEST_COLORS[0], label="partial (shade: request)"))
        kinds = {s.kind for s in timeline.slices}
        for kind in ("reduction", "fill", "no-op"):
            if kind in kinds:
                handles.append(Patch(color=_COLORS[kind], label=kind))
    if any(s.ready_us > s.start_us for s in timeline.slices):
        handles.append(Patch(color=_COLORS["wait"], label="waits for inputs"))
    handles.append(Patch(facecolor=_COLORS["idle"], edgecolor="#cccccc", label="idle"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=10, frameon=False
    )


def _color(s: Slice) -> str:
    if s.request is not None:
        return _REQUEST_COLORS[s.request % len(_REQUEST_COLORS)]
    return _COLORS[s.kind]


def _rectangles(
    axes: Axes,
    boxes: Sequence[tuple[float, float, float, float]],
    color: str,
    edge: str | None = None,
) -> None:
    """Draw boxes (x, y, width, height) in one collection: there may be thousands."""
    from matplotlib.collections import PolyCollection

    corners = [[(x, y), (x + w, y), (x + w, y + h), (x, y + h)] for x, y, w, h in boxes]
    axes.add_collection(
        PolyCollection(
            corners, facecolors=color, edgecolors=edge or "none", linewidths=0.4 if edge else 0
        ),
        autolim=False,
    )
