"""The steps of a smoke test in their order, and the record of what came of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qlora_pl.cli import read_runs
from qlora_pl.data.encoding.tokenizer import load_tokenizer
from qlora_pl.smoke.after_training import try_finished
from qlora_pl.smoke.base_files import BaseFiles, find_base
from qlora_pl.smoke.checklist import MARKS, Checklist
from qlora_pl.smoke.contradictions import refuse_contradictions
from qlora_pl.smoke.first_rows import FirstRows, find_first_rows
from qlora_pl.smoke.random_base import RandomBase, check_whole, make_base, most_bytes
from qlora_pl.smoke.row_check import RowCheck, check_rows, check_template, shown_row
from qlora_pl.smoke.run_tokenizer import check_tokenizer, provide_tokenizer
from qlora_pl.smoke.shrunken_run import ShrunkenRun, shrink
from qlora_pl.smoke.surroundings import refuse_full_disk
from qlora_pl.smoke.training import Training


class Procedure:
    """Tries one run.

    Args:
        words: As the user wrote them after ``fit``.
        place: A temporary folder.
        is_online: Whether the Hub may be asked.
        tell: Takes each line.
    """

    def __init__(
        self, words: list[str], place: Path, is_online: bool, tell: Callable[[str], None]
    ) -> None:
        self.words, self.place, self.is_online, self.tell = words, place, is_online, tell
        self.checklist = Checklist(tell, self._in_words, _can_show(MARKS["passed"][0]))
        self.run: Any = None
        self.base: BaseFiles | None = None
        self.skeleton: Any = None
        self.tokenizer: Path | None = None
        self.stand_ins: list[str] = []
        self.random_base: RandomBase | None = None
        self.first = FirstRows()
        self.rows: RowCheck | None = None
        self.shrunken: ShrunkenRun | None = None

    def perform(self) -> int:
        """Try every step whose ground holds; the exit code."""
        # A mistake here is said by the command, as every command says one, and nothing else is.
        with self.checklist.step("configuration", shows_failure=False) as step:
            step.said = self._configuration()
        if self.checklist.has_failed:
            return 2
        with self.checklist.step("base") as step:
            step.said = self._base()
        if self.base is not None:
            with self.checklist.step("tokenizer") as step:
                step.said = self._tokenizer()
        if self.tokenizer is not None:
            with self.checklist.step("template") as step:
                step.said = check_template(self.run, self._facts_folder, self.tokenizer)
            if step.status == "passed":
                with self.checklist.step("data") as step:
                    step.said, step.more = self._data()
        if not self.checklist.has_failed:
            self._train()
        self.checklist.show_rest()
        return int(self.checklist.has_failed)

    # -- steps -----------------------------------------------------------------------------------

    def _configuration(self) -> str:
        [self.run] = read_runs([self.words])
        refuse_contradictions(self.run)
        return f"{self.run.run.name}: every key and value is known"

    def _base(self) -> str:
        model = self.run.model
        self.base = find_base(
            model.model_name_or_path, model.revision, model.cache_dir, self.place / "found"
        )
        if self.base.origin.startswith("the built-in"):
            self.stand_ins.append(f"'{self.base.name}': its built-in shape for its config.json")
        skeleton = check_whole(self.base, self.run)
        refuse_full_disk(self.place, most_bytes(self.base, skeleton, self.run))
        self.skeleton = skeleton
        num_weights = sum(parameter.numel() for parameter in self.skeleton.parameters())
        return (
            f"{type(self.skeleton).__name__} of {num_weights:,} weights, from {self.base.origin}; "
            "what is quantised and adapted is there"
        )

    def _tokenizer(self) -> str:
        assert self.base is not None
        self.tokenizer, stand_in = provide_tokenizer(
            self.base, self.run, self.place / "tokenizer", self.is_online
        )
        if stand_in:
            self.stand_ins.append(stand_in)
        loaded = load_tokenizer(str(self.tokenizer))
        if self.skeleton is not None:
            check_tokenizer(loaded, self.skeleton, self.run)
            self.random_base = make_base(
                self.base,
                self.skeleton,
                self.run,
                self.place / "base",
                loaded if stand_in else None,
            )
        return f"{'stand-in: ' if stand_in else ''}{len(loaded):,} tokens"

    @property
    def _facts_folder(self) -> Path:
        """With the base's config.json, and what else it says of its tokens."""
        assert self.base is not None
        return self.base.folder if self.random_base is None else self.random_base.folder

    def _data(self) -> tuple[str, list[str]]:
        assert self.tokenizer is not None
        rows = self.place / "rows"
        rows.mkdir()
        self.first = find_first_rows(self.run.data, rows, self.is_online)
        self.stand_ins += [
            f"'{name}': three rows in its schema in its place"
            for name in dict.fromkeys(self.first.stand_ins)
        ]
        rows_found = check_rows(self.run, self.first, self._facts_folder, self.tokenizer)
        self.rows = rows_found
        said = rows_found.sentence()
        if self.first.stand_ins:
            said = f"stand-in: {said.removeprefix('the first ')}"
        return said, [*rows_found.notes(), *shown_row(rows_found)]

    def _train(self) -> None:
        assert self.rows is not None
        assert self.tokenizer is not None
        assert self.random_base is not None
        shrunken = shrink(self.run, self.random_base, self.tokenizer, self.first, self.rows)
        self.shrunken = shrunken
        training = Training(shrunken, self.words, self.place)
        with self.checklist.step("train") as step:
            step.said = training.until_killed()
            step.said += f" ({shrunken.ranks} processes)" if shrunken.ranks > 1 else ""
        if self.checklist.has_failed:
            return
        with self.checklist.step("resume") as step:
            step.said = training.resumed()
        if self.checklist.has_failed:
            return
        try_finished(
            self.checklist,
            self.run,
            shrunken,
            self.words,
            self.place,
            folder=training.folder,
            why_no_validation=self._why_no_validation(self.rows),
        )

    def _why_no_validation(self, rows: RowCheck) -> str:
        """A clause; empty where rows validate."""
        if self.run.trainer.limit_val_batches == 0:
            return "left out by trainer.limit_val_batches: 0"
        return "" if rows.has_validation else "no row validates (data.val_size: 0)"

    # -- what is said ------------------------------------------------------------------------------

    def _in_words(self, text: str) -> str:
        """With the user's names where those of temporary folders stand."""
        if self.run is None:
            return text
        for folder, name in (
            ("base", self.run.model.model_name_or_path),
            ("found", self.run.model.model_name_or_path),
            ("tokenizer", self.run.data.tokenizer),
        ):
            text = text.replace(str(self.place / folder), str(name))
        return text

    def record(self, code: int, seconds: float) -> dict[str, Any]:
        """Everything in plain types."""
        shrunken = self.shrunken
        return {
            "format": 1,
            "exit_code": code,
            "seconds": round(seconds, 1),
            "steps": [step.to_plain() for step in self.checklist.steps.values()],
            "stand_ins": self.stand_ins,
            "narrowed": shrunken.changes if shrunken else [],
            "not_tested": shrunken.not_tested if shrunken else [],
            "versions": {name: version(name) for name in ("torch", "lightning", "bitsandbytes")},
        }

    def show_end(self, code: int, seconds: float) -> None:
        """Tell what stood in, what was narrowed, what was not tested, and the verdict."""
        record = self.record(code, seconds)
        for title, key in (
            ("stood in for what is not here", "stand_ins"),
            ("narrowed", "narrowed"),
            ("not tested here", "not_tested"),
        ):
            if record[key]:
                self.tell(f"{title}:")
                for line in record[key]:
                    self.tell(f"  - {line}")
        failed = [s.name for s in self.checklist.steps.values() if s.status == "failed"]
        verdict = f"failed: {', '.join(failed)}" if failed else "passed"
        has_logs = self.shrunken is not None and failed  # of what ran as processes of its own
        hint = "; --keep leaves the logs" if has_logs else ""
        self.tell(f"smoke: {verdict}, in {seconds:.0f} s{hint}")


def perform(
    words: list[str], place: Path, is_online: bool, tell: Callable[[str], None], began: float
) -> dict[str, Any]:
    """Try a run; see ``Procedure``.

    Args:
        words: As for it.
        place: As for it.
        is_online: As for it.
        tell: As for it.
        began: When the command did, by ``time.monotonic()``; importing takes seconds.

    Returns:
        The record, with the exit code of the command.
    """
    procedure = Procedure(words, place, is_online, tell)
    code = procedure.perform()
    seconds = time.monotonic() - began
    if code != 2:
        procedure.show_end(code, seconds)
    return procedure.record(code, seconds)


def _can_show(mark: str) -> bool:
    try:
        mark.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
