"""The gate of tools/sanitize.py: explained races are counted, any other is listed."""

from __future__ import annotations

from tools import sanitize

EXPLAINED_RACE = """\
========= Error: Race reported between Write access at mk::ptx::bulk_load(unsigned int, \
const void *, unsigned int, unsigned int)+0x1fc0 in ptx.cuh:94
=========     and Write access at mla::stage_fp32(const kittens::rt<float, (int)16, (int)256, \
kittens::ducks::rt_layout::row> &, int)+0x22310 in staging.cuh:69 [74 hazards]
"""


def test_a_hand_over_that_is_explained_is_counted() -> None:
    counts, others = sanitize.unexplained(EXPLAINED_RACE)
    assert counts == {sanitize.PAGE: 1}
    assert others == []


def test_any_other_pair_is_listed() -> None:
    _, others = sanitize.unexplained(EXPLAINED_RACE.replace("stage_fp32", "absorb"))
    assert len(others) == 1
    assert "bulk_load / absorb" in others[0]


def test_an_error_that_is_no_race_is_listed() -> None:
    _, others = sanitize.unexplained("========= Error: Barrier misused\n" + EXPLAINED_RACE)
    assert others == ["========= Error: Barrier misused"]
