"""What several test files share: raw launches of hand-made or planned queues."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mla_decode
import numpy as np
import torch
from mla_decode import interpreter, native, raw
from mla_decode.arguments import KernelArguments
from mla_decode.reference import Case, Errors, attention, compare
from mla_decode.words import (
    KV_TILE,
    MAX_ROWS,
    Fill,
    Instruction,
    Partial,
    Reduction,
    Words,
    find_mates,
)

# CPU cases are small; on a busy machine threads that wait for each other cost ten times as much.
torch.set_num_threads(1)

EDGE_LENGTHS = [1, 31, 32, 63, 64, 65, 255, 256, 257]

# The arguments of the raw launch, by the fields of `KernelArguments`.
RAW_NAMES = {
    "queue_state": "global_instruction_index",
    "q_nope": "q_v",
    "q_pe": "q_rot",
    "latent": "v",
    "rope": "k_rot",
    "block_ids": "table",
    "out": "o",
}


def pack(*instructions: Instruction) -> Words:
    """Words ``[n, 32]`` of hand-made instructions."""
    return np.stack([instruction.pack() for instruction in instructions])


def plan_of(case: Case, **options: Any) -> mla_decode.Plan:
    """The plan of a case, by `mla_decode.plan`."""
    ragged = case.cu_seqlens_q is not None
    return mla_decode.plan(
        case.seq_lens,
        case.num_heads,
        case.new_tokens,
        num_kv_heads=case.h_kv,
        total_tokens=case.total_tokens if ragged else None,
        **options,
    )


def slot_rows(case: Case, group_rows: int = MAX_ROWS) -> int:
    """Rows of the largest row group of a case."""
    return min(group_rows, max(1, *case.tokens) * case.heads_per_kv)


@dataclass
class Launch:
    """The tensors of one raw launch, outputs and scratch poisoned with NaN.

    With several KV heads, which the raw launch does not take, queries and outputs are as
    `KernelArguments` has them, KV head by KV head; see `result`.
    """

    tensors: dict[str, Any]
    case: Case

    @staticmethod
    def of(case: Case, instructions: Words, num_slots: int, group_rows: int = MAX_ROWS) -> Launch:
        device = case.q.device
        sizes = num_slots, slot_rows(case, group_rows)
        workspace = mla_decode.Workspace(device, *sizes)
        workspace.poison()
        views = workspace.views(*sizes)
        q = case.q
        out, lse = case.poisoned_outputs()
        if case.h_kv > 1:
            heads = (case.h_kv, case.heads_per_kv)
            q = q.reshape(case.total_tokens, *heads, -1).transpose(0, 1).flatten(0, 1).contiguous()
            out, lse = out.view(len(q), heads[1], -1), lse.view(len(q), heads[1])
        return Launch(
            {
                "instructions": torch.from_numpy(instructions.copy()).to(device),
                "timings": torch.zeros(len(instructions), 8, dtype=torch.int32, device=device),
                "global_instruction_index": views.queue_state,
                "q_rot": q[..., 512:],
                "q_v": q[..., :512],
                "k_rot": case.rope,
                "v": case.latent,
                "table": case.block_table,
                "o": out,
                "o_scratch": views.o_scratch,
                "lvec_scratch": views.lvec_scratch,
                "completion_flag": views.completion_flag,
                "softmax_scale": case.softmax_scale,
                "tic": 0,
                "lse": lse,
                "causal": case.causal,
                "cu_seqlens_q": case.cu_seqlens_q,
                "kv_indptr": case.kv_indptr,
                "attn_sink": case.attn_sink,
                "lse_base": case.lse_base,
                "lse_empty": case.lse_empty,
            },
            case,
        )

    @staticmethod
    def of_plan(case: Case, plan: mla_decode.Plan) -> Launch:
        return Launch.of(case, plan.instructions, plan.num_slots, plan.group_rows)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    def run(self, **options: Any) -> None:
        """Launch by `mla_decode.mla_decode`, or as `decode` does with several KV heads."""
        _, size = find_mates(self.tensors["instructions"].cpu().numpy())
        if self.case.h_kv == 1:
            mla_decode.mla_decode(**self.tensors, **{"cluster_ctas": size, **options})
        else:
            grid = native.Grid(cluster_ctas=size)
            raw.run_checked(self.arguments(), None, grid, raw.DEFAULT_SPIN_TIMEOUT_NS, **options)

    def arguments(self) -> KernelArguments:
        """For `mla_decode.interpreter.run`."""
        fields = {**self.tensors, "s_q": 1}
        for field, name in RAW_NAMES.items():
            fields[field] = fields.pop(name)
        if isinstance(self.case.new_tokens, int):
            fields["s_q"] = self.case.new_tokens
            if self.case.h_kv == 1:
                for field in ("q_nope", "q_pe", "out"):
                    fields[field] = fields[field].flatten(0, 1)
                fields["lse"] = fields["lse"].transpose(1, 2)
        for field in ("latent", "rope"):
            if fields[field].dim() == 3:
                fields[field] = fields[field].unsqueeze(2)
        return KernelArguments(**fields)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``out`` and ``lse`` in the shapes of `mla_decode.reference.attention`."""
        case = self.case
        if case.h_kv == 1:
            return self.o, self.lse
        by_head = (case.h_kv, case.total_tokens, case.heads_per_kv)
        out = self.o.view(*by_head, -1).transpose(0, 1).flatten(1, 2)
        lse = self.lse.view(by_head).transpose(0, 1).flatten(1, 2)
        if case.cu_seqlens_q is not None:
            return out, lse
        shape = case.q.shape[:3]
        return out.view(*shape, -1), lse.view(shape).transpose(1, 2)

    def errors(self) -> Errors:
        """How far the result is from the float64 reference."""
        return compare(*self.result(), *attention(self.case))

    def poison(self) -> None:
        """NaN into outputs and scratch; flags and queue state stay."""
        for name in ("o", "lse", "o_scratch", "lvec_scratch"):
            self.tensors[name].fill_(float("nan"))

    def snapshot(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors, to see what a call changed."""
        kept = {k: v for k, v in self.tensors.items() if isinstance(v, torch.Tensor)}
        return {name: tensor.detach().clone() for name, tensor in kept.items()}

    def changed(self, before: dict[str, torch.Tensor]) -> list[str]:
        """Names of the tensors whose bits differ from ``before``."""
        return [n for n, t in before.items() if not same_bits(t, self.tensors[n])]


def run_queue(
    case: Case,
    queue: list[Instruction],
    num_slots: int,
    group_rows: int = MAX_ROWS,
    **options: Any,
) -> Launch:
    """A finished launch of hand-made instructions; ``options`` are the interpreter's."""
    launch = Launch.of(case, pack(*queue), num_slots, group_rows)
    if options:
        interpreter.run(launch.arguments(), **options)
    else:
        launch.run()
    return launch


def require_attention(launch: Launch) -> Launch:
    """The launch, whose result must agree with the float64 reference."""
    errors = launch.errors()
    assert errors.passed, errors
    return launch


def cut(
    case: Case,
    tiles: int,
    *,
    runs: bool = True,
    column_slices: int = 1,
    group_rows: int = MAX_ROWS,
) -> tuple[list[Instruction], int]:
    """A queue for a case that cuts all keys every ``tiles`` tiles; and its scratch slots.

    ``runs`` merges each row group at once, its inputs interleaved with those of the
    sequence's other groups; otherwise token by token, inputs listed. Both in slices of columns.
    """
    partials: list[Instruction] = []
    merges: list[Instruction] = []
    fills = list(_fills(case))
    num_slots, uid = 0, 1_000_000
    for sequence in range(case.h_kv * len(case.seq_lens)):
        request = sequence % len(case.seq_lens)
        length, rows = case.seq_lens[request], case.tokens[request] * case.heads_per_kv
        if not length or not rows:
            continue
        starts = range(0, length, tiles * KV_TILE)
        groups = range(0, rows, group_rows)
        for number, row in enumerate(groups):
            slots = range(num_slots + number, num_slots + len(starts) * len(groups), len(groups))
            for start, slot in zip(starts, slots, strict=True):
                end = min(start + starts.step, length)
                dst, own_uid = (-slot - 1, slot) if len(starts) > 1 else (sequence, uid)
                partials.append(Partial(own_uid, dst, sequence, start, end, length, row))
                uid += 1
            if len(starts) == 1:
                continue
            inputs = slots if runs else tuple(slots)
            width = 512 // column_slices
            for column in range(0, 512, width):
                end_row = min(row + group_rows, rows)
                for piece in _row_slices(case.heads_per_kv, row, end_row, runs):
                    merges.append(
                        Reduction(
                            uid, sequence, inputs=inputs, col_begin=column, num_cols=width, **piece
                        )
                    )
                    uid += 1
        num_slots += len(starts) * len(groups) if len(starts) > 1 else 0
    return [*partials, *merges, *fills], num_slots


def _row_slices(num_heads: int, begin: int, end: int, runs: bool) -> Iterator[dict[str, int]]:
    """Rows ``[begin, end)`` as the words of a run, or of a list for each token."""
    if runs:
        yield {"dst_seq": 0, "row_offset": begin, "num_rows": end - begin}
        return
    while begin < end:
        token, head = divmod(begin, num_heads)
        stop = min((token + 1) * num_heads, end)
        yield {"dst_seq": token, "head_begin": head, "num_rows": stop - begin}
        begin = stop


def _fills(case: Case) -> Iterator[Fill]:
    """One for each empty request and for the padding, of each KV head."""
    uid = 2_000_000
    for kv_head in range(case.h_kv):
        begin = kv_head * case.total_tokens
        for length, tokens in zip(case.seq_lens, case.tokens, strict=True):
            if length == 0 and tokens:
                yield Fill(uid, begin, begin + tokens)
            begin, uid = begin + tokens, uid + 1
        end = (kv_head + 1) * case.total_tokens
        if begin < end:
            yield Fill(uid, begin, end)
            uid += 1


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN for NaN."""
    return a.shape == b.shape and bool(torch.equal(_bits(a), _bits(b)))


def _bits(t: torch.Tensor) -> torch.Tensor:
    dense = t.contiguous()
    if dense.dtype in (torch.bfloat16, torch.float16):
        return dense.view(torch.int16)
    return dense.view(torch.int32) if dense.dtype == torch.float32 else dense
