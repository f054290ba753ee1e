"""Sums up what ``ptxas -v`` said and fails on register spills.

python tools/ptxas_report.py [--allow-spills] --out build/ptxas.txt LOG ...
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FUNCTION = re.compile(r"Function properties for (\S+)")
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


@dataclass
class Function:
    """What ptxas reports of one kernel, or of one device function that was not inlined."""

    name: str
    is_kernel: bool = False
    registers: int = 0
    stack_bytes: int = 0
    spill_store_bytes: int = 0
    spill_load_bytes: int = 0
    smem_bytes: int = 0

    @property
    def spills(self) -> bool:
        return self.spill_store_bytes > 0 or self.spill_load_bytes > 0


def parse(report: str) -> list[Function]:
    """Read a ptxas report; a kernel's ``Used`` line follows its properties."""
    functions: dict[str, Function] = {}
    kernels: set[str] = set()
    current = Function("")
    for line in report.splitlines():
        if match := ENTRY.search(line):
            kernels.add(match[1])
            # A kernel's own lines come after it, device functions that it calls in between.
            current = functions.setdefault(match[1], Function(match[1]))
        elif match := FUNCTION.search(line):
            current = functions.setdefault(match[1], Function(match[1]))
        elif match := SPILLS.search(line):
            current.stack_bytes, current.spill_store_bytes, current.spill_load_bytes = map(
                int, match.groups()
            )
        elif match := USED.search(line):
            current.registers = int(match[1])
            current.smem_bytes = int(match[2] or 0)
    for name in kernels:
        functions[name].is_kernel = True
    return list(functions.values())


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return names
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout
    lines = text.splitlines()
    return lines if len(lines) == len(names) else names


def summary(functions: list[Function]) -> str:
    """Return one line per function, spilling ones marked."""
    lines = []
    for function, name in zip(functions, demangled([f.name for f in functions]), strict=True):
        short = re.sub(r"\(.*\)$", "", name)
        short = short if len(short) <= 70 else short[:67] + "..."
        kind = "kernel" if function.is_kernel else "function"
        spill = (
            f"SPILLS {function.spill_store_bytes} B stored, {function.spill_load_bytes} B loaded"
            if function.spills
            else "no spills"
        )
        registers = f"{function.registers} registers, " if function.is_kernel else ""
        lines.append(f"ptxas: {kind} {short}: {registers}{function.stack_bytes} B stack, {spill}")
    return "\n".join(lines)


def warnings(report: str) -> list[str]:
    """Return what ptxas warns of (serialized wgmma, for one), each reason once."""
    lines = [line for line in report.splitlines() if re.search("warning|Performance Loss", line)]
    reasons = [re.sub(r"^.*?: |,? (in|for) the function '.*$", "", line) for line in lines]
    return list(dict.fromkeys(reasons))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="sum up ptxas reports; fail on spills")
    parser.add_argument("--allow-spills", action="store_true")
    parser.add_argument("--out", type=Path, required=True, help="all reports in one file")
    parser.add_argument("logs", type=Path, nargs="+")
    arguments = parser.parse_args(argv)
    report = "".join(path.read_text() for path in arguments.logs)
    functions = parse(report)
    print(summary(functions))
    for warning in warnings(report):
        print(f"ptxas: ** {warning}")
    spilling = [function for function in functions if function.spills]
    if not functions:
        print("ptxas: no function in the report; was -Xptxas -v dropped?")
        return 1
    if spilling and not arguments.allow_spills:
        print(f"ptxas: {len(spilling)} function(s) spill registers; ALLOW_SPILLS=1 builds anyway")
        return 1
    arguments.out.write_text(summary(functions) + "\n\n" + report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
