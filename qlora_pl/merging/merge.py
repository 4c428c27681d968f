"""``qlora-pl merge``: an adapter and its base -> a model that needs neither, and what that cost.

Both policies are written and scored against the model that was trained; the better one stays.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qlora_pl.errors import ConfigurationError
from qlora_pl.files import atomic_folder, write_json
from qlora_pl.inference.flags import Flags
from qlora_pl.inference.loading import refuse_other_base
from qlora_pl.inference.machine import place_of
from qlora_pl.inference.source import MERGE_RECORD, ModelChoice, ModelSource, resolve_source
from qlora_pl.merging.asking import load_merged, load_trained
from qlora_pl.merging.candidates import (
    Form,
    refuse_full_disk,
    refuse_no_parent,
    write_candidate,
)
from qlora_pl.merging.card import merged_card
from qlora_pl.merging.requantizing import FourBits, plan_packing
from qlora_pl.merging.scored_rows import SCORE_TOKENS, ScoredRow, held_out_rows, rows_of_file
from qlora_pl.merging.scoring import (
    Score,
    estimate_seconds,
    in_words,
    score,
    table,
    write_reference,
)
from qlora_pl.merging.weights import POLICIES, MergedWeights, Policy
from qlora_pl.modeling.base.encoder_decoder import is_encoder_decoder
from qlora_pl.modeling.base.identity import BaseIdentity, identify_base
from qlora_pl.modeling.loading.host_memory import large_blocks_apart, release_freed_memory

logger = logging.getLogger(__name__)

DESCRIPTION = """Write a model that holds an adapter's changes, in 16 or 32 bits, which any program
loads without this one; or in 4 bits. Merging onto the 4-bit base and onto the original weights
give different models: both are scored on held-out rows against the trained model, and the better
one is kept."""
THRESHOLD = 0.05
"""Nats a token of KL to the trained model, above which a merged model is another one."""


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
    requantize: FourBits | None = None
    """Pack the merged model's matrices in 4 bits, with double quantisation; None: they are written
    in ``--dtype``, as is the rest."""
    data: str | None = None
    """Rows to score with, in any layout that training reads; None: the held-out rows that lie in
    the adapter folder."""
    score_tokens: int = SCORE_TOKENS
    """Trained tokens that are scored, at most; 0: nothing is scored."""
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
        if self.data is not None and not self.score_tokens:
            problems.append("--data: is not read with --score-tokens 0; leave one of them out.")
        if self.threshold <= 0:
            problems.append(f"--threshold: must be above 0, got {self.threshold}.")
        if problems:
            raise ConfigurationError(problems)


def flags() -> Flags:
    """The command's flags."""
    parser = Flags("merge", DESCRIPTION)
    parser.add_settings(ModelChoice, "what is merged")
    parser.add_settings(MergeOptions, "where it goes")
    return parser


def merge_command(words: Sequence[str]) -> int:
    """Run the command with the words that follow ``merge``.

    Raises:
        QLoRAError: for a mistake in words or folders, before anything long is done; if there is no
            room; if the merged model is another than the trained one.
    """
    parser = flags()
    given = parser.parse(words)
    options = MergeOptions(**parser.settings(MergeOptions, given))
    choice = ModelChoice(**parser.settings(ModelChoice, given))
    print(merge(choice, options))
    return 0


@large_blocks_apart()
def merge(choice: ModelChoice, options: MergeOptions) -> str:
    """Merge, score, and keep the better; what came of it, as Markdown."""
    output = Path(str(options.output)).expanduser()
    if output.exists():
        raise ConfigurationError(f"--output: '{output}' exists already and is never overwritten.")
    refuse_no_parent(output.parent)
    source = resolve_source(choice)
    if len(source.adapters) != 1 or choice.precision != "trained":
        raise ConfigurationError("--adapter: name one adapter folder, without --precision.")
    if choice.devices == "auto":
        raise ConfigurationError("--devices: auto is not for merging; choose one, or cpu.")
    identity = identify_base(source.base, source.revision, choice.cache_dir)
    refuse_other_base(source, identity)
    weights = MergedWeights(source, identity, choice.trust_remote_code)
    rows = _rows(source, weights, options, choice.cache_dir)
    policies = _policies(options, rows)
    form = _form(weights, source, options)
    refuse_full_disk(output.parent, weights, form, len(policies), rows)
    with atomic_folder(output) as place:
        judge = _Judge(rows, place / "reference.npy", 1 + len(policies), choice)
        judge.ask_the_trained(source, identity, weights, choice)
        scores: dict[str, Score] = {}
        for policy in policies:
            write_candidate(place / policy, weights, source, policy, form, choice.cache_dir)
            scores |= judge.score(policy, place / policy, form.dtype)
        judge.finish()
        kept = min(scores, key=lambda name: scores[name].kl_divergence) if scores else policies[0]
        text = _verdict(scores, kept, options)
        for path in (place / kept).iterdir():
            path.rename(place / path.name)
        for policy in policies:
            shutil.rmtree(place / policy)
        record = _record(source, scores, kept, options)
        write_json(place / MERGE_RECORD, record)
        (place / "README.md").write_text(merged_card(source, record, table(scores)))
    return f"{text}\n\nmerge: {output}"


