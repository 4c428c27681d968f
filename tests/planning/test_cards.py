"""What ``--gpu`` may say, and what is known of each card."""

from __future__ import annotations

import pytest

from qlora_pl.errors import ConfigurationError
from qlora_pl.planning.work.cards import CARDS, GIB, card_named


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("T4", "T4"),
        ("tesla t4", "T4"),
        ("rtx 3090", "RTX3090"),
        ("3090", "RTX3090"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("RTX_A6000", "A6000"),
        ("a100", "A100-40GB"),
        ("A100-80GB", "A100-80GB"),
        ("a100 80gb", "A100-80GB"),
        ("v100", "V100-16GB"),
        ("H100 SXM", "H100"),
        ("h200", "H200"),
    ],
)
def test_a_card_is_found_in_every_usual_spelling(word: str, name: str) -> None:
    assert card_named(word).name == name


@pytest.mark.parametrize(
    ("word", "size"),
    [
        ("24GiB", 24 * GIB),
        ("24 gib", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("46.5GiB", int(46.5 * GIB)),
        ("8192MiB", 8 * GIB),
    ],
)
def test_a_bare_size_is_a_card_of_that_memory_and_unknown_speed(word: str, size: int) -> None:
    card = card_named(word)
    assert card.memory_bytes == size
    assert not card.is_named


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("a6001", "did you mean 'A6000'"),
        ("RTX 3080", "did you mean 'RTX3090'"),
        ("L40", "did you mean 'L40S'"),
        ("abc", "no card is called 'abc'"),
        ("", "no card is called ''"),
        ("0", "no memory"),
        ("0GiB", "no memory"),
        ("-3GiB", "no memory"),
        ("5000GiB", "more than a card can have"),
        ("24", "write 24GiB"),
        ("24furlongs", "write 24GiB"),
        ("nan", "no card is called 'nan'"),
        ("infGiB", "no card is called 'infGiB'"),
    ],
)
def test_what_is_no_card_and_no_size_is_refused_in_one_sentence(word: str, part: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        card_named(word)
    (sentence,) = refused.value.problems
    assert sentence.startswith("--gpu: ")
    assert part in sentence


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_card_has_less_memory_than_its_name_says_but_not_much_less(card: object) -> None:
    """Sizes as the boards are sold, in GB; usable GiB are between 88 and 100 per cent of them."""
    sold = {
        "T4": 16,
        "V100-16GB": 16,
        "V100-32GB": 32,
        "RTX3060": 12,
        "RTX3090": 24,
        "RTX4090": 24,
        "A6000": 48,
        "L40S": 48,
        "A100-40GB": 40,
        "A100-80GB": 80,
        "H100": 80,
        "H200": 141,
    }
    share = card.memory_bytes / GIB / sold[card.name]  # type: ignore[attr-defined]
    assert 0.9 < share < 1.0
