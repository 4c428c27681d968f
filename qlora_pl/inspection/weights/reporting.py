"""From the flags of ``inspect model`` to its numbers: opened, measured, asked, ranked."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qlora_pl import __version__
from qlora_pl.errors import ConfigurationError
from qlora_pl.inference.loading import load, refuse_other_base
from qlora_pl.inference.source import ModelChoice, ModelSource, resolve_source
from qlora_pl.inspection.weights.asking import Questioner
from qlora_pl.inspection.weights.command import ModelOptions, as_first
from qlora_pl.inspection.weights.formats import Format
from qlora_pl.inspection.weights.keeping import Kept, KeptScore, rank, yaml_lines
from qlora_pl.inspection.weights.measuring import MatrixNumbers, measure
from qlora_pl.inspection.weights.numbers import LogitNumbers, ModelNumbers
from qlora_pl.inspection.weights.opening import OpenBase, open_folder
from qlora_pl.merging.scored_rows import ScoredRow, held_out_rows, rows_of_file
from qlora_pl.merging.scoring import estimate_seconds, in_words
from qlora_pl.modeling.base.encoder_decoder import is_encoder_decoder
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.loading.host_memory import large_blocks_apart

logger = logging.getLogger(__name__)


@large_blocks_apart()
def report(options: ModelOptions, formats: Sequence[Format]) -> ModelNumbers:
    """Measure a base.

    Raises:
        QLoRAError: if it cannot be opened, is damaged or quantised already; if rows cannot be read.
    """
    started = time.perf_counter()
    base, rows, formats = _open(options, list(formats))
    precision = str(base.model.dtype).removeprefix("torch.") if rows else ""
    matrices = list(_with_bar(base, formats, rows))
    unfit = _refuse_unfit(matrices, formats)
    formats = [f for f in formats if any(f.name in m.errors for m in matrices)]
    asked = _ask(options, base, rows, matrices, formats) if rows else None
    logits, by_layer, by_kind = None, {}, {}
    if asked is not None:
        logits = asked
        by_layer, by_kind = asked.by_layer, asked.by_kind
    how, ranked = rank(matrices, formats[0], by_layer, by_kind)
    kept = ranked[: _most_kept(options, matrices)]
    return ModelNumbers(
        model=base.name,
        version=__version__,
        versions={name: version(name) for name in ("torch", "transformers", "bitsandbytes")},
        date=date.today().isoformat(),
        device=_name_of(base.device),
        seconds=time.perf_counter() - started,
        precision=precision,
        data=_data_name(options) if rows else "",
        tokens_read=sum(row.num_tokens for row in rows),
        formats=list(formats),
        matrices=matrices,
        kept_weights=_kept_weights(base),
        unfit=unfit,
        logits=logits,
        measure=how,
        kept=kept,
        yaml=_yaml(formats[0], kept, matrices, base.skipped),
    )


def _yaml(
    format: Format,
    kept: Sequence[Kept],
    matrices: Sequence[MatrixNumbers],
    skipped: Sequence[str],
) -> str:
    return yaml_lines(format, kept, matrices, skipped) if kept and format.is_trainable else ""


def _kept_weights(base: OpenBase) -> int:
    return sum(
        parameter.numel()
        for name, parameter in base.model.named_parameters()
        if name not in base.plan.quantized and parameter.ndim > 1
    )


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _data_name(options: ModelOptions) -> str:
    if options.data is not None:
        return Path(options.data).name
    return "held-out rows of the adapter"


# -- opening ---------------------------------------------------------------------------------------


def _open(
    options: ModelOptions, formats: list[Format]
) -> tuple[OpenBase, list[ScoredRow], list[Format]]:
    """The base, the rows to ask it, and what is compared."""
    source = _source(options) if options.is_asked else None
    name, revision, skipped = options.model, options.revision, options.skip_modules
    if source is not None:
        name, revision = source.base, source.revision
        skipped = tuple(dict.fromkeys([*skipped, *source.quantization.skip_modules]))
    assert name is not None
    if source is not None:
        refuse_other_base(source, identify_base(name, revision, options.cache_dir))
    base = open_folder(name, revision, skipped, options.cache_dir, options.trust_remote_code)
    if source is None:
        return base, [], formats
    if source.manifest is not None and options.adapter is not None:
        formats = as_first(formats, source.manifest.quantization)
    rows = _rows(options, source, base)
    if not rows:
        logger.warning(
            "--adapter: no held-out rows lie in '%s', so its base is measured without being asked; "
            "name rows with --data.",
            options.adapter,
        )
        return base, [], formats
    return replace(base, model=_loaded(options, source, base)), rows, formats


def _loaded(options: ModelOptions, source: ModelSource, base: OpenBase) -> Any:
    """The same base whole on its device, to be asked."""
    precision = options.precision
    if precision == "auto":
        precision = "bfloat16" if base.device.type == "cuda" else "float32"
    whole = replace(
        source,
        adapters={},
        quantization=QuantizationConfig(quant_type="none", compute_dtype=precision),
    )
    code = options.trust_remote_code
    return load(whole, base.device, options.cache_dir, code, is_exact=True).model


def _source(options: ModelOptions) -> ModelSource:
    if options.adapter is not None:
        return resolve_source(
            ModelChoice(
                adapter=(options.adapter,),
                base=options.base,
                revision=options.revision,
                template=options.template,
            )
        )
    return resolve_source(
        ModelChoice(
            model=options.model,
            revision=options.revision,
            template=options.template,
            trust_remote_code=options.trust_remote_code,
        )
    )


def _rows(options: ModelOptions, source: ModelSource, base: OpenBase) -> list[ScoredRow]:
    if options.data is not None:
        return rows_of_file(source, base.model, options.data, options.tokens, options.cache_dir)
    if is_encoder_decoder(base.model):
        return []  # of pairs, whose source and target lie in one array
    (adapter,) = source.adapters.values()
    return held_out_rows(adapter, options.tokens)


# -- measuring -------------------------------------------------------------------------------------


def _with_bar(base: OpenBase, formats: Sequence[Format], rows: Sequence[ScoredRow]) -> Any:
    from tqdm.auto import tqdm

    weights = sum(base.model.get_parameter(name).numel() for name in base.plan.quantized)
    with closing(
        tqdm(total=weights, desc="matrices", unit="weights", unit_scale=True, leave=False)
    ) as bar:
        for found in measure(base, formats, rows):
            bar.update(found.num_weights)
            yield found


def _refuse_unfit(matrices: Sequence[MatrixNumbers], formats: Sequence[Format]) -> dict[str, str]:
    """Formats that some matrices cannot have, each with the first of them.

    Raises:
        ConfigurationError: if none fits any.
    """
    unfit = {}
    for format in formats:
        if wrong := [m for m in matrices if format.name not in m.errors]:
            unfit[format.name] = f"'{wrong[0].module}' has {wrong[0].shape[1]} inputs"
    if not any(m.errors for m in matrices):
        name, why = next(iter(unfit.items()))
        raise ConfigurationError(
            f"--block-sizes: no matrix can be kept as {name}: {why}, no multiple of its block, so "
            "a block would span two rows; name a smaller size."
        )
    return unfit


# -- asking ----------------------------------------------------------------------------------------


def _ask(
    options: ModelOptions,
    base: OpenBase,
    rows: Sequence[ScoredRow],
    matrices: Sequence[MatrixNumbers],
    formats: Sequence[Format],
) -> LogitNumbers | None:
    """What the base says with parts of it quantised; None: it was not to be asked."""
    if options.logits == "none":
        return None
    from tqdm.auto import tqdm

    main = formats[0]
    groups = _groups(matrices, main) if options.logits == "parts" else {}
    steps = _steps(_most_kept(options, matrices)) if groups else []
    number = 1 + len(formats) + len(groups) + len(steps)
    seconds = number * estimate_seconds(base.model, rows)
    logger.info("inspect: the base is asked %d times, about %s.", number, in_words(seconds))
    tokens = sum(row.num_tokens for row in rows)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(tqdm(total=number * tokens, desc="logits", unit="tokens", leave=False)) as bar,
    ):
        asked = Questioner(base, rows, Path(folder), bar)
        every = [m.module for m in matrices]
        by_format = {f.name: asked.score(every, f) for f in formats}
        scores = {key: asked.score(modules, main) for key, modules in groups.items()}
        by_layer = {name: s for (what, name), s in scores.items() if what == "layer"}
        by_kind = {name: s for (what, name), s in scores.items() if what == "kind"}
        _, ranked = rank(matrices, main, by_layer, by_kind)
        kept = []
        for step in steps:
            spared = {k.module for k in ranked[:step]}
            rest = [name for name in every if name not in spared]
            kept.append(KeptScore(number=step, score=asked.score(rest, main)))
    any_score = next(iter(by_format.values()))
    return LogitNumbers(
        whole=any_score.trained_perplexity,
        tokens=any_score.tokens,
        rows=len(rows),
        by_format=by_format,
        by_layer=by_layer,
        by_kind=by_kind,
        kept=kept,
    )


def _groups(matrices: Sequence[MatrixNumbers], format: Format) -> dict[tuple[str, str], list[str]]:
    """Modules of each layer and of each kind."""
    groups: dict[tuple[str, str], list[str]] = {}
    for m in matrices:
        if format.name in m.errors:
            groups.setdefault(("layer", m.place.layer), []).append(m.module)
    for m in matrices:
        if format.name in m.errors:
            groups.setdefault(("kind", m.place.kind), []).append(m.module)
    return groups


def _most_kept(options: ModelOptions, matrices: Sequence[MatrixNumbers]) -> int:
    """Suggestions: a base of which nothing is quantised is none of them."""
    return min(options.keep, len(matrices) - 1)


def _steps(keep: int) -> list[int]:
    """1, 2, 4 and so on up to all suggestions."""
    steps = []
    step = 1
    while step < keep:
        steps.append(step)
        step *= 2
    return [*steps, keep] if keep else []
