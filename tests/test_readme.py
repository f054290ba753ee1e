"""What README claims is what was measured, and what it points at is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import mla_decode
import pytest
import torch

from tools import readme_table

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

RECORD: dict[str, Any] = {
    "device": "NVIDIA H200",
    "commit": "0123456789abcdef",
    "date": "2026-01-02",
    "torch": "2.11",
    "cuda": "13.0",
    "benchmark": [
        {"shape": shape, "impl": impl, "us": us, "gbps": 4000.4, "tflops": 650.2, "floor_us": 20.0}
        for shape, impl, us in (
            ("B1_64k_q1_h16", "mla_decode", 25.0),
            ("B1_64k_q1_h16", "flash_mla", 50.0),
            ("B128_4k_q1_h128", "mla_decode", 220.0),
        )
    ],
}


def test_readme_shows_the_newest_results() -> None:
    readme = readme_table.README.read_text(encoding="utf-8")
    table = readme_table.table(readme_table.newest())
    assert readme == readme_table.rewritten(readme, table), "run tools/readme_table.py"


def test_readmes_picture_shows_the_newest_results() -> None:
    assert "docs/figures/measured.svg" in readme_table.README.read_text(encoding="utf-8")
    assert readme_table.is_current(readme_table.newest()), "run tools/readme_table.py"


def test_a_picture_of_other_results_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "measured.svg"
    assert not readme_table.is_current(RECORD, path)
    readme_table.write_picture(RECORD, path)
    assert readme_table.is_current(RECORD, path)
    slower = [row | {"us": row["us"] * 1.1} for row in RECORD["benchmark"]]
    assert not readme_table.is_current(RECORD | {"benchmark": slower}, path)


def test_the_table_has_a_line_per_shape_with_its_own_unit() -> None:
    lines = readme_table.table(RECORD).splitlines()
    assert lines[-2:] == [
        "| B1_64k_q1_h16 | 25.0 | 4000 GB/s | 1.25 | 50.0 (2.00) | – |",
        "| B128_4k_q1_h128 | 220.0 | 650 TFLOP/s | 11.00 | – | – |",
    ]


def test_the_table_says_which_floor_it_counts_with() -> None:
    assert "Floor: as an H200 once gave it" in readme_table.table(RECORD)
    own = {"launch_us": 1.25, "bytes_per_us": 2_000_000, "flop_per_us": 790e6, "measured": True}
    text = readme_table.table(RECORD | {"floor": own})
    assert "Floor: 1.25 us + bytes / 2.00 TB/s (measured on this GPU), or FLOP / 790" in text
    # Half as fast a memory binds this one.
    assert "| B128_4k_q1_h128 | 220.0 | 4000 GB/s |" in text
    assert "ASSUMED" in readme_table.table(RECORD | {"floor": own | {"measured": False}})


def test_the_latest_date_wins(tmp_path: Path) -> None:
    assert readme_table.newest(tmp_path) is None
    (tmp_path / "a.json").write_text('{"date": "2026-02-01"}')
    (tmp_path / "b.json").write_text('{"date": "2026-01-31"}')
    (tmp_path / "pending.json").write_text('{"source_digest": "", "reason": ""}')
    assert readme_table.newest(tmp_path) == {"date": "2026-02-01"}


@pytest.mark.parametrize(
    "readme",
    ["", "<!-- results -->", "<!-- /results --> <!-- results -->"],
    ids=["none", "no end", "wrong order"],
)
def test_a_readme_without_markers_is_refused(readme: str) -> None:
    with pytest.raises(readme_table.TableError, match="expected one"):
        readme_table.rewritten(readme, "table")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|href)=\"([^\"#]+)\"", text)
    local = [link for pair in links for link in pair if link and "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_readme_names_the_two_commands() -> None:
    readme = readme_table.README.read_text(encoding="utf-8")
    assert "\nmake demo" in readme
    assert "\nmake test" in readme


@pytest.fixture(scope="module")
def examples() -> dict[str, str]:
    """The README's Python, by what is shown. It takes a GPU if there is one, of whatever kind; the
    promise here is the CPU's."""
    readme = readme_table.README.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names = ("call", "graph", "compile", "flash_mla", "context_parallel")
    assert len(blocks) == len(names)
    return {
        name: block.replace("torch.cuda.is_available()", "False")
        for name, block in zip(names, blocks, strict=True)
    }


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def test_the_examples_of_one_process_run_as_they_stand(
    examples: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "flash_mla", types.ModuleType("flash_mla"))
    assert all(len(example.splitlines()) <= 25 for example in examples.values())
    names: dict[str, Any] = {}
    exec(examples["call"], names)
    assert list(names["out"].shape) == [2, 4, 16, 512]
    assert list(names["lse"].shape) == [2, 16, 4]
    q, kv_cache, table = names["q"], names["kv_cache"], names["block_table"]

    exec(examples["graph"], names)
    assert names["lengths"].tolist() == [4641 + 12, 1730 + 12]
    for cache, (out, _) in zip((kv_cache, kv_cache.flip(0)), names["results"], strict=True):
        expected, _ = mla_decode.decode(q, cache, table, [4653, 1742])
        assert relative_error(out, expected) < 4e-3

    # The source of what torch.compile compiles must be in a file.
    path = tmp_path / "layer.py"
    path.write_text(examples["compile"])
    torch._dynamo.reset()
    exec(compile(path.read_text(), str(path), "exec"), names)
    halved, _ = mla_decode.decode(q * 0.5, kv_cache, table, [4653, 1742])
    assert relative_error(names["compiled"], halved + 1) < 4e-3

    exec(examples["flash_mla"], names)
    expected, expected_lse = mla_decode.decode(q, kv_cache, table, [4653, 1742])
    assert relative_error(names["flash_out"], expected) < 4e-3
    torch.testing.assert_close(names["flash_lse"], expected_lse, rtol=1e-5, atol=1e-5)


