"""The benchmark: microseconds, GB/s, TFLOP/s and the multiple of the physical limit, beside peers.

The limit of the memory is measured first, on the GPU at hand (`benchmarks.floor`).

python -m benchmarks.bench [--serving] [--shapes NAME ...] [--file FILE] [--random N --seed S]
                           [--impls NAME ...] [--out FILE] [--report FOLDER]
python -m benchmarks.bench --planning
python -m benchmarks.bench --floor
python -m benchmarks.bench --step [--layers N] [--shapes NAME ...] [--file FILE]
                           [--random N --seed S]

`python -m mla_decode bench` is the same. A file of shapes is a list in JSON:
[{"name": "mine", "seq_lens": [4096, 100], "new_tokens": 1, "num_heads": 16}, ...],
new_tokens also one number per request, block_size if it is not 64.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import choice, floor, planning, report
from benchmarks.implementations import IMPLEMENTATIONS, STEPS
from benchmarks.measure import REPLAYS, Row, measure
from benchmarks.shapes import SERVING_SHAPES, SHAPES, Shape

ROOT = Path(__file__).resolve().parent.parent
OURS = report.OURS
LAYERS = 61  # of DeepSeek-V3
SHAPE_OPTIONS = ("shapes", "file", "random", "seed", "serving")
IGNORED = {  # by the tables that are not of calls
    "step": ("out", "report", "impls"),
    "planning": ("step", "floor", "layers", "out", "report", "impls", *SHAPE_OPTIONS),
    "floor": ("step", "layers", "out", "report", "impls", *SHAPE_OPTIONS),
}
HEADER = (
    f"{'shape':<28} {'impl':<15} {'us':>8} {'GB/s':>7} {'TFLOP/s':>8} {'x floor':>8} {'rel err':>8}"
)


def commit() -> str:
    """Return COMMIT's value, for copies without their history; else the checked-out commit."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    command = ["git", "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return "unknown"
    return answer.stdout.strip() if answer.returncode == 0 else "unknown"


def speedups(rows: list[Row]) -> str:
    """Return how many times faster than each peer ours is on the shape of ``rows``."""
    times = {row.impl: row.us for row in with_figures(rows)}
    if OURS not in times:
        return ""
    return "  ".join(
        f"{us / times[OURS]:.2f}x {impl}" for impl, us in times.items() if impl != OURS
    )


def table_lines(rows: list[Row]) -> list[str]:
    """Return the table's lines of one shape."""
    lines = []
    for row in rows:
        text = f"{row.shape.name:<28} {row.impl:<15} "
        if row.has_figure:
            text += f"{row.us:8.2f} {row.gbps:7.0f} {row.tflops:8.1f} "
            text += f"{row.us / row.floor_us:8.2f} {row.rel_err:8.1e}"
            text += f"  {speedups(rows)}" if row.impl == OURS else ""
        elif not row.error:
            text += f"{'–':>8} {'–':>7} {'–':>8} {'–':>8} {'–':>8}"
        if row.error:
            text += f"  ** {row.error}"
        lines.append(text)
    return lines


def summary(rows: list[Row]) -> str:
    """Return how our times compare with the faster peer's over shapes that both have."""
    times: dict[str, dict[str, float]] = {}
    memory_bound = {row.shape.name for row in rows if row.floor.is_memory_bound(row.shape)}
    for row in with_figures(rows):
        times.setdefault(row.shape.name, {})[row.impl] = row.us
    ratios = {
        name: min(us for impl, us in of.items() if impl != OURS) / of[OURS]
        for name, of in times.items()
        if OURS in of and len(of) > 1
    }
    lines = []
    for which, names in (
        ("all", list(ratios)),
        ("memory-bound", [name for name in ratios if name in memory_bound]),
    ):
        if len(names) > 1:
            mean = statistics.geometric_mean(ratios[name] for name in names)
            least = min(names, key=ratios.__getitem__)
            lines.append(
                f"{which}, {len(names)} shapes: the faster peer takes {mean:.2f} times as long as "
                f"ours (geometric mean), at least {ratios[least]:.2f} ({least})"
            )
    return "\n".join(lines)


def title() -> str:
    """What the figures are of."""
    name, cuda = torch.cuda.get_device_name(), torch.version.cuda
    return f"{name}, torch {torch.__version__}, CUDA {cuda}, commit {commit()[:12]}"


def with_progress(shapes: list[Shape]) -> Iterator[Shape]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield from shapes
        return
    from rich.console import Console
    from rich.progress import Progress

    # The table goes through the bar's console where both are on a terminal; a file gets it itself.
    redirected = sys.stdout.isatty()
    console = Console(stderr=True)
    with Progress(console=console, transient=True, redirect_stdout=redirected) as progress:
        yield from progress.track(shapes, description="shapes")


def run(shapes: list[Shape], impls: list[str], replays: int = REPLAYS) -> list[Row]:
    """Measure the floor, then measure and print every shape; return the rows."""
    print(title(), flush=True)
    own_floor = floor.of_this_gpu()
    print(HEADER, flush=True)
    rows = []
    for shape in with_progress(shapes):
        measured = measure(shape, impls, replays=replays, floor=own_floor)
        print("\n".join(table_lines(measured)), flush=True)
        rows += measured
        torch.cuda.empty_cache()
    print(f"floor: {own_floor}")
    if compared := summary(rows):
        print(compared)
    return rows


