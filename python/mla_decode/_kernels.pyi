"""The CUDA extension. It takes raw pointers: no torch, no libpython symbols of ours."""

from typing import Literal, TypedDict

QUEUE_STATE_WORDS: int
TIMING_WORDS: int

class ErrorRecord(TypedDict, total=False):
    kind: Literal["timeout", "length"]
    sm: int
    role: str
    instruction: int
    uid: int
    opcode: int
    wait: str
    request: int
    expected: int
    seen: int

def available(device: int = 0) -> str: ...
def num_sms(device: int = 0) -> int: ...
def max_clusters(cluster_ctas: int, device: int = 0) -> int: ...
def device_name(device: int = 0) -> str: ...
def take_error(device: int = 0) -> ErrorRecord | None: ...

class DecodeLayout:
    """All of a launch that does not change from call to call. Strides are in elements."""

    def __init__(
        self,
        *,
        fp16: bool,
        num_heads: int,
        h_kv: int,
        num_requests: int,
        s_q: int,
        total_tokens: int,
        q_nope_row_stride: int,
        q_pe_row_stride: int,
        num_blocks: int,
        block_size: int,
        latent_strides: tuple[int, int, int],
        rope_strides: tuple[int, int, int],
        table_stride: int,
        lse_strides: tuple[int, int, int],
        slot_rows: int,
        softmax_scale: float,
        causal: bool,
        lse_base2: bool,
        lse_empty: float,
        device: int,
    ) -> None: ...

class BoundDecode:
    """A queue and its scratch, for calls of one layout. Tensors are addresses, 0 for none."""

    def __init__(
        self,
        layout: DecodeLayout,
        *,
        instructions: int,
        num_instructions: int,
        instructions_are_constant: bool,
        timings: int,
        queue_state: int,
        o_scratch: int,
        lvec_scratch: int,
        completion_flag: int,
        tic: int,
        num_ctas: int,
        cluster_ctas: int,
        spin_timeout_ns: int,
    ) -> None: ...
    def enqueue(self, tensors: tuple[int, ...], out: int, lse: int, stream: int, /) -> None:
        """Enqueue one launch; ``tensors`` are those of `native.ADDRESSES`."""

class TensorReader:
    """Reads the tensors of a call through DLPack's C exchange API."""

    def __init__(self, tensor_type: type, /) -> None:
        """Raise RuntimeError if the type (``torch.Tensor``) has no such API."""

    def read(
        self,
        q: object,
        kv_cache: object,
        block_table: object,
        cu_seqlens_q: object,
        kv_indptr: object,
        kv_indices: object,
        attn_sink: object,
        out: object,
        lse: object,
        /,
    ) -> tuple[bytes, tuple[int, ...]] | None:
        """Everything that checks look at, as a key, and the addresses for `BoundDecode.enqueue`.

        ``q`` and ``kv_cache`` may be pairs, the rest None. Of ``kv_indices`` the size is no part
        of the key. None if one of them is no tensor of exactly the reader's type.
        """

def plan(
    seq_lens: int,
    cu_seqlens_q: int,
    kv_indptr: int,
    block_size: int,
    num_requests: int,
    h_kv: int,
    s_q: int,
    total_tokens: int,
    num_heads: int,
    max_seq_len: int,
    num_workers: int,
    split_tiles: int,
    cluster_ctas: int,
    group_rows: int,
    cost: list[float],
    instructions: int,
    rows: int,
    header: int,
    device: int,
    stream: int,
    /,
) -> None:
    """Enqueue the planning of a batch on the GPU. Tensors are addresses, 0 for none.

    ``block_size`` counts with ``kv_indptr`` only.
    """
