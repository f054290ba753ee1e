"""What several test files share: raw launches of hand-made or planned queues."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mla_decode
import numpy as np
import torch
from mla_decode.arguments import KernelArguments
from mla_decode.reference import Case
from mla_decode.words import Instruction, Words

# CPU cases are small; on a busy machine threads that wait for each other cost ten times as much.
torch.set_num_threads(1)

EDGE_LENGTHS = [1, 31, 32, 63, 64, 65, 255, 256, 257]


def pack(*instructions: Instruction) -> Words:
    """Words ``[n, 32]`` of hand-made instructions."""
    return np.stack([instruction.pack() for instruction in instructions])


@dataclass
class Launch:
    """The tensors of one raw launch, outputs and scratch poisoned with NaN."""

    tensors: dict[str, Any]

    @staticmethod
    def of(case: Case, instructions: Words, num_slots: int) -> Launch:
        device = case.q.device
        workspace = mla_decode.Workspace(device, num_slots, case.new_tokens, case.num_heads)
        workspace.poison()
        views = workspace.views(num_slots, case.new_tokens, case.num_heads)
        out, lse = case.poisoned_outputs()
        return Launch(
            {
                "instructions": torch.from_numpy(instructions.copy()).to(device),
                "timings": torch.zeros(len(instructions), 8, dtype=torch.int32, device=device),
                "global_instruction_index": views.queue_state,
                "q_rot": case.q[..., 512:],
                "q_v": case.q[..., :512],
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
            }
        )

    @staticmethod
    def of_plan(case: Case, plan: mla_decode.Plan) -> Launch:
        return Launch.of(case, plan.instructions, plan.num_slots)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    def run(self, **options: Any) -> None:
        """Launch by `mla_decode.mla_decode`."""
        mla_decode.mla_decode(**self.tensors, **options)

    def arguments(self) -> KernelArguments:
        """For `mla_decode.interpreter.run`."""
        return KernelArguments(**self.tensors)

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


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN for NaN."""
    return a.shape == b.shape and bool(torch.equal(_bits(a), _bits(b)))


def _bits(t: torch.Tensor) -> torch.Tensor:
    dense = t.contiguous()
    if dense.dtype == torch.bfloat16:
        return dense.view(torch.int16)
    return dense.view(torch.int32) if dense.dtype == torch.float32 else dense
