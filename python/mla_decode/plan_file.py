"""Plans on disk: JSON for people, npz for size. No pickle in either.

Both hold the same header (format name, queue version, sizes) and arrays, and a sha256 over
all that decides what the queue computes: sizes, lengths and words.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import QueueError, QueueVersionError
from .words import INSTRUCTION_WORDS, QUEUE_VERSION, Words

FORMAT = "mla_decode.plan"
_MOST_WORKERS = 1 << 14  # kMaxWorkers of scheduler/batch.h

_ARRAYS = {
    "seq_lens": np.int32,
    "instructions": np.int32,
    "worker": np.int32,
    "start_us": np.float32,
    "end_us": np.float32,
}
_INTEGERS = (
    "num_heads",
    "num_kv_heads",
    "total_tokens",
    "num_workers",
    "split_tiles",
    "num_slots",
    "group_rows",
)


@dataclass(frozen=True)
class PlanDocument:
    """What a file holds; fields as in `mla_decode.Plan`."""

    seq_lens: npt.NDArray[np.int32]
    num_heads: int
    new_tokens: int | tuple[int, ...]
    num_kv_heads: int
    total_tokens: int
    num_workers: int
    policy: str
    split_tiles: int
    instructions: Words
    num_slots: int
    predicted_us: float
    worker: npt.NDArray[np.int32]
    start_us: npt.NDArray[np.float32]
    end_us: npt.NDArray[np.float32]
    group_rows: int

    def sha256(self) -> str:
        """Digest over the sizes, the lengths, the new tokens and the words."""
        sizes = {
            "queue_version": QUEUE_VERSION,
            "num_heads": self.num_heads,
            "new_tokens": self.new_tokens,
            "num_kv_heads": self.num_kv_heads,
            "total_tokens": self.total_tokens,
            "num_slots": self.num_slots,
            "group_rows": self.group_rows,
            "requests": self.seq_lens.size,
        }
        digest = hashlib.sha256(json.dumps(sizes).encode())
        digest.update(self.seq_lens.astype("<i4").tobytes())
        digest.update(self.instructions.astype("<i4").tobytes())
        return digest.hexdigest()


def write(path: Path, document: PlanDocument) -> None:
    """Write ``document``; npz if the name ends so, JSON otherwise."""
    header: dict[str, Any] = {
        "format": FORMAT,
        "queue_version": QUEUE_VERSION,
        "instruction_words": INSTRUCTION_WORDS,
        "sha256": document.sha256(),
        "policy": document.policy,
        "predicted_us": document.predicted_us,
        "new_tokens": document.new_tokens,
    }
    header.update({name: getattr(document, name) for name in _INTEGERS})
    arrays = {name: getattr(document, name) for name in _ARRAYS}
    if path.suffix == ".npz":
        text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
        np.savez_compressed(path, header=text, **arrays)
        return
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in header.items()]
    lines += [f"  {json.dumps(name)}: {_json_rows(array)}" for name, array in arrays.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def read(path: Path) -> PlanDocument:
    """Read what `write` wrote.

    Raises
    ------
    QueueVersionError, QueueError
        Other version; or no plan, truncated, mutated.
    """
    header, arrays = _read_npz(path) if path.suffix == ".npz" else _read_json(path)
    if header.get("format") != FORMAT:
        raise QueueError(f"{path}: expected format {FORMAT!r}, got {header.get('format')!r}")
    version = header.get("queue_version")
    if version != QUEUE_VERSION or header.get("instruction_words") != INSTRUCTION_WORDS:
        raise QueueVersionError(
            f"{path}: expected queue version {QUEUE_VERSION} of {INSTRUCTION_WORDS} words, got "
            f"version {version} of {header.get('instruction_words')} words; plan again"
        )
    document = _document(path, header, arrays)
    if document.sha256() != header.get("sha256"):
        raise QueueError(
            f"{path}: mutated: expected sha256 {header.get('sha256')}, the words give "
            f"{document.sha256()}"
        )
    return document


def _document(path: Path, header: dict[str, Any], arrays: dict[str, Any]) -> PlanDocument:
    fields: dict[str, Any] = {}
    try:
        for name in _INTEGERS:
            fields[name] = _integer(name, header[name])
        fields["new_tokens"] = _new_tokens(header["new_tokens"])
        fields["policy"] = str(header["policy"])
        fields["predicted_us"] = float(header["predicted_us"])
        for name, dtype in _ARRAYS.items():
            fields[name] = np.ascontiguousarray(np.asarray(arrays[name], dtype=dtype))
    except KeyError as error:
        raise QueueError(f"{path}: truncated: expected the entry {error}") from None
    except (TypeError, ValueError, OverflowError) as error:
        raise QueueError(f"{path}: malformed: {error}") from None
    words = fields["instructions"]
    if words.ndim != 2 or words.shape[1] != INSTRUCTION_WORDS:
        raise QueueError(
            f"{path}: instructions: expected shape [n, {INSTRUCTION_WORDS}], got "
            f"{list(words.shape)}"
        )
    _require_sane(path, fields)
    tokens, batch = fields["new_tokens"], fields["seq_lens"].size
    if isinstance(tokens, tuple) and len(tokens) != batch:
        raise QueueError(f"{path}: new_tokens: expected {batch} entries, got {len(tokens)}")
    for name in ("worker", "start_us", "end_us"):
        if fields[name].shape != words.shape[:1]:
            raise QueueError(
                f"{path}: {name}: expected {words.shape[0]} entries, got {list(fields[name].shape)}"
            )
    return PlanDocument(**fields)


def _require_sane(path: Path, fields: dict[str, Any]) -> None:
    """Check what the digest does not cover, because the queue computes the same without it."""
    workers, worker = fields["num_workers"], fields["worker"]
    if not 1 <= workers <= _MOST_WORKERS:
        raise QueueError(f"{path}: num_workers: expected 1 to {_MOST_WORKERS}, got {workers}")
    if worker.min(initial=0) < 0:
        raise QueueError(f"{path}: worker: expected 0 or more, got {worker.min()}")
    if fields["split_tiles"] < 0:
        raise QueueError(f"{path}: split_tiles: expected 0 or more, got {fields['split_tiles']}")
    for name in ("predicted_us", "start_us", "end_us"):
        if not np.isfinite(fields[name]).all():
            raise QueueError(f"{path}: {name}: expected finite times")


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    return value


def _new_tokens(value: Any) -> int | tuple[int, ...]:
    """A number for all requests, or one for each."""
    if isinstance(value, list):
        return tuple(_integer("new_tokens", tokens) for tokens in value)
    return _integer("new_tokens", value)


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise QueueError(f"{path}: truncated or no JSON: {error}") from None
    if not isinstance(document, dict):
        raise QueueError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document, document


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(bytes(arrays.pop("header")).decode())
    except FileNotFoundError:
        raise
    except KeyError as error:
        raise QueueError(f"{path}: truncated: expected the entry {error}") from None
    except Exception as error:  # zip, zlib, numpy and its tokenizer have a dozen of their own
        raise QueueError(f"{path}: truncated or no npz: {error}") from None
    if not isinstance(header, dict):
        raise QueueError(f"{path}: expected a header object, got {type(header).__name__}")
    return header, arrays


def _json_rows(array: npt.NDArray[Any]) -> str:
    if array.ndim == 1:
        values = [round(float(x), 4) for x in array] if array.dtype.kind == "f" else array.tolist()
        return json.dumps(values)
    return "[\n    " + ",\n    ".join(json.dumps(row) for row in array.tolist()) + "\n  ]"
