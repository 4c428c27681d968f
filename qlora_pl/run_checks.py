"""A parsed run: what fills its open values, and everything that can be found wrong with it.

Nothing is loaded and no rows are read, so that a mistake costs seconds and not hours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from qlora_pl.data.batches.global_batch import AUTO
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.data.reading.sources import RowSources
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.base.identity import is_hub_name, locate_base, refuse_unpinned_code
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.full_training import refuse_packed_weights
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig, ScheduleConfig
from qlora_pl.parsing import not_finite
from qlora_pl.redaction import secrets_in
from qlora_pl.strategies.choice import refuse_other_strategies
from qlora_pl.training.checkpoints.checkpoint import AdapterCheckpoint
from qlora_pl.training.run_folders.run_folder import RunConfig
from qlora_pl.training.run_folders.run_record import flatten
from qlora_pl.training.trainer_settings import check_trainer, refuse_dependent
from qlora_pl.training.watching.samples import SampleWriter

DEFAULT_EPOCHS = 3
DEFAULT_ACCUMULATION = 4  # with batch_size 4 the paper's 16 rows a step


def complete(run: Namespace) -> Namespace:
    """Fill the values whose default comes from another section; they stay settable."""
    if run.data.tokenizer is None:
        run.data.tokenizer = run.model.model_name_or_path
    if run.run.name is None:
        files = [Path(str(path)) for path in run.get("config") or []]
        named = files[-1].stem if files else Path(str(run.model.model_name_or_path)).name
        run.run.name = named or "run"
    trainer = run.trainer
    if trainer.max_epochs is None and trainer.max_steps == -1 and trainer.max_time is None:
        trainer.max_epochs = DEFAULT_EPOCHS
    is_open = run.data.global_batch_size is None and run.data.batch_size != AUTO
    if trainer.accumulate_grad_batches is None and is_open:
        trainer.accumulate_grad_batches = DEFAULT_ACCUMULATION
    return run


def check_run(run: Namespace) -> list[str]:
    """Every problem of a parsed run that can be found without reading rows or weights."""
    values = run.as_dict()
    if problems := [*not_finite(values), *secrets_in(_plain(values))]:
        return problems
    model, samples = settings(run.model), settings(run.samples)
    groups: list[Callable[[], Any]] = [
        lambda: QuantizationConfig(**settings(model["quantization"])),
        lambda: LoRAConfig(**settings(model["lora"])),
        lambda: refuse_packed_weights(
            QuantizationConfig(**settings(model["quantization"])),
            LoRAConfig(**settings(model["lora"])),
        ),
        lambda: OptimizerConfig(**settings(model["optimizer"])),
        lambda: ScheduleConfig(**settings(model["schedule"])),
        lambda: DecodingConfig(**settings(model["decoding"])),
        lambda: _check_base(model["model_name_or_path"]),
        lambda: refuse_unpinned_code(
            model["model_name_or_path"], model["revision"], model["trust_remote_code"]
        ),
        lambda: InstructionDataModule(**settings(run.data)),
        lambda: AdapterCheckpoint(**settings(run.checkpoint)),
        lambda: SampleWriter(
            **samples | {"decoding": DecodingConfig(**settings(samples["decoding"]))}
        ),
        lambda: RunConfig(**settings(run.run)),
        lambda: check_trainer(run.trainer),
        lambda: refuse_other_strategies(run.trainer),
        lambda: refuse_dependent(run),
    ]
    for group in groups:
        try:
            group()
        except ConfigurationError as error:
            problems += error.problems
    return list(dict.fromkeys(problems))  # two groups may stand on the same value


def settings(group: Namespace) -> dict[str, Any]:
    """The keys of a group, without what the parser notes besides (the file it came from)."""
    return {key: value for key, value in vars(group).items() if not key.startswith("__")}


def _plain(value: Any) -> Any:
    """Values as run.yaml will have them."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.plain() if isinstance(value, RowSources) else value


def _check_base(name: str) -> None:
    if not is_hub_name(name):
        locate_base(name, None, None)


def flat_values(run: Namespace) -> dict[str, Any]:
    """Every value of a run by its dotted key, in plain types; lists as JSON.

    Without ``config``, the files that it was read from.
    """
    values = _plain(run.as_dict())
    return flatten({key: value for key, value in values.items() if key != "config"})
