"""What answers: an adapter folder of this project, a plain PEFT adapter, or a model alone.

A folder of this project says everything; of the others, what is not said is a stated default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qlora_pl.data.templates.loading import JINJA_SUFFIXES, TEMPLATES
from qlora_pl.errors import ConfigurationError, did_you_mean
from qlora_pl.modeling.base.prequantized import stored_quantization
from qlora_pl.modeling.base.quantization import QuantizationConfig, QuantType
from qlora_pl.modeling.folders.adapter_folder import AdapterManifest, read_adapter_folder
from qlora_pl.modeling.folders.peft_folder import locate_adapter, read_config

Precision = Literal["trained", "bfloat16", "float16", "float32"]
PRECISIONS: tuple[Precision, ...] = ("trained", "bfloat16", "float16", "float32")
Devices = Literal["one", "auto", "cpu"]
DEVICES: tuple[Devices, ...] = ("one", "auto", "cpu")
KEY = "--adapter"
"""Who names a folder, in messages."""
DEFAULT_NAME = "adapter"
"""What an adapter without a name of its own is called."""
BASE = "base"
"""What the base without an adapter is called."""
MERGE_RECORD = "merge.json"
"""What lies in a merged folder: where it came from, and its template."""

ASSUMED_TEMPLATE = (
    "the tokenizer's chat template if it has one, else instruction-response (--template)"
)


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model answers."""

    adapter: tuple[str, ...] = ()
    """An adapter folder, or a name on the Hub; several as NAME=FOLDER, all of one base."""
    model: str | None = None
    """In its place, a model without an adapter: a folder, or a name on the Hub."""
    revision: str | None = None
    """The commit, branch or tag of a base on the Hub, where no adapter folder names it."""
    base: str | None = None
    """Where the adapter's base lies now, if not where it lay in training."""
    quantization: QuantType | None = None
    """How the base is kept, where no adapter folder says it; nf4 beside an adapter, none for a
    model."""
    precision: Precision = "trained"
    """trained: the base in 4 bits, as the adapter was trained over it. Else the base in 16 or 32
    bits, over which the adapter was not trained."""
    template: str | None = None
    """Turns questions into prompts, where no adapter folder says it: a name or a file of Jinja."""
    trust_remote_code: bool = False
    """Whether Python code that lies beside a model may run."""
    cache_dir: str | None = None
    """Where packed weights and downloads are kept."""
    devices: Devices = "one"
    """one: the first GPU, or the CPU where there is none; auto: layer after layer over every GPU,
    the rest on the CPU, which computes it; cpu."""
    max_memory: tuple[str, ...] = ()
    """With --devices auto, what weights may take at most: 20GiB on every GPU, or 0=20GiB,
    cpu=64GiB on one device."""

    def __post_init__(self) -> None:
        problems = []
        if bool(self.adapter) == (self.model is not None):
            problems.append(
                "--adapter: name an adapter folder, or a model alone with --model"
                f"{', not both' if self.adapter else ''}."
            )
        if self.base is not None and not self.adapter:
            problems.append("--base: is for an adapter; a model alone is named by --model.")
        if self.precision != "trained" and self.quantization not in (None, "none"):
            problems.append(
                f"--quantization: {self.quantization} and --precision {self.precision} contradict "
                "each other; leave one of them out."
            )
        if self.precision not in PRECISIONS:
            problems.append(
                f"--precision: '{self.precision}' is not known"
                f"{did_you_mean(self.precision, PRECISIONS)}"
            )
        if self.devices not in DEVICES:
            problems.append(
                f"--devices: '{self.devices}' is not known{did_you_mean(self.devices, DEVICES)}"
            )
        if self.max_memory and self.devices != "auto":
            problems.append("--max-memory: is for --devices auto; add it.")
        is_file = Path(self.template or "").suffix in JINJA_SUFFIXES
        if self.template is not None and not is_file and self.template not in TEMPLATES:
            problems.append(
                f"--template: no template is called '{self.template}' (known: "
                f"{', '.join(TEMPLATES)}){did_you_mean(self.template, TEMPLATES)}"
            )
        if problems:
            raise ConfigurationError(problems)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """All that is needed to load what answers."""

    base: str
    revision: str | None
    quantization: QuantizationConfig
    template: str | Mapping[str, Any]
    tokenizer: str
    """A folder or a name on the Hub."""
    adapters: dict[str, Path] = field(default_factory=dict)
    """Folders by name, the first of which is in use."""
    weights: str | None = None
    """The base's fingerprint in training; None: nobody knows."""
    encoder: str = "Encoder"
    """The class of the encoder that made its training rows."""
    vocabulary_size: int | None = None
    lora_dtype: str = "float32"
    """What adapters are kept in."""
    manifest: AdapterManifest | None = None
    assumed: tuple[str, ...] = ()
    """What no file says and was taken for granted, one clause each."""


def resolve_source(choice: ModelChoice) -> ModelSource:
    """Read what is named, without loading weights.

    Raises:
        ConfigurationError: if a folder is no adapter, or adapters are of several bases.
        AdapterFolderError: if a folder is damaged.
    """
    if choice.model is not None:
        return _of_model(choice, choice.model)
    folders = _named_folders(choice.adapter)
    sources = [_of_adapter(choice, folder) for folder in folders.values()]
    first = sources[0]
    for name, other in zip(folders, sources, strict=True):
        for part in ("base", "weights", "quantization", "vocabulary_size", "template"):
            if getattr(other, part) != getattr(first, part):
                raise ConfigurationError(
                    f"--adapter: '{name}' has another {part} than '{next(iter(folders))}' "
                    f"({getattr(other, part)} and {getattr(first, part)}); ask one at a time."
                )
    return replace(first, adapters=folders)


