"""What vLLM serves: an adapter over its base, or a merged model, and the exact command.

vLLM is not started here: what is checked is what it is given (the adapter, the chat template, the
settings), by the rules of its documentation.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from qlora_pl.data.encoding.encoder import Encoder
from qlora_pl.data.encoding.served_template import served_tokenizer
from qlora_pl.errors import ConfigurationError
from qlora_pl.exporting.answer_settings import AnswerSettings, answer_settings
from qlora_pl.exporting.distance import as_record, distance_over_16_bits, in_words
from qlora_pl.exporting.merging import merge_into
from qlora_pl.exporting.options import ExportOptions
from qlora_pl.exporting.parity import check_parity, served_encoder, tokenizer_folder_ids
from qlora_pl.exporting.plain_adapter import plain_adapter
from qlora_pl.files import atomic_folder, write_atomic, write_json
from qlora_pl.inference.source import ModelChoice, ModelSource
from qlora_pl.modeling.base.identity import locate_base
from qlora_pl.modeling.base.prequantized import is_prequantized

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be (vllm/config/lora.py, releases 0.12 to 0.22)."""
ADAPTER_FOLDER, MODEL_FOLDER, TOKENIZER_FOLDER = "adapter", "model", "tokenizer"
SETTINGS_FOLDER = "generation"
TOLD = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
"""Fields of ``DecodingConfig`` that vLLM reads from generation_config.json."""
NOT_RUN = (
    "vLLM itself was not run for this: the commands follow its documentation. The tokens of the "
    "prompts were compared through transformers, whose rendering vLLM uses."
)


@dataclass(frozen=True)
class Served:
    """What is served, and the words of the command that say so."""

    model: str
    """A folder or a name on the Hub."""
    words: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    """What there is to know, a paragraph each."""
    record: tuple[tuple[str, object], ...] = ()
    has_packed_base: bool = False
    """Whether an adapter's base is stored in 4 or 8 bits."""


def export_vllm(source: ModelSource, choice: ModelChoice, options: ExportOptions) -> str:
    """Write a folder, and the commands that serve it.

    Raises:
        QLoRAError: if prompts differ, or the adapter is more than vLLM reads; nothing is left then.
    """
    encoder = served_encoder(source, choice)
    output = Path(str(options.output)).expanduser()
    folder = next(iter(source.adapters.values()), None)
    with atomic_folder(output) as place:
        served_tokenizer(encoder).save_pretrained(place / TOKENIZER_FOLDER)
        ways = {"the chat template": tokenizer_folder_ids(place / TOKENIZER_FOLDER)}
        parity = check_parity(encoder, ways, folder)
        settings = answer_settings(source, encoder)
        (place / SETTINGS_FOLDER).mkdir()
        write_json(place / SETTINGS_FOLDER / "generation_config.json", settings.generation_config())
        served = _write(source, choice, options, encoder, place, output)
        texts = [
            *served.texts,
            parity.in_words(),
            *_left_out(settings),
            NOT_RUN,
            _how_to_run(served, source, settings, output),
        ]
        card = "\n\n".join(texts)
        write_json(
            place / "export.json", {"to": "vllm", "base": source.base, **dict(served.record)}
        )
        write_atomic(place / "README.md", f"# {source.base} for vLLM\n\n{card}\n")
    return f"{card}\n\nexport: {output}"


def _write(
    source: ModelSource,
    choice: ModelChoice,
    options: ExportOptions,
    encoder: Encoder,
    place: Path,
    output: Path,
) -> Served:
    if not source.adapters:
        return Served(source.base, record=(("form", "model"),))
    if options.form == "merged":
        text = merge_into(place / MODEL_FOLDER, choice, options)
        return Served(str(output / MODEL_FOLDER), texts=(text,), record=(("form", "merged"),))
    return _write_adapter(source, choice, options, place, output)


