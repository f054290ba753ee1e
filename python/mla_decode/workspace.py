"""Scratch, flags and queue state of the launches on one stream."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from . import checks
from .errors import DeviceError, UnsupportedError
from .words import LATENT_DIM, MAX_ROWS, QUEUE_STATE_WORDS

_MAX_VIEWS = 256  # kept by a workspace; a decoding loop sees few sizes


@dataclass(frozen=True)
class WorkspaceViews:
    """A workspace seen with the sizes of one launch."""

    queue_state: torch.Tensor  # [32] int32
    o_scratch: torch.Tensor  # [slots, slot_rows, 512] fp32
    lvec_scratch: torch.Tensor  # [slots, slot_rows] fp32
    completion_flag: torch.Tensor  # [slots] int32


def workspace_bytes(num_slots: int, slot_rows: int) -> int:
    """Bytes of device memory that a workspace of these sizes takes."""
    rows = num_slots * slot_rows
    return 4 * (rows * (LATENT_DIM + 1) + num_slots + QUEUE_STATE_WORDS)


class Workspace:
    """Memory that launches on one stream share: scratch partials, flags, queue state.

    Launches that may overlap (two streams) need two workspaces. It grows on demand and
    keeps what it outgrew, because a captured CUDA graph may still write there; nothing of
    it needs a reset between launches.

    Parameters
    ----------
    device : device
        Where to allocate.
    num_slots, slot_rows : int
        Sizes to allocate at once: a plan's ``num_slots``, and the rows of a slot, which are
        those of the batch's largest row group (at most 64).
    """

    def __init__(
        self,
        device: torch.device | str,
        num_slots: int = 0,
        slot_rows: int = MAX_ROWS,
    ) -> None:
        checks.require_int("num_slots", num_slots, 0, 1 << 31)
        checks.require_int("slot_rows", slot_rows, 0, MAX_ROWS)
        # An empty tensor resolves "cuda" to the current device.
        self.device = torch.empty(0, device=device).device
        self._refuse_capture()
        with torch.inference_mode(False):  # so that later launches may come from outside of it
            self._queue_state = torch.zeros(
                QUEUE_STATE_WORDS, dtype=torch.int32, device=self.device
            )
            self._o = torch.empty(0, dtype=torch.float32, device=self.device)
            self._lvec = torch.empty(0, dtype=torch.float32, device=self.device)
            self._flags = torch.empty(0, dtype=torch.int32, device=self.device)
        self._outgrown: list[torch.Tensor] = []
        self._views: dict[tuple[int, int], WorkspaceViews] = {}
        self.views(num_slots, slot_rows)

    @property
    def nbytes(self) -> int:
        """Bytes held, outgrown buffers included."""
        held = [self._queue_state, self._o, self._lvec, self._flags, *self._outgrown]
        return sum(t.numel() * t.element_size() for t in held)

    def views(self, num_slots: int, slot_rows: int) -> WorkspaceViews:
        """Tensors of the given sizes, growing the buffers where they are too small."""
        sizes = (num_slots, slot_rows)
        return self._views.get(sizes) or self._make_views(*sizes)

    def _make_views(self, num_slots: int, slot_rows: int) -> WorkspaceViews:
        rows = num_slots * slot_rows
        # Stamps and flags of earlier launches are harmless: they are of earlier epochs.
        self._o = self._grown(self._o, rows * LATENT_DIM, zero=True)
        self._lvec = self._grown(self._lvec, rows)
        self._flags = self._grown(self._flags, num_slots, zero=True)
        made = WorkspaceViews(
            self._queue_state,
            self._o[: rows * LATENT_DIM].view(num_slots, slot_rows, LATENT_DIM),
            self._lvec[:rows].view(num_slots, slot_rows),
            self._flags[:num_slots],
        )
        if len(self._views) >= _MAX_VIEWS:
            self._views.clear()
        self._views[num_slots, slot_rows] = made
        return made

    def poison(self) -> None:
        """Fill the scratch with NaN, so that a value read before it is written shows.

        These NaN are not taken for a result of a launch that stamps its results.
        """
        self._o.fill_(float("nan"))
        self._lvec.fill_(float("nan"))

    def require_device(self, device: torch.device) -> None:
        """Check that the workspace lies where the tensors do."""
        if self.device != device:
            raise DeviceError(f"workspace: expected device {device}, got {self.device}")

    def _grown(self, buffer: torch.Tensor, numel: int, *, zero: bool = False) -> torch.Tensor:
        if buffer.numel() >= numel:
            return buffer
        self._refuse_capture()
        if buffer.numel():
            self._outgrown.append(buffer)
        self._views.clear()  # of the smaller buffers
        size = max(numel, 2 * buffer.numel())  # doubling bounds what is outgrown by what is used
        make = torch.zeros if zero else torch.empty
        with torch.inference_mode(False):  # as in __init__
            grown = make(size, dtype=buffer.dtype, device=buffer.device)
        if zero and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # zeroed for every stream
        return grown

    def _refuse_capture(self) -> None:
        # Captured, the zero fill would be replayed and take the epoch back with it.
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(
                "workspace: cannot grow while a CUDA graph is captured; call once before, or "
                "pass a Workspace of the plan's sizes"
            )


_cached: dict[tuple[torch.device, int], Workspace] = {}


class _OfThread(threading.local):
    """What the CPU has instead of streams; goes with the thread."""

    workspace: Workspace | None = None


_of_thread = _OfThread()


def cached_workspace(device: torch.device, stream: int) -> Workspace:
    """The workspace that `mla_decode.decode` uses on a stream, or a CPU thread, given none."""
    key = (device, stream)
    if key not in _cached:
        if device.type == "cpu":
            return _own_workspace(device)
        _cached[key] = Workspace(device)
    return _cached[key]


def _own_workspace(device: torch.device) -> Workspace:
    """That of this thread."""
    if _of_thread.workspace is None:
        _of_thread.workspace = Workspace(device)
    return _of_thread.workspace


def release_workspaces() -> None:
    """Forget the cached workspaces. No captured graph that used one may be replayed after."""
    global _of_thread
    _cached.clear()
    _of_thread = _OfThread()  # of all threads
