"""GGUF files, which llama.cpp and Ollama read, through llama.cpp's own converters.

A model becomes one file. An adapter alone becomes another, which llama.cpp puts over the file of
its base in 16 bits; the converter reads one alpha, so it is given a plain adapter.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError
from qlora_pl.exporting import llama_cpp
from qlora_pl.exporting.distance import (
    as_record,
    distance_over_16_bits,
    in_words,
    refuse_packed_base,
)
from qlora_pl.exporting.gguf_file import (
    complete,
    lacks_scores,
    need_packages,
    refuse_incomplete_adapter,
    stop_ids,
)
from qlora_pl.exporting.llama_tokens import compare_with_llama_cpp
from qlora_pl.exporting.merging import merge_into
from qlora_pl.exporting.options import ExportOptions
from qlora_pl.exporting.parity import (
    check_parity,
    llama_cpp_ids,
    llama_cpp_template,
    served_encoder,
)
from qlora_pl.exporting.plain_adapter import PlainAdapter, plain_adapter
from qlora_pl.files import atomic_folder, write_atomic, write_json
from qlora_pl.inference.loading import load_encoder
from qlora_pl.inference.source import ModelChoice, ModelSource
from qlora_pl.modeling.base.identity import locate_base

logger = logging.getLogger(__name__)

MODEL_FILE = "model.gguf"
ADAPTER_FILE = "adapter.gguf"
MERGED_FOLDER = "merged"
ADAPTER_FOLDER = "adapter"
RECORD = "export.json"
CARD = "README.md"
TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, kw_only=True)
class GGUFExport:
    """What was written, or can be."""

    file: str
    """The GGUF file's name in the folder of the export."""
    command: str
    """The converter's, as it is typed."""
    is_converted: bool
    """Whether the file is there."""
    texts: list[str]
    """What there is to know, a paragraph of Markdown each."""
    record: dict[str, Any] = field(default_factory=dict)
    """The same for ``export.json``."""


def export_gguf(source: ModelSource, choice: ModelChoice, options: ExportOptions) -> str:
    """Write a GGUF file, or what the printed command makes one of; what came of it.

    Raises:
        QLoRAError: if something is missing, or a converter fails; nothing is left then.
    """
    encoder = served_encoder(source, choice)
    template = llama_cpp_template(encoder)
    ways = {"the chat template": llama_cpp_ids(encoder.tokenizer, template)}
    parity = check_parity(encoder, ways, next(iter(source.adapters.values()), None))
    output = Path(str(options.output)).expanduser()
    with atomic_folder(output) as place:
        done = write_gguf(source, choice, options, place, output)
        write_atomic(place / TEMPLATE, template)
        text = "\n\n".join([*done.texts, parity.in_words(), _how_to_run(done, source, output)])
        write_json(place / RECORD, {"to": "gguf", "base": source.base, **done.record})
        write_atomic(place / CARD, f"# {_title(done, source)}\n\n{text}\n")
    return f"{text}\n\nexport: {output}"


def write_gguf(
    source: ModelSource, choice: ModelChoice, options: ExportOptions, place: Path, final: Path
) -> GGUFExport:
    """Fill a folder with a GGUF file, or with what its converter reads.

    Args:
        source: What is exported.
        choice: It was resolved from.
        options: Whether the adapter is merged, and the converter runs.
        place: The folder to fill.
        final: The name that it will get, for commands.
    """
    if options.form == "adapter":
        return _write_adapter(source, choice, options, place, final)
    return _write_model(source, choice, options, place, final)


def _write_model(
    source: ModelSource, choice: ModelChoice, options: ExportOptions, place: Path, final: Path
) -> GGUFExport:
    converter = _converter(llama_cpp.MODEL_CONVERTER, options)
    texts = []
    trained = source.manifest.stop_token_ids if source.manifest else []
    refuse_unscored(source, options)
    if source.adapters:
        folder, shown = place / MERGED_FOLDER, final / MERGED_FOLDER
        texts.append(merge_into(folder, choice, options))
    else:
        folder = shown = locate_base(source.base, source.revision, choice.cache_dir)
        refuse_packed_base(folder, source.base)
    stops = stop_ids(folder, trained)
    words = llama_cpp.model_words(converter, shown, final / MODEL_FILE, options.outtype)
    if options.convert:
        llama_cpp.convert(
            llama_cpp.model_words(converter, folder, place / MODEL_FILE, options.outtype),
            place / MODEL_FILE,
        )
        complete(place / MODEL_FILE, folder, stops)
        encoder = load_encoder(source, choice.cache_dir)
        adapter = next(iter(source.adapters.values()), None)
        texts.append(compare_with_llama_cpp(place / MODEL_FILE, encoder, adapter))
        if source.adapters:
            shutil.rmtree(folder)
    return GGUFExport(
        file=MODEL_FILE,
        command=llama_cpp.command_line(words),
        is_converted=options.convert,
        texts=texts,
        record={"form": "merged", "outtype": options.outtype, "stop_token_ids": stops},
    )


