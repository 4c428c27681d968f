"""README.md of a merged folder: what was merged onto what, what that cost, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_pl.inference.source import ModelSource
from qlora_pl.modeling.folders.card_sections import fenced, front_matter
from qlora_pl.modeling.folders.model_card import (
    about,
    asked,
    base_name,
    card_front,
    own_command,
    own_lines,
    plain_lines,
    trained_rows,
)

TAGS = ["merged", "qlora", "qlora-pl"]
ONTO = {
    "dequantized": "what its 4-bit base decodes to, over which it was trained",
    "original": "the base's original weights",
}


def merged_card(source: ModelSource, record: Mapping[str, Any], scores: str) -> str:
    """The whole page.

    Args:
        source: Of the adapter.
        record: What ``merge.json`` holds.
        scores: Of the candidates, as Markdown.
    """
    manifest = source.manifest
    name = base_name(manifest) if manifest is not None else _last_part(source.base)
    kind = manifest.auto_class if manifest is not None else "AutoModelForCausalLM"
    front = (
        card_front(manifest, TAGS)
        if manifest is not None
        else front_matter(base_model=None, library_name="transformers", tags=TAGS, card={})
    )
    parts = [
        front,
        f"# {name}, with an adapter merged into it",
        _summary(source, record),
        *_scores(record, scores),
        *([] if manifest is None else about(manifest)),
        "## Loading",
        "With transformers:",
        fenced("python", plain_lines(kind)),
        *([] if manifest is None else asked(manifest)),
        "With qlora_pl:",
        fenced("python", own_lines('load_adapter(model=".")')),
        fenced("bash", own_command("--model .")),
    ]
    if record["requantized"] is None:
        parts.append("With vLLM: `vllm serve .`")
    return "\n\n".join(parts) + "\n"


def _summary(source: ModelSource, record: Mapping[str, Any]) -> str:
    manifest = source.manifest
    form = record["dtype"]
    if record["requantized"] is not None:
        form = f"{record['requantized']} with double quantisation, the rest in {form}"
    trained = ""
    if manifest is not None:
        trained = (
            f" It was trained for {manifest.step:,} optimizer steps on {trained_rows(manifest)}; "
            f"prompt template `{manifest.template}`."
        )
    onto = ONTO[record["policy"]]
    return f"An adapter, merged onto {onto}; in {form}.{trained} `merge.json` is the record."


def _scores(record: Mapping[str, Any], scores: str) -> list[str]:
    if not record["scores"]:
        return ["How far it lies from the model that was trained was not measured."]
    said = (
        f"Beside the model that was trained, on {record['scored_on']}; of the two ways to merge, "
        f"`{record['policy']}` is the one that was kept."
        if len(record["scores"]) > 1
        else f"Beside the model that was trained, on {record['scored_on']}:"
    )
    return ["## What merging changed", said, scores]


def _last_part(name: str) -> str:
    return Path(name).name