def _named_folders(words: Sequence[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for word in words:
        name, separator, place = word.partition("=")
        is_named = bool(separator) and "/" not in name
        name, place = (name, place) if is_named else (DEFAULT_NAME, word)
        if name == BASE or name in folders:
            taken = f"'{BASE}' is the base's own" if name == BASE else f"two are called '{name}'"
            raise ConfigurationError(f"--adapter: {taken}; write NAME=FOLDER with another name.")
        if not name.isidentifier():
            raise ConfigurationError(f"--adapter: '{name}' is no name; use letters and digits.")
        folders[name] = _locate(place)
    return folders


def _locate(place: str) -> Path:
    folder = Path(place).expanduser()
    if (folder / "manifest.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            f"--adapter: '{place}' is a whole model, not an adapter; name it with --model."
        )
    if folder.is_dir() and not (folder / "adapter_config.json").is_file():
        inner = [path.parent for path in sorted(folder.glob("**/adapter_config.json"))]
        hint = f"; did you mean '{inner[-1]}'?" if inner else ", which every adapter has."
        raise ConfigurationError(
            f"--adapter: '{place}' holds no adapter: there is no adapter_config.json{hint}"
        )
    return locate_adapter(place, KEY)


def _of_adapter(choice: ModelChoice, folder: Path) -> ModelSource:
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    if (folder / "manifest.json").is_file():
        manifest = read_adapter_folder(folder)
        base = choice.base or manifest.base["name"]
        _refuse_contradictions(choice, manifest, folder)
        return _of_manifest(choice, manifest, base, str(folder) if has_tokenizer else base)
    config = read_config(folder, KEY)
    named = choice.base or config.get("base_model_name_or_path")
    if not named:
        raise ConfigurationError(
            f"--base: '{folder}' does not say what its base is; name it with --base."
        )
    assumed = []
    if choice.quantization is None and choice.precision == "trained":
        assumed.append("its base in nf4 with double quantisation (--quantization)")
    if choice.template is None:
        assumed.append(ASSUMED_TEMPLATE)
    return ModelSource(
        base=named,
        revision=choice.revision or config.get("revision"),
        quantization=_quantization(
            choice, QuantizationConfig(quant_type=choice.quantization or "nf4")
        ),
        template=choice.template or "auto",
        tokenizer=str(folder) if has_tokenizer else named,
        assumed=tuple(assumed),
    )


def _of_model(choice: ModelChoice, name: str) -> ModelSource:
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file():
        raise ConfigurationError(f"--model: '{name}' is an adapter; name it with --adapter.")
    stored = stored_quantization(folder) if choice.quantization is None else None
    quantization = _quantization(
        choice, stored or QuantizationConfig(quant_type=choice.quantization or "none")
    )
    if (folder / MERGE_RECORD).is_file():
        return _of_merged(choice, folder, quantization)
    if (folder / "manifest.json").is_file():
        source = _of_manifest(choice, read_adapter_folder(folder), name, name)
        # The manifest's fingerprint is of what training began with.
        return replace(source, weights=None, revision=None, quantization=quantization)
    return ModelSource(
        base=name,
        revision=choice.revision,
        quantization=quantization,
        template=choice.template or "auto",
        tokenizer=name,
        assumed=() if choice.template else (ASSUMED_TEMPLATE,),
    )


def _of_merged(choice: ModelChoice, folder: Path, quantization: QuantizationConfig) -> ModelSource:
    path = folder / MERGE_RECORD
    try:
        record = json.loads(path.read_text())
        template = choice.template or record["template"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigurationError(f"--model: '{path}' cannot be read ({error}).") from error
    return ModelSource(
        base=str(folder),
        revision=None,
        quantization=quantization,
        template=template,
        encoder=record.get("encoder", "Encoder"),
        tokenizer=str(folder),
    )


def _of_manifest(
    choice: ModelChoice, manifest: AdapterManifest, base: str, tokenizer: str
) -> ModelSource:
    trained = manifest.quantization
    quantization = QuantizationConfig(
        quant_type=trained["quant_type"],
        double_quant=trained["double_quant"] or None,
        block_size=trained["block_size"],
        compute_dtype=trained["compute_dtype"],
        skip_modules=tuple(trained["skip_modules"]),
    )
    definition = manifest.encoding.get("template")
    return ModelSource(
        base=base,
        revision=manifest.base["revision"],
        weights=manifest.base["weights"],
        quantization=_quantization(choice, quantization),
        template=choice.template or definition or manifest.template,
        encoder=manifest.encoding.get("encoder", "Encoder"),
        tokenizer=tokenizer,
        vocabulary_size=manifest.vocabulary_size,
        lora_dtype=manifest.lora["dtype"],
        manifest=manifest,
    )


def _refuse_contradictions(choice: ModelChoice, manifest: AdapterManifest, folder: Path) -> None:
    trained = manifest.quantization["quant_type"]
    if choice.quantization not in (None, trained):
        raise ConfigurationError(
            f"--quantization: '{folder}' was trained over {trained}, not {choice.quantization}; "
            "leave it out, or ask the base in 16 bits with --precision bfloat16."
        )


def _quantization(choice: ModelChoice, trained: QuantizationConfig) -> QuantizationConfig:
    if choice.precision == "trained":
        return trained
    return QuantizationConfig(quant_type="none", compute_dtype=choice.precision)
