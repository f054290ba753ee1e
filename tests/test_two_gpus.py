"""Two GPUs: keys spread over them (NCCL), and heads split between them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mla_decode
import pytest
import torch
from mla_decode import distributed, reference

from tests.several_ranks import SCALE, Batch, make_batch, paged, run_ranks
from tests.support import same_bits

pytestmark = pytest.mark.gpu

RANKS = 2
HEADS = 16
NUM_GPUS = torch.cuda.device_count()

needs_two_gpus = pytest.mark.skipif(
    NUM_GPUS < RANKS, reason=f"needs a GPU: {RANKS} of them, there are {NUM_GPUS}"
)

LENGTHS = [1, 3, 64, 65, 2000, 9331, 0]


def shares(batch: Batch, rank: int, how: str) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """The keys of one rank, and what it says of them."""
    if how == "interleaved":
        keys = [own[rank::RANKS] for own in batch.keys]
        visible = distributed.visible_interleaved(batch.lengths, batch.tokens, rank, RANKS)
        return keys, {"visible": visible}
    # The ends of requests lie on rank 0, on rank 1, and across both.
    cuts = [max(0, len(own) - i % 4) for i, own in enumerate(batch.keys)]
    keys = [own[cut:] if rank else own[:cut] for own, cut in zip(batch.keys, cuts, strict=True)]
    behind = [0 if rank else len(own) - cut for own, cut in zip(batch.keys, cuts, strict=True)]
    visible = distributed.visible_in_chunk([len(own) for own in keys], batch.tokens, behind)
    return keys, {"visible": visible}


CASES = {
    f"{how}_q{new_tokens}": (how, new_tokens)
    for how in ("chunks", "interleaved")
    for new_tokens in (1, 3)
}


def batch_of(new_tokens: int) -> Batch:
    lengths = [length if length >= new_tokens else 0 for length in LENGTHS]
    return make_batch(lengths, [new_tokens] * len(lengths), HEADS)


def all_calls(rank: int, folder: Path) -> None:
    """What each rank does; results go to files."""
    device = torch.device("cuda", rank)
    for name, (how, new_tokens) in CASES.items():
        batch = batch_of(new_tokens)
        keys, options = shares(batch, rank, how)
        cache, table = paged(keys, seed=rank)
        out, lse = distributed.context_parallel_decode(
            batch.q.view(len(keys), new_tokens, HEADS, -1).to(device),
            cache.to(device),
            table.to(device),
            [len(own) for own in keys],
            softmax_scale=SCALE,
            **options,
        )
        mla_decode.synchronize(device)
        torch.save((out.cpu(), lse.cpu()), folder / f"{name}-{rank}.pt")
    replay_with_other_lengths(rank, folder, device)


def replay_with_other_lengths(rank: int, folder: Path, device: torch.device) -> None:
    """Capture one call, planned on the GPU, and replay it while lengths change."""
    batch = batch_of(1)
    keys = [own[rank::RANKS] for own in batch.keys]
    cache, table = (tensor.to(device) for tensor in paged(keys, seed=rank))
    q = batch.q.view(len(keys), 1, HEADS, -1).to(device)
    seq_lens = torch.tensor([len(own) for own in keys], dtype=torch.int32, device=device)
    planned = mla_decode.DevicePlan(
        len(keys), HEADS, max_seq_len=table.shape[1] * 64, device=device
    )

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return distributed.context_parallel_decode(
            q, cache, table, plan=planned.update(seq_lens), softmax_scale=SCALE, causal=True
        )

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            out, lse = step()
        for replay in range(3):
            seq_lens.copy_(torch.tensor([len(o) for o in replayed(keys, replay)]))
            graph.replay()
            stream.synchronize()
            torch.save((out.cpu(), lse.cpu()), folder / f"replay{replay}-{rank}.pt")
    mla_decode.synchronize(device)


def replayed(keys: list[torch.Tensor], replay: int) -> list[torch.Tensor]:
    """The keys that a rank has in a replay: fewer each time."""
    return [own[: len(own) >> replay] for own in keys]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    folder = tmp_path_factory.mktemp("gpus")
    # Multicast over NVLink needs rights that a container may lack; two GPUs do without.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    run_ranks(all_calls, RANKS, folder, backend="nccl", timeout_s=240)
    return lambda name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(RANKS)]


def require_attention(results: list[Any], batch: Batch) -> None:
    """Both ranks have the same bits, and they are attention over all keys."""
    (out, lse), other = results
    assert same_bits(other[0], out)
    assert same_bits(other[1], lse)
    expected_out, expected_lse = batch.attention()
    errors = reference.compare(
        out.flatten(0, 1),
        lse.transpose(1, 2).flatten(0, 1),
        expected_out,
        expected_lse.masked_fill(expected_lse == -math.inf, math.inf),
    )
    assert errors.passed, str(errors)


@needs_two_gpus
@pytest.mark.parametrize("name", CASES)
def test_context_parallel_decode_over_nccl(name: str, results: Callable[[str], list[Any]]) -> None:
    require_attention(results(name), batch_of(CASES[name][1]))


@needs_two_gpus
@pytest.mark.parametrize("replay", range(3))
def test_a_captured_collective_replays_with_other_lengths(
    replay: int, results: Callable[[str], list[Any]]
) -> None:
    batch = batch_of(1)
    ranks = [replayed([own[rank::RANKS] for own in batch.keys], replay) for rank in range(RANKS)]
    keys = [torch.cat(own) for own in zip(*ranks, strict=True)]
    require_attention(results(f"replay{replay}"), Batch(batch.q, keys, batch.tokens))


def half_of_heads(case: reference.Case, index: int) -> reference.Case:
    """The case of one GPU that has half of the heads."""
    heads = case.num_heads // 2
    moved = case.to(f"cuda:{index}")
    q = moved.q[:, :, index * heads : (index + 1) * heads]
    return reference.Case(**{**vars(moved), "q": q.contiguous(), "num_heads": heads})


def decode_half(half: reference.Case, lengths: Any, **options: Any) -> list[torch.Tensor]:
    return list(
        mla_decode.decode(
            half.q,
            half.kv_cache,
            half.block_table,
            lengths,
            softmax_scale=half.softmax_scale,
            **options,
        )
    )


@needs_two_gpus
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("planned_on", ["host", "device"])
def test_each_gpu_decodes_its_heads_whatever_the_current_device(
    current: int, planned_on: str
) -> None:
    case = reference.make_case([5, 64, 3000, 20001], HEADS, 2)
    expected_out, expected_lse = reference.attention(case)
    halves = [half_of_heads(case, index) for index in range(2)]
    streams = [torch.cuda.Stream(f"cuda:{index}") for index in range(2)]
    for index in range(2):
        torch.cuda.synchronize(index)
    rounds = []
    with torch.cuda.device(current):
        for _ in range(3):
            results = []
            for half, stream in zip(halves, streams, strict=True):
                lengths: Any = case.seq_lens
                if planned_on == "device":
                    with torch.cuda.stream(stream):
                        lengths = torch.tensor(lengths, dtype=torch.int32, device=half.q.device)
                with torch.cuda.device(current):  # the stream alone says where
                    results.append(decode_half(half, lengths, stream=stream))
            for index in range(2):
                mla_decode.synchronize(index)
            rounds.append([[tensor.cpu() for tensor in result] for result in results])
        assert torch.cuda.current_device() == current
    for (out0, lse0), (out1, lse1) in rounds:
        out, lse = torch.cat([out0, out1], 2), torch.cat([lse0, lse1], 1)
        errors = reference.compare(out, lse, expected_out, expected_lse)
        assert errors.passed, str(errors)
        assert same_bits(out0, rounds[0][0][0])


@needs_two_gpus
def test_a_graph_of_the_other_device_replays() -> None:
    case = reference.make_case([70, 3000], HEADS, 1)
    expected_out, expected_lse = reference.attention(case)
    half = half_of_heads(case, 1)
    lengths = torch.tensor(case.seq_lens, dtype=torch.int32, device="cuda:1")
    stream = torch.cuda.Stream("cuda:1")
    with torch.cuda.device(0):
        with torch.cuda.stream(stream):
            decode_half(half, lengths)
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                out, lse = decode_half(half, lengths)
            for _ in range(2):
                out.fill_(math.nan)
                graph.replay()
            mla_decode.synchronize("cuda:1")
        heads = slice(HEADS // 2, HEADS)
        errors = reference.compare(
            out.cpu(), lse.cpu(), expected_out[:, :, heads], expected_lse[:, heads]
        )
        assert errors.passed, str(errors)
        assert torch.cuda.current_device() == 0


@needs_two_gpus
def test_tensors_of_two_devices_are_refused() -> None:
    case = half_of_heads(reference.make_case([70], HEADS, 1), 1)
    with pytest.raises(mla_decode.DeviceError, match=r"expected device cuda:1, got cuda:0"):
        mla_decode.decode(case.q, case.kv_cache, case.block_table.to("cuda:0"), [70])
    with pytest.raises(mla_decode.DeviceError, match=r"stream: expected one of cuda:1"):
        decode_half(case, [70], stream=torch.cuda.Stream("cuda:0"))
