"""The one parser of a training run, and the way from a parsed run to a started one.

Everything that can be found wrong without loading weights is found here, and reported together: all
misspelt keys of all files and flags, then all impossible values.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn, cast

from jsonargparse import Namespace, set_parsing_settings
from jsonargparse.typing import register_type
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from qlora_pl.data.batches.global_batch import settle_accumulation
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.parsing import explain_parser_error, unknown_keys
from qlora_pl.run_checks import check_run, complete, settings
from qlora_pl.strategies.choice import strategy_named
from qlora_pl.strategies.fitting import fitting_strategy, num_gpus
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.memory.auto_batch import AutoBatch
from qlora_pl.training.memory.memory_record import MemoryRecord
from qlora_pl.training.memory.rehearsal import Rehearsal
from qlora_pl.training.processes.lost_ranks import lost_rank, watch_other_ranks
from qlora_pl.training.processes.slurm import asks_for_requeue, requeue
from qlora_pl.training.run_folders.run_folder import Resolved, RunConfig
from qlora_pl.training.run_folders.run_logger import run_logger
from qlora_pl.training.run_folders.run_record import RunRecord, flatten
from qlora_pl.training.run_folders.run_start import RunStart
from qlora_pl.training.stopping import (
    has_reached_its_end,
    leaving_on_signals,
    lost_loader,
    request_of,
    stopped_by_signal,
)
from qlora_pl.training.trainer_settings import (
    RunTrainer,
    check_seed,
)
from qlora_pl.training.watching.monitoring import RunMetrics
from qlora_pl.training.watching.predictions import PredictionWriter
from qlora_pl.training.watching.progress import default_bars
from qlora_pl.training.watching.samples import SampleWriter
from qlora_pl.training.watching.step_layout import StepLayout

set_parsing_settings(docstring_parse_attribute_docstrings=True)
register_type(
    RowSources,
    serializer=RowSources.plain,
    deserializer=lambda value: RowSources.parse(value, allow_rows=False),
    deserializer_exceptions=(ValueError, TypeError, AttributeError, ConfigurationError),
)

logger = logging.getLogger(__name__)

TRAINER_DEFAULTS = {
    "precision": "32-true",  # types are set when the base is loaded, and by nothing else
    "gradient_clip_val": 0.3,  # the paper's (table 9)
    "accumulate_grad_batches": None,  # what data.global_batch_size leaves, or the default above
    "num_sanity_val_steps": -1,  # the whole validation split before training: the "before" figure
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # the module's own counts logical weights
    "use_distributed_sampler": False,  # the data module's order is a function of seed and step
}


class QLoRAParser(LightningArgumentParser):
    """A parser whose errors are one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise instead of printing seventy lines of usage."""
        raise ConfigurationError(explain_parser_error(message).splitlines()) from ex


class QLoRACLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` of a ``QLoRAModule``.

    Args:
        args: Words of the command line; None: those of this process.
    """

    def __init__(self, args: list[str] | None = None) -> None:
        self._command = (sys.argv[1:] if args is None else args)[0]
        self.resolved: Resolved | None = None
        self._start = RunStart()
        try:
            super().__init__(
                QLoRAModule,
                InstructionDataModule,
                args=args,
                seed_everything_default=0,
                auto_configure_optimizers=False,  # the optimizer is built after the model is loaded
                save_config_callback=RunRecord,
                trainer_class=RunTrainer,
                trainer_defaults=TRAINER_DEFAULTS,
                parser_class=QLoRAParser,
                parser_kwargs={"prog": "qlora-pl"},
                load_from_checkpoint_support=False,
            )
        except BaseException as error:
            if (end := self._start.give_up(error)) is not error:
                raise end from None
            raise
        finally:
            self._start.release()

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The command at hand alone: building a parser for all four would take two seconds more.

        Without ``weights_only``: a checkpoint is always read so.
        """
        return {
            name: skip | {"weights_only"}
            for name, skip in LightningCLI.subcommands().items()
            if name == self._command
        }

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Without abbreviations: ``--model.lora.drop 0.1`` must not work by chance."""
        return super().init_parser(**{**kwargs, "allow_abbrev": False})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Groups of their own, so that a YAML with ``trainer.callbacks`` does not lose them."""
        parser.add_class_arguments(RunConfig, "run")
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SampleWriter, "samples")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Report every unknown key before parsing, which would stop at the first."""
        out = sys.stdout if self._start.launch.is_first else io.StringIO()
        with redirect_stdout(out):  # --help, --print_config
            self.refuse_mistakes(sys.argv[1:] if args is None else cast(list[str], args))
            super().parse_arguments(parser, args)

    def refuse_mistakes(self, words: list[str]) -> None:
        """Look at every key before its value is parsed.

        Raises:
            ConfigurationError: with every key that is unknown, or null where it cannot be.
        """
        if problems := unknown_keys(self._subcommand_parsers[self._command], words[1:]):
            raise ConfigurationError(problems)

    def _set_seed(self) -> None:
        """Refuse a seed that no generator takes before Lightning hands it to one."""
        check_seed(self.config[self._command].seed_everything)
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Lightning merges hyper-parameters of a checkpoint over the command line; nothing does."""

    def before_instantiate_classes(self) -> None:
        """Fill in what depends on other values, check everything, choose the run's folder."""
        assert self.subcommand is not None
        run = complete(self.config[self.subcommand])
        if problems := [*check_run(run), *self._start.launch.problems(run.trainer)]:
            raise ConfigurationError(problems)
        self.resolved = self._start.choose(
            str(self.subcommand),
            RunConfig(**settings(run.run)),
            run.trainer,
            run.ckpt_path,
            self._plain_config() if self._start.launch.launcher else {},
        )
        run.ckpt_path = str(self.resolved.checkpoint) if self.resolved.checkpoint else None

    def _plain_config(self) -> dict[str, Any]:
        """Every value by its dotted key; where the files lie may differ between nodes."""
        text = self.parser.dump(self.config, skip_unset=False, format="json")
        run = json.loads(text)[self.subcommand]
        return flatten({key: value for key, value in run.items() if key != "config"})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that writes into the run's folder, whatever loggers were chosen."""
        assert self.subcommand is not None
        chosen = self.config[self.subcommand].trainer.logger
        assert self.resolved is not None
        kwargs["default_root_dir"] = str(self.resolved.folder)
        kwargs |= self._start.launch.trainer_settings(self.config_init[self.subcommand].trainer)
        if chosen is None or chosen is True:
            kwargs["logger"] = run_logger(self.resolved) if self.subcommand == "fit" else False
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, RuntimeError) as error:
            raise ConfigurationError(f"trainer: {first_sentence(error)}") from error
        if self.subcommand == "fit":  # before rows are read and processes started
            settle_accumulation(self.datamodule, trainer)
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> Trainer:
        assert self.subcommand is not None
        assert self.resolved is not None
        memory_gib = self.config[self.subcommand].run.memory_gib
        auto = AutoBatch(memory_gib, self.resolved.checkpoint)
        essential: list[Any] = [auto, RunMetrics(), StepLayout()]
        if self.subcommand == "fit" and not config["fast_dev_run"]:
            essential.append(MemoryRecord(self._all_runs()))  # its peak begins before a rehearsal
        essential.append(Rehearsal())
        if self.subcommand == "predict":
            essential.append(PredictionWriter())
        chosen = config["callbacks"] or []
        chosen = chosen if isinstance(chosen, list) else [chosen]
        essential += default_bars(chosen, config["enable_progress_bar"])
        if config["strategy"] == "auto" and (number := num_gpus(Namespace(config))) > 1:
            config["strategy"] = fitting_strategy(
                self.model, self.datamodule, number, self._start.ranks.least
            )
        if isinstance(config["strategy"], str):
            config["strategy"] = strategy_named(config["strategy"])
        return super()._instantiate_trainer(config, [*essential, *callbacks])

    def _all_runs(self) -> Path:
        """The folder of all experiments."""
        assert self.resolved is not None
        return self.resolved.folder.parent.parent

    def _run_subcommand(self, subcommand: str) -> None:
        assert self.resolved is not None
        if self.resolved.checkpoint is None and subcommand != "fit" and self._start.launch.is_first:
            print(
                "No --ckpt_path: the adapters are new, so this looks at the base model.",
                file=sys.stderr,
            )
        is_fit, folder = subcommand == "fit", self.resolved.folder
        watch_other_ranks(self.trainer, self.config[subcommand].run.timeout_seconds)
        try:
            with leaving_on_signals(self.trainer):
                super()._run_subcommand(subcommand)
        except MisconfigurationException as error:
            raise ConfigurationError(f"trainer: {first_sentence(error)}") from error
        except (SystemExit, Exception) as end:
            stopped = stopped_by_signal(end, request_of(self.trainer), folder, is_fit)
            if stopped is None and (lost := lost_rank(end, self.trainer)) is not None:
                raise lost from end
            if stopped is None and (died := lost_loader(end)) is not None:
                raise died from end
            if stopped is None:
                raise
            if is_fit and asks_for_requeue(stopped.number):
                self._start.ranks.before_any_leaves(requeue)
            if not self._start.launch.is_first:  # one sentence is enough
                raise SystemExit(stopped.exit_code) from end
            raise stopped from end
        if self.trainer.is_global_zero:
            print(result_line(self.trainer, subcommand, folder))


