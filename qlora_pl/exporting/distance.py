"""How far an adapter over the base in 16 bits lies from the model that was trained over 4 bits.

Engines that take an adapter alone put it over the 16-bit base, which it was not trained over: the
error of packing, with which it has learnt to live, is missing there.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.loading import load
from qlora_pl.inference.machine import place_of
from qlora_pl.inference.source import ModelChoice, ModelSource, resolve_source
from qlora_pl.merging.scored_rows import ScoredRow, held_out_rows
from qlora_pl.merging.scoring import Score, score, write_reference
from qlora_pl.modeling.base.quantization import resolve_compute_dtype
from qlora_pl.modeling.loading.host_memory import release_freed_memory

logger = logging.getLogger(__name__)


def rows_to_score(source: ModelSource, most: int) -> list[ScoredRow]:
    """Held-out rows of an adapter, none of which are pairs of an encoder-decoder model.

    Args:
        source: Of one adapter.
        most: Trained tokens, at most; 0: none.
    """
    if not most or (source.manifest is not None and "Seq2Seq" in source.manifest.auto_class):
        return []
    (folder,) = source.adapters.values()
    return held_out_rows(folder, most)


def distance_over_16_bits(
    source: ModelSource, choice: ModelChoice, most: int, folder: Path | None = None
) -> Score | None:
    """Score the adapter over its base in 16 bits beside the model that was trained.

    Products are in the type in which the run had them, so that the base alone differs.

    Args:
        source: Of one adapter.
        choice: It was resolved from.
        most: Trained tokens that are scored, at most.
        folder: Where log-probabilities lie meanwhile (4 bytes a token of the vocabulary and a token
            of the rows); None: where the system keeps such things.

    Returns:
        None where there are no held-out rows.
    """
    rows = rows_to_score(source, most)
    if not rows:
        return None
    logger.info("Asking the trained model, and the adapter over the base in 16 bits ...")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        reference = Path(temporary) / "reference.npy"
        write_reference_of(source, choice, rows, reference)
        products = resolve_compute_dtype(source.quantization.compute_dtype, place_of(choice).device)
        precision: Any = str(products).removeprefix("torch.")
        return _score(replace(choice, precision=precision, quantization=None), rows, reference)


def write_reference_of(
    source: ModelSource, choice: ModelChoice, rows: list[ScoredRow], path: Path
) -> None:
    """Keep what the trained model says, which is loaded for it and let go."""
    place = place_of(choice)
    trained = load(source, place, choice.cache_dir, choice.trust_remote_code, is_exact=True)
    (name,) = source.adapters
    with trained.answering_as(name) as model:
        write_reference(model, rows, path)
    del trained, model
    release_freed_memory(of_cycles=True)


def _score(choice: ModelChoice, rows: list[ScoredRow], reference: Path) -> Score:
    source = resolve_source(choice)
    place = place_of(choice)
    served = load(source, place, choice.cache_dir, choice.trust_remote_code, is_exact=True)
    (name,) = source.adapters
    with served.answering_as(name) as model:
        found = score(model, rows, reference)
    del served, model
    release_freed_memory(of_cycles=True)
    return found


def in_words(found: Score | None, threshold: float) -> str:
    """What a user is told of it, a paragraph of Markdown.

    Args:
        found: From ``distance_over_16_bits``.
        threshold: Nats a token, above which the adapter alone is advised against.
    """
    if found is None:
        return (
            "How far the adapter over the base in 16 bits lies from the model that was trained "
            "was not measured: there are no held-out rows to score with."
        )
    text = (
        f"Over the base in 16 bits the adapter lies {found.kl_divergence:.3g} nats a token (KL) "
        f"from the model that was trained, over {found.tokens:,} held-out tokens: the same "
        f"likeliest token for {found.top1_agreement:.2%}, perplexity {found.perplexity:.4f} "
        f"({found.trained_perplexity:.4f} as trained)."
    )
    if found.kl_divergence > threshold:
        text += (
            f" That is above {threshold:g}: export it merged into the 4-bit base that it was "
            "trained over (--form merged), which is what was trained."
        )
    return text


def as_record(found: Score | None) -> dict[str, Any] | None:
    """For ``export.json``."""
    return None if found is None else asdict(found)


def refuse_packed_base(folder: Path, name: str) -> None:
    """A base that is stored in 4 or 8 bits has no 16-bit weights to serve an adapter over.

    Raises:
        ConfigurationError: naming it.
    """
    from qlora_pl.modeling.base.prequantized import is_prequantized

    if is_prequantized(folder):
        raise ConfigurationError(
            f"--adapter: its base '{name}' is stored in 4 or 8 bits, and engines read 16; name the "
            "base in 16 bits with --base."
        )
