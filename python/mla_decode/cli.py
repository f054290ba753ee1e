"""Command line: ``python -m mla_decode {demo,plan,tune,trace,bench,doctor}``."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import cost, doctor, measure, native, reference, timeline
from ._scheduler import get_quality
from .errors import MlaDecodeError, UnsupportedError
from .picture import write_png
from .planning import POLICIES, Plan, plan
from .trace_file import write_trace
from .words import GROUP_ROWS, MAX_REDUCTION_INPUTS, MAX_ROWS

if TYPE_CHECKING:
    from rich.console import Console

DEMO_SEQ_LENS = (4641, 45118, 1730, 1696)
DEMO_NEW_TOKENS = 4
DEMO_HEADS = 16

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_UNSUPPORTED = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns
    -------
    int
        0 done, 1 a wrong result or a bad input, 2 bad usage, 3 not possible on this machine.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command is not _bench:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    command: Callable[[argparse.Namespace, Console], int] = arguments.command
    try:
        return command(arguments, _console())
    except UnsupportedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_UNSUPPORTED
    except (MlaDecodeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED


def parse_seq_lens(text: str) -> list[int]:
    """Lengths as written on the command line: ``4641,45118`` or ``4096x128``."""
    lengths: list[int] = []
    for part in text.replace(" ", ",").split(","):
        if not part:
            continue
        length, _, times = part.partition("x")
        try:
            lengths += [int(length)] * (int(times) if times else 1)
        except ValueError:
            message = f"expected lengths such as 4641,45118 or 4096x128, got {part!r}"
            raise argparse.ArgumentTypeError(message) from None
    if not lengths:
        raise argparse.ArgumentTypeError(f"expected at least one length, got {text!r}")
    return lengths


# Commands


def _demo(arguments: argparse.Namespace, console: Console) -> int:
    job = _Job.of(arguments)
    made = job.plan(arguments)
    floor = made.floor_us
    console.print(
        f"[bold]batch[/]      {timeline.describe_shape(made)}, block size {job.block_size}"
    )
    console.print(f"[bold]schedule[/]   {made.summary()}")
    pieces = made.partials_per_request()
    console.print(f"[bold]splits[/]     {_short(pieces)} pieces per request")
    made.validate()
    console.print("[bold]validator[/]  every row and token covered once, no deadlock possible")
    console.print(f"[bold]device[/]     {job.device_name}")
    case = job.case()
    out, lse = case.poisoned_outputs()
    started = time.perf_counter()
    measure.decode_case(case, made, out=out, lse=lse, check_block_table=True)
    native.synchronize(job.device)
    elapsed = time.perf_counter() - started
    if job.on_gpu:
        us = measure.decode_us(case, made)
        console.print(
            f"[bold]time[/]       {us:.1f} us per call (CUDA graph replay) = "
            f"{us / floor:.2f} x the floor of {floor:.1f} us"
        )
    else:
        console.print(
            f"[bold]time[/]       {elapsed:.2f} s in the CPU interpreter: it executes the same "
            f"words, but says nothing about a GPU (floor there: {floor:.1f} us)"
        )
    errors = reference.compare(out, lse, *reference.attention(case))
    console.print(f"[bold]error[/]      against float64: {errors}")
    drawn = job.timeline(case, made) if job.on_gpu else timeline.predicted(made)
    _write_timeline(drawn, arguments.out, f"demo-{drawn.source}", console)
    console.print("[bold green]passed[/]" if errors.passed else "[bold red]FAILED[/]")
    return EXIT_OK if errors.passed else EXIT_FAILED


def _plan(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.load:
        made = Plan.load(arguments.load)
    else:
        made = _Job.of(arguments).plan(arguments)
        made.validate()
    console.print(f"[bold]batch[/]     {timeline.describe_shape(made)}")
    console.print(f"[bold]schedule[/]  {made.summary()}")
    console.print(f"[bold]splits[/]    {_short(made.partials_per_request())} pieces per request")
    console.print(f"[bold]scratch[/]   {made.workspace_bytes / 2**20:.1f} MiB")
    if arguments.table:
        console.print(made.table(), markup=False, highlight=False)
    if arguments.save:
        made.save(arguments.save)
        console.print(f"saved {arguments.save}")
    return EXIT_OK


def _tune(arguments: argparse.Namespace, console: Console) -> int:
    from rich.box import SIMPLE
    from rich.progress import Progress
    from rich.table import Table

    job = _Job.of(arguments)
    candidates = _candidates(arguments)
    case = job.case() if job.on_gpu else None
    results: list[tuple[float, float | None, Plan, float | None]] = []
    with Progress(console=console, transient=True) as progress:
        for policy, tiles, group_rows in progress.track(candidates, description="tuning"):
            made = plan(
                job.seq_lens,
                job.num_heads,
                job.new_tokens,
                num_workers=arguments.num_workers,
                device=job.device,
                policy=policy,
                split_tiles=tiles,
                group_rows=group_rows,
            )
            us = measure.decode_us(case, made, arguments.replays) if case is not None else None
            results.append((made.predicted_us, us, made, _quality(made)))
    results.sort(key=lambda r: r[0] if r[1] is None else r[1])
    table = Table(title=timeline.describe_shape(results[0][2]), box=SIMPLE)
    table.add_column("policy", no_wrap=True)
    for name in ("pieces", "instr.", "quality", "predicted us", "measured us", "x floor"):
        table.add_column(name, justify="right", no_wrap=True)
    for predicted_us, us, made, quality in results:
        best = predicted_us if us is None else us
        table.add_row(
            _name(made),
            str(sum(made.partials_per_request())),
            str(made.num_instructions),
            "-" if quality is None else f"{quality:.1f}",
            f"{predicted_us:.2f}",
            "-" if us is None else f"{us:.2f}",
            f"{best / made.floor_us:.2f}",
        )
    console.print(table)
    if case is None:
        console.print(f"simulated only: {job.device_name}")
    winner = results[0][2]
    console.print(f"best: {_name(winner)}")
    if arguments.save:
        winner.save(arguments.save)
        console.print(f"saved {arguments.save}")
    return EXIT_OK


def _trace(arguments: argparse.Namespace, console: Console) -> int:
    job = _Job.of(arguments)
    made = Plan.load(arguments.load) if arguments.load else job.plan(arguments)
    console.print(f"[bold]schedule[/]  {made.summary()}")
    _write_timeline(timeline.predicted(made), arguments.out, "trace-predicted", console)
    if job.on_gpu or arguments.interpreter:
        job = job.with_lengths_of(made)
        drawn = job.timeline(job.case(), made)
        _write_timeline(drawn, arguments.out, f"trace-{drawn.source}", console)
    else:
        console.print(f"predicted only: {job.device_name}")
    return EXIT_OK


def _bench(arguments: argparse.Namespace, console: Console) -> int:
    try:
        full = importlib.import_module("benchmarks.bench")
    except ModuleNotFoundError as error:
        if error.name not in ("benchmarks", "benchmarks.bench"):
            raise UnsupportedError(f"bench: expected {error.name}, it is not installed") from None
        if arguments.rest:
            raise UnsupportedError(
                f"bench: {' '.join(arguments.rest)}: expected the repository's benchmarks; "
                "without them only the demo's batch is timed"
            ) from None
        return _small_bench(console)
    return int(full.main(arguments.rest))


def _small_bench(console: Console) -> int:
    device = torch.device("cuda")
    if not torch.cuda.is_available():
        raise UnsupportedError(f"bench: {native.missing() or 'no CUDA device'}")
    native.require(device)
    case = reference.make_case(DEMO_SEQ_LENS, DEMO_HEADS, DEMO_NEW_TOKENS, device=device)
    made = plan(DEMO_SEQ_LENS, DEMO_HEADS, DEMO_NEW_TOKENS)
    us, out, lse = measure.decode_us_and_outputs(case, made)
    errors = reference.compare(out, lse, *reference.attention(case))
    if not errors.passed:
        console.print(f"[bold red]FAILED[/]: wrong output, no figure: {errors}")
        return EXIT_FAILED
    moved = cost.traffic_bytes(case.seq_lens, case.num_heads, case.new_tokens)
    console.print(
        f"{torch.cuda.get_device_name()}: {timeline.describe_shape(made)}: {us:.1f} us, "
        f"{moved / us / 1e3:.0f} GB/s, {us / made.floor_us:.2f} x floor"
    )
    return EXIT_OK


def _doctor(arguments: argparse.Namespace, console: Console) -> int:
    del arguments
    findings = doctor.examine()
    colors = {"ok": "green", "missing": "red", "info": "cyan"}
    for f in findings:
        console.print(f"[{colors[f.state]}]{f.state:8}[/] {f.what:11}", end="")
        console.print(f.detail, markup=False, highlight=False)
    able = doctor.can_launch(findings)
    console.print(
        "The megakernel can run here."
        if able
        else "The megakernel cannot run here; the scheduler and the interpreter can."
    )
    return EXIT_OK


# What the commands share


@dataclass(frozen=True)
class _Job:
    """A batch, and where it runs."""

    seq_lens: list[int]
    num_heads: int
    new_tokens: int | Sequence[int]
    block_size: int
    seed: int
    device: torch.device
    device_name: str
    num_kv_heads: int = 1
    padding_tokens: int = 0

    @staticmethod
    def of(arguments: argparse.Namespace) -> _Job:
        device, name = _device(arguments.device)
        return _Job(
            seq_lens=list(arguments.seq_lens),
            num_heads=arguments.heads,
            new_tokens=arguments.new_tokens,
            block_size=arguments.block_size,
            seed=arguments.seed,
            device=device,
            device_name=name,
        )

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def plan(self, arguments: argparse.Namespace) -> Plan:
        return plan(
            self.seq_lens,
            self.num_heads,
            self.new_tokens,
            num_workers=arguments.num_workers,
            device=self.device,
            policy=arguments.policy,
            split_tiles=arguments.split_tiles,
            group_rows=arguments.group_rows,
        )

    def with_lengths_of(self, made: Plan) -> _Job:
        return _Job(
            made.seq_lens.tolist(),
            made.num_heads,
            made.new_tokens,
            self.block_size,
            self.seed,
            self.device,
            self.device_name,
            made.num_kv_heads,
            made.total_tokens - sum(made.tokens),
        )

    def case(self) -> reference.Case:
        return reference.make_case(
            self.seq_lens,
            self.num_heads,
            self.new_tokens,
            self.block_size,
            seed=self.seed,
            device=self.device,
            h_kv=self.num_kv_heads,
            padding_tokens=self.padding_tokens,
        )

    def timeline(self, case: reference.Case, made: Plan) -> timeline.Timeline:
        records = measure.timing_records(case, made)
        return timeline.measured(made, records, self.device_name if self.on_gpu else "cpu")


def _device(choice: str) -> tuple[torch.device, str]:
    """The device to run on, and its name or why there is none."""
    reason = native.missing() if torch.cuda.is_available() else "no CUDA GPU"
    if choice == "cpu" or (choice == "auto" and reason):
        why = "" if choice == "cpu" else f" ({reason})"
        return torch.device("cpu"), f"CPU interpreter{why}"
    if reason:
        raise UnsupportedError(f"device: expected a Hopper GPU, {reason}")
    device = torch.device("cuda", torch.cuda.current_device())
    native.require(device)
    return device, torch.cuda.get_device_name(device)


def _write_timeline(drawn: timeline.Timeline, folder: Path, name: str, console: Console) -> None:
    trace = write_trace(drawn, folder / f"{name}.perfetto.json")
    try:
        console.print(
            f"[bold]timeline[/]   {write_png(drawn, folder / f'{name}.png')}", soft_wrap=True
        )
    except UnsupportedError as error:
        console.print(f"[bold]timeline[/]   no picture: {error}")
    console.print(f"[bold]trace[/]      {trace} (open in https://ui.perfetto.dev)")


def _candidates(arguments: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Policy, tiles per piece and rows of a row group of the plans to compare."""
    rows = arguments.heads * arguments.new_tokens
    smaller = [size for size in GROUP_ROWS if size < min(rows, MAX_ROWS)]
    others = [policy for policy in POLICIES if policy not in ("balanced", "fixed")]
    return [
        *(("balanced", 0, size) for size in (MAX_ROWS, *smaller)),
        *((policy, 0, MAX_ROWS) for policy in others),
        *(("fixed", tiles, MAX_ROWS) for tiles in arguments.tiles),
    ]