class RunReader(QLoRACLI):
    """Parses exactly what ``fit`` parses; builds and runs nothing."""

    def _set_seed(self) -> None:
        """Nothing is drawn, so nothing is seeded, nor said about it."""
        check_seed(self.config[self._command].seed_everything)

    def before_instantiate_classes(self) -> None:
        """Nothing is chosen or made for a run that does not start."""

    def instantiate_classes(self) -> None:
        """Nothing is built; Lightning runs a command only when one is set."""
        self.subcommand = None


class RunConfigs:
    """Reads what many ``qlora-pl fit ARGUMENTS`` would use, with one parser.

    Building it takes seconds, a further parse a tenth.
    """

    def __init__(self) -> None:
        self._reader = RunReader(
            ["fit", "--model.model_name_or_path", "BASE", "--data.sources", "ROWS"]
        )

    def read(self, arguments: list[str]) -> Namespace:
        """One complete, checked configuration.

        Raises:
            ConfigurationError: with every problem of the run.
        """
        self._reader.refuse_mistakes(["fit", *arguments])
        # By the command's own parser: through the one above it every value is checked twice.
        run = complete(self._reader._subcommand_parsers["fit"].parse_args(arguments))
        if problems := check_run(run):
            raise ConfigurationError(problems)
        return run


