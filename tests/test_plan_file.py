"""Plans on disk that are damaged, or that nobody wrote."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import mla_decode
import pytest
from mla_decode.errors import QueueError


@pytest.mark.parametrize("name", ["plan.json", "plan.npz"])
def test_damage_is_a_queue_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    mla_decode.plan([3000, 65], 8, 2).save(path)
    good = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            mla_decode.Plan.load(path)
        except QueueError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_workers": 0}, "num_workers: expected 1 to 16384, got 0"),
        ({"num_workers": 1 << 40}, "num_workers: expected 1 to 16384"),
        ({"worker": [-9] * 89}, "worker: expected 0 or more, got -9"),
        ({"split_tiles": -3}, "split_tiles: expected 0 or more, got -3"),
        ({"predicted_us": float("nan")}, "predicted_us: expected finite times"),
        ({"num_heads": 8.9}, "num_heads: expected an integer, got 8.9"),
        ({"new_tokens": 2.5}, "new_tokens: expected an integer, got 2.5"),
        ({"new_tokens": True}, "new_tokens: expected an integer, got True"),
    ],
)
def test_what_the_digest_does_not_cover_is_checked(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "plan.json"
    mla_decode.plan([3000, 65], 8, 2).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(QueueError, match=message):
        mla_decode.Plan.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000, "[]", "\xff"])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(QueueError):
        mla_decode.Plan.load(path)
