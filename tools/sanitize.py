"""Run a small batch under compute-sanitizer: memcheck, racecheck and synccheck.

    python tools/sanitize.py [--tools memcheck ...]

Needs a GPU and compute-sanitizer on the PATH; not 0 if a tool reports anything that EXPLAINED does
not explain. The batches have partials that write the output and partials that write scratch, full
and ragged tiles, causal masks, rows of one and of several groups, of 64 rows and of fewer,
reductions of one and of two levels, and instructions of all kinds on the same CTAs.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck")


class Batch(NamedTuple):
    lengths: list[int]
    heads: int
    tokens: int
    block_size: int
    ctas: int
    tiles: int  # per partial; 0: as the planner cuts
    group_rows: int = 64


BATCHES = (
    Batch([1, 63, 64, 65, 700], 16, 1, 64, 8, 1),
    Batch([130, 2500], 16, 4, 128, 12, 1),
    Batch([300], 128, 2, 64, 8, 1),
    Batch([64 * 60], 8, 1, 256, 60, 1),
    Batch([700, 450], 16, 1, 64, 3, 5),
    Batch([700, 450], 16, 4, 64, 3, 5),
    Batch([390], 64, 1, 16, 2, 7),
    Batch([300, 65], 24, 2, 64, 8, 1, group_rows=16),
    Batch([300, 65], 24, 2, 64, 8, 1, group_rows=32),
)
# Partials that adopt the results of others.
ADOPTING = (
    Batch([900] * 9, 16, 1, 64, 6, 0),
    Batch([900] * 9, 16, 4, 16, 6, 0),
)
# Partials shared by mates of clusters. Not under racecheck, which did not end with them in 100 s.
SHARED = (
    Batch([1000, 700], 16, 1, 64, 16, 0),
    Batch([1000, 700], 16, 2, 16, 16, 0),
    Batch([1000, 700], 64, 1, 64, 16, 0),
    Batch([1000], 24, 2, 64, 32, 0, group_rows=16),
)

# racecheck follows __syncthreads and the thread that arrives at an mbarrier. It does not follow
# what that thread has seen of its warp (__syncwarp, then one lane arrives), nor a barrier at which
# some warps arrive and others wait. So it reports the accesses on the two sides of such a
# hand-over; each pair below is ordered by the barrier that is named.
RING_SLOT = "a ring slot is rebuilt after every warp has arrived at `retired`"
PAGE = "a page changes hands through `page_free`, after its last reader and writer arrived"
HAND_OVER = "the warpgroups of a wide partial hand P to each other by kEvenPReady and kOddPReady"
NOTE = "notes of what a role waits for are for the watchdog; whoever comes last may have the word"
EXPLAINED = {
    frozenset({"note"}): NOTE,
    frozenset({"note", "clear_note"}): NOTE,
    frozenset({"decode", "word"}): RING_SLOT,
    frozenset({"decode", "num_tiles_of"}): RING_SLOT,
    frozenset({"decode", "PartialWork"}): RING_SLOT,
    frozenset({"decode", "ReductionWork"}): RING_SLOT,
    frozenset({"decode", "physical_page"}): RING_SLOT,
    frozenset({"grant_pages", "physical_page"}): RING_SLOT,
    frozenset({"mbar_init", "mbar_arrive"}): RING_SLOT,
    frozenset({"mbar_init", "mbar_arrive_expect_tx"}): RING_SLOT,
    frozenset({"mbar_init", "mbar_try_wait"}): RING_SLOT,
    frozenset({"mbar_invalidate", "mbar_arrive"}): RING_SLOT,
    frozenset({"mbar_invalidate", "mbar_arrive_expect_tx"}): RING_SLOT,
    frozenset({"mbar_invalidate", "mbar_try_wait"}): RING_SLOT,
    frozenset({"clear_rows", "load_smem_float4"}): PAGE,
    frozenset({"put_rows", "add_others"}): HAND_OVER,
}


def function_name(text: str) -> str:
    """The innermost function of a sanitizer line: the name before the last argument list."""
    while "<" in text:  # template arguments hold function types of their own
        shorter = re.sub(r"<[^<>]*>", "", text)
        if shorter == text:
            break
        text = shorter
    names = re.findall(r"(\w+)\(", text)
    return names[-1] if names else text.strip()


def unexplained(report: str) -> tuple[dict[str, int], list[str]]:
    """Count the explained races of a racecheck report by reason, and list the others."""
    counts: dict[str, int] = {}
    others: list[str] = []
    first = ""
    for line in report.splitlines():
        access = re.search(r"(Race reported between|and) (?:Read|Write) access at (.*)\+0x", line)
        if access is None:
            if "Error" in line and "Race reported" not in line and "Target" not in line:
                others.append(line)
            continue
        name = function_name(access.group(2))
        if access.group(1) != "and":
            first = name
            continue
        reason = EXPLAINED.get(frozenset({first, name}))
        if reason is None:
            others.append(f"{first} / {name}: {line.strip()}")
        else:
            counts[reason] = counts.get(reason, 0) + 1
    return counts, others


def kinds(others: list[str]) -> dict[str, int]:
    """Count the races that are not explained by their pair of functions, all of them."""
    return dict(collections.Counter(other.split(":")[0] for other in others))


def run_batches(tool: str) -> int:
    """Decode every batch for a tool once and compare it with float64; 1 if an output is wrong."""
    sys.path.insert(0, str(ROOT / "python"))
    import mla_decode
    from mla_decode import reference

    batches = BATCHES + ADOPTING + (() if tool == "racecheck" else SHARED)
    for lengths, heads, tokens, block_size, ctas, tiles, group_rows in batches:
        case = reference.make_case(lengths, heads, tokens, block_size).to("cuda")
        policy = "fixed" if tiles > 0 else "balanced"
        plan = mla_decode.plan(
            lengths,
            heads,
            tokens,
            num_workers=ctas,
            policy=policy,
            split_tiles=tiles,
            group_rows=group_rows,
        )
        if tiles == 0 and plan.cluster_ctas == 1 and not (plan.instructions[:, 13] > 0).any():
            print(f"{lengths} heads {heads} tokens {tokens}: the plan neither shares nor adopts")
            return 1
        out, lse = mla_decode.decode(
            case.q,
            case.kv_cache,
            case.block_table,
            case.seq_lens,
            plan=plan,
            spin_timeout_ns=200_000_000_000,  # everything is slow under the sanitizer
        )
        mla_decode.synchronize()
        errors = reference.compare(out, lse, *reference.attention(case))
        print(f"{lengths} heads {heads} tokens {tokens}: {plan.num_instructions} instructions")
        if not errors.passed:
            print(f"wrong output: {errors}")
            return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--batches", choices=TOOLS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.batches:
        return run_batches(arguments.batches)
    return max(run_tool(tool) for tool in arguments.tools)


def run_tool(tool: str) -> int:
    """Run the batches under one tool; print a line, and what it found."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "3"]
    command += [sys.executable, __file__, "--batches", tool]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if tool == "racecheck" and run.returncode == 3:
        counts, others = unexplained(run.stdout)
        print(f"{tool}: {sum(counts.values())} explained, {len(others)} not")
        for reason, count in counts.items():
            print(f"    {count} x {reason}")
        for pair, count in kinds(others).items():
            print(f"    {count} x {pair}, for one:")
            print(next(other for other in others if other.startswith(pair)))
        return 1 if others or not counts else 0
    print(f"{tool}: {'clean' if run.returncode == 0 else 'FAILED'}")
    if run.returncode != 0:
        print(run.stdout[-6000:], run.stderr[-2000:])
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
