"""What README claims is what was measured, and what it points at is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

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


def test_the_table_has_a_line_per_shape_with_its_own_unit() -> None:
    lines = readme_table.table(RECORD).splitlines()
    assert lines[-2:] == [
        "| B1_64k_q1_h16 | 25.0 | 4000 GB/s | 1.25 | 50.0 (2.00) | – |",
        "| B128_4k_q1_h128 | 220.0 | 650 TFLOP/s | 11.00 | – | – |",
    ]


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


def test_the_usage_example_runs_as_it_stands() -> None:
    readme = readme_table.README.read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(example.splitlines()) <= 15
    names: dict[str, Any] = {}
    # The example takes a GPU if there is one, of whatever kind; the promise here is the CPU's.
    exec(example.replace("torch.cuda.is_available()", "False"), names)
    assert list(names["out"].shape) == [2, 4, 16, 512]
    assert list(names["lse"].shape) == [2, 16, 4]


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
