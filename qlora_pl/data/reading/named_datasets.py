"""The datasets of the QLoRA paper and of its tutorials, by name: ``{dataset: alpaca}``.

A name stands for a place, a format and a column or two; nothing else depends on it. Row counts and
licences are those that the datasets' authors published, and none was counted here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TREES = ("oasst",)
"""Formats that take ``languages`` and ``replies``."""


@dataclass(frozen=True, kw_only=True)
class NamedDataset:
    """Where a dataset lies, and what its rows mean."""

    path: str | None
    """Its name on the Hub; None: it must be brought as a file."""
    format: str
    licence: str
    """As its card or repository states it."""
    num_rows: int | None = None
    """Published rows of the training split, before any filter; None: no exact number was found."""
    subset: str | None = None
    revision: str | None = None
    """The commit; None: this project knows none, so that the newest is read unless one is set."""
    file: str | None = None
    """The files to read of the repository, a name or a pattern; None: all."""
    columns: dict[str, str] = field(default_factory=dict)
    is_huge: bool = False
    """Nobody trains on all of it: ``sample`` or ``limit`` must be said."""
    note: str = ""
    """What a user should know, one sentence."""


DATASETS: dict[str, NamedDataset] = {
    "alpaca": NamedDataset(
        path="tatsu-lab/alpaca",
        revision="dce01c9b08f87459cf36a430d809084718273017",
        format="alpaca",
        num_rows=52_002,
        licence="CC BY-NC 4.0",
    ),
    "alpaca-cleaned": NamedDataset(
        path="yahma/alpaca-cleaned",
        format="alpaca",
        num_rows=51_942,
        licence="CC BY 4.0",
        note="Its rows changed over time; pin a revision.",
    ),
    "chip2": NamedDataset(
        path="laion/OIG",
        file="unified_chip2.jsonl",
        format="chip2",
        num_rows=210_289,
        licence="Apache 2.0",
        note="Every turn is kept, also those after the second answer.",
    ),
    "self-instruct": NamedDataset(
        path="yizhongw/self_instruct",
        file="self_instruct/**",
        revision="refs/convert/parquet",
        format="prompt-completion",
        num_rows=82_612,
        licence="Apache 2.0",
        note="Its main branch is a loading script, which datasets 4 does not run; read is the copy "
        "in Parquet that the Hub made of it.",
    ),
    "hh-rlhf": NamedDataset(
        path="Anthropic/hh-rlhf",
        format="hh-rlhf",
        num_rows=160_800,
        licence="MIT",
        note="The chosen dialogue of each pair, cut into its turns.",
    ),
    "longform": NamedDataset(
        path="akoksal/LongForm",
        format="input-output",
        num_rows=23_652,
        licence="MIT",
    ),
    "guanaco": NamedDataset(
        path="timdettmers/openassistant-guanaco",
        revision="831dabac2283d99420cda0b673d7a2a43849f17a",
        format="guanaco",
        num_rows=9_846,
        licence="Apache 2.0",
        note="One path of each tree of OASST1, flattened; format: text trains on every token, as "
        "the paper's Guanaco was.",
    ),
    "oasst1": NamedDataset(
        path="OpenAssistant/oasst1",
        format="oasst",
        num_rows=84_437,
        licence="Apache 2.0",
        note="Rows are messages; the best path of each of its trees is a conversation (the paper "
        "speaks of the top reply at each level and of 9,209 examples).",
    ),
    "unnatural-instructions": NamedDataset(
        path="mrm8488/unnatural-instructions-core",
        format="unnatural-instructions",
        num_rows=66_010,
        licence="MIT",
        note="The core; a row may hold several instances (68,478 in all).",
    ),
    "unnatural-instructions-full": NamedDataset(
        path="mrm8488/unnatural-instructions-full",
        format="unnatural-instructions-full",
        num_rows=66_010,
        licence="MIT",
        note="The core's rows with reworded instructions: 240,670 examples.",
    ),
    "flan-v2": NamedDataset(
        path="chiayewken/flan-v2",
        format="source-target",
        num_rows=23_173_509,
        licence="not stated on its card (the FLAN collection: Apache 2.0)",
        is_huge=True,
        note="44 GB, fetched whole; other copies have inputs and targets (format inputs-targets).",
    ),
    "super-natural-instructions": NamedDataset(
        path="Muennighoff/natural-instructions",
        format="natural-instructions",
        licence="not stated on its card (the original: Apache 2.0)",
        is_huge=True,
        note="Between 1 and 10 million rows; the original script plans 69,624 of them.",
    ),
    "vicuna": NamedDataset(
        path=None,
        format="vicuna",
        licence="none: its conversations were never released",
        note="A file of ShareGPT conversations; an answer that opens one and a question that ends "
        "it are left out.",
    ),
    "dolly": NamedDataset(
        path="databricks/databricks-dolly-15k",
        format="dolly",
        num_rows=15_011,
        licence="CC BY-SA 3.0",
    ),
    "prompts": NamedDataset(
        path="fka/awesome-chatgpt-prompts",
        format="text",
        columns={"text": "prompt"},
        licence="CC0 1.0",
        note="Prompts alone, learnt as text; it grows by contributions, so pin a revision.",
    ),
    "text": NamedDataset(
        path=None,
        format="text",
        licence="the file's own",
        note="Raw text: .txt, or the column text of any other kind; each document is a row.",
    ),
}
"""By the name that ``dataset`` takes."""
