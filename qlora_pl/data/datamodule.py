"""``InstructionDataModule``: sources to loaders, wired into Lightning's hooks.

Everything is read, encoded and checked in ``setup``, which Lightning runs before
``configure_model``: a bad row stops a run before any weight is loaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from qlora_pl.batch import Batch, PackingProbe, PromptBatch
from qlora_pl.data.batches.batching import (
    BatchLayout,
    BatchShape,
    EvaluationBatches,
    PromptBatches,
    ResumableSampler,
    TrainingBatches,
    make_loader,
)
from qlora_pl.data.batches.collation import make_packing_probe
from qlora_pl.data.batches.global_batch import settle_accumulation
from qlora_pl.data.batches.largest_batch import first_size
from qlora_pl.data.continuing import describe_order, position_in_layout
from qlora_pl.data.encoding.encoder import TrainOn
from qlora_pl.data.encoding.encoder_choice import Encoding
from qlora_pl.data.encoding.lengths import Overlong
from qlora_pl.data.reading.normalizing import OnError
from qlora_pl.data.reading.sources import NO_ROWS, RowSources
from qlora_pl.data.rows.preparation import EncodedSplit
from qlora_pl.data.setting_checks import pair_problems, setting_problems
from qlora_pl.data.sharing import SharedReading, failing_together
from qlora_pl.data.splits import (
    BaseFacts,
    first_rows,
    hub_split,
    multiplicity,
    prepare_encoder,
    prompts_of,
    read_split,
    split_off,
)
from qlora_pl.data.windows import Windows, open_windows
from qlora_pl.errors import ConfigurationError
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
            ``encoding: original``, and for encoder-decoder models, where None means
            ``max_length``), which leaves ``max_length`` to what comes before it.
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
        window: Rows that are read, encoded and judged at a time while training goes on, for sources
            too large to be read before (streamed ones); None: everything is read first.
        on_error: What becomes of a bad row: ``stop``: the run, naming it. ``skip``: it is left out,
            counted and listed, unless too many are bad (1 %, and ten or more).
        batch_size: Rows of a micro-batch on one device, or packs where rows are packed. ``auto``:
            as many as fit into its memory and divide its share of a step, chosen before the first.
        global_batch_size: Rows of an optimizer step over all devices (packs where rows are packed,
            micro-batches with ``tokens_per_batch``), whatever their number. None: ``batch_size`` x
            ``trainer.accumulate_grad_batches`` x devices; 16 x devices where the first is ``auto``.
        eval_batch_size: Rows of a batch in validation, test and prediction; None: ``batch_size``.
        group_by_length: Whether rows of similar length share a step, so that less is padded.
        packing: Whether training rows are put into packs of ``max_length`` tokens that attend to
            themselves alone. ``true`` (on): the run stops if the model does not keep them apart;
            ``auto``: it is padded then; ``false`` (off): rows are padded.
        padding: How wide padded batches are: as their ``longest`` row, or all ``max_length``.
        tokens_per_batch: Tokens of a micro-batch at most, padding included, in place of
            ``batch_size``; a step then has as many micro-batches as ever. None: ``batch_size``.
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
        window: int | None = None,
        on_error: OnError = "stop",
        batch_size: int | Literal["auto"] = 4,
        global_batch_size: int | None = None,
        eval_batch_size: int | None = None,
        group_by_length: bool = True,
        packing: bool | Literal["auto"] = False,
        padding: Literal["longest", "max_length"] = "longest",
        tokens_per_batch: int | None = None,
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
        self.on_error: OnError = on_error
        self.window = window
        self._windows: Windows | None = None
        self._first_window = ""
        self.asked_batch_size = batch_size
        self.global_batch_size = global_batch_size
        self.asked_eval_batch_size = eval_batch_size
        self.batch_size = first_size(batch_size, global_batch_size)
        self.eval_batch_size = self.batch_size if eval_batch_size is None else eval_batch_size
        self.group_by_length = group_by_length
        self.packing = packing
        self.is_packed = packing is True
        """Whether training batches are packs; the model has a say (``decide_packing``)."""
        self.padding = padding
        self.tokens_per_batch = tokens_per_batch
        self.val_size = val_size
        self.val_seed = val_seed
        self.seed = seed
        self.max_train_samples = max_train_samples
        self.max_val_samples = max_val_samples
        self.num_workers = num_workers
        self.reading = SharedReading()
        self.splits: dict[str, EncodedSplit] = {}
        self.base: BaseFacts | None = None
        """What is known of the model; None: asked of the trainer's."""
        self.accumulation = 1
        """Micro-batches of a step where there is no trainer to ask."""
        self._resume_from = {"epoch": 0, "position": 0}
        if problems := self.problems():
            raise ConfigurationError(problems)

    def problems(self) -> list[str]:
        """Every problem of the settings that can be found without reading a row."""
        problems = setting_problems(self)
        for name in ("sources", "val_sources", "test_sources"):
            problems += getattr(self, name).problems(f"data.{name}")
        return problems

    # -- reading ---------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """On one process of each machine: encode for the others."""
        if self.window is None and self.trainer is not None:
            stage: Any = self.trainer.state.fn
            self.reading.by_the_first(self.trainer, self._cache(), lambda: self._read(stage))

    def setup(self, stage: str) -> None:
        """Read, encode, check and split the rows; a second call reads nothing."""
        self._resume_from = {"epoch": 0, "position": 0}  # of the run before, if there was one
        self.reading.by_all(self.trainer, self._cache(), lambda: self._read(stage))

    def _cache(self) -> Path | None:
        return cache_root(self._base().cache_dir) if self.cache else None

    def _read(self, stage: str) -> None:
        if stage == "fit":
            settle_accumulation(self, self.trainer)
        if stage == "test":
            self._setup_test()
        elif "val" not in self.splits:
            self._setup_fit()

    def _setup_fit(self) -> None:
        self._prepare_encoder()
        if self.window is not None:
            self._windows = open_windows(self, self.window)
            self.splits |= self._windows.first_splits(self)
            self._first_window = self.splits["train"].rows.fingerprint()
            return
        train = self.read_rows(self.sources, "data.sources")
        val_sources = self.val_sources or hub_split(self.sources, ("validation", "eval", "dev"))
        if val_sources:
            val = self.read_rows(val_sources, "data.val_sources")
        else:
            train, val = split_off(train, self.val_size, self.val_seed)
        self.splits["train"] = first_rows(train, self.max_train_samples)
        self.splits["val"] = first_rows(val, self.max_val_samples)
        for name in ("train", "val"):
            logger.info("%s: %s", name, self.splits[name].report)

    def _setup_test(self) -> None:
        if "test" in self.splits:
            return
        sources = self.test_sources or hub_split(self.sources, ("test",))
        if not sources:
            raise ConfigurationError("data.test_sources: no test rows are named; set it to a file.")
        self._prepare_encoder()
        self.splits["test"] = self.read_rows(sources, "data.test_sources")

    def _prepare_encoder(self) -> None:
        self.encoder = prepare_encoder(self, self._base())
        self.tokenizer, self.template = self.encoder.tokenizer, self.encoder.template
        if self.encoder.is_paired and (problems := pair_problems(self)):
            raise ConfigurationError(problems)

    def read_rows(self, sources: RowSources, key: str) -> EncodedSplit:
        """The rows of these sources, encoded and checked; ``key`` is where they are named."""
        return read_split(self, self.encoder, self._base(), sources, key)

    def _base(self) -> BaseFacts:
        module = self.trainer.lightning_module if self.trainer is not None else None
        return BaseFacts.of(module) if self.base is None else self.base

    # -- loaders ---------------------------------------------------------------------------------

    def _layout(self, batch_size: int, accumulation: int = 1) -> BatchLayout:
        trainer = self.trainer
        place = (1, 0) if trainer is None else (trainer.world_size, trainer.global_rank)
        return BatchLayout(batch_size, accumulation, *place)

    def _training_layout(self) -> BatchLayout:
        accumulation = getattr(self.trainer, "accumulate_grad_batches", self.accumulation)
        # With a token budget the unit is a whole micro-batch, and no number of rows has a meaning.
        return self._layout(1 if self.tokens_per_batch else self.batch_size, accumulation)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches in the run's order, from where a resumed run stopped."""
        resume_from = self._resume_from
        if self._windows is not None:
            epoch = max(resume_from["epoch"], getattr(self.trainer, "current_epoch", 0))
            if epoch != resume_from["epoch"]:
                resume_from = {"epoch": epoch, "position": 0}
            with failing_together(self.trainer):
                self.splits["train"] = self._windows.read(epoch)
        split = self.splits["train"]
        batches = TrainingBatches(
            split.rows,
            self._training_layout(),
            self._order_seed(),
            self.group_by_length,
            self.tokenizer.pad_token_id,
            self._training_shape(),
            self._multiplicity(),
        )
        if batches.regroups_rows:
            logger.info("batches: %s", batches)
        return make_loader(batches, self.num_workers, ResumableSampler(batches, **resume_from))

    def _lines(self) -> BatchShape:
        """The shape of batches that are neither packed nor filled to a budget."""
        return replace(self._training_shape(), is_packed=False, tokens_per_batch=None)

    def _training_shape(self) -> BatchShape:
        return BatchShape(
            max_length=self.max_length,
            is_packed=self.is_packed,
            pads_to_max_length=self.padding == "max_length",
            tokens_per_batch=self.tokens_per_batch,
            is_paired=self.encoder.is_paired,
        )

    def _multiplicity(self) -> np.ndarray | None:
        return multiplicity(self.splits["train"], self.sources)

    # -- packing ---------------------------------------------------------------------------------

    def packing_probe(self) -> PackingProbe:
        """Training rows, packed and apart: what the model is asked before ``decide_packing``."""
        num_lines = min(2, self.batch_size)  # some kernels keep rows apart in a single line only
        return make_packing_probe(self.splits["train"].rows, self.tokenizer.pad_token_id, num_lines)

    def decide_packing(self, is_packed: bool) -> None:
        """Whether loaders made from now on pack rows; the model has been asked."""
        self.is_packed = is_packed

    def first_batches(self, count: int) -> list[Batch]:
        """Batches of the first training rows, the same on every device, wherever training is."""
        rows, layout = self.splits["train"].rows, BatchLayout(self.batch_size)
        some = rows.select(range(min(count * self.batch_size, len(rows))))
        batches = EvaluationBatches(some, layout, self.tokenizer.pad_token_id, self._lines())
        return [batches[index] for index in range(len(batches))]

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The validation rows in a fixed order; no loader at all when there are none.

        Raises:
            ConfigurationError: if there are none and validating is all that was asked for.
        """
        is_asked = self.trainer is not None and self.trainer.state.fn == "validate"
        if is_asked and not len(self.splits["val"].rows):
            raise ConfigurationError(
                "data.val_size: 0 leaves no validation rows to score; name data.val_sources."
            )
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """The test rows in a fixed order."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        """The prompts of the validation rows, in their order."""
        prompts, references = prompts_of(self.splits["val"], self.encoder)
        layout, pad_id = self._layout(self.eval_batch_size), self.tokenizer.pad_token_id
        return make_loader(PromptBatches(prompts, references, layout, pad_id), self.num_workers)

    def _evaluation_loader(self, split: str) -> DataLoader[Batch] | list[Any]:
        rows = self.splits[split].rows
        if not len(rows):
            return []
        pad_id, layout = self.tokenizer.pad_token_id, self._layout(self.eval_batch_size)
        return make_loader(EvaluationBatches(rows, layout, pad_id, self._lines()), self.num_workers)

    def _order_seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    # -- resuming --------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What decides which rows form which step, in plain types; kept in every checkpoint."""
        rows = self._first_window or self.splits["train"].rows.fingerprint()
        seed, weights = self._order_seed(), self._multiplicity()
        return describe_order(self, rows, self._training_layout(), seed, weights)

    def resume_from(self, saved: Mapping[str, Any], epoch: int, position: int) -> int:
        """Continue at a micro-batch of an epoch, if the rows and their order are the saved ones.

        Args:
            saved: What ``describe`` said of the run that wrote the checkpoint.
            epoch: In which it stopped.
            position: Micro-batches of the epoch that each of its devices had done.

        Returns:
            The same point in micro-batches of this run.

        Raises:
            CheckpointError: naming each difference.
        """
        position = position_in_layout(saved, self.describe(), position)
        self._resume_from = {"epoch": epoch, "position": position}
        return position

    def name_rows(self, row_ids: Sequence[int], split: str = "train") -> list[str]:
        """File and row number of rows of a split, for messages; fillers are left out."""
        places = self.splits[split].places
        return [str(places[row]) for row in row_ids if row >= 0]
