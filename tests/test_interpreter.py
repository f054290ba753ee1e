"""The interpreter: real numerics, every legal interleaving, epochs, and deadlocks as such."""

from __future__ import annotations

import time

import mla_decode
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mla_decode import interpreter
from mla_decode.errors import DeadlockError, RangeError
from mla_decode.reference import attention, compare, make_case
from mla_decode.words import Noop, Partial, Reduction

from tests.support import Launch, pack, same_bits

EPOCH_WORD = interpreter.STATE_EPOCH


def split_in_two(
    length: int = 130, *, request: int = 0, first_uid: int = 0
) -> tuple[Partial, Partial, Reduction]:
    """A request of one token in two partials and the reduction that merges them."""
    a, b = first_uid, first_uid + 1
    return (
        Partial(uid=a, dst_batch=-a - 1, q_batch=request, start=0, end=64, length=length),
        Partial(uid=b, dst_batch=-b - 1, q_batch=request, start=64, end=length, length=length),
        Reduction(uid=first_uid + 2, dst_batch=request, dst_seq=0, inputs=(a, b)),
    )


# Numerics


def test_hand_made_queue_gives_attention() -> None:
    case = make_case([130], 16, 1)
    launch = Launch.of(case, pack(*split_in_two(), Noop(uid=3)), num_slots=2)
    launch.run()
    errors = compare(launch.o, launch.lse, *attention(case))
    assert errors.passed, errors


def test_reduction_tree_in_slices_gives_attention() -> None:
    """Two levels; slices of heads and of columns, each with a slot of its own."""
    case = make_case([256], 16, 1)
    partials = [
        Partial(uid=i, dst_batch=-i - 1, q_batch=0, start=64 * i, end=64 * i + 64, length=256)
        for i in range(4)
    ]
    level, final, slot = [], [], 4
    for head in (0, 8):
        for column in (0, 256):
            piece = {"head_begin": head, "num_heads": 8, "col_begin": column, "num_cols": 256}
            for pair in ((0, 1), (2, 3)):
                level.append(Reduction(slot, -slot - 1, 0, pair, **piece))
                slot += 1
            final.append(Reduction(100 + slot, 0, 0, (slot - 2, slot - 1), **piece))
    launch = Launch.of(case, pack(*partials, *level, *final), num_slots=slot)
    launch.run()
    errors = compare(launch.o, launch.lse, *attention(case))
    assert errors.passed, errors


def test_row_groups_cover_128_heads() -> None:
    case = make_case([100], 128, 1)
    groups = [
        Partial(
            uid=i, dst_batch=0, q_batch=0, start=0, end=100, length=100, row_begin=r, num_rows=n
        )
        for i, (r, n) in enumerate([(0, 64), (64, 0)])
    ]
    launch = Launch.of(case, pack(*groups), num_slots=0)
    launch.run()
    errors = compare(launch.o, launch.lse, *attention(case))
    assert errors.passed, errors


def test_token_without_a_visible_key_is_zero_and_inf() -> None:
    """Length 1 with 4 new tokens: the first three see nothing, alone and through a merge."""
    case = make_case([1], 8, 4)
    through_merge = [
        Partial(uid=0, dst_batch=-1, q_batch=0, start=0, end=1, length=1),
        *(Reduction(uid=1 + t, dst_batch=0, dst_seq=t, inputs=(0,)) for t in range(4)),
    ]
    for queue in (
        [Partial(uid=0, dst_batch=0, q_batch=0, start=0, end=1, length=1)],
        through_merge,
    ):
        launch = Launch.of(case, pack(*queue), num_slots=1)
        launch.run()
        assert bool((launch.o[:, :3] == 0).all())
        assert bool((launch.lse[:, :, :3] == torch.inf).all())
        errors = compare(launch.o, launch.lse, *attention(case))
        assert errors.passed, errors


def test_end_mark_ends_the_queue() -> None:
    case = make_case([130], 16, 1)
    words = pack(*split_in_two(), Noop(uid=3))
    words[2, 0] = -1
    launch = Launch.of(case, words, num_slots=2)
    launch.run()
    assert bool(launch.o.isnan().all()), "the reduction after the end mark ran"
    assert launch.timings[:, 0].tolist() == [1, 1, 0, 0]


def test_one_key_too_many_reads_the_poison() -> None:
    """Proves the trap: a queue that is one token too long does read NaN."""
    case = make_case([100], 8, 1)
    for length, poisoned in ((100, False), (101, True)):
        queue = pack(Partial(uid=0, dst_batch=0, q_batch=0, start=0, end=length, length=length))
        launch = Launch.of(case, queue, num_slots=0)
        launch.run()
        assert bool(launch.o.isnan().any()) == poisoned


