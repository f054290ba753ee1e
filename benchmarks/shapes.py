"""The shapes that are benchmarked, their traffic, work and physical limit."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LATENT_DIM = 512  # width of V and of the no-position part of Q and K
HEAD_DIM = 576  # latent and rope part
BLOCK_SIZE = 64  # of a shape that names none
BF16_BYTES = 2


@dataclass(frozen=True)
class Shape:
    """One decode problem: causal query tokens for each request, as many for all or not."""

    name: str
    seq_lens: tuple[int, ...]
    new_tokens: int | tuple[int, ...]
    num_heads: int
    block_size: int = BLOCK_SIZE
    batch_invariant: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """Query tokens of each request."""
        if isinstance(self.new_tokens, int):
            return (self.new_tokens,) * len(self.seq_lens)
        return self.new_tokens

    @property
    def is_mixed(self) -> bool:
        """Requests have different numbers of query tokens, one request behind the other in q."""
        return not isinstance(self.new_tokens, int)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache that must be read."""
        return HEAD_DIM * BF16_BYTES * sum(self.seq_lens)

    @property
    def bytes(self) -> int:
        """Bytes of cache, Q and O: what a call must move."""
        rows = sum(self.tokens) * self.num_heads
        return self.kv_bytes + rows * (HEAD_DIM + LATENT_DIM) * BF16_BYTES

    @property
    def flop(self) -> int:
        """Floating-point operations of both matrix products, the causal mask not deducted."""
        pairs = sum(
            length * tokens for length, tokens in zip(self.seq_lens, self.tokens, strict=True)
        )
        return 2 * self.num_heads * (HEAD_DIM + LATENT_DIM) * pairs


@dataclass(frozen=True)
class Floor:
    """What no kernel on a GPU can beat: its stream of bytes, or its arithmetic if that is slower.

    The defaults were measured on an H200, once: a persistent grid that streams bytes into shared
    memory and computes nothing, and the bf16 matrix rate on random data. `benchmarks.floor`
    measures the stream of the GPU at hand; the matrix rate stays that of the H200.
    """

    launch_us: float = 1.6
    bytes_per_us: float = 4.6e6
    flop_per_us: float = 790e6
    measured: bool = False  # launch and stream, on the GPU at hand

    def stream_us(self, num_bytes: float) -> float:
        """Microseconds of a launch that streams so many bytes."""
        return self.launch_us + num_bytes / self.bytes_per_us

    def us(self, shape: Shape) -> float:
        """Microseconds that a shape takes at least."""
        return max(self.stream_us(shape.bytes), shape.flop / self.flop_per_us)

    def is_memory_bound(self, shape: Shape) -> bool:
        """Streaming the bytes takes longer than doing the arithmetic."""
        return self.stream_us(shape.bytes) >= shape.flop / self.flop_per_us

    def as_json(self) -> dict[str, float | bool]:
        return {
            "launch_us": round(self.launch_us, 3),
            "bytes_per_us": round(self.bytes_per_us),
            "flop_per_us": round(self.flop_per_us),
            "measured": self.measured,
        }

    def __str__(self) -> str:
        stream = f"{self.launch_us:.2f} us + bytes / {self.bytes_per_us / 1e6:.2f} TB/s"
        whose = "measured on this GPU" if self.measured else "ASSUMED: an H200's, not measured here"
        return f"{stream} ({whose}), or FLOP / {self.flop_per_us / 1e6:.0f} TFLOP/s (an H200's)"


ASSUMED = Floor()


B16_LOGNORMAL = (
    12603, 1216, 2490, 7118, 1778, 4572, 5879, 2140, 1327, 5966, 13269, 2573, 3520, 25480, 2810,
    2939,
)  # fmt: skip
B64_MIX = (
    871, 568, 711, 329, 617, 1015, 348, 978, 543, 837, 650, 1020, 924, 679, 560, 497,
    650, 406, 381, 423, 511, 423, 569, 943, 645, 820, 829, 883, 937, 765, 711, 847,
    722, 546, 519, 279, 516, 315, 664, 845, 850, 546, 670, 871, 527, 329, 446, 764,
    582, 1011, 453, 655, 532, 985, 1019, 810, 317, 305, 949, 317, 669, 768, 530, 349,
)  # fmt: skip

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("B1_64k_q1_h16", (65536,), 1, 16),
        Shape("imb4_q4_h16", (4641, 45118, 1730, 1696), 4, 16),
        Shape("B64_mix_q4_h16", B64_MIX, 4, 16),
        Shape("B64_512_q2_h16", (512,) * 64, 2, 16),
        Shape("B8_1k_q1_h16", (1024,) * 8, 1, 16),
        Shape("B16_lognormal_q1_h16", B16_LOGNORMAL, 1, 16),
        Shape("B132_4k_q4_h16", (4096,) * 132, 4, 16),
        Shape("B128_4k_q1_h16", (4096,) * 128, 1, 16),
        Shape("B128_4k_q1_h8", (4096,) * 128, 1, 8),
        Shape("B32_8k_q1_h64", (8192,) * 32, 1, 64),
        Shape("B128_4k_q1_h128", (4096,) * 128, 1, 128),
        Shape("B128_8k_q2_h128", (8192,) * 128, 2, 128),
        Shape("B1_128k_q1_h128", (131072,), 1, 128),
    )
}