def read_runs(argument_lists: list[list[str]]) -> list[Namespace]:
    """The complete, checked configuration that each ``qlora-pl fit ARGUMENTS`` would use.

    Raises:
        ConfigurationError: with every problem of every run.
    """
    configs, runs, problems = RunConfigs(), [], []
    for arguments in argument_lists:
        try:
            runs.append(configs.read(arguments))
        except ConfigurationError as error:
            problems += error.problems
    if problems:
        raise ConfigurationError(problems)
    return runs


def first_sentence(error: BaseException) -> str:
    """The first line of a library's message, as one sentence."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".!") + "." if lines else f"{type(error).__name__}."


def result_line(trainer: Trainer, command: str, folder: Path) -> str:
    """What a command came to, and where it lies."""
    if command == "fit" and not has_reached_its_end(trainer):
        return (
            f"fit: stopped by trainer.max_time at step {trainer.global_step}, continue with "
            f"--ckpt_path last: {folder}"
        )
    evaluation = getattr(trainer.lightning_module, "last_evaluation", {})
    figures = ", ".join(
        f"{name.rpartition('/')[2]} {value:.4f}" for name, value in evaluation.items()
    )
    is_scored = command in ("validate", "test") and figures
    return f"{command}: {figures}: {folder}" if is_scored else f"{command}: {folder}"
