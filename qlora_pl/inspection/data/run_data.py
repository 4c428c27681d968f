"""A run's configuration -> the rows that it would read, and the same rows before they are cut.

The training parser and the run's own data module do the work, so that what is looked at is what is
trained on; no trainer is built and no weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from qlora_pl.cli import read_runs
from qlora_pl.data.conversation import Conversation
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.encoding.lengths import Limits
from qlora_pl.data.reading.places import Place
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.data.rows.preparation import EncodedSplit, prepare_split
from qlora_pl.data.splits import BaseFacts, limits_of
from qlora_pl.errors import ConfigurationError, DatasetFormatError, QLoRAError
from qlora_pl.files import cache_root
from qlora_pl.run_checks import DEFAULT_ACCUMULATION, settings

TRAIN, VAL = "data.sources", "data.val_sources"


class RowsOfRun(InstructionDataModule):
    """A run's data module without a trainer, which reads on where ``fit`` would stop.

    Args:
        base: What is known of the run's model.
        accumulation: The run's ``trainer.accumulate_grad_batches``, where its data set no
            ``global_batch_size``.
        settings: The run's ``data``.
    """

    def __init__(self, base: BaseFacts, accumulation: int, **settings: Any) -> None:
        super().__init__(**settings | {"num_workers": 0})
        self.base, self.accumulation = base, accumulation
        self.limits = limits_of(self)
        self.noted: list[str] = []
        """Why ``fit`` would not start on these rows."""
        self.read: dict[str, EncodedSplit] = {}
        """The rows of each key, before they are split."""
        self._sources: dict[str, RowSources] = {}

    def setup(self, stage: str = "fit") -> None:
        """Read training and validation rows, as far as they can be read.

        Raises:
            QLoRAError: if there are no training rows that could be looked at.
        """
        try:
            super().setup(stage)
        except QLoRAError as error:
            if TRAIN not in self.read:
                raise
            if len(self.read[TRAIN].rows):  # else it follows from what is noted already
                self.noted += str(error).splitlines()

    def read_rows(self, sources: RowSources, key: str) -> EncodedSplit:
        """See ``InstructionDataModule``."""
        self._sources[key] = sources
        self.read[key] = self._prepare(key, self.limits, self.noted)
        return self.read[key]

    def whole_rows(self, key: str) -> EncodedSplit:
        """Every row that was read for a key, as it is before anything is cut or left out."""
        report = self.read[key].report
        if not (report.num_cut or report.num_split or report.num_dropped):
            return self.read[key]
        room = report.longest + report.longest_target
        has_two = self.max_target_length is not None
        limits = Limits(
            max_length=room, max_target_length=room if has_two else None, max_lost_ratio=1.0
        )
        return self._prepare(key, limits, noted=[])

    def _prepare(self, key: str, limits: Limits, noted: list[str]) -> EncodedSplit:
        """With the rows that are not to blame, where one of them stops ``fit``."""
        assert self.base is not None
        root = cache_root(self.base.cache_dir) if self.cache else None
        sources, processes = self._sources[key], self.encoding_processes
        common = (key, root, processes)
        try:
            return prepare_split(sources, self.encoder, limits, *common, self.on_error, noted)
        except (ConfigurationError, DatasetFormatError) as error:
            if self.on_error == "skip" and limits.overlong != "error":
                raise
            noted += str(error).splitlines()
        if limits.overlong == "error":
            limits = replace(limits, overlong="drop")
        return prepare_split(sources, self.encoder, limits, *common, "skip", noted)


class RunData(NamedTuple):
    """What a run reads."""

    name: str
    data: RowsOfRun
    """Set up; without splits where nothing was left to split."""
    whole: dict[str, EncodedSplit]
    """By the configuration key of their sources: every row before it is cut or left out."""

    @property
    def problems(self) -> list[str]:
        """Why ``fit`` would not start on these rows."""
        return self.data.noted


def read_run(words: list[str]) -> RunData:
    """Parse what ``fit`` would be given, and read its rows.

    Raises:
        ConfigurationError: for every mistake that ``fit`` would name before it reads rows.
        DatasetFormatError: if no training row is what its format says.
    """
    (run,) = read_runs([words])
    base = BaseFacts.of(run.model)
    accumulation = run.trainer.accumulate_grad_batches or DEFAULT_ACCUMULATION
    data = RowsOfRun(base, accumulation, **settings(run.data))
    data.setup()
    return RunData(str(run.run.name), data, {key: data.whole_rows(key) for key in data.read})


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
