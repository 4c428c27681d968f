"""Both shapes of a batch, drawn by hand."""

from __future__ import annotations

import pytest
import torch

from qlora_pl.inspection.data.drawings import batch_drawing, histogram
from qlora_pl.inspection.data.first_batch import picture
from qlora_pl.inspection.data.numbers import Lengths

NOT = -100


def test_a_padded_batch_is_read_by_its_mask_and_labels() -> None:
    batch = {
        "input_ids": torch.ones(2, 8, dtype=torch.int64),
        "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3]),
        "labels": torch.tensor([[NOT] * 3 + [7] * 4 + [NOT], [NOT] * 2 + [7] * 3 + [NOT] * 3]),
    }
    seen = picture(batch)
    assert (seen.width, seen.num_rows, seen.num_trained, seen.num_padding) == (8, 2, 7, 3)
    assert [tuple(s) for s in seen.lines[0].stretches] == [
        ("read", 0, 3),
        ("trained", 3, 7),
        ("read", 7, 8),
    ]
    assert [tuple(s) for s in seen.lines[1].stretches] == [
        ("read", 0, 2),
        ("trained", 2, 5),
        ("padding", 5, 8),
    ]


def test_a_packed_batch_is_read_by_its_positions() -> None:
    """Rows of 3 and 3 tokens and 2 of padding; a row of 8; a line of padding alone."""
    batch = {
        "input_ids": torch.ones(3, 8, dtype=torch.int64),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1], list(range(8)), list(range(8))]),
        "labels": torch.tensor(
            [
                [NOT, NOT, 7, NOT, 7, 7, NOT, NOT],
                [NOT] * 4 + [7] * 4,
                [NOT] * 8,
            ]
        ),
        "document_lengths": torch.tensor([3, 3, 8]),
    }
    seen = picture(batch)
    assert (seen.num_rows, seen.num_trained, seen.num_padding) == (3, 7, 10)
    assert [line.row_starts for line in seen.lines] == [[0, 3], [0], []]
    assert [s.kind for s in seen.lines[0].stretches] == [
        *("read", "trained", "read", "trained", "padding")
    ]
    assert batch_drawing(seen).count('class="start"') == 1


def test_pairs_are_drawn_side_by_side() -> None:
    """Sources of 4 and 2 tokens, targets of 1 and 2."""
    batch = {
        "input_ids": torch.ones(2, 4, dtype=torch.int64),
        "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]]),
        "labels": torch.tensor([[7, NOT], [7, 7]]),
        "decoder_attention_mask": torch.tensor([[1, 0], [1, 1]]),
    }
    seen = picture(batch)
    assert (seen.width, seen.num_rows, seen.num_trained, seen.num_padding) == (6, 2, 3, 3)
    assert [[s.kind for s in line.stretches] for line in seen.lines] == [
        ["read", "trained", "padding"],
        ["read", "padding", "trained"],
    ]


@pytest.mark.parametrize("max_length", [10, 100, 1000])
def test_the_cut_off_is_drawn_inside_of_the_histogram(max_length: int) -> None:
    lengths = Lengths([0, 10, 20, 900], [3, 0, 1], {}, 0)
    drawn = histogram(lengths, max_length)
    assert f"data.max_length {max_length:,}" in drawn
    assert drawn.count("<rect") == 2
    assert "20 and longer: 1" in drawn
    assert ('class="count over"' in drawn) == (max_length < 20)
