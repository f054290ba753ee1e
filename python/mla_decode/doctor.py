"""What is installed, what the GPU can do, and what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _scheduler, native
from .words import QUEUE_VERSION

SMEM_BYTES_NEEDED = 227 * 1024


@dataclass(frozen=True)
class Finding:
    """One line of the report. ``state`` is ``ok``, ``missing`` or ``info``."""

    what: str
    state: str
    detail: str


def examine() -> list[Finding]:
    """Look at everything; never raises because of what it finds."""
    findings = [
        Finding("python", "ok", platform.python_version()),
        Finding("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        Finding(
            "scheduler", "ok", f"queue version {QUEUE_VERSION}, {Path(_scheduler.__file__).name}"
        ),
    ]
    for package, purpose in (("numpy", "plans"), ("matplotlib", "pictures"), ("rich", "tables")):
        findings.append(_package(package, purpose))
    nvcc = shutil.which("nvcc")
    findings.append(
        Finding("nvcc", "info", nvcc or "not on PATH; needed only to build the kernels")
    )
    findings.append(
        Finding("kernels", "ok", "built")
        if native.is_built()
        else Finding("kernels", "missing", native.missing())
    )
    findings.extend(_gpu())
    return findings


def can_launch(findings: list[Finding]) -> bool:
    """Whether the megakernel can run here."""
    return all(f.state != "missing" for f in findings if f.what in ("kernels", "gpu"))


def _package(name: str, purpose: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "missing", f"not installed; used for {purpose}")


def _gpu() -> list[Finding]:
    if not torch.cuda.is_available():
        reason = "torch was built without CUDA" if torch.version.cuda is None else "no CUDA device"
        return [Finding("gpu", "missing", f"{reason}; decode runs in the interpreter")]
    findings = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        smem = getattr(p, "shared_memory_per_block_optin", SMEM_BYTES_NEEDED)
        detail = (
            f"{p.name}: {p.multi_processor_count} SMs, compute capability {p.major}.{p.minor}, "
            f"{p.total_memory / 2**30:.0f} GiB, L2 {p.L2_cache_size / 2**20:.0f} MiB, "
            f"{smem // 1024} KiB shared memory per CTA"
        )
        hopper = (p.major, p.minor) == native.REQUIRED_CAPABILITY and smem >= SMEM_BYTES_NEEDED
        if not hopper:
            detail += "; the kernels need a Hopper GPU (9.0, 227 KiB)"
        findings.append(Finding("gpu", "ok" if hopper else "missing", detail))
    if native.is_built():
        reason = native.missing()
        state = "missing" if reason else "ok"
        findings.append(Finding("driver", state, reason or "new enough"))
    return findings
