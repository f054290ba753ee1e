"""The role that hangs is named, whichever it is, and the next launch works.

The instructions are those of ``hanging.cu``: one role waits for ever, or a page is kept, and all
others come to their end.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

TIMEOUT_US = 20_000
FIRST_UID = 100  # no uid is a place in the queue
RING = 4  # instructions in flight: a hang may keep the next from its slot
ROLES = ("loader", "launcher", "consumer", "storer")
FINE: dict[str, int] = {}  # an instruction in which nobody hangs


class Gpu:
    """Launches, all with the same queue state."""

    def __init__(self) -> None:
        from tests import _hanging

        self.native: Any = _hanging
        self.device = torch.cuda.current_device()
        self.sms: int = _hanging.num_sms(self.device)
        self.state = torch.zeros(_hanging.QUEUE_STATE_WORDS, dtype=torch.int32, device="cuda")

    def run(
        self, queue: list[dict[str, int]], num_ctas: int = 1
    ) -> tuple[dict[str, int] | None, list[int]]:
        """Return the failure record, and how many warps came to the end of each instruction."""
        words = [
            self.native.instruction(FIRST_UID + place, **instruction)
            for place, instruction in enumerate(queue)
        ]
        instructions = torch.tensor(words, dtype=torch.int32, device="cuda")
        finished = torch.zeros(FIRST_UID + len(queue), dtype=torch.int32, device="cuda")
        self.native.run(
            instructions.data_ptr(),
            len(queue),
            self.state.data_ptr(),
            finished.data_ptr(),
            TIMEOUT_US,
            num_ctas,
            torch.cuda.current_stream().cuda_stream,
            self.device,
        )
        torch.cuda.synchronize()
        record = self.native.take_failure(self.device)
        if record is not None:
            assert 0 <= record.pop("sm") < self.sms
        return record, finished[FIRST_UID:].tolist()

    def hang(self, role: str, semaphore: int, **options: int) -> dict[str, int]:
        return {"waiter": self.native.ROLES[role], "semaphore": semaphore, **options}

    def record(self, role: str, place: int, wait: int, index: int, parity: int) -> dict[str, int]:
        """What is to be reported of the instruction at this place of the queue."""
        return {
            "role": self.native.ROLES[role],
            "instruction": place,
            "uid": FIRST_UID + place,
            "opcode": self.native.OPCODE,
            "wait": wait,
            "index": index,
            "expected": parity,
            "seen": 1 - parity,
        }

    def works(self) -> bool:
        """Every warp of every instruction comes to its end, on one SM and on all, twice."""
        length = 3 * self.sms
        fine = None, [self.native.WARPS] * length
        return all(self.run([FINE] * length, num_ctas) == fine for num_ctas in (1, self.sms) * 2)


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.mark.parametrize(("before", "behind"), [(0, 0), (0, 2), (6, 0), (6, 2), (0, RING), (6, 9)])
@pytest.mark.parametrize("role", ROLES)
def test_the_role_that_hangs_is_named(role: str, before: int, behind: int, gpu: Gpu) -> None:
    semaphore = gpu.native.NUM_SEMAPHORES - 1
    queue = [FINE] * before + [gpu.hang(role, semaphore)] + [FINE] * behind
    record, finished = gpu.run(queue)
    assert record == gpu.record(role, before, gpu.native.WAIT_SEMAPHORE, semaphore, parity=0)
    waiting = gpu.native.CONSUMER_WARPS if role == "consumer" else 1
    warps = gpu.native.WARPS
    assert finished[: before + 1] == [warps] * before + [warps - waiting]
    assert gpu.works()


@pytest.mark.parametrize("behind", [0, RING])
def test_one_warp_that_hangs_is_named_though_the_others_of_its_role_go_on(
    behind: int, gpu: Gpu
) -> None:
    queue = [FINE, gpu.hang("consumer", 3, num_waiting_warps=1)] + [FINE] * behind
    record, finished = gpu.run(queue)
    assert record == gpu.record("consumer", 1, gpu.native.WAIT_SEMAPHORE, 3, parity=0)
    assert finished[:2] == [gpu.native.WARPS, gpu.native.WARPS - 1]
    assert gpu.works()


@pytest.mark.parametrize("page", [0, 4])
def test_a_page_that_is_kept_is_missed_by_the_next_loader(page: int, gpu: Gpu) -> None:
    record, finished = gpu.run([FINE, FINE, {"kept_page": page}, FINE, FINE])
    # The third phase of the page does not end: phases count from 0.
    assert record == gpu.record("loader", 3, gpu.native.WAIT_PAGE, page, parity=0)
    warps = gpu.native.WARPS
    assert finished == [warps, warps, warps, warps - 1, 0]
    assert gpu.works()


@pytest.mark.parametrize("role", ROLES)
def test_where_all_sms_hang_one_of_them_is_named(role: str, gpu: Gpu) -> None:
    record, _ = gpu.run([gpu.hang(role, 7)] * gpu.sms, gpu.sms)
    assert record is not None
    place = record["instruction"]
    assert 0 <= place < gpu.sms
    assert record == gpu.record(role, place, gpu.native.WAIT_SEMAPHORE, 7, parity=0)
    assert gpu.works()