def run_steps(shapes: list[Shape], layers: int, replays: int) -> list[Row]:
    """Measure and print decode steps of so many layers, planned on the GPU; return the rows."""
    print(title())
    print(f"one decode step of {layers} layers, planning on the GPU included, ms")
    print(f"{'shape':<28} " + " ".join(f"{impl:>12}" for impl in STEPS) + "  times as long as ours")
    rows = []
    for shape in with_progress(shapes):
        measured = measure(shape, list(STEPS), replays=replays, layers=layers)
        cells = [f"{row.us / 1e3:12.3f}" if row.has_figure else f"{'–':>12}" for row in measured]
        why = "".join(f"  ** {row.impl}: {row.error}" for row in measured if row.error)
        print(f"{shape.name:<28} " + " ".join(cells) + f"  {speedups(measured)}{why}", flush=True)
        rows += measured
        torch.cuda.empty_cache()
    return rows


def failures(rows: list[Row]) -> list[str]:
    """Return which outputs were wrong, anyone's, and where ours did not run."""
    return [
        f"{row.shape.name}, {row.impl}: {row.error}"
        for row in rows
        if row.error and (row.impl == OURS or math.isfinite(row.us))
    ]


def exit_code(rows: list[Row]) -> int:
    """Return 1 if an output was wrong or ours did not run."""
    return 1 if failures(rows) else 0


def with_figures(rows: list[Row]) -> list[Row]:
    """Return the rows that have a figure to trust."""
    return [row for row in rows if row.has_figure]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description="MLA decode beside its peers")
    choice.add_options(parser)
    parser.add_argument(
        "--serving", action="store_true", help="block sizes, mixed batches, batch invariance"
    )
    parser.add_argument("--planning", action="store_true", help="planning on the GPU instead")
    parser.add_argument(
        "--floor", action="store_true", help="instead, the streams that the floor is a line through"
    )
    parser.add_argument(
        "--step", action="store_true", help="decode steps of --layers layers instead of calls"
    )
    parser.add_argument("--layers", type=int, default=LAYERS, help="of a step (DeepSeek-V3 has 61)")
    parser.add_argument("--impls", nargs="+", choices=list(IMPLEMENTATIONS), metavar="NAME")
    parser.add_argument("--replays", type=int, default=REPLAYS)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="write CSV, JSON, pictures and Markdown"
    )
    arguments = parser.parse_args(argv)
    table = SERVING_SHAPES if arguments.serving else SHAPES
    arguments.chosen = choice.chosen(parser, arguments, table.values())
    refuse_what_is_ignored(parser, arguments)
    for name in ("layers", "replays"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    check_places(parser, arguments)
    return arguments


def refuse_what_is_ignored(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program where an option has no effect on the table that is asked for."""
    for mode, ignored in IGNORED.items():
        given = [name for name in ignored if getattr(arguments, name) != parser.get_default(name)]
        if getattr(arguments, mode) and given:
            options = ", ".join(f"--{name}" for name in given)
            parser.error(f"--{mode} prints a table of its own: expected no {options}")


def check_places(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """End the program, before anything is measured, where the files cannot be written."""
    out, folder = arguments.out, arguments.report
    if out and (out.is_dir() or not out.parent.is_dir()):
        parser.error(f"--out: expected a file in a folder that is there, got {out}")
    if folder and not next(place for place in (folder, *folder.parents) if place.exists()).is_dir():
        parser.error(f"--report: expected a folder, or a place for one, got {folder}")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if an output was wrong or ours did not run, 2 without a GPU."""
    arguments = parse(argv)
    if not torch.cuda.is_available():
        print(f"bench: no CUDA GPU (torch {torch.__version__})", file=sys.stderr)
        return 2
    if arguments.planning:
        return planning.run(arguments.replays)
    if arguments.floor:
        return floor.run(arguments.replays)
    if arguments.step:
        return exit_code(run_steps(arguments.chosen, arguments.layers, arguments.replays))
    rows = run(arguments.chosen, arguments.impls or list(IMPLEMENTATIONS), arguments.replays)
    written = write_files(rows, arguments.out, arguments.report)
    return exit_code(rows) if written else 1


def write_files(rows: list[Row], out: Path | None, folder: Path | None) -> bool:
    """Write the rows and the report where they are asked for; False if one could not be."""
    unwritten = []
    if out:
        try:
            out.write_text(report.json_of(with_figures(rows)), encoding="utf-8")
        except OSError as error:
            unwritten.append(f"--out: {error}")
    if folder:
        try:
            print(f"report: {report.write_report(folder, rows, title())}")
        except OSError as error:
            unwritten.append(f"--report: {error}")
    for problem in unwritten:
        print(f"bench: {problem}", file=sys.stderr)
    return not unwritten


if __name__ == "__main__":
    sys.exit(main())
