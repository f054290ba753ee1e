"""The benchmark's rows as files: CSV, JSON, pictures, and a page of Markdown that shows them.

``table.csv`` and ``rows.json`` hold every row; ``multiples.png`` how far each implementation is
from the limit, shape by shape; ``roofline.png`` the rates against the arithmetic intensity;
``latency.png`` the time against bytes, lengths and batch. The limit is the floor of the rows, which
all have the same. A row with an error has no figure anywhere. Without matplotlib there are no
pictures, and the page says so.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import Row
from benchmarks.shapes import Shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

OURS = "mla_decode"
# An implementation looks the same in every picture.
_STYLES = {
    "mla_decode": ("#1f5fa8", "o"),
    "flash_mla": ("#f08c2e", "s"),
    "flashinfer_fa3": ("#3f8a8c", "^"),
}
_OTHER_STYLE = ("#999999", "D")
_LIMIT = "#4a4a4a"
_BARS = 0.8  # of the room of a shape
_MANY_DECADES, _FEW_DECADES = 3.0, 0.6  # of an axis: labels at 1 alone, at 2 and 5, at all


def write_report(folder: Path, rows: Sequence[Row], title: str) -> Path:
    """Write all files into ``folder`` and return the path of ``report.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    good = [row for row in rows if row.has_figure]
    write_csv(folder / "table.csv", good)
    (folder / "rows.json").write_text(json_of(good), encoding="utf-8")
    pictures, why_none = [], ""
    try:
        pictures = write_pictures(folder, good) if good else []
    except ModuleNotFoundError as error:
        why_none = f"No pictures: expected {error.name or 'matplotlib'}, it is not installed."
        print(f"report: {why_none}", file=sys.stderr)
    report = folder / "report.md"
    report.write_text(markdown(rows, title, pictures, why_none), encoding="utf-8")
    return report


def record(row: Row) -> dict[str, str | float]:
    """Return a row's fields: those of the results files, and the multiple of the floor."""
    return row.as_json() | {"x_floor": round(row.us / row.floor_us, 3)}


def json_of(rows: Iterable[Row]) -> str:
    """Return the rows as a JSON document."""
    return json.dumps([record(row) for row in rows], indent=1) + "\n"


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """One line per row; the fields of `record`."""
    lines = [record(row) for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        if not lines:
            return
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def markdown(
    rows: Sequence[Row], title: str, pictures: Sequence[str] = (), why_none: str = ""
) -> str:
    """A table with a line per shape and columns per implementation, then the pictures."""
    floor = rows[0].floor
    impls = list(dict.fromkeys(row.impl for row in rows))
    shapes = _shapes_of(rows)
    by_place = {(row.shape.name, row.impl): row for row in rows}
    lines = [
        f"# {title}",
        "",
        "Microseconds per call; in brackets how many times the limit, which is the time to stream "
        f"the bytes or to do the arithmetic, whichever is longer: {floor}. Rates are of that one.",
        "",
    ]
    header = ["shape", "limit, us", *(name for impl in impls for name in _columns(impl, impls))]
    lines += [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 1)]
    for shape in shapes:
        ours = by_place.get((shape.name, OURS))
        cells = [_one_line(shape.name).replace("|", "\\|"), f"{floor.us(shape):.1f}"]
        for impl in impls:
            own = _cells(by_place.get((shape.name, impl)), ours)
            cells += own[: len(_columns(impl, impls))]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"- {_one_line(row.shape.name)}, {row.impl}: {row.error}" for row in rows if row.error]
    if notes:
        lines += ["", "Without a figure:", "", *notes]
    for picture in pictures:
        lines += ["", f"![{Path(picture).stem}]({picture})"]
    if why_none:
        lines += ["", why_none]
    return "\n".join(lines) + "\n"


def _columns(impl: str, impls: Sequence[str]) -> list[str]:
    """The header of an implementation: of a peer also its time over ours."""
    ratio = [f"{impl} / {OURS}"] if impl != OURS and OURS in impls else []
    return [impl, "rate", *ratio]


def _cells(row: Row | None, ours: Row | None) -> tuple[str, str, str]:
    """Time, rate, and time over ours."""
    if row is None or not row.has_figure:
        return "–", "–", "–"
    time = f"{row.us:.1f} ({row.us / row.floor_us:.2f})"
    bound_by_memory = row.floor.is_memory_bound(row.shape)
    rate = f"{row.gbps:.0f} GB/s" if bound_by_memory else f"{row.tflops:.0f} TFLOP/s"
    return time, rate, f"{row.us / ours.us:.2f}" if ours and ours.has_figure else "–"


def _one_line(name: str) -> str:
    return " ".join(name.split())


# Pictures