def _rows(
    source: ModelSource, weights: MergedWeights, options: MergeOptions, cache_dir: str | None
) -> list[ScoredRow]:
    if not options.score_tokens:
        return []
    if options.data is not None:
        return rows_of_file(source, weights.skeleton, options.data, options.score_tokens, cache_dir)
    if is_encoder_decoder(weights.skeleton):
        return []  # of pairs, whose source and target lie in one array
    (folder,) = source.adapters.values()
    return held_out_rows(folder, options.score_tokens)


def _policies(options: MergeOptions, rows: list[ScoredRow]) -> list[Policy]:
    if not rows:
        logger.warning(
            "There are no rows to score with (--data names some), so nothing is scored%s.",
            ", and the adapter is merged onto the 4-bit base, over which it was trained"
            if options.policy == "best"
            else "",
        )
    if options.policy != "best":
        return [options.policy]
    return list(POLICIES) if rows else ["dequantized"]


def _form(weights: MergedWeights, source: ModelSource, options: MergeOptions) -> Form:
    dtype = getattr(torch, options.dtype)
    if options.requantize is None:
        return Form(dtype=dtype)
    kept = source.quantization.skip_modules
    return Form(dtype=dtype, packing=plan_packing(weights.skeleton, options.requantize, kept))


class _Judge:
    """Asks the trained model once, and then each candidate; without rows it does nothing."""

    def __init__(
        self, rows: list[ScoredRow], reference: Path, num_models: int, choice: ModelChoice
    ) -> None:
        self._rows, self._reference, self._num_models = rows, reference, num_models
        self._device = place_of(choice).device
        self._bar: Any = None

    def ask_the_trained(
        self,
        source: ModelSource,
        identity: BaseIdentity,
        weights: MergedWeights,
        choice: ModelChoice,
    ) -> None:
        from tqdm import tqdm

        if not self._rows:
            return
        trained = load_trained(source, identity, weights.plan, choice)
        total = sum(row.num_tokens for row in self._rows)
        with trained.answering_as(next(iter(source.adapters))) as model:
            seconds = self._num_models * estimate_seconds(model, self._rows)
            logger.info(
                "Scoring: %d models read %s tokens each, about %s, besides merging.",
                self._num_models,
                f"{total:,}",
                in_words(seconds),
            )
            self._bar = tqdm(
                total=self._num_models * total,
                desc="scoring",
                unit=" tokens",
                delay=1.0,
                leave=False,
                disable=None,
            )
            write_reference(model, self._rows, self._reference, self._bar)
        del trained, model
        release_freed_memory(of_cycles=True)

    def score(self, policy: Policy, folder: Path, dtype: torch.dtype) -> Mapping[str, Score]:
        if not self._rows:
            return {}
        model = load_merged(folder, dtype, self._device)
        found = score(model, self._rows, self._reference, self._bar)
        del model
        release_freed_memory(of_cycles=True)
        return {policy: found}

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._reference.unlink(missing_ok=True)


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
        "requantized": options.requantize,
        "scored_on": _scored_on(options) if scores else None,
        "scores": {name: asdict(found) for name, found in scores.items()},
        "base": manifest.base if manifest else {"name": source.base, "revision": source.revision},
        "encoder": source.encoder,
        "template": json.loads(json.dumps(source.template, default=dict)),
    }


def _scored_on(options: MergeOptions) -> str:
    return "held-out rows" if options.data is None else Path(options.data).name
