"""What a number counts, told from its name and from how its docstring begins."""

from __future__ import annotations

import re

PLAIN = "none, a plain number"
SHARE = "a share, from 0 to 1"
BY_NAME = ((r"_seconds$|-seconds$|^--time-limit$", "seconds"), (r"_gib$|-gib$", "GiB"))
BY_MEANING = (
    (r"^Share|^Sample from .* share|^The warm-up as a share|as a fraction of", SHARE),
    (r"a number of rows, or a share", "rows, or below 1 a share of them"),
    (
        r"^(Tokens|Trained tokens|tokens of)|so many likeliest tokens|^Runs of so many tokens",
        "tokens",
    ),
    (r"^(Rows of|Rows that|Validation rows)|[Rr]ead .*rows|first so many rows", "rows"),
    (r"^Optimizer steps|every so many optimizer steps|^Steps", "optimizer steps"),
    (r"^Micro-batches", "micro-batches"),
    (r"^Batches", "batches"),
    (r"^Epochs", "epochs"),
    (r"^Weights", "weights"),
    (r"^(Loader p|P)rocesses", "processes"),
    (r"checkpoints that are kept", "checkpoints"),
    (r"^Beginnings of an answer", "beams"),
    (r"over the peak|over that of", "a ratio"),
    (r"^How often each row", "times an epoch"),
    (r"^Seed|^Of what is drawn at random", "none, any whole number from 0 on"),
)
"""By the first that is found."""


def unit_of(name: str, kind: str, meaning: str) -> str:
    """What a number counts; "" where the value is none, or nothing tells.

    Args:
        name: Of a key or flag.
        kind: Its type, in words.
        meaning: Its docstring's text.
    """
    if "number" not in kind or kind.startswith("mapping"):
        return ""
    for table, text in ((BY_NAME, name), (BY_MEANING, meaning)):
        for pattern, unit in table:
            if re.search(pattern, text):
                return unit
    return "" if name.startswith(("trainer.", "--")) else PLAIN
