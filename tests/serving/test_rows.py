"""A row of a batch ends where its own answer ends, and is told in whole characters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.inference.answering import Encoded
from qlora_pl.inference.prompts import Prompt
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.serving.rows import BatchStreamer, Ended, Event, Job, Piece, Row, RowStream

STOP, PADDING = 1000, 1001
BYTES: Any = SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace"))
"""A tokenizer whose tokens are bytes."""


def stream_of(heard: list[Event], limit: int = 100, stop: tuple[str, ...] = ()) -> RowStream:
    prompt = Prompt(0, Conversation((Message("user", "?"),)), {}, "prompt")
    job = Job("base", DecodingConfig(stop=stop), heard.append)
    return RowStream(Row(job, 0, Encoded(prompt, "?", [5])), limit, BYTES, {STOP})


def tell(streams: list[RowStream], rows: list[list[int]]) -> None:
    """As transformers does: prompts of one width, then a token of each row, padded at its end."""
    streamer = BatchStreamer(streams)
    streamer.put(torch.zeros(len(rows), 3, dtype=torch.long))
    for place in range(max(map(len, rows))):
        column = [row[place] if place < len(row) else PADDING for row in rows]
        streamer.put(torch.tensor(column))
    streamer.end()


def text_of(heard: list[Event]) -> str:
    return "".join(event.text for event in heard if isinstance(event, Piece))


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "👩‍👩‍👧 and 🏳️‍🌈"])
def test_no_piece_holds_half_a_character(text: str) -> None:
    heard: list[Event] = []
    tell([stream_of(heard)], [[*text.encode(), STOP]])
    assert text_of(heard) == text
    assert len(heard) > 5
    assert not any("\ufffd" in event.text for event in heard if isinstance(event, Piece))


def test_rows_end_apart_by_token_by_length_and_by_text() -> None:
    heard: list[list[Event]] = [[], [], [], []]
    streams = [
        stream_of(heard[0]),
        stream_of(heard[1], limit=4),
        stream_of(heard[2], stop=("!",)),
        stream_of(heard[3]),
    ]
    rows = [b"one", b"two and more", b"three! and more", b"the longest of all of them"]
    tell(streams, [[*row, STOP] for row in rows])
    ends = [events[-1] for events in heard]
    assert all(isinstance(end, Ended) for end in ends)
    answers = [end.answer for end in ends if isinstance(end, Ended)]
    assert [(answer.text, answer.stop_reason) for answer in answers] == [
        ("one", "stop_token"),
        ("two", "length"),
        ("three", "stop_text"),
        ("the longest of all of them", "stop_token"),
    ]
    assert [text_of(events) for events in heard] == [answer.text for answer in answers]
    assert [len(answer.ids) for answer in answers] == [3, 4, 6, 26]
    assert [sum(isinstance(event, Ended) for event in events) for events in heard] == [1] * 4


def test_a_row_is_wanted_until_it_ends_or_its_client_leaves() -> None:
    streams = [stream_of([]), stream_of([])]
    streams[0].row.job.has_left = True
    assert [stream.is_wanted for stream in streams] == [False, True]
    tell(streams, [[65, STOP], [65, STOP]])
    assert [stream.is_wanted for stream in streams] == [False, False]
