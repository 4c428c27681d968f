"""``InstructionDataModule``: sources to loaders, wired into Lightning's hooks.

Everything is read, encoded and checked in ``setup``, which Lightning runs before
``configure_model``: a bad row stops a run before any weight is loaded.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from qlora_pl.batch import Batch, PromptBatch
from qlora_pl.data.batching import (
    BatchLayout,
    EvaluationBatches,
    InOrderSampler,
    PromptBatches,
    ResumableSampler,
    TrainingBatches,
    keyed_generator,
)
from qlora_pl.data.encoder_choice import Encoding, choose_encoder
from qlora_pl.data.encoding import TrainOn
from qlora_pl.data.lengths import Limits, Overlong
from qlora_pl.data.preparation import EncodedSplit, ReadRows, prepare_split
from qlora_pl.data.readers import hub_splits
from qlora_pl.data.sources import NO_ROWS, RowSources
from qlora_pl.data.stop_tokens import check_stop_token, known_stop_tokens
from qlora_pl.data.template_loading import load_template
from qlora_pl.data.tokenizer import load_tokenizer
from qlora_pl.errors import CheckpointError, ConfigurationError, DatasetFormatError, QLoRAError
from qlora_pl.files import cache_root

logger = logging.getLogger(__name__)


class InstructionDataModule(LightningDataModule):
    """Instruction data for training, validation, test and prediction.

    Args:
        sources: Rows to train on: a file (.json, .jsonl, .csv, .parquet), a Hub name, a mapping
            with ``path`` and the settings of ``SourceConfig``, or a list of these; from Python also
            a list of dictionaries or a ``datasets.Dataset`` (all that ``RowSources.parse`` takes).
        val_sources: Rows to validate on; null: a validation split of a Hub dataset where it has
            one, otherwise ``val_size`` of the training rows.
        test_sources: Rows for ``test``; null: the test split of a Hub dataset.
        template: How a conversation becomes text: ``alpaca``, ``guanaco``, ``vicuna``, ``chatml``,
            ``llama2``, ``llama3``, ``instruction-response``, ``plain``, ``chat`` (the tokenizer's
            own), ``auto`` (``chat`` where the tokenizer has one, else ``instruction-response``), a
            file of Jinja, or a mapping: ``{jinja: TEXT}`` or the fields of ``TextTemplate``.
        tokenizer: Hub name or folder; None: the model's.
        max_length: Tokens that a row may have, prompt, answers and special tokens together.
        max_target_length: Tokens that an answer may have where it has a limit of its own (with
            ``encoding: original``), which leaves ``max_length`` to what comes before it.
        encoding: ``spans``: the text is tokenised as a whole. ``original``: prompt and answer are
            tokenised and cut apart, as qlora.py does; for reproducing its numbers.
        overlong: What happens to a longer row: ``cut`` on the right, ``cut_keep_stop`` (the same,
            but the answer keeps its stop token), ``cut_prompt`` (on the left, then on the right),
            ``split`` into pieces, ``drop``, or ``error``.
        max_lost_ratio: Share of the trained tokens that cutting and dropping may take away before
            the run refuses to start, 0 to 1.
        train_on: What is learnt: ``answers``, the ``last_answer`` of each row,
            ``answers_and_system``, or ``everything``.
        append_eos: Whether plain text ends in the end-of-text token, so that a document's end is
            learnt; conversations always stop.
        cache: Whether encoded rows are kept on disk (``QLORA_PL_CACHE`` or ``~/.cache/qlora_pl``),
            so that the next start need not encode.
        encoding_processes: Processes that encode; None: up to 8, once there are many rows.
        batch_size: Rows of a micro-batch on one device. Rows of an optimizer step:
            ``batch_size`` x ``trainer.accumulate_grad_batches`` x devices.
        eval_batch_size: Rows of a batch in validation, test and prediction; None: ``batch_size``.
        group_by_length: Whether rows of similar length share a step, so that less is padded.
        val_size: Rows kept for validation where no split exists: a number of rows, or a share of
            them below 1 (one row at least); 0: none, all rows train.
        val_seed: Seed of that split alone, so that it is the same for every command and run.
        seed: Seed of the order of rows; None: the seed of ``seed_everything``, else 0.
        max_train_samples: Train on the first so many rows of the training split; None: all.
        max_val_samples: Validate on the first so many rows; None: all.
        num_workers: Loader processes; 0 reads in the training process.
    """

    def __init__(
        self,
        sources: RowSources,
        val_sources: RowSources = NO_ROWS,
        test_sources: RowSources = NO_ROWS,
        template: str | dict[str, str] = "auto",
        tokenizer: str | None = None,
        max_length: int = 512,
        max_target_length: int | None = None,
        encoding: Encoding = "spans",
        overlong: Overlong = "cut",
        max_lost_ratio: float = 0.01,
        train_on: TrainOn = "answers",
        append_eos: bool = True,
        cache: bool = True,
        encoding_processes: int | None = None,
        batch_size: int = 4,
        eval_batch_size: int | None = None,
        group_by_length: bool = True,
        val_size: int | float = 0.05,
        val_seed: int = 42,
        seed: int | None = None,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.sources = RowSources.parse(sources)
        self.val_sources = RowSources.parse(val_sources, "data.val_sources")
        self.test_sources = RowSources.parse(test_sources, "data.test_sources")
        self.chosen_template = template
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.max_target_length = max_target_length
        self.encoding: Encoding = encoding
        self.overlong = overlong
        self.max_lost_ratio = max_lost_ratio
        self.train_on: TrainOn = train_on
        self.append_eos = append_eos
        self.cache = cache
        self.encoding_processes = encoding_processes
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.group_by_length = group_by_length
        self.val_size = val_size
        self.val_seed = val_seed
        self.seed = seed
        self.max_train_samples = max_train_samples
        self.max_val_samples = max_val_samples
        self.num_workers = num_workers
        self.splits: dict[str, EncodedSplit] = {}
        self.read: dict[str, ReadRows] = {}
        self._model: Mapping[str, Any] = {}  # where there is no trainer to ask
        self._accumulation = 1
        self._noted: list[str] | None = None
        self._resume_from = {"epoch": 0, "position": 0}
        if problems := self.problems():
            raise ConfigurationError(problems)

    def problems(self) -> list[str]:
        """Every problem of the settings that can be found without reading a row."""
        ranges: list[tuple[bool, str]] = [
            (self.max_length >= 2, f"max_length: must be at least 2, got {self.max_length}."),
            (self.batch_size >= 1, f"batch_size: must be at least 1, got {self.batch_size}."),
            (
                self.eval_batch_size >= 1 or self.eval_batch_size == self.batch_size,
                f"eval_batch_size: must be at least 1, got {self.eval_batch_size}.",
            ),
            (
                0 <= self.max_lost_ratio <= 1,
                f"max_lost_ratio: must lie in 0 to 1, got {self.max_lost_ratio}.",
            ),
            (self.val_size >= 0, f"val_size: must be 0 or more, got {self.val_size}."),
            (
                isinstance(self.val_size, int) or self.val_size < 1,
                f"val_size: a share lies below 1, got {self.val_size}; write a whole number for "
                "rows.",
            ),
            (self.num_workers >= 0, f"num_workers: must be 0 or more, got {self.num_workers}."),
            (
                self.max_train_samples is None or self.max_train_samples >= 1,
                f"max_train_samples: must be at least 1, got {self.max_train_samples}.",
            ),
            (
                self.max_val_samples is None or self.max_val_samples >= 1,
                f"max_val_samples: must be at least 1, got {self.max_val_samples}.",
            ),
        ]
        problems = [f"data.{sentence}" for holds, sentence in ranges if not holds]
        for name in ("sources", "val_sources", "test_sources"):
            problems += getattr(self, name).problems(f"data.{name}")
        return problems

    # -- reading ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Read, encode, check and split the rows; a second call reads nothing."""
        self._resume_from = {"epoch": 0, "position": 0}  # of the run before, if there was one
        if stage == "test":
            self._setup_test()
        elif "val" not in self.splits:
            self._setup_fit()

    def setup_alone(self, model: Mapping[str, Any], accumulation: int = 1) -> list[str]:
        """``setup`` of a run without its trainer, going on where ``fit`` would not start.

        Args:
            model: ``model_name_or_path``, ``revision`` and ``cache_dir`` of the run's model.
            accumulation: The run's ``trainer.accumulate_grad_batches``.

        Returns:
            Why ``fit`` would not start on these rows; empty: it would.

        Raises:
            QLoRAError: if not even the training rows can be read.
        """
        self._model, self._accumulation, self._noted = model, accumulation, []
        try:
            self.setup("fit")
        except QLoRAError as error:
            if not self.read:
                raise
            if len(self.read["data.sources"].split.rows):  # else it follows from what is noted
                self._noted += str(error).splitlines()
        return self._noted

    def _setup_fit(self) -> None:
        self._prepare_encoder()
        train = self._encode(self.sources, "data.sources")
        val_sources = self.val_sources or self._hub_split(("validation", "eval", "dev"))
        if val_sources:
            val = self._encode(val_sources, "data.val_sources")
        else:
            train, val = self._split_off(train)
        self.splits["train"] = _first(train, self.max_train_samples)
        self.splits["val"] = _first(val, self.max_val_samples)
        for name in ("train", "val"):
            logger.info("%s: %s", name, self.splits[name].report)

    def _setup_test(self) -> None:
        if "test" in self.splits:
            return
        sources = self.test_sources or self._hub_split(("test",))
        if not sources:
            raise ConfigurationError("data.test_sources: no test rows are named; set it to a file.")
        self._prepare_encoder()
        self.splits["test"] = self._encode(sources, "data.test_sources")

    def _prepare_encoder(self) -> None:
        name = self.tokenizer_name or self._model_attribute("model_name_or_path")
        if name is None:
            raise ConfigurationError("data.tokenizer: name a tokenizer (a folder or Hub name).")
        # The revision is a commit of the model's repository, which no other has.
        is_the_models = name == self._model_attribute("model_name_or_path")
        revision = self._model_attribute("revision") if is_the_models else None
        self.tokenizer = load_tokenizer(name, revision, self._model_attribute("cache_dir"))
        self.template = load_template(self.chosen_template, self.tokenizer)
        self.encoder = choose_encoder(
            self.encoding,
            self.template,
            self.tokenizer,
            self.train_on,
            self.append_eos,
            self.max_target_length,
        )
        self._check_stop_token(name, revision)

    def _check_stop_token(self, tokenizer: str, revision: str | None) -> None:
        base = self._model_attribute("model_name_or_path") or tokenizer
        is_trained_whole = getattr(self._model_attribute("lora"), "method", "") == "none"
        if not is_trained_whole:
            known = known_stop_tokens(
                self.tokenizer,
                base,
                revision,
                self._model_attribute("cache_dir"),
                grows=bool(self._model_attribute("grow_vocabulary")),
            )
            trained = getattr(self._model_attribute("lora"), "trainable_tokens", ())
            check_stop_token(self.template, self.tokenizer, base, known, trained)

    def _model_attribute(self, name: str) -> Any:
        module = self.trainer.lightning_module if self.trainer is not None else None
        return getattr(module, name, self._model.get(name))

    @property
    def limits(self) -> Limits:
        """How long rows may be, and how much may be lost to that."""
        return Limits(
            max_length=self.max_length,
            max_target_length=self.max_target_length,
            overlong=self.overlong,
            max_lost_ratio=self.max_lost_ratio,
        )

    def whole_rows(self, key: str) -> EncodedSplit:
        """Every row that was read for a key, as it is before anything is cut or left out."""
        sources, split = self.read[key]
        report, longest = split.report, split.report.longest
        if not (report.num_cut or report.num_split or report.num_dropped):
            return split
        limits = Limits(
            max_length=longest,
            max_target_length=None if self.max_target_length is None else longest,
            max_lost_ratio=1.0,
        )
        return self._prepare(sources, key, limits, noted=[])

    def _encode(self, sources: RowSources, key: str) -> EncodedSplit:
        split = self._prepare(sources, key, self.limits, self._noted)
        self.read[key] = ReadRows(sources, split)
        logger.info("%s: %s", key, split.report)  # what was cut or dropped; parts do not know it
        return split

    def _prepare(
        self, sources: RowSources, key: str, limits: Limits, noted: list[str] | None
    ) -> EncodedSplit:
        folder = cache_root(self._model_attribute("cache_dir")) if self.cache else None
        arguments = (key, folder, self.encoding_processes)
        try:
            return prepare_split(sources, self.encoder, limits, *arguments, noted=noted)
        except (ConfigurationError, DatasetFormatError) as error:
            if noted is None:
                raise
            noted += str(error).splitlines()  # and on with the rows that are not to blame
        if limits.overlong == "error":
            limits = replace(limits, overlong="drop")
        return prepare_split(sources, self.encoder, limits, *arguments, "skip", noted)

    def _hub_split(self, names: Sequence[str]) -> RowSources:
        """The first of these splits that a Hub dataset of the training sources has, or nothing."""
        for source in self.sources.sources:
            for name in hub_splits(source):
                # "train+validation" and "validation[:500]" name splits that are trained on
                if name in names and name not in re.findall(r"\w+", source.split):
                    return RowSources((replace(source, split=name, limit=None),))
        return NO_ROWS

    def _split_off(self, rows: EncodedSplit) -> tuple[EncodedSplit, EncodedSplit]:
        """Training and validation rows; which is which depends on ``val_seed`` and nothing else."""
        conversation_of = rows.conversations.of_row
        names = np.unique(conversation_of)  # a conversation's rows stay together
        total = len(names)
        num_val = self.val_size
        if isinstance(num_val, float):
            num_val = max(1, round(total * num_val)) if num_val > 0 else 0
        if num_val >= total:
            raise ConfigurationError(
                f"data.val_size: {self.val_size} leaves none of the {total} rows to train on."
            )
        order = keyed_generator(self.val_seed, 0).permutation(total)
        is_val = np.isin(conversation_of, names[order[:num_val]])
        return rows.select(np.flatnonzero(~is_val)), rows.select(np.flatnonzero(is_val))

    # -- loaders ---------------------------------------------------------------------------------

    def _layout(self, batch_size: int, accumulation: int = 1) -> BatchLayout:
        if self.trainer is None:
            return BatchLayout(batch_size, accumulation)
        return BatchLayout(
            batch_size, accumulation, self.trainer.world_size, self.trainer.global_rank
        )

    def _training_layout(self) -> BatchLayout:
        trainer = self.trainer
        accumulation = self._accumulation if trainer is None else trainer.accumulate_grad_batches
        return self._layout(self.batch_size, accumulation)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches in the run's order, from where a resumed run stopped."""
        batches = TrainingBatches(
            self.splits["train"].rows,
            self._training_layout(),
            self._order_seed(),
            self.group_by_length,
            self.tokenizer.pad_token_id,
        )
        sampler = ResumableSampler(batches, **self._resume_from)
        return self._loader(batches, sampler)

    def first_batches(self, count: int) -> list[Batch]:
        """Batches of the first training rows, the same on every device, wherever training is."""
        rows = self.splits["train"].rows
        some = rows.select(range(min(count * self.batch_size, len(rows))))
        batches = EvaluationBatches(some, BatchLayout(self.batch_size), self.tokenizer.pad_token_id)
        return [batches[index] for index in range(len(batches))]

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The validation rows in a fixed order; no loader at all when there are none.

        Raises:
            ConfigurationError: if there are none and validating is all that was asked for.
        """
        is_asked_for = self.trainer is not None and self.trainer.state.fn == "validate"
        if is_asked_for and not len(self.splits["val"].rows):
            raise ConfigurationError(
                "data.val_size: 0 leaves no validation rows to score; name data.val_sources."
            )
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The test rows in a fixed order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """The prompts of the validation rows, in their order."""
        split = self.splits["val"]
        if not len(split.rows):
            raise ConfigurationError(
                "data.val_size: 0 leaves no validation rows to answer; name data.val_sources."
            )
        conversations = [c for c in split.conversations.each() if not c.is_plain_text]
        if not conversations:
            raise ConfigurationError(
                "data.val_sources: the validation rows are plain text, which has no prompts to "
                "answer."
            )
        prompts = [self.encoder.encode_prompt(c.prompt) for c in conversations]
        batches = PromptBatches(
            prompts,
            [c.reference for c in conversations],
            self._layout(self.eval_batch_size),
            self.tokenizer.pad_token_id,
        )
        return self._loader(batches)

    def _evaluation_loader(self, split: str) -> DataLoader[Batch] | list[Any]:
        rows = self.splits[split].rows
        if not len(rows):
            return []
        layout = self._layout(self.eval_batch_size)
        return self._loader(EvaluationBatches(rows, layout, self.tokenizer.pad_token_id))

    def _loader(self, batches: Any, sampler: ResumableSampler | None = None) -> DataLoader[Any]:
        # A generator of its own: every new iterator draws a seed, by default from the global
        # generator, and a validation would then change the dropout that follows it.
        return DataLoader(
            batches,
            batch_size=None,
            sampler=InOrderSampler(len(batches)) if sampler is None else sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),
        )

    def _order_seed(self) -> int:
        if self.seed is not None:
            return self.seed
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    # -- resuming --------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What decides which rows form which step, in plain types; kept in every checkpoint."""
        layout = self._training_layout()
        return {
            "train_rows": self.splits["train"].rows.fingerprint(),
            "num_train_rows": len(self.splits["train"].rows),
            "global_batch_size": layout.global_batch_size,
            "batch_size": layout.batch_size,
            # A position counts micro-batches: 8 are two steps of one device, or eight of four.
            "accumulation": layout.accumulation,
            "group_by_length": self.group_by_length,
            "seed": self._order_seed(),
        }

    def resume_from(self, saved: Mapping[str, Any], epoch: int, position: int) -> None:
        """Continue at a micro-batch of an epoch, if the rows and their order are the saved ones.

        Raises:
            CheckpointError: naming each difference.
        """
        sentences = {
            "train_rows": "the training rows (or their template, tokenizer or length)",
            "num_train_rows": "the number of training rows",
            "global_batch_size": "the rows of an optimizer step",
            "batch_size": "data.batch_size",
            "accumulation": "trainer.accumulate_grad_batches",
            "group_by_length": "data.group_by_length",
            "seed": "the seed of the order of rows",
        }
        now = self.describe()
        problems = [
            f"The checkpoint's run differs in {sentences[name]}: it had {_short(saved.get(name))}, "
            f"this run has {_short(now[name])}. Use its value, or start without --ckpt_path."
            for name in now
            if saved.get(name) != now[name]
        ]
        if problems:
            raise CheckpointError(problems)
        self._resume_from = {"epoch": epoch, "position": position}

    def name_rows(self, row_ids: Sequence[int], split: str = "train") -> list[str]:
        """File and row number of rows of a split, for messages; fillers are left out."""
        places = self.splits[split].places
        return [str(places[row]) for row in row_ids if row >= 0]


def _first(split: EncodedSplit, limit: int | None) -> EncodedSplit:
    return split if limit is None or limit >= len(split.rows) else split.select(range(limit))


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) > 16 else str(value)
