"""``qlora-pl merge``: an adapter and its base -> a model that needs neither, and what that cost.

Both policies are written and scored against the model that was trained; the better one stays.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_pl.data.encoding.served_template import served_tokenizer
from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.files import atomic_folder, write_json
from qlora_pl.inference.flags import Flags
from qlora_pl.inference.loading import load, load_encoder
from qlora_pl.inference.machine import best_device
from qlora_pl.inference.source import ModelChoice, ModelSource, resolve_source
from qlora_pl.merging.scoring import (
    SCORE_TOKENS,
    Score,
    ScoredRow,
    held_out_rows,
    score,
    table,
    write_reference,
)
from qlora_pl.merging.weights import POLICIES, MergedWeights, Policy
from qlora_pl.merging.writing import bytes_of, plan_shards, write_shards
from qlora_pl.modeling.identity import BaseIdentity, identify_base

logger = logging.getLogger(__name__)

DESCRIPTION = """Write a model that holds an adapter's changes, in 16 or 32 bits, which any program
loads without this one. Merging onto the 4-bit base and onto the original weights give different
models: both are scored on held-out rows against the trained model, and the better one is kept."""
THRESHOLD = 0.05
"""Nats a token of KL to the trained model, above which a merged model is another one."""
RECORD = "merge.json"


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What is merged, and where it goes."""

    output: str | None = None
    """The folder of the merged model; must not exist yet."""
    policy: Literal["best", "dequantized", "original"] = "best"
    """Onto what the 4-bit base decodes to, which was trained, or onto the original weights; best:
    both are scored, and the better one is kept."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """What weights are written in."""
    score_tokens: int = SCORE_TOKENS
    """Held-out tokens that are scored, at most; 0: nothing is scored."""
    threshold: float = THRESHOLD
    """KL to the trained model, in nats a token, above which nothing is written."""
    force: bool = False
    """Write the model all the same."""

    def __post_init__(self) -> None:
        problems = []
        if self.output is None:
            problems.append("--output: name the folder of the merged model.")
        if self.score_tokens < 0:
            problems.append(f"--score-tokens: must be 0 or more, got {self.score_tokens}.")
        if self.threshold <= 0:
            problems.append(f"--threshold: must be above 0, got {self.threshold}.")
        if problems:
            raise ConfigurationError(problems)


def merge_command(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``merge``.

    Raises:
        QLoRAError: for a mistake in words or folders, before anything long is done; if there is no
            room; if the merged model is another than the trained one.
    """
    parser = Flags("merge", DESCRIPTION)
    parser.add_settings(ModelChoice, "what is merged")
    parser.add_settings(MergeOptions, "where it goes")
    given = parser.parse(words)
    options = MergeOptions(**parser.settings(MergeOptions, given))
    choice = ModelChoice(**parser.settings(ModelChoice, given))
    print(merge(choice, options))
    return 0


def merge(choice: ModelChoice, options: MergeOptions) -> str:
    """Merge, score, and keep the better; what came of it, as Markdown."""
    output = Path(str(options.output)).expanduser()
    if output.exists():
        raise ConfigurationError(f"--output: '{output}' exists already and is never overwritten.")
    source = resolve_source(choice)
    if len(source.adapters) != 1 or choice.precision != "trained":
        raise ConfigurationError("--adapter: name one adapter folder, without --precision.")
    identity = identify_base(source.base, source.revision, choice.cache_dir)
    (folder,) = source.adapters.values()
    rows = held_out_rows(folder, options.score_tokens) if options.score_tokens else []
    if source.manifest is not None and "Seq2Seq" in source.manifest.auto_class:
        rows = []  # of pairs, whose source and target lie in one array
    policies = _policies(options, rows)
    dtype = getattr(torch, options.dtype)
    refuse_full_disk(output.parent, source, identity, dtype, len(policies))
    with atomic_folder(output) as place:
        reference = place / "reference.npy"
        if rows:
            _ask_the_trained(source, rows, reference, choice)
        scores: dict[str, Score] = {}
        weights = MergedWeights(source, identity, choice.trust_remote_code)
        for policy in policies:
            _write(weights, source, policy, dtype, place / policy, choice)
            if rows:
                scores[policy] = _score(place / policy, rows, reference, source, dtype)
        kept = min(scores, key=lambda name: scores[name].kl_divergence) if scores else policies[0]
        text = _verdict(scores, kept, options)
        reference.unlink(missing_ok=True)
        for path in (place / kept).iterdir():
            path.rename(place / path.name)
        for policy in policies:
            shutil.rmtree(place / policy)
        write_json(place / RECORD, _record(source, scores, kept, options))
    return f"{text}\n\nmerge: {output}"