def _write_adapter(
    source: ModelSource, choice: ModelChoice, options: ExportOptions, place: Path, output: Path
) -> Served:
    (adapter,) = source.adapters.values()
    plain = plain_adapter(adapter, source.manifest)
    rank = allowed_rank(plain.rank)
    (place / ADAPTER_FOLDER).mkdir()
    plain.write(place / ADAPTER_FOLDER)
    texts = []
    if plain.is_changed:
        texts.append(
            f"Scales of the adapter's modules went into its matrices, all of rank {plain.rank} "
            "now: vLLM reads one alpha and one rank for all."
        )
    found = None
    is_packed = is_prequantized(locate_base(source.base, source.revision, choice.cache_dir))
    if not is_packed:
        found = distance_over_16_bits(source, choice, options.score_tokens, place)
        texts.append(in_words(found, options.threshold))
    return Served(
        source.base,
        words=(
            *("--enable-lora", "--lora-modules", f"adapter={output / ADAPTER_FOLDER}"),
            *("--max-lora-rank", str(rank)),
        ),
        texts=tuple(texts),
        record=(("form", "adapter"), ("rank", plain.rank), ("score", as_record(found))),
        has_packed_base=is_packed,
    )


def allowed_rank(rank: int) -> int:
    """The least of ``RANKS`` that holds a rank.

    Raises:
        ConfigurationError: above the largest.
    """
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise ConfigurationError(
        f"--form: the adapter has rank {rank}, and vLLM takes up to {RANKS[-1]}; export it merged "
        "(--form merged)."
    )


def serve_command(
    served: Served, settings: AnswerSettings, output: Path, revision: str | None, *more: str
) -> str:
    """The command, as it is typed.

    Args:
        served: What is served.
        settings: Its context.
        output: The folder of the export.
        revision: Of a base on the Hub.
        more: Further words.
    """
    words = [
        *("vllm", "serve", served.model),
        *(("--revision", revision) if revision else ()),
        *("--tokenizer", str(output / TOKENIZER_FOLDER)),
        *served.words,
        *("--chat-template", str(output / TOKENIZER_FOLDER / "chat_template.jinja")),
        *("--generation-config", str(output / SETTINGS_FOLDER)),
        *("--max-model-len", str(settings.context)),
        *more,
    ]
    return shlex.join(words)


def _how_to_run(served: Served, source: ModelSource, settings: AnswerSettings, output: Path) -> str:
    on_hub = source.revision if not Path(served.model).is_absolute() else None

    def command(*more: str) -> str:
        return f"    {serve_command(served, settings, output, on_hub, *more)}"

    name = "adapter" if served.words else served.model
    asking = (
        "    curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' "
        f'-d \'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}\''
    )
    if served.has_packed_base:
        lines = ["Serve it over the base as it is stored:", "", command()]
    elif served.words:
        lines = [
            "Serve it over the base in 16 bits:",
            "",
            command("--dtype", "bfloat16"),
            "",
            f"Over the base in 4 bits, {_as_trained(source)}:",
            "",
            command("--dtype", "bfloat16", "--quantization", "bitsandbytes"),
        ]
    else:
        lines = ["Serve it:", "", command("--dtype", "bfloat16")]
    return "\n".join([*lines, "", "Ask it:", "", asking])


def _as_trained(source: ModelSource) -> str:
    """How vLLM's packing (NF4 in blocks of 64, scales packed too) compares with training's."""
    trained = source.quantization
    if trained.quant_type == "nf4" and trained.block_size == 64:
        if trained.double_quant:
            return "which vLLM packs as training did (nf4, double quantisation)"
        return "which vLLM packs as training did but for its scales, which it packs too"
    return f"which vLLM packs in nf4 with double quantisation; training had {trained.quant_type}"


def _left_out(settings: AnswerSettings) -> list[str]:
    names = settings.left_out(TOLD)
    if not names:
        return []
    return [
        f"vLLM reads no default for {', '.join(names)}, which the run sets: send it by request."
    ]
