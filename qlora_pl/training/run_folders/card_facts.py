"""What a run tells its model card: settings, losses so far, where its rows come from, a prompt.

Everything of it is the same in a run that was stopped and resumed, and nothing of it is a place on
this machine, a time or a secret.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer

from qlora_pl.data.conversation import Conversation, Message
from qlora_pl.data.reading.named_datasets import DATASETS, NamedDataset
from qlora_pl.data.reading.source_config import SourceConfig
from qlora_pl.data.templates.chat_template import CLOCK
from qlora_pl.errors import QLoRAError
from qlora_pl.modeling.folders.card_sections import QUESTION, chosen
from qlora_pl.modeling.folders.licences import base_licence
from qlora_pl.redaction import redact
from qlora_pl.training.watching.monitoring import RunMetrics

SETTINGS = (
    "seed_everything",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.gradient_clip_val",
    "model.lora.target_modules",
    "model.lora.init",
    "model.optimizer.name",
    "model.optimizer.lr",
    "model.optimizer.betas",
    "model.optimizer.weight_decay",
    "model.optimizer.lora_plus_ratio",
    "model.schedule.name",
    "model.schedule.warmup_steps",
    "model.schedule.warmup_ratio",
    "model.schedule.min_lr_ratio",
    "model.normalize_loss_by",
    "data.max_length",
    "data.max_target_length",
    "data.train_on",
    "data.overlong",
    "data.packing",
    "data.group_by_length",
    "data.tokens_per_batch",
)
"""Keys of ``run.yaml`` that a card shows; the rest is in the file, which lies beside it."""


def lasting_facts(module: Any, data: Any, run_yaml: str) -> dict[str, Any]:
    """What holds throughout a run, in plain types.

    Args:
        module: What is trained.
        data: Its data module; None: there is none.
        run_yaml: The configuration, as text.
    """
    licence = {key: redact(word) for key, word in base_licence(module.identity.folder).items()}
    facts: dict[str, Any] = {"base_licence": licence, "settings": _settings(run_yaml, data)}
    if data is not None:
        sources = list(_sources(data))
        facts["sources"] = [{k: s[k] for k in ("role", "name", "licence")} for s in sources]
        facts["datasets"] = sorted({s["name"] for s in sources if s["is_on_hub"]})
        facts["prompt"] = _prompt(data)
    return facts


def losses_so_far(trainer: Trainer, step: int) -> list[dict[str, float]]:
    """Steps, losses and learning rates that a card shows, up to a step.

    Args:
        trainer: Of the run.
        step: The last that belongs to what is saved.
    """
    metrics = next(
        (c for c in trainer.callbacks if isinstance(c, RunMetrics)),  # type: ignore[attr-defined]
        None,
    )
    if metrics is None:
        return []
    columns = ("train/loss", "val/loss", "optim/lr")
    rows = [
        {"step": int(row["step"]), **{c: float(row[c]) for c in columns if c in row}}
        for row in metrics.history()
        if row["step"] <= step
    ]
    return [dict(row) for row in chosen(rows)]


def _settings(run_yaml: str, data: Any) -> dict[str, Any]:
    said = yaml.safe_load(run_yaml)
    if not isinstance(said, Mapping):
        return {}
    found = {}
    for key in SETTINGS:
        value: Any = said
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            found[key] = value
    if data is not None:
        found["rows of a step"] = data.describe()["global_batch_size"]
    return found


def _sources(data: Any) -> Iterator[dict[str, Any]]:
    for role, rows in (("training rows", data.sources), ("validation rows", data.val_sources)):
        for source in rows.sources:
            known = _known(source)
            is_on_hub = not source.is_local
            name = source.path if is_on_hub else Path(source.path).name
            if not source.path and source.dataset is not None:
                name = (known.path if known else None) or source.dataset
            yield {
                "role": role,
                "name": redact(str(name)),
                "licence": known.licence if known is not None and is_on_hub else None,
                "is_on_hub": is_on_hub,
            }
        if rows.rows is not None:
            yield {"role": role, "name": "rows in memory", "licence": None, "is_on_hub": False}


def _known(source: SourceConfig) -> NamedDataset | None:
    path = source.resolved().path
    return next((known for known in DATASETS.values() if known.path and known.path == path), None)


def _prompt(data: Any) -> dict[str, Any] | None:
    """A question in the words of the template, if a plain tokenizer gives the same tokens of it."""
    if CLOCK in json.dumps(data.encoder.definition()):
        return None
    try:
        text, ids = data.encoder.encode_prompt(Conversation((Message("user", QUESTION),)))
    except QLoRAError:  # a template that wants more than a question
        return None
    for adds in (True, False):
        if data.tokenizer(text, add_special_tokens=adds)["input_ids"] == ids:
            return {"text": text, "add_special_tokens": adds}
    return None