def _policies(options: MergeOptions, rows: list[ScoredRow]) -> list[Policy]:
    if options.policy != "best":
        return [options.policy]
    if rows:
        return list(POLICIES)
    logger.warning(
        "There are no held-out rows to score with, so nothing is scored, and the adapter is merged "
        "onto the 4-bit base, over which it was trained."
    )
    return ["dequantized"]


def refuse_full_disk(
    parent: Path, source: ModelSource, identity: BaseIdentity, dtype: torch.dtype, number: int
) -> None:
    """There must be room for every candidate before the first is begun.

    Raises:
        HardwareError: naming what is needed.
        ConfigurationError: if the folder that is to hold the output does not exist.
    """
    from qlora_pl.modeling.plan import build_skeleton

    if not parent.is_dir():
        raise ConfigurationError(f"--output: there is no folder '{parent}'.")
    skeleton = build_skeleton(identity.folder, "auto", False)
    needed = number * sum(p.numel() for p in skeleton.parameters()) * bytes_of(dtype) * 1.02
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise HardwareError(
            f"--output: '{parent}' has {free / 2**30:.1f} GiB free, and {number} merged model"
            f"{'s' * (number > 1)} take {needed / 2**30:.1f}; make room, or choose a --policy."
        )


def _ask_the_trained(
    source: ModelSource, rows: list[ScoredRow], reference: Path, choice: ModelChoice
) -> None:
    trained = load(source, best_device(), choice.cache_dir, choice.trust_remote_code, is_exact=True)
    (name,) = source.adapters
    with trained.answering_as(name) as model:
        write_reference(model, rows, reference)
    del trained, model
    gc.collect()


def _write(
    weights: MergedWeights,
    source: ModelSource,
    policy: Policy,
    dtype: torch.dtype,
    folder: Path,
    choice: ModelChoice,
) -> None:
    folder.mkdir()
    size = bytes_of(dtype)
    files = plan_shards([(name, number * size) for name, number in weights.sizes()])
    write_shards(folder, files, weights.tensors(policy, dtype))
    config = weights.base.config
    config.dtype = dtype
    config.save_pretrained(folder)
    generation: Any = weights.base.generation_config
    if source.manifest is not None and source.manifest.stop_token_ids:
        generation.eos_token_id = source.manifest.stop_token_ids  # where training ended answers
    generation.save_pretrained(folder)
    encoder = load_encoder(source, choice.cache_dir)
    served_tokenizer(encoder).save_pretrained(folder)  # whose chat template is that of training


def _score(
    folder: Path, rows: list[ScoredRow], reference: Path, source: ModelSource, dtype: torch.dtype
) -> Score:
    import transformers

    kind = source.manifest.auto_class if source.manifest else "AutoModelForCausalLM"
    model: Any = getattr(transformers, kind).from_pretrained(
        folder, dtype=dtype, device_map={"": str(best_device())}
    )
    found = score(model.eval(), rows, reference)
    del model
    gc.collect()
    return found


def _verdict(scores: dict[str, Score], kept: str, options: MergeOptions) -> str:
    """What is said of the scores.

    Raises:
        ConfigurationError: if even the better model is another than the trained one.
    """
    if not scores:
        return f"Merged onto the {kept} base; nothing was scored."
    text = f"{table(scores)}\n\nKept: {kept}."
    if scores[kept].kl_divergence > options.threshold and not options.force:
        raise ConfigurationError(
            f"The merged model is another than the trained one: KL "
            f"{scores[kept].kl_divergence:.3g} nats a token, above --threshold "
            f"{options.threshold:g}; nothing was written (--force writes it all the same).\n"
            + table(scores)
        )
    return text


def _record(
    source: ModelSource, scores: dict[str, Score], kept: str, options: MergeOptions
) -> dict[str, Any]:
    manifest = source.manifest
    return {
        "policy": kept,
        "dtype": options.dtype,
        "scores": {name: asdict(found) for name, found in scores.items()},
        "base": manifest.base if manifest else {"name": source.base, "revision": source.revision},
        "template": json.loads(json.dumps(source.template, default=dict)),
    }