def _write_adapter(
    source: ModelSource, choice: ModelChoice, options: ExportOptions, place: Path, final: Path
) -> GGUFExport:
    (adapter,) = source.adapters.values()
    plain = plain_adapter(adapter, source.manifest)
    base = locate_base(source.base, source.revision, choice.cache_dir)
    refuse_packed_base(base, source.base)
    refuse_transposed(plain)
    converter = _converter(llama_cpp.ADAPTER_CONVERTER, options)
    folder, shown = place / ADAPTER_FOLDER, final / ADAPTER_FOLDER
    folder.mkdir()
    plain.write(folder)
    words = llama_cpp.adapter_words(converter, shown, base, final / ADAPTER_FILE)
    if options.convert:
        llama_cpp.convert(
            llama_cpp.adapter_words(converter, folder, base, place / ADAPTER_FILE),
            place / ADAPTER_FILE,
        )
        refuse_incomplete_adapter(place / ADAPTER_FILE, len(plain.tensors) // 2)
        shutil.rmtree(folder)
    found = distance_over_16_bits(source, choice, options.score_tokens, place)
    texts = [in_words(found, options.threshold)]
    if plain.is_changed:
        texts.append(
            f"Scales of the adapter's modules went into its matrices, all of rank {plain.rank} "
            "now: llama.cpp reads one alpha for all."
        )
    return GGUFExport(
        file=ADAPTER_FILE,
        command=llama_cpp.command_line(words),
        is_converted=options.convert,
        texts=texts,
        record={
            "form": "adapter",
            "rank": plain.rank,
            "alpha": plain.config["lora_alpha"],
            "is_folded": plain.is_changed,
            "score": as_record(found),
        },
    )


def refuse_unscored(source: ModelSource, options: ExportOptions) -> None:
    """A command that would make a file of another tokenizer is not printed.

    Raises:
        ConfigurationError: if the converter's file has to be put right.
    """
    if not options.convert and lacks_scores(Path(source.tokenizer).expanduser()):
        raise ConfigurationError(
            f"--convert: is needed for '{source.base}', whose vocabulary llama.cpp's converter "
            "alone gives no scores, so that texts would come out in other tokens."
        )


def refuse_transposed(plain: PlainAdapter) -> None:
    """GPT-2 keeps its matrices the other way round; the adapter's converter turns A and B about.

    Raises:
        ConfigurationError: naming what to do instead.
    """
    if plain.config.get("fan_in_fan_out"):
        raise ConfigurationError(
            "--form: the base keeps its matrices transposed, as GPT-2 does, which llama.cpp's "
            "converter of adapters gets wrong; export it merged (--form merged)."
        )


def _converter(name: str, options: ExportOptions) -> Path | None:
    if options.convert:
        need_packages()
        return llama_cpp.need_converter(name, options.llama_cpp)
    return llama_cpp.find_converter(name, options.llama_cpp)


def _title(done: GGUFExport, source: ModelSource) -> str:
    if done.file == ADAPTER_FILE:
        return f"An adapter for {source.base}, as a GGUF file"
    return f"{source.base}, {'with an adapter merged in, ' * bool(source.adapters)}as a GGUF file"


def _how_to_run(done: GGUFExport, source: ModelSource, output: Path) -> str:
    # A base's own template is in its file, and an adapter's file has none.
    template = f"--jinja --chat-template-file {output / TEMPLATE}"
    lines = []
    if not done.is_converted:
        lines += ["Make the file with llama.cpp's converter:", "", f"    {done.command}", ""]
    if done.file == ADAPTER_FILE:
        lines += [
            "It is read over the base in 16 bits, whose file the first command makes:",
            "",
            f"    qlora-pl export --to gguf --model {source.base} --output base --convert",
            f"    llama-server -m base/{MODEL_FILE} --lora {output / ADAPTER_FILE} {template}",
        ]
    else:
        lines += ["Serve it:", "", f"    llama-server -m {output / MODEL_FILE} {template}"]
    return "\n".join(lines)