def write_pictures(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Draw what there is to draw; return the names of the files."""
    shapes = _shapes_of(rows)
    sizes = {
        "multiples": _multiples_size(shapes),
        "roofline": (8.0, 5.0),
        "latency": (13.0, 4.4),
    }
    draw = {"multiples": _draw_multiples, "roofline": _draw_roofline, "latency": _draw_latency}
    names = []
    for name, size in sizes.items():
        figure = _new_figure(size)
        draw[name](figure, rows, shapes)
        figure.savefig(folder / f"{name}.png", dpi=120)
        names.append(f"{name}.png")
    return names


def write_multiples(path: Path, rows: Sequence[Row], title: str, description: str) -> None:
    """Draw the picture of the multiples alone, as an SVG that says of itself what it shows."""
    import matplotlib

    shapes = _shapes_of(rows)
    figure = _new_figure(_multiples_size(shapes))
    _draw_multiples(figure, rows, shapes)
    figure.suptitle(title, fontsize=10)
    metadata = {"Title": title, "Description": description, "Date": None}
    # The same file every time, with its text as text.
    with matplotlib.rc_context({"svg.hashsalt": "multiples", "svg.fonttype": "none"}):
        figure.savefig(path, facecolor="white", metadata=metadata)


def _new_figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _multiples_size(shapes: Sequence[Shape]) -> tuple[float, float]:
    return 9.0, 1.8 + 0.42 * len(shapes)


def _shapes_of(rows: Sequence[Row]) -> list[Shape]:
    return list({row.shape.name: row.shape for row in rows}.values())


def _style(impl: str) -> tuple[str, str]:
    return _STYLES.get(impl, _OTHER_STYLE)


def _of_impls(rows: Sequence[Row]) -> dict[str, list[Row]]:
    impls: dict[str, list[Row]] = {}
    for row in rows:
        impls.setdefault(row.impl, []).append(row)
    return impls


def _draw_multiples(figure: Figure, rows: Sequence[Row], shapes: Sequence[Shape]) -> None:
    axes: Axes = figure.subplots()
    place = {shape.name: index for index, shape in enumerate(shapes)}
    impls = _of_impls(rows)
    height = _BARS / len(impls)
    for index, (impl, own) in enumerate(impls.items()):
        at = [place[row.shape.name] - _BARS / 2 + (index + 0.5) * height for row in own]
        multiples = [row.us / row.floor_us for row in own]
        axes.barh(at, multiples, height * 0.92, color=_style(impl)[0], label=impl)
        for y, multiple in zip(at, multiples, strict=True):
            axes.annotate(
                f"{multiple:.2f}", (multiple, y), (3, 0), textcoords="offset points", va="center",
                fontsize=7,
            )  # fmt: skip
    axes.axvline(1.0, color=_LIMIT, linewidth=1)
    names = [_one_line(shape.name) for shape in shapes]
    axes.set_yticks(range(len(shapes)), names, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("time as a multiple of the limit (1: nothing can be faster)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(impls), frameon=False)


def _draw_roofline(figure: Figure, rows: Sequence[Row], shapes: Sequence[Shape]) -> None:
    axes: Axes = figure.subplots()
    floor = rows[0].floor
    intensities = [shape.flop / shape.bytes for shape in shapes]
    ridge = floor.flop_per_us / floor.bytes_per_us
    low, high = min(intensities) / 1.5, max(max(intensities) * 1.5, 2 * ridge)
    roof = [(x, min(x * floor.bytes_per_us, floor.flop_per_us) / 1e6) for x in (low, ridge, high)]
    axes.plot(*zip(*roof, strict=True), color=_LIMIT, linewidth=1.5)
    axes.annotate(
        f"{floor.bytes_per_us / 1e6:.1f} TB/s, then {floor.flop_per_us / 1e6:.0f} TFLOP/s", roof[1],
        (8, 4), textcoords="offset points", fontsize=9, color=_LIMIT,
    )  # fmt: skip
    for impl, own in _of_impls(rows).items():
        color, marker = _style(impl)
        x = [row.shape.flop / row.shape.bytes for row in own]
        axes.plot(x, [row.tflops for row in own], marker, color=color, label=impl, alpha=0.8)
    _plain_logarithmic(axes)
    axes.set(xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    axes.set_xlim(low, high)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)


def _draw_latency(figure: Figure, rows: Sequence[Row], shapes: Sequence[Shape]) -> None:
    sizes: dict[str, Callable[[Shape], float]] = {
        "cache that is read, MB": lambda shape: shape.kv_bytes / 1e6,
        "longest request, keys": lambda shape: max(shape.seq_lens),
        "requests": lambda shape: len(shape.seq_lens),
    }
    floor = rows[0].floor
    panels = figure.subplots(1, len(sizes), sharey=True)
    for axes, (label, size) in zip(panels, sizes.items(), strict=True):
        limits = sorted((size(shape), floor.us(shape)) for shape in shapes)
        axes.plot(*zip(*limits, strict=True), "_", color=_LIMIT, markersize=12, label="limit")
        for impl, own in _of_impls(rows).items():
            color, marker = _style(impl)
            x, us = [size(row.shape) for row in own], [row.us for row in own]
            axes.plot(x, us, marker, label=impl, color=color, alpha=0.8)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, which="major", color="#e6e6e6", linewidth=0.6)
        _plain_logarithmic(axes)
    panels[0].set_ylabel("us per call")
    panels[0].legend(loc="upper left", frameon=False)


def _plain_logarithmic(axes: Axes) -> None:
    """Both axes logarithmic, with plain numbers: 1, 2, 5, 10, ...; a long one 1, 10, 100, ..."""
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: _short(value))
        axis.set_minor_formatter(partial(_minor_label, axis))


def _minor_label(axis: Axis, value: float, position: int | None = None) -> str:
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    digits = "" if decades > _MANY_DECADES else "25" if decades > _FEW_DECADES else "23456789"
    return _short(value) if f"{value:e}"[0] in digits else ""


def _short(value: float) -> str:
    return f"{value / 1e3:,g}k" if value >= 1e3 else f"{value:g}"