def test_block_id_inside_the_length_is_checked() -> None:
    case = make_case([64, 130], 8, 1)
    case.block_table[1, 2] = 1000
    with pytest.raises(RangeError, match=r"request 1, block 2: expected 0 to \d+, got 1000"):
        mla_decode.interpret(case.q, case.kv_cache, case.block_table, case.seq_lens)


def test_demo_batch_is_right_and_quick() -> None:
    lengths = [4641, 45118, 1730, 1696]
    case = make_case(lengths, 16, 4)
    started = time.perf_counter()
    out, lse = mla_decode.interpret(case.q, case.kv_cache, case.block_table, lengths)
    elapsed = time.perf_counter() - started
    errors = compare(out, lse, *attention(case))
    assert errors.passed, errors
    assert elapsed < 20


# Interleavings

batches = st.tuples(
    st.lists(st.one_of(st.integers(1, 300), st.integers(300, 2500)), min_size=1, max_size=5),
    st.sampled_from((8, 16, 32, 64, 128)),
    st.integers(1, 4),
    st.sampled_from((64, 128, 256)),
)


@settings(max_examples=25)
@given(
    batch=batches, sms=st.integers(1, 160), workers=st.integers(1, 160), seed=st.integers(0, 2**32)
)
def test_every_plan_validates_and_every_interleaving_agrees(
    batch: tuple[list[int], int, int, int], sms: int, workers: int, seed: int
) -> None:
    lengths, heads, tokens, block = batch
    case = make_case(lengths, heads, tokens, block, seed=seed % 1000)
    plan = mla_decode.plan(lengths, heads, tokens, num_workers=sms)
    plan.validate()

    def interpret(**options: int) -> tuple[torch.Tensor, torch.Tensor]:
        return mla_decode.interpret(
            case.q, case.kv_cache, case.block_table, lengths, plan, **options
        )

    out, lse = interpret()
    errors = compare(out, lse, *attention(case))
    assert errors.passed, errors
    shuffled_out, shuffled_lse = interpret(num_workers=workers, seed=seed)
    assert same_bits(out, shuffled_out)
    assert same_bits(lse, shuffled_lse)


@pytest.mark.parametrize("policy", ("balanced", "backward", "unsplit", "fixed"))
def test_every_policy_gives_attention(policy: str) -> None:
    lengths = [700, 1, 3000]
    case = make_case(lengths, 16, 2)
    plan = mla_decode.plan(lengths, 16, 2, policy=policy, split_tiles=3 if policy == "fixed" else 0)
    out, lse = mla_decode.interpret(
        case.q, case.kv_cache, case.block_table, lengths, plan, num_workers=9, seed=1
    )
    errors = compare(out, lse, *attention(case))
    assert errors.passed, errors


def test_seeds_give_different_orders_and_the_same_seed_the_same() -> None:
    case = make_case([2000], 8, 1)
    plan = mla_decode.plan([2000], 8, num_workers=8)

    def order(seed: int) -> list[tuple[int, int]]:
        launch = Launch.of_plan(case, plan)
        run = interpreter.run(launch.arguments(), num_workers=8, seed=seed)
        return [(step.index, step.worker) for step in run.steps]

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(5)}) == 5


def test_workers_finish_their_own_in_order_and_start_at_their_index() -> None:
    case = make_case([3000], 8, 1)
    plan = mla_decode.plan([3000], 8, num_workers=6)
    launch = Launch.of_plan(case, plan)
    run = interpreter.run(launch.arguments(), num_workers=6, seed=4)
    assert sorted(step.index for step in run.steps) == list(range(plan.num_instructions))
    for worker in range(6):
        mine = [step.index for step in run.steps if step.worker == worker]
        assert mine == sorted(mine)
        assert mine[0] == worker


def test_reader_runs_after_every_input_is_published() -> None:
    case = make_case([3000, 500], 16, 2)
    plan = mla_decode.plan([3000, 500], 16, 2)
    run = interpreter.run(Launch.of_plan(case, plan).arguments(), num_workers=40, seed=9)
    steps = {step.index: step for step in run.steps}
    decoded = plan.decoded()
    writer = {i.slot: n for n, i in enumerate(decoded) if not isinstance(i, Noop)}
    checked = 0
    for n, instruction in enumerate(decoded):
        if isinstance(instruction, Reduction):
            for slot in instruction.inputs:
                assert steps[writer[slot]].published < steps[n].executed
                checked += 1
    assert checked > 0


def test_a_missing_dependency_shows_under_some_interleaving() -> None:
    """Flags raised by hand beforehand: the reduction may run first, and then reads NaN."""
    case = make_case([130], 8, 1)
    poisoned = 0
    for seed in range(20):
        launch = Launch.of(case, pack(*split_in_two()), num_slots=2)
        launch.completion_flag.fill_(1)  # the epoch of the first launch
        interpreter.run(launch.arguments(), num_workers=3, seed=seed)
        poisoned += bool(launch.o.isnan().any())
    assert 0 < poisoned < 20


# Epochs