def test_the_context_parallel_example_runs_on_two_ranks(
    examples: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        examples["call"]
        + examples["context_parallel"]
        + "error = float((merged.double() - out.double()).norm() / out.double().norm())\n"
        + "assert error < 4e-3, error\n"
        + f"open(rf'{tmp_path}/rank{{rank}}of{{ranks}}', 'w').close()\n"
        + "dist.destroy_process_group()\n"
    )
    answer = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", path],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "python"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert answer.returncode == 0, answer.stderr
    assert {path.name for path in tmp_path.glob("rank*")} == {"rank0of2", "rank1of2"}


def test_the_format_page_has_every_rule_of_the_validator() -> None:
    header = (ROOT / "scheduler" / "validator.h").read_text(encoding="utf-8")
    rules = re.findall(r'\{"([a-z-]+)", "([^"]+)"\};', header)
    page = (ROOT / "docs" / "instruction-format.md").read_text(encoding="utf-8")
    assert [rule for rule, meaning in rules if f"| `{rule}` | {meaning} |" not in page] == []
    assert len(rules) > 20


def test_the_tutorial_quotes_its_opcode() -> None:
    def squeezed(text: str) -> str:
        return " ".join(re.sub(r"\s*//.*", "", text).split())

    page = (ROOT / "docs" / "writing-an-opcode.md").read_text(encoding="utf-8")
    source = "".join(squeezed(p.read_text()) for p in sorted((ROOT / "demos").glob("*.cu*")))
    blocks = re.findall(r"```cpp\n(.*?)```", page, re.DOTALL)
    quoted = [line for block in blocks for line in block.splitlines() if line.strip() != "..."]
    absent = [line for line in map(squeezed, quoted) if line not in source]
    # Signatures and the launch are shown in short.
    assert [line for line in absent if not re.match(r"static int |mk::launch", line)] == []
