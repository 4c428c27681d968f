"""A run's configuration -> the rows that it would read, and the same rows before they are cut.

The training parser and the run's own data module do the work, so that what is looked at is what is
trained on; no trainer is built and no weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from qlora_pl.cli import read_runs, settings
from qlora_pl.data.conversation import Conversation
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.places import Place
from qlora_pl.data.preparation import EncodedSplit

TRAIN, VAL = "data.sources", "data.val_sources"


class RunData(NamedTuple):
    """What a run reads."""

    name: str
    data: InstructionDataModule
    """Set up; without splits where nothing was left to split."""
    whole: dict[str, EncodedSplit]
    """By the configuration key of their sources: every row as it is before ``data.max_length``."""
    problems: list[str]
    """Why ``fit`` would not start on these rows."""


def read_run(words: list[str]) -> RunData:
    """Parse what ``fit`` would be given, and read its rows.

    Raises:
        ConfigurationError: for every mistake that ``fit`` would name before it reads rows.
        DatasetFormatError: if a training row is not what its format says.
    """
    (run,) = read_runs([words])
    model: dict[str, Any] = settings(run.model)
    data = InstructionDataModule(**settings(run.data) | {"num_workers": 0})
    problems = data.setup_alone(model, run.trainer.accumulate_grad_batches)
    whole = {key: data.whole_rows(key) for key in data.read}
    return RunData(str(run.run.name), data, whole, problems)


class Documents(Sequence[tuple[Place, Conversation]]):
    """Each conversation of some rows once, whatever number of rows it became.

    Args:
        split: The rows.
    """

    def __init__(self, split: EncodedSplit) -> None:
        firsts = np.unique(split.conversations.of_row, return_index=True)[1]
        self.split = split.select(np.sort(firsts))

    def __len__(self) -> int:
        return len(self.split.rows)

    def __getitem__(self, number: Any) -> Any:
        """One conversation with its place."""
        return self.place(number), self.split.conversations[number]

    def place(self, number: int) -> Place:
        """The file and row of one."""
        place = self.split.places[number]
        return Place(place.source, place.row)

    @property
    def places(self) -> list[Place]:
        """All of their files and rows."""
        return [self.place(number) for number in range(len(self))]


def whole_documents(run: RunData) -> dict[str, Documents]:
    """The conversations that the run trains and validates on, by split.

    Rows that are dropped for their length stand with those that they were read with, unless the
    run takes only the first so many of a split.
    """
    splits, data = run.data.splits, run.data
    if "val" not in splits:
        return {"train": Documents(run.whole[TRAIN])}
    if data.max_train_samples is not None or data.max_val_samples is not None:
        return {name: Documents(splits[name]) for name in ("train", "val")}
    if VAL in run.whole:
        return {"train": Documents(run.whole[TRAIN]), "val": Documents(run.whole[VAL])}
    whole = run.whole[TRAIN]
    held_out = set(Documents(splits["val"]).places)
    is_val = np.array([Place(*place[:2]) in held_out for place in whole.places], dtype=bool)
    return {
        "train": Documents(whole.select(np.flatnonzero(~is_val))),
        "val": Documents(whole.select(np.flatnonzero(is_val))),
    }
