"""The gate of tools/sanitize.py: explained races are counted, any other is listed."""

from __future__ import annotations

from tools import sanitize

EXPLAINED_RACE = """\
========= Error: Race reported between Write access at mla::WideConsumer<mla::MlaConfig<\
__nv_bfloat16, (bool)1, (bool)0>>::put_rows(float *, const float (&)[2])+0x1fc0 in \
wide_consumer.cuh:94
=========     and Read access at mla::WideConsumer<mla::MlaConfig<__nv_bfloat16, (bool)1, \
(bool)0>>::add_others(int)+0x22310 in wide_consumer.cuh:41 [74 hazards]
"""


def test_a_hand_over_that_is_explained_is_counted() -> None:
    counts, others = sanitize.unexplained(EXPLAINED_RACE)
    assert counts == {sanitize.HAND_OVER: 1}
    assert others == []


def test_any_other_pair_is_listed() -> None:
    _, others = sanitize.unexplained(EXPLAINED_RACE.replace("add_others", "absorb"))
    assert len(others) == 1
    assert "put_rows / absorb" in others[0]


def test_no_kind_of_race_is_lost_behind_another() -> None:
    first = EXPLAINED_RACE.replace("add_others", "absorb")
    second = EXPLAINED_RACE.replace("add_others", "store")
    _, others = sanitize.unexplained(30 * first + second)
    assert sanitize.kinds(others) == {"put_rows / absorb": 30, "put_rows / store": 1}


def test_an_error_that_is_no_race_is_listed() -> None:
    _, others = sanitize.unexplained("========= Error: Barrier misused\n" + EXPLAINED_RACE)
    assert others == ["========= Error: Barrier misused"]