def _quality(made: Plan) -> float | None:
    """Quality of the longest request's split; None if it is not split.

    Its pieces run on a processor each and feed the fewest reductions that hold them, all due
    at the finish.
    """
    longest = int(made.seq_lens.argmax())
    pieces = made.partials_per_request()[longest]
    if pieces < 2:
        return None
    due = [0.0] * -(-pieces // MAX_REDUCTION_INPUTS)
    return get_quality(due, pieces, max(made.tokens[longest], 1), int(made.seq_lens[longest]))


def _name(made: Plan) -> str:
    tiles = f" {made.split_tiles}" if made.split_tiles else ""
    groups = f", {made.group_rows} rows" if made.group_rows < MAX_ROWS else ""
    return f"{made.policy}{tiles}{groups}"


def _short(pieces: list[int]) -> str:
    if len(pieces) <= 8:
        return ", ".join(str(p) for p in pieces)
    return f"{min(pieces)} to {max(pieces)}"


def _console() -> Console:
    try:
        from rich.console import Console
    except ImportError:
        raise UnsupportedError("command line: expected rich, it is not installed") from None
    width = None if sys.stdout.isatty() else 120
    return Console(highlight=False, soft_wrap=True, width=width)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mla_decode", description="MLA decode on Hopper"
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser("demo", help="schedule, run and check a batch of four requests")
    _add_batch(demo)
    _add_planner(demo)
    _add_out(demo)
    demo.set_defaults(command=_demo)

    planning = commands.add_parser("plan", help="make, print, save or load a plan")
    _add_batch(planning)
    _add_planner(planning)
    planning.add_argument("--table", action="store_true", help="print every instruction")
    planning.add_argument("--save", type=Path, metavar="FILE", help="write it: .json or .npz")
    planning.add_argument("--load", type=Path, metavar="FILE", help="read a plan instead")
    planning.set_defaults(command=_plan)

    tune = commands.add_parser("tune", help="compare policies, split sizes and row groups")
    _add_batch(tune)
    tune.add_argument("--num-workers", type=int, help="SMs; those of the GPU, or 132")
    tune.add_argument(
        "--tiles",
        type=int,
        nargs="+",
        default=[2, 4, 8, 16, 32, 64],
        metavar="N",
        help="tiles of 64 tokens per piece to try",
    )
    tune.add_argument("--replays", type=int, default=measure.REPLAYS)
    tune.add_argument("--save", type=Path, metavar="FILE", help="write the best plan")
    tune.set_defaults(command=_tune)

    trace = commands.add_parser("trace", help="write timelines: a picture and a Perfetto trace")
    _add_batch(trace)
    _add_planner(trace)
    _add_out(trace)
    trace.add_argument("--load", type=Path, metavar="FILE", help="trace a saved plan")
    trace.add_argument("--interpreter", action="store_true", help="time the interpreter on the CPU")
    trace.set_defaults(command=_trace)

    bench = commands.add_parser("bench", help="the benchmark, beside the peers", add_help=False)
    bench.set_defaults(command=_bench)

    look = commands.add_parser("doctor", help="what is installed, and what is missing")
    look.set_defaults(command=_doctor)
    return parser


def _add_batch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seq-lens",
        type=parse_seq_lens,
        default=DEMO_SEQ_LENS,
        metavar="LENGTHS",
        help="such as 4641,45118 or 4096x128",
    )
    parser.add_argument("--heads", type=int, default=DEMO_HEADS)
    parser.add_argument("--new-tokens", type=int, default=DEMO_NEW_TOKENS)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)


def _add_planner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-workers", type=int, help="SMs; those of the GPU, or 132")
    parser.add_argument("--policy", choices=POLICIES, default="balanced")
    parser.add_argument("--split-tiles", type=int, default=0, help="tiles per piece, for fixed")
    parser.add_argument("--group-rows", type=int, choices=GROUP_ROWS, help="rows of a row group")


def _add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build") / "timelines",
        metavar="DIR",
        help="where timelines go",
    )
