"""The benchmark's rows as files: CSV, JSON, pictures, and a page of Markdown that shows them.

``table.csv`` and ``rows.json`` hold every row; ``multiples.png`` how far each implementation is
from the limit, shape by shape; ``roofline.png`` the rates against the arithmetic intensity;
``latency.png`` the time against bytes, lengths and batch. The limit is the floor of the rows, which
all have the same. A row with an error has no figure anywhere.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import Row
from benchmarks.shapes import Shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# An implementation looks the same in every picture.
_STYLES = {
    "mla_decode": ("#1f5fa8", "o"),
    "flash_mla": ("#f08c2e", "s"),
    "flashinfer_fa3": ("#3f8a8c", "^"),
}
_OTHER_STYLE = ("#999999", "D")
_LIMIT = "#4a4a4a"
_BARS = 0.8  # of the room of a shape


def write_report(folder: Path, rows: Sequence[Row], title: str) -> Path:
    """Write all files into ``folder`` and return the path of ``report.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    good = [row for row in rows if not row.error and math.isfinite(row.us)]
    write_csv(folder / "table.csv", good)
    document = [row.as_json() for row in good]
    (folder / "rows.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    pictures = write_pictures(folder, good) if good else []
    report = folder / "report.md"
    report.write_text(markdown(rows, title, pictures), encoding="utf-8")
    return report


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """One line per row; the fields of `Row.as_json`."""
    lines = [row.as_json() for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        if not lines:
            return
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def markdown(rows: Sequence[Row], title: str, pictures: Sequence[str] = ()) -> str:
    """A table with a line per shape and a column per implementation, then the pictures."""
    floor = rows[0].floor
    impls = list(dict.fromkeys(row.impl for row in rows))
    shapes = _shapes_of(rows)
    cells = {(row.shape.name, row.impl): _cell(row) for row in rows}
    lines = [
        f"# {title}",
        "",
        "Microseconds per call; in brackets how many times the limit, which is the time to stream "
        f"the bytes or to do the arithmetic, whichever is longer: {floor}.",
        "",
        "| shape | limit, us | " + " | ".join(impls) + " |",
        "|---|---:|" + "---:|" * len(impls),
    ]
    for shape in shapes:
        line = " | ".join(cells.get((shape.name, impl), "–") for impl in impls)
        lines.append(f"| {shape.name} | {floor.us(shape):.1f} | {line} |")
    notes = [f"- {row.shape.name}, {row.impl}: {row.error}" for row in rows if row.error]
    if notes:
        lines += ["", "Without a figure:", "", *notes]
    for picture in pictures:
        lines += ["", f"![{Path(picture).stem}]({picture})"]
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if row.error or not math.isfinite(row.us):
        return "–"
    return f"{row.us:.1f} ({row.us / row.floor_us:.2f})"


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
    return 9.0, 1.6 + 0.42 * len(shapes)


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
    axes.set_yticks(range(len(shapes)), [shape.name for shape in shapes])
    axes.invert_yaxis()
    axes.set_xlabel("time as a multiple of the limit (1: nothing can be faster)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)


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
    """Both axes logarithmic, labelled 1, 2, 5, 10, ... with plain numbers."""
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter(lambda value, _: f"{value:,g}" if f"{value:e}"[0] in "25" else "")
