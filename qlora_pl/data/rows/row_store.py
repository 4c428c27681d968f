"""Encoded rows on disk: written as they come, mapped into memory, every byte checked when opened.

A million rows take no more memory to write or to read than a thousand. A folder gets its name only
when it is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self, overload

import numpy as np

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.encoding.example import EncodedExample
from qlora_pl.data.reading.places import Place
from qlora_pl.data.rows.encoded_rows import EncodedRows, concatenated, concatenated_weights
from qlora_pl.files import sha256_bytes, sha256_file

INDEX = ("start", "length", "trained", "file", "row", "part", "conversation")
"""What is known of each row: int64 each."""
FILES = {
    "tokens.int32": np.int32,
    "trained.bool": np.bool_,
    "rows.int64": np.int64,
    "conversations.jsonl": np.uint8,
    "conversation_starts.int64": np.int64,
    "needed.int64": np.int64,
}
WEIGHTS = "weights.float32"
META = "meta.json"
"""What is known of all rows together, below its own digest."""


class EncodedChunk(NamedTuple):
    """Rows on their way from where they were encoded to where they are kept."""

    input_ids: np.ndarray
    is_trained: np.ndarray
    weights: np.ndarray | None
    origins: np.ndarray
    """``(num_rows, 6)`` int64: ``INDEX`` without ``start``; conversations count from 0 here."""
    conversations: bytes
    """One line of JSON each."""
    conversation_lengths: np.ndarray
    """``(num_conversations,)`` int64, bytes of each line."""

    @classmethod
    def of(
        cls,
        examples: Sequence[EncodedExample],
        origins: Sequence[tuple[int, int, int, int]],
        conversations: Sequence[Conversation],
    ) -> EncodedChunk:
        """Of these rows; their origins are source, row, part and place among the conversations."""
        lines = [json.dumps(to_plain(c)).encode() + b"\n" for c in conversations]
        index = [
            (len(example.input_ids), example.num_trained, *origin)
            for example, origin in zip(examples, origins, strict=True)
        ]
        return cls(
            concatenated([example.input_ids for example in examples], np.int32),
            concatenated([example.is_trained for example in examples], bool),
            concatenated_weights(examples),
            np.array(index, dtype=np.int64).reshape(-1, len(INDEX) - 1),
            b"".join(lines),
            np.array([len(line) for line in lines], dtype=np.int64),
        )


def to_plain(conversation: Conversation) -> dict[str, Any]:
    """A conversation in plain types."""
    turns = [[m.role, m.content, m.context, m.weight] for m in conversation.messages]
    return {"text": conversation.is_plain_text, "turns": turns}


def from_plain(value: dict[str, Any]) -> Conversation:
    """The conversation that ``to_plain`` was given."""
    return Conversation(tuple(Message(*turn) for turn in value["turns"]), value["text"])


class RowWriter:
    """Appends chunks to the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, BinaryIO] = {name: (folder / name).open("wb") for name in FILES}
        self._num_tokens = 0
        self._num_conversations = 0
        self._num_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def append(self, chunk: EncodedChunk) -> None:
        """Add rows."""
        self._append_weights(chunk)
        self._files["tokens.int32"].write(chunk.input_ids.tobytes())
        self._files["trained.bool"].write(chunk.is_trained.tobytes())
        lengths = chunk.origins[:, 0]
        starts = self._num_tokens + np.cumsum(lengths) - lengths
        index = np.column_stack([starts, chunk.origins]).astype(np.int64)
        index[:, -1] += self._num_conversations
        self._files["rows.int64"].write(index.tobytes())
        self._files["conversations.jsonl"].write(chunk.conversations)
        sizes = chunk.conversation_lengths
        beginnings = self._num_bytes + np.cumsum(sizes) - sizes
        self._files["conversation_starts.int64"].write(beginnings.astype(np.int64).tobytes())
        self._num_tokens += len(chunk.input_ids)
        self._num_conversations += len(sizes)
        self._num_bytes += len(chunk.conversations)

    def _append_weights(self, chunk: EncodedChunk) -> None:
        if chunk.weights is None and WEIGHTS not in self._files:
            return
        if WEIGHTS not in self._files:  # the first row that has any: what was trained counts 1
            file = self._files[WEIGHTS] = (self._folder / WEIGHTS).open("wb")
            self._files["trained.bool"].flush()
            with (self._folder / "trained.bool").open("rb") as before:
                while some := before.read(1 << 20):
                    file.write(np.frombuffer(some, np.bool_).astype(np.float32).tobytes())
        weights = chunk.is_trained if chunk.weights is None else chunk.weights
        self._files[WEIGHTS].write(weights.astype(np.float32).tobytes())

    def finish(
        self, files: Sequence[tuple[str, int]], report: dict[str, Any], needed: np.ndarray
    ) -> None:
        """Add what is known of all rows together, and the digests of the files."""
        self._files["needed.int64"].write(needed.astype(np.int64).tobytes())
        for file in self._files.values():
            file.close()
        digests = {name: sha256_file(self._folder / name) for name in self._files}
        meta = json.dumps({"files": list(files), "report": report, "sha256": digests})
        (self._folder / META).write_text(f"{sha256_bytes(meta.encode())}\n{meta}")