def test_launches_on_one_workspace_advance_the_epoch() -> None:
    case = make_case([130], 8, 1)
    launch = Launch.of(case, pack(*split_in_two()), num_slots=2)
    state = launch.global_instruction_index
    results = []
    for number in range(1, 5):
        launch.poison()
        launch.run()
        results.append(launch.o.clone())
        assert state[interpreter.STATE_NEXT_TICKET] == 0
        assert state[EPOCH_WORD] == number
        assert launch.completion_flag.flatten().tolist() == [number, number]
    assert all(same_bits(results[0], result) for result in results)
    assert not results[0].isnan().any()


def test_flags_of_an_earlier_launch_satisfy_nobody() -> None:
    case = make_case([130], 8, 1)
    launch = Launch.of(case, pack(*split_in_two()), num_slots=2)
    for seed in range(20):
        launch.poison()
        interpreter.run(launch.arguments(), num_workers=3, seed=seed)
        assert not launch.o.isnan().any()


@pytest.mark.parametrize("tics", [(0, 0, 0), (0, 1, 2), (1, 0, 1), (7, 7, 0)], ids=str)
def test_any_tic_gives_a_new_epoch(tics: tuple[int, ...]) -> None:
    case = make_case([130], 8, 1)
    launch = Launch.of(case, pack(*split_in_two()), num_slots=2)
    epochs = []
    for tic in tics:
        launch.tensors["tic"] = tic
        launch.poison()
        launch.run()
        epochs.append(int(launch.completion_flag[0, 0]))
        assert not launch.o.isnan().any()
    assert len(set(epochs)) == len(epochs)


def test_epoch_wraps_around() -> None:
    case = make_case([130], 8, 1)
    launch = Launch.of(case, pack(*split_in_two()), num_slots=2)
    launch.global_instruction_index[EPOCH_WORD] = 2**31 - 1
    launch.run()
    assert launch.global_instruction_index[EPOCH_WORD] == -(2**31)
    assert not launch.o.isnan().any()


# Deadlocks


def test_input_that_nothing_writes_is_a_deadlock() -> None:
    case = make_case([130], 8, 1)
    first, _, merge = split_in_two()
    launch = Launch.of(case, pack(first, merge), num_slots=2)
    with pytest.raises(DeadlockError) as caught:
        launch.run()
    (line,) = caught.value.waits
    assert "worker 0: instruction 1 (uid 2, reduction)" in line
    assert "flag [slot 1, token 0] == 1, sees 0: nothing in the queue writes it" in line


def test_launch_after_a_deadlock_works() -> None:
    case = make_case([130], 8, 1)
    first, second, merge = split_in_two()
    broken = Launch.of(case, pack(first, merge), num_slots=2)
    with pytest.raises(DeadlockError):
        broken.run()
    fine = Launch.of(case, pack(first, second, merge), num_slots=2)
    for name in ("global_instruction_index", "o_scratch", "lvec_scratch", "completion_flag"):
        fine.tensors[name] = broken.tensors[name]
    fine.run()
    assert compare(fine.o, fine.lse, *attention(case)).passed


def test_reader_before_its_input_deadlocks_one_worker_but_not_two() -> None:
    case = make_case([130], 8, 1)
    first, second, merge = split_in_two()
    queue = pack(merge, first, second)
    with pytest.raises(
        DeadlockError, match="uid 0 writes it, held by worker 0 behind its own wait"
    ):
        interpreter.run(Launch.of(case, queue, num_slots=2).arguments(), num_workers=1)
    launch = Launch.of(case, queue, num_slots=2)
    interpreter.run(launch.arguments(), num_workers=2, seed=0)
    assert compare(launch.o, launch.lse, *attention(case)).passed


def test_readers_that_hold_all_workers_are_a_deadlock() -> None:
    case = make_case([130, 130], 8, 1)
    first, second, merge = split_in_two()
    others = split_in_two(request=1, first_uid=3)
    queue = pack(
        merge, others[2], *(Noop(uid=90 + i) for i in range(2)), first, second, *others[:2]
    )
    with pytest.raises(DeadlockError) as caught:
        interpreter.run(Launch.of(case, queue, num_slots=5).arguments(), num_workers=2, seed=3)
    assert len(caught.value.waits) == 2
    assert "that no free worker can reach" in str(caught.value)


# Records


def test_timing_records_name_the_worker_and_are_in_order() -> None:
    case = make_case([3000], 8, 1)
    plan = mla_decode.plan([3000], 8, num_workers=4)
    launch = Launch.of_plan(case, plan)
    launch.timings.fill_(-7)
    run = interpreter.run(launch.arguments(), num_workers=4, seed=2)
    records = launch.timings.long()
    for step in run.steps:
        assert records[step.index, 0] == step.worker + 1
    times = records[:, 1:]
    assert bool(((times[:, 1:] - times[:, :-1]) % 2**32 < 2**31).all())