def with_block_size(shape: Shape, block_size: int) -> Shape:
    """The same problem in a cache of other blocks; the KV bytes and so the floor stay."""
    return replace(shape, name=f"{shape.name}_bs{block_size}", block_size=block_size)


def batch_invariant(shape: Shape) -> Shape:
    """The same problem, every request planned by itself."""
    return replace(shape, name=f"{shape.name}_invariant", batch_invariant=True)


# What a serving engine adds to the table above: other block sizes, requests with different
# numbers of new tokens beside the two halves that they are made of, batch-invariant plans.
SERVING_SHAPES = {
    shape.name: shape
    for shape in (
        *(
            with_block_size(SHAPES[name], block_size)
            for name in (
                "B128_4k_q1_h16",
                "B1_64k_q1_h16",
                "B16_lognormal_q1_h16",
                "B132_4k_q4_h16",
            )
            for block_size in (16, 32, 1)
        ),
        Shape("B64_4k_q1or4_h16", (4096,) * 64, (1, 4) * 32, 16),
        Shape("B32_4k_q1_h16", (4096,) * 32, 1, 16),
        Shape("B32_4k_q4_h16", (4096,) * 32, 4, 16),
        Shape("B64_4k_q1or2_h128", (4096,) * 64, (1, 2) * 32, 128),
        Shape("B32_4k_q1_h128", (4096,) * 32, 1, 128),
        Shape("B32_4k_q2_h128", (4096,) * 32, 2, 128),
        *(batch_invariant(shape) for shape in SHAPES.values()),
    )
}


def random_shapes(count: int, seed: int) -> list[Shape]:
    """Return ``count`` random batches, the same for the same seed: mixed sizes, heavy tails."""
    rng = random.Random(seed)
    shapes = []
    for index in range(count):
        batch = round(2 ** rng.uniform(0, 7.5))
        median = 2 ** rng.uniform(8, 14.5)
        sigma = rng.choice([0.0, 0.3, 1.0, 1.5])
        num_heads = rng.choice([8, 16, 16, 32, 64, 128])
        new_tokens = rng.choice([1, 1, 2, 3, 4])
        longest = max(new_tokens, min(131072, 2_000_000 // batch))
        seq_lens = tuple(
            max(new_tokens, min(longest, round(median * rng.lognormvariate(0, sigma))))
            for _ in range(batch)
        )
        name = f"random{seed}.{index}_B{batch}_q{new_tokens}_h{num_heads}"
        shapes.append(Shape(name, seq_lens, new_tokens, num_heads))
    return shapes


_FIELDS = {"name", "seq_lens", "new_tokens", "num_heads", "block_size"}


def read_shapes(path: Path) -> list[Shape]:
    """Read a list of shapes in JSON; raises ValueError that names the one that is wrong."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: expected a list of shapes")
    return [_shape(f"{path}[{index}]", entry) for index, entry in enumerate(entries)]


def _shape(where: str, entry: Any) -> Shape:
    if not isinstance(entry, dict) or set(entry) | {"block_size"} != _FIELDS:
        raise ValueError(f"{where}: expected the fields {sorted(_FIELDS)}")
    tokens = entry["new_tokens"]
    lengths = _numbers(f"{where}.seq_lens", entry["seq_lens"])
    if isinstance(tokens, list):
        tokens = _numbers(f"{where}.new_tokens", tokens)
        if len(tokens) != len(lengths):
            raise ValueError(f"{where}.new_tokens: expected {len(lengths)}, got {len(tokens)}")
    else:
        (tokens,) = _numbers(f"{where}.new_tokens", [tokens])
    heads, block_size = _numbers(where, [entry["num_heads"], entry.get("block_size", BLOCK_SIZE)])
    if min(lengths) < (max(tokens) if isinstance(tokens, tuple) else tokens):
        raise ValueError(f"{where}.seq_lens: expected at least the new tokens")
    return Shape(str(entry["name"]), lengths, tokens, heads, block_size=block_size)


def _numbers(where: str, values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not values:
        raise ValueError(f"{where}: expected a list of whole numbers")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{where}: expected whole numbers of at least 1, got {value!r}")
    return tuple(values)
