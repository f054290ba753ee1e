"""Which shapes a command line asks for: by name, from a file, at random."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.shapes import SERVING_SHAPES, SHAPES, Shape, random_shapes, read_shapes

ALL_SHAPES = {**SHAPES, **SERVING_SHAPES}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--shapes``, ``--file``, ``--random`` and ``--seed``."""
    parser.add_argument("--shapes", nargs="+", metavar="NAME", help=f"of {', '.join(ALL_SHAPES)}")
    parser.add_argument("--file", type=Path, help="shapes of your own, in JSON")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="random batches instead")
    parser.add_argument("--seed", type=int, default=0, help="of the random batches")


def chosen(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, otherwise: Iterable[Shape]
) -> list[Shape]:
    """Return the shapes that were asked for, or ``otherwise``; a wrong one ends the program."""
    unknown = set(arguments.shapes or []) - set(ALL_SHAPES)
    if unknown:
        parser.error(f"unknown shapes {sorted(unknown)}; known are {', '.join(ALL_SHAPES)}")
    shapes = [ALL_SHAPES[name] for name in arguments.shapes or []]
    own = []
    if arguments.file:
        try:
            own = read_shapes(arguments.file)
        except (OSError, ValueError) as error:
            parser.error(f"--file: {error}")
    if arguments.random < 0:
        parser.error(f"--random: expected at least 0, got {arguments.random}")
    shapes += own + random_shapes(arguments.random, arguments.seed)
    times = Counter(shape.name for shape in shapes)
    for shape in own:  # figures are told apart by the name
        if times[shape.name] > 1:
            parser.error(f"--file: expected names of one shape each, got {shape.name!r} again")
    return shapes or list(otherwise)