@dataclass(frozen=True)
class StoredRows:
    """What a folder of rows holds."""

    rows: EncodedRows
    places: Places
    conversations: Conversations
    report: dict[str, Any]
    needed: np.ndarray
    """How many trained tokens need each ``max_length`` to be kept."""


def open_rows(folder: Path) -> StoredRows | None:
    """The rows of a folder, mapped; None if it is not whole or was altered."""
    try:
        digest_of_meta, text = (folder / META).read_text().split("\n")
        if sha256_bytes(text.encode()) != digest_of_meta:
            return None
        meta = json.loads(text)
        for name, digest in meta["sha256"].items():
            if sha256_file(folder / name) != digest:
                return None
    except (OSError, ValueError):
        return None
    arrays = {name: _mapped(folder / name, dtype) for name, dtype in FILES.items()}
    index = arrays["rows.int64"].reshape(-1, len(INDEX)).T
    weights = _mapped(folder / WEIGHTS, np.float32) if WEIGHTS in meta["sha256"] else None
    rows = EncodedRows(
        arrays["tokens.int32"], arrays["trained.bool"], index[0], index[1], index[2], weights
    )
    return StoredRows(
        rows,
        Places([(name, number) for name, number in meta["files"]], index[3:6]),
        Conversations(arrays["conversations.jsonl"], arrays["conversation_starts.int64"], index[6]),
        meta["report"],
        arrays["needed.int64"],
    )


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")


class Places(Sequence[Place]):
    """Where each row came from.

    Args:
        files: Their names, and the number of the source that each was read for.
        origins: ``(3, num_rows)``: file, row and part of each.
    """

    def __init__(self, files: Sequence[tuple[str, int]], origins: np.ndarray) -> None:
        self.files = files
        self.origins = origins

    def __len__(self) -> int:
        return self.origins.shape[1]

    @overload
    def __getitem__(self, place: int) -> Place: ...
    @overload
    def __getitem__(self, place: slice) -> Places: ...
    def __getitem__(self, place: int | slice) -> Place | Places:
        """One row's, or those of some."""
        if isinstance(place, slice):
            return Places(self.files, self.origins[:, place])
        file, row, part = (int(number) for number in self.origins[:, place])
        return Place(self.files[file][0], row, part)

    def select(self, rows: np.ndarray) -> Places:
        """Those of these rows."""
        return Places(self.files, self.origins[:, rows])

    def source_numbers(self) -> np.ndarray:
        """``(num_rows,)`` int64: which of the named sources each row comes from."""
        numbers = np.array([number for _, number in self.files], dtype=np.int64)
        return numbers[self.origins[0]] if len(numbers) else np.zeros(0, np.int64)


class Conversations(Sequence[Conversation]):
    """The conversation of each row, read when it is asked for.

    Args:
        lines: ``(num_bytes,)`` uint8: a line of JSON each.
        starts: ``(num_conversations,)``, where each begins.
        of_row: ``(num_rows,)``, which is whose.
    """

    def __init__(self, lines: np.ndarray, starts: np.ndarray, of_row: np.ndarray) -> None:
        self.lines = lines
        self.starts = starts
        self.of_row = of_row

    def __len__(self) -> int:
        return len(self.of_row)

    @overload
    def __getitem__(self, place: int) -> Conversation: ...
    @overload
    def __getitem__(self, place: slice) -> Conversations: ...
    def __getitem__(self, place: int | slice) -> Conversation | Conversations:
        """One row's, or those of some."""
        if isinstance(place, slice):
            return Conversations(self.lines, self.starts, self.of_row[place])
        number = int(self.of_row[place])
        start = int(self.starts[number])
        is_last = number + 1 == len(self.starts)
        end = len(self.lines) if is_last else int(self.starts[number + 1])
        return from_plain(json.loads(self.lines[start:end].tobytes()))

    def select(self, rows: np.ndarray) -> Conversations:
        """Those of these rows."""
        return Conversations(self.lines, self.starts, self.of_row[rows])

    def each(self) -> Conversations:
        """Every conversation once, in the rows' order, whatever number of rows it became."""
        return self.select(np.sort(np.unique(self.of_row, return_index=True)[1]))


def digest_of(parts: Iterable[bytes | str]) -> str:
    """SHA-256 of texts, each with its length, so that no two lists of them look alike."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
