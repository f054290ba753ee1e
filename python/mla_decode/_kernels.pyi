"""The CUDA extension. It takes raw pointers: no torch, no libpython symbols of ours."""

from typing import TypeAlias, TypedDict

# data pointer, sizes, strides in elements
TensorRef: TypeAlias = tuple[int, list[int], list[int]]

QUEUE_STATE_WORDS: int
TIMING_WORDS: int

class ErrorRecord(TypedDict):
    sm: int
    role: str
    instruction: int
    uid: int
    opcode: int
    wait: str
    expected: int
    seen: int

def available(device: int = 0) -> str: ...
def num_sms(device: int = 0) -> int: ...
def device_name(device: int = 0) -> str: ...
def take_error(device: int = 0) -> ErrorRecord | None: ...
def mla_decode(
    instructions: TensorRef,
    timings: TensorRef | None,
    queue_state: TensorRef,
    q_rot: TensorRef,
    q_v: TensorRef,
    k_rot: TensorRef,
    v: TensorRef,
    table: TensorRef,
    o: TensorRef,
    o_scratch: TensorRef,
    lvec_scratch: TensorRef,
    completion_flag: TensorRef,
    softmax_scale: float,
    tic: int,
    lse: TensorRef | None,
    stream: int,
    num_ctas: int,
    spin_timeout_ns: int,
    device: int,
) -> None: ...
