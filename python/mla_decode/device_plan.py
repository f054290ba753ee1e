"""Plans made on the device: from lengths on the GPU to a queue on the GPU, nothing copied back."""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from . import _scheduler, checks, cost, native
from .cost import CostModel
from .errors import (
    DeviceError,
    DtypeError,
    RangeError,
    ScheduleError,
    ShapeError,
    UnsupportedError,
    schedule_errors,
)
from .lengths import MAX_SEQ_LEN, tokens_from_offsets
from .planning import (
    BATCH_INVARIANT_TILES,
    DEFAULT_NUM_WORKERS,
    Plan,
    clusters_of,
    require_fits,
    require_heads,
    sequence_tokens,
)
from .row_groups import choose_groups
from .words import INSTRUCTION_WORDS, MAX_NEW_TOKENS, MAX_ROWS, OPCODE_END_OF_QUEUE
from .workspace import Workspace, workspace_bytes

HEADER_WORDS = 8
HEADER_INSTRUCTIONS = 0  # instructions, end marks not counted
HEADER_SLOTS = 1
HEADER_BAD_LENGTHS = 2

_FitKey = tuple[int, int, int, int, int]


class DevicePlan:
    """A queue for a batch of fixed sizes whose lengths change, planned where they are.

    Its buffers are allocated once, for the worst lengths. `update` plans: on the GPU one small
    kernel that reads the lengths where they are, without a copy to the host, a wait or an
    allocation, so that it can be captured in a CUDA graph and replayed while lengths, block
    ids and the number of live requests change. One plan serves the calls of all layers of a
    step; several may be alive. On the CPU the same algorithm runs in C++.

    Parameters
    ----------
    num_requests : int
        Rows of the batch, those that only pad it included.
    num_heads : int
        Query heads, those of all KV heads together.
    new_tokens : int
        New tokens of every request, 1 to 16; with ``ragged`` the most that a request has.
    num_kv_heads : int
        KV heads, a divisor of ``num_heads``.
    total_tokens : int, optional
        With ``ragged``: rows of tokens in ``q``, padding included;
        ``num_requests * new_tokens`` when None. Else that product.
    max_seq_len : int
        Longest KV length, at most what a row of the block table can name. Buffers may grow
        with it, so name what is needed.
    ragged : bool
        Requests have different numbers of new tokens, and `update` takes ``cu_seqlens_q``.
    batch_invariant : bool
        Plan every request by itself, as `mla_decode.plan`.
    split_tiles : int
        Tiles of 64 keys per piece of every request; 0 balances the load, and 16 is meant
        with ``batch_invariant``.
    num_workers : int, optional
        SMs to balance for; those of ``device``, 132 on the CPU.
    clusters : bool
        Launch clusters of SMs, whose size `cluster_ctas` the sizes alone decide, so that those of a
        cluster can share a request without a reduction, where that is faster. And where the sizes
        leave eight SMs for each of them, row groups have `group_rows` of 16 or 32. False: never.
    device : device
        Where the lengths and the decode calls are.

    Attributes
    ----------
    instructions : Tensor
        ``[capacity, 32]`` int32 on ``device``: the words, end marks behind them, and room
        that the planner may need.
    header : Tensor
        ``[8]`` int32 on ``device``: instructions, scratch slots, lengths out of range.
    num_slots, slot_rows : int
        Scratch slots that any lengths can need, and rows of each.
    cluster_ctas : int
        SMs of a cluster of the launch; 1: no clusters.
    group_rows : int
        Rows of every row group but a request's last: 64, 32 or 16.
    num_workers : int
        SMs that it is balanced for: with clusters those that are in one.
    is_planned : bool
        Whether there was an `update`.
    tokens : tuple of int or None
        On the CPU: new tokens of every request, as the last `update` planned them.

    Raises
    ------
    RangeError, DtypeError, UnsupportedError
        Sizes out of range, or no GPU that can run it.
    """

    def __init__(
        self,
        num_requests: int,
        num_heads: int,
        new_tokens: int = 1,
        *,
        num_kv_heads: int = 1,
        total_tokens: int | None = None,
        max_seq_len: int,
        ragged: bool = False,
        batch_invariant: bool = False,
        split_tiles: int = 0,
        num_workers: int | None = None,
        clusters: bool = True,
        device: torch.device | str,
    ) -> None:
        checks.require_int("num_requests", num_requests, 1, 1 << 24)
        if not 1 <= checks.require_int("new_tokens", new_tokens, 0, 1 << 16) <= MAX_NEW_TOKENS:
            raise UnsupportedError(f"new_tokens: expected 1 to {MAX_NEW_TOKENS}, got {new_tokens}")
        checks.require_int("max_seq_len", max_seq_len, 0, MAX_SEQ_LEN)
        checks.require_int("split_tiles", split_tiles, 0, 1 << 25)
        self.heads_per_kv = require_heads(num_heads, num_kv_heads)
        self.num_requests = num_requests
        self.num_heads = num_heads
        self.new_tokens = new_tokens
        self.num_kv_heads = num_kv_heads
        self.max_seq_len = self._max_room = max_seq_len
        self.ragged = ragged
        self.total_tokens = self._token_room = self._require_total_tokens(total_tokens)
        if batch_invariant and split_tiles == 0:
            split_tiles = BATCH_INVARIANT_TILES
        self.split_tiles = split_tiles
        # An empty tensor resolves "cuda" to the current device.
        self.device = torch.empty(0, device=device).device
        on_gpu = self.device.type == "cuda"
        self._index = native.require(self.device) if on_gpu else -1
        if num_workers is None:
            num_workers = native.num_sms(self.device) if on_gpu else DEFAULT_NUM_WORKERS
        checks.require_int("num_workers", num_workers, 1, 1 << 16)
        rows = new_tokens * self.heads_per_kv
        self.group_rows, self.cluster_ctas, self.num_workers = choose_groups(
            np.full(num_requests * num_kv_heads, rows),
            max_seq_len,
            num_workers,
            clusters_of(self.device if on_gpu else None) if clusters and split_tiles == 0 else (),
        )
        self.slot_rows = min(self.group_rows, rows)
        self._cost_model = _cost_model(self._index, self.slot_rows)
        self._cost = list(self._cost_model.as_dict().values())
        capacity, self.num_slots = device_plan_capacity(
            num_requests,
            self.heads_per_kv,
            new_tokens,
            num_kv_heads,
            self.total_tokens,
            max_seq_len,
            self.num_workers,
            split_tiles,
            self.group_rows,
        )
        with torch.inference_mode(False):  # so that later updates may come from outside of it
            self.instructions = torch.full(
                (capacity, INSTRUCTION_WORDS),
                OPCODE_END_OF_QUEUE,
                dtype=torch.int32,
                device=self.device,
            )
            self.header = torch.zeros(HEADER_WORDS, dtype=torch.int32, device=self.device)
        self._queue = native.Queue(self.instructions.data_ptr(), capacity, is_constant=False)
        self._header_ptr = self.header.data_ptr()
        self.is_planned = False
        self.tokens: tuple[int, ...] | None = None
        self._seq_lens: torch.Tensor | None = None
        self._cu_seqlens_q: torch.Tensor | None = None
        self._kv_indptr: torch.Tensor | None = None
        self._block_size = 0
        self._passed: object = None  # layouts of the tensors that `update` found right last
        s_q = 0 if ragged else new_tokens
        self.fit_key: _FitKey = (num_requests, s_q, self.total_tokens, num_heads, num_kv_heads)
        self.binding = object()  # see Plan

    @property
    def capacity(self) -> int:
        """Rows of words: instructions, end marks, and room that the planner may need."""
        return int(self.instructions.shape[0])

    @property
    def batch(self) -> int:
        """Number of requests."""
        return self.num_requests

    @property
    def shares_keys(self) -> bool:
        """As `Plan.shares_keys`."""
        return self.new_tokens * self.heads_per_kv > self.group_rows

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch, flags and queue state that it needs."""
        return workspace_bytes(self.num_slots, self.slot_rows)

    def workspace(self) -> Workspace:
        """A new workspace of the size that this plan needs."""
        return Workspace(self.device, self.num_slots, self.slot_rows)

    def update(
        self,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None = None,
        stream: torch.cuda.Stream | int | None = None,
        *,
        kv_indptr: torch.Tensor | None = None,
        block_size: int | None = None,
    ) -> DevicePlan:
        """Plan for these lengths; on the GPU enqueued, and nothing waits for it.

        Parameters
        ----------
        seq_lens : Tensor
            ``[num_requests]`` int32 on the plan's device: KV lengths, new tokens included; 0
            for an empty request. One that is negative or beyond ``max_seq_len`` is planned as
            the nearest length that is allowed and reported: at once on the CPU, at the next
            call or `mla_decode.synchronize` on the GPU.
        cu_seqlens_q : Tensor, optional
            ``[num_requests + 1]`` int32 on the plan's device, for a ``ragged`` plan: where
            the new tokens of every request begin, and their number at the end.
        stream : torch.cuda.Stream or int, optional
            Where to enqueue; the current stream when None. The decode calls that use the plan
            must come later on the same stream, or wait for it.
        kv_indptr : Tensor, optional
            ``[num_requests + 1]`` int32 on the plan's device, as of `mla_decode.decode`: a
            length beyond the keys that the request's own blocks hold is out of range too.
        block_size : int, optional
            Tokens per block of the cache; with ``kv_indptr`` only.

        Returns
        -------
        DevicePlan
            This one.

        Raises
        ------
        ShapeError, DtypeError, DeviceError, StrideError
            Wrong tensors. Nothing was enqueued.
        RangeError
            A length out of range: on the CPU one of these, after planning what it was
            clamped to; on the GPU one of an earlier call.
        """
        given = (seq_lens, cu_seqlens_q, kv_indptr)
        layouts = (block_size, *map(checks.layout, given))
        if layouts != self._passed:
            self._require(*given, block_size)
            self._passed = layouts
        self._seq_lens, self._cu_seqlens_q, self._kv_indptr = given
        self._block_size = block_size or 0
        if self._index >= 0:
            native.raise_pending_on(self._index)
            self._enqueue(native.stream_handle(stream, self.device))
            self.is_planned = True
            return self
        if stream is not None:
            raise DeviceError("stream: expected None for a plan on the CPU")
        self._update_on_cpu(seq_lens, cu_seqlens_q)
        return self

    def rebind(self, total_tokens: int, max_seq_len: int) -> None:
        """Change what the buffers' sizes do not depend on, for the next `update`.

        Parameters
        ----------
        total_tokens : int
            Rows of tokens in ``q``; only with ``ragged`` another number than before, and at
            most the one that the plan was created with.
        max_seq_len : int
            At most the one that the plan was created with.
        """
        if total_tokens == self.total_tokens and max_seq_len == self.max_seq_len:
            return
        if max_seq_len > self._max_room:
            raise RangeError(f"max_seq_len: expected at most {self._max_room}, got {max_seq_len}")
        self.total_tokens = self._require_total_tokens(total_tokens)
        self.max_seq_len = max_seq_len
        self.fit_key = (*self.fit_key[:2], self.total_tokens, *self.fit_key[3:])
        self.binding = object()

    def to_host(self) -> Plan:
        """The plan as the device made it, to inspect, validate or save; waits for the device.

        Its lengths are read now from the tensors that `update` was given, so these must still
        hold what was planned.

        Returns
        -------
        Plan
            With the times that the cost model predicts for it.

        Raises
        ------
        UnsupportedError
            Nothing was planned yet, or a CUDA graph is being captured.
        """
        if not self.is_planned or self._seq_lens is None:
            raise UnsupportedError("DevicePlan: expected an update before to_host")
        if self.device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                raise UnsupportedError(
                    "DevicePlan: expected to_host outside the capture of a CUDA graph"
                )
            torch.cuda.synchronize(self.device)
        header = self.header.cpu().numpy()
        count = int(header[HEADER_INSTRUCTIONS])
        words = np.ascontiguousarray(self.instructions[:count].cpu().numpy())
        lengths = self._seq_lens.cpu().numpy().clip(0, self._limits()).astype(np.int32)
        tokens: int | tuple[int, ...] = self.new_tokens
        if self._cu_seqlens_q is not None:
            tokens = tokens_from_offsets(self._cu_seqlens_q.cpu(), self.num_requests)
        worker, start_us, end_us, makespan_us = _scheduler.simulate(
            words,
            self.heads_per_kv,
            sequence_tokens(tokens, self.num_kv_heads),
            self.num_workers,
            self._cost_model,
            self.group_rows,
        )
        return Plan(
            seq_lens=lengths,
            num_heads=self.num_heads,
            new_tokens=tokens,
            num_kv_heads=self.num_kv_heads,
            total_tokens=self.total_tokens,
            num_workers=self.num_workers,
            policy="batch_invariant" if self.split_tiles else "balanced",
            split_tiles=self.split_tiles,
            instructions=words,
            num_slots=int(header[HEADER_SLOTS]),
            predicted_us=float(makespan_us),
            worker=np.asarray(worker),
            start_us=np.asarray(start_us),
            end_us=np.asarray(end_us),
            group_rows=self.group_rows,
        )

    def queue(self, device: torch.device) -> native.Queue:
        """The words, as many as the buffer holds."""
        if device != self.device:
            raise DeviceError(f"plan: made on {self.device}, the call is on {device}")
        return self._queue

    def to(self, device: torch.device | str) -> torch.Tensor:
        """The words as a ``[capacity, 32]`` int32 tensor on ``device``, which is the plan's."""
        wanted = torch.device(device)
        if wanted.type != self.device.type or wanted.index not in (None, self.device.index):
            raise DeviceError(f"plan: made on {self.device}, the call is on {device}")
        return self.instructions

    def require_capacity(self, capacity: int, where: str) -> None:
        """Check that the block ids of a call can name ``max_seq_len`` keys of a request.

        Raises
        ------
        RangeError
            They cannot; ``where`` says what they are.
        """
        if self.max_seq_len > capacity:
            raise RangeError(
                f"plan: expected a max_seq_len of at most {capacity} ({where}), got "
                f"{self.max_seq_len}"
            )

    def require_fits(
        self, batch: int, s_q: int, total_tokens: int, num_heads: int, num_kv_heads: int
    ) -> None:
        """Check that the plan was made for a call of these sizes, as `Plan.require_fits`."""
        require_fits(self.fit_key, (batch, s_q, total_tokens, num_heads, num_kv_heads))
        if not self.is_planned:
            raise ScheduleError("plan: expected an update before decode, got a DevicePlan without")

    def require_seq_lens(self, seq_lens: npt.NDArray[np.int32]) -> None:
        """Check that the plan's lengths are these; waits for the device."""
        self.to_host().require_seq_lens(seq_lens)

    def __repr__(self) -> str:
        tokens = f"up to {self.new_tokens}" if self.ragged else str(self.new_tokens)
        return (
            f"DevicePlan({self.num_requests} requests, {self.num_heads} heads, {tokens} new "
            f"tokens, {self.max_seq_len} keys at most, {self.device})"
        )

    def _enqueue(self, stream: int) -> None:
        assert self._seq_lens is not None, "set by update"
        native.enqueue_plan(
            self._seq_lens.data_ptr(),
            native.address(self._cu_seqlens_q),
            native.address(self._kv_indptr),
            self._block_size,
            self.num_requests,
            self.num_kv_heads,
            self.new_tokens,
            self.total_tokens,
            self.heads_per_kv,
            self.max_seq_len,
            self.num_workers,
            self.split_tiles,
            self.cluster_ctas,
            self.group_rows,
            self._cost,
            self._queue.instructions,
            self._queue.num_instructions,
            self._header_ptr,
            self._index,
            stream,
        )

    def _require_total_tokens(self, total_tokens: int | None) -> int:
        whole = self.num_requests * self.new_tokens
        if total_tokens is None:
            return whole
        checks.require_int("total_tokens", total_tokens, 0, (1 << 31) - 1)
        if not self.ragged and total_tokens != whole:
            raise ShapeError(
                f"total_tokens: expected {whole} without ragged=True, got {total_tokens}"
            )
        return total_tokens

    def _limits(self) -> npt.NDArray[np.int64]:
        """``[num_requests]``: the longest that each request may be."""
        limits = np.full(self.num_requests, self.max_seq_len, dtype=np.int64)
        if self._kv_indptr is None:
            return limits
        blocks = np.diff(self._kv_indptr.cpu().numpy().astype(np.int64))
        own: npt.NDArray[np.int64] = np.minimum(limits, blocks.clip(0) * self._block_size)
        return own

    def _require(
        self,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None,
        kv_indptr: torch.Tensor | None,
        block_size: int | None,
    ) -> None:
        _require_integers("seq_lens", seq_lens, self.num_requests, self.device)
        if (cu_seqlens_q is not None) != self.ragged:
            wanted = "a tensor with ragged=True" if self.ragged else "None without ragged=True"
            raise DtypeError(f"cu_seqlens_q: expected {wanted}")
        if cu_seqlens_q is not None:
            _require_integers("cu_seqlens_q", cu_seqlens_q, self.num_requests + 1, self.device)
        if (kv_indptr is None) != (block_size is None):
            raise DtypeError("kv_indptr, block_size: expected both or neither")
        if kv_indptr is not None:
            _require_integers("kv_indptr", kv_indptr, self.num_requests + 1, self.device)
            checks.require_int("block_size", block_size, 1, (1 << 31) - 1)

    def _update_on_cpu(self, seq_lens: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> None:
        lengths, limits = seq_lens.detach().numpy(), self._limits()
        counts: tuple[int, ...] = (self.new_tokens,) * self.num_requests
        if cu_seqlens_q is not None:
            counts = tokens_from_offsets(cu_seqlens_q, self.num_requests)
            self._require_tokens(np.asarray(counts, dtype=np.int32))
        header = self.header.numpy()
        _scheduler.device_plan(
            seq_lens=np.clip(lengths, 0, limits).astype(np.int32),
            cu_seqlens_q=None if cu_seqlens_q is None else cu_seqlens_q.numpy(),
            num_kv_heads=self.num_kv_heads,
            s_q=self.new_tokens,
            total_tokens=self.total_tokens,
            num_heads=self.heads_per_kv,
            max_seq_len=self.max_seq_len,
            num_workers=self.num_workers,
            split_tiles=self.split_tiles,
            cluster_ctas=self.cluster_ctas,
            group_rows=self.group_rows,
            cost=self._cost,
            instructions=self.instructions.numpy(),
            header=header,
        )
        self.is_planned, self.tokens = True, counts
        bad = np.flatnonzero((lengths < 0) | (lengths > limits))
        header[HEADER_BAD_LENGTHS] = bad.size
        if bad.size:
            request = int(bad[0])
            raise native.bad_length(request, int(limits[request]), int(lengths[request]))

    def _require_tokens(self, tokens: npt.NDArray[np.int32]) -> None:
        if int(tokens.max(initial=0)) > self.new_tokens:
            request = int(tokens.argmax())
            raise RangeError(
                f"cu_seqlens_q: request {request}: expected at most {self.new_tokens} new tokens, "
                f"got {tokens[request]}"
            )
        if int(tokens.sum()) > self.total_tokens:
            raise RangeError(
                f"cu_seqlens_q: expected at most {self.total_tokens} tokens, got {tokens.sum()}"
            )


@cache
def _cost_model(index: int, rows: int) -> CostModel:
    """Fitted on the GPU of that index, -1 for none; looked up once, since plans are made often."""
    return cost.load(torch.cuda.get_device_name(index) if index >= 0 else None, rows)


def device_plan_capacity(
    num_requests: int,
    heads_per_kv: int,
    new_tokens: int,
    num_kv_heads: int,
    total_tokens: int,
    max_seq_len: int,
    num_workers: int,
    split_tiles: int,
    group_rows: int = MAX_ROWS,
) -> tuple[int, int]:
    """Rows of words, end marks included, and scratch slots that any lengths can need."""
    with schedule_errors():
        rows, slots = _scheduler.device_plan_capacity(
            num_requests=num_requests,
            num_kv_heads=num_kv_heads,
            s_q=new_tokens,
            total_tokens=total_tokens,
            num_heads=heads_per_kv,
            max_seq_len=max_seq_len,
            num_workers=num_workers,
            split_tiles=split_tiles,
            group_rows=group_rows,
        )
    return int(rows), int(slots)


def _require_integers(name: str, value: torch.Tensor, size: int, device: torch.device) -> None:
    tensor = checks.require_tensor(name, value)
    checks.require_dtype(name, tensor, torch.int32)
    checks.require_device(name, tensor, device)
    checks.require_shape(name, tensor, [size])
    checks.require_dense(name, tensor, 4)


class PlannedWords:
    """Words of a plan in a tensor, as the operators of PyTorch hand them over.

    Nothing proves that they fit the call: that is for whoever made them to know.

    Parameters
    ----------
    words : Tensor
        ``[n, 32]`` int32: those of a `Plan` or a `DevicePlan`.
    fit_key
        Sizes of the call; see `Plan.fit_key`.
    num_slots, num_workers, cluster_ctas, group_rows : int
        Of the plan.

    Attributes
    ----------
    slot_rows : int
        Rows of a scratch slot, for the most new tokens that a request may have.
    """

    max_seq_len = 0  # nothing to compare with the call's block ids
    tokens: tuple[int, ...] | None = None  # nor with its offsets

    def __init__(
        self,
        words: torch.Tensor,
        fit_key: _FitKey,
        num_slots: int,
        num_workers: int,
        cluster_ctas: int,
        group_rows: int,
    ) -> None:
        checks.require_dtype("plan", checks.require_tensor("plan", words), torch.int32)
        checks.require_shape("plan", words, ["n", INSTRUCTION_WORDS])
        checks.require_dense("plan", words, checks.TMA_BYTES)
        self.words = words
        self.fit_key = fit_key
        self.binding = object()  # see Plan
        _, s_q, _, heads, kv_heads = fit_key
        rows = (s_q or MAX_NEW_TOKENS) * (heads // kv_heads)
        self.slot_rows = min(group_rows, rows)
        self.group_rows = group_rows
        self.shares_keys = rows > group_rows
        self.num_slots = num_slots
        self.num_workers = num_workers
        self.cluster_ctas = cluster_ctas

    def queue(self, device: torch.device) -> native.Queue:
        """The words, which a kernel may have written."""
        return native.Queue(self.to(device).data_ptr(), int(self.words.shape[0]), is_constant=False)

    def to(self, device: torch.device | str) -> torch.Tensor:
        """The words, which lie on ``device``."""
        checks.require_device("plan", self.words, torch.device(device))
        return self.words

    def require_capacity(self, capacity: int, where: str) -> None:
        """Nothing to check."""

    def require_fits(
        self, batch: int, s_q: int, total_tokens: int, num_heads: int, num_kv_heads: int
    ) -> None:
        """As `Plan.require_fits`."""
        require_fits(self.fit_key, (batch, s_q, total_tokens, num_heads, num_kv_heads))

    def to_host(self) -> Plan:
        """Not known: the lengths are not in the words."""
        raise UnsupportedError("plan: expected a Plan or a DevicePlan for this check, got words")

    def require_seq_lens(self, seq_lens: npt.NDArray[np.int32]) -> None:
        """Not known: the lengths are not in the words."""
        self.to_host().require_seq_lens(seq_lens)
