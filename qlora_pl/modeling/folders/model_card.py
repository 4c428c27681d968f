"""README.md of an adapter folder, as model hubs show it: what it is, and lines that load it.

All of it comes from the manifest, so that the same run writes the same page whenever it is stopped;
places on the machine, times and secrets are not in it. What plain programs do differently without a
word is said, and undone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_pl.modeling.base.quantization import BLOCK_SIZE
from qlora_pl.modeling.folders.card_sections import (
    QUESTION,
    asking_plainly,
    fenced,
    front_matter,
    history_section,
    licence_section,
    settings_section,
)

if TYPE_CHECKING:
    from qlora_pl.modeling.folders.adapter_folder import AdapterManifest


def model_card(manifest: AdapterManifest) -> str:
    """The whole page of an adapter."""
    lora, name = manifest.lora, base_name(manifest)
    kind = "DoRA" if lora["method"] == "dora" else "LoRA"
    title = f"# {kind} adapter for {name}"
    parts = [
        _front(manifest, "peft", ["lora", "qlora", "qlora-pl"]),
        title,
        _summary(manifest),
        *_warnings(manifest),
        *about(manifest),
        "## Loading",
        "With transformers and PEFT, as it was trained:",
        fenced("python", _loading(manifest)),
        *asked(manifest),
        "With qlora_pl:",
        fenced("python", own_lines('load_adapter(".")')),
        fenced("bash", own_command("--adapter .")),
        "For vLLM and other programs that read whole models, `qlora-pl merge --adapter . --output "
        "merged` writes one and measures what that changes; then `vllm serve merged`.",
    ]
    return "\n\n".join(parts) + "\n"


def whole_model_card(manifest: AdapterManifest) -> str:
    """The whole page of a base that was trained whole."""
    parts = [
        _front(manifest, "transformers", ["full-fine-tuning", "qlora-pl"]),
        f"# {base_name(manifest)}, fine-tuned whole",
        f"Trained for {manifest.step:,} optimizer steps on {trained_rows(manifest)}, every weight "
        f"of it, kept in {manifest.lora['dtype']}; prompt template `{manifest.template}`. "
        "`run.yaml` is the whole configuration; `manifest.json` holds the fingerprint of the base "
        "and the digest of every file here.",
        *about(manifest),
        "## Loading",
        "With transformers:",
        fenced("python", plain_lines(manifest.auto_class)),
        *asked(manifest),
        "With qlora_pl:",
        fenced("python", own_lines('load_adapter(model=".")')),
        fenced("bash", own_command("--model .")),
    ]
    return "\n\n".join(parts) + "\n"


def about(manifest: AdapterManifest) -> list[str]:
    """What it was trained on and how, as sections; without what the manifest does not say."""
    card = manifest.card
    return [
        *licence_section(base_name(manifest), card),
        *settings_section(card.get("settings", {}), manifest.versions),
        *history_section(card.get("history", [])),
    ]


def asked(manifest: AdapterManifest) -> list[str]:
    """How a plain program asks it."""
    return asking_plainly(manifest.card.get("prompt"), manifest.auto_class, manifest.stop_token_ids)


def base_name(manifest: AdapterManifest) -> str:
    """A name on the Hub as it is, and of a folder the last part: the rest is the machine's."""
    name = str(manifest.base["name"])
    return name if _is_hub_name(name) else Path(name).name


def _is_hub_name(name: str) -> bool:
    # Not by looking whether a folder is there: the page must not depend on where it is written.
    return not name.startswith((".", "/", "~")) and name.count("/") == 1


def _front(manifest: AdapterManifest, library: str, tags: list[str]) -> str:
    return front_matter(
        base_model=manifest.base["name"] if _is_hub_name(manifest.base["name"]) else None,
        library_name=library,
        tags=tags,
        card=manifest.card,
        is_pair="Seq2Seq" in manifest.auto_class,
    )


def card_front(manifest: AdapterManifest, tags: list[str]) -> str:
    """The opening of a page of a merged model."""
    return _front(manifest, "transformers", tags)


def _summary(manifest: AdapterManifest) -> str:
    lora = manifest.lora
    scale = ", rank-stabilised scale" if lora["use_rslora"] else ""
    some = ", others in some modules" if lora["rank_pattern"] or lora["alpha_pattern"] else ""
    biases = {
        "none": "",
        "lora_only": ", biases of adapted layers trained too",
        "all": ", every bias trained too",
    }
    return (
        f"Trained for {manifest.step:,} optimizer steps on {trained_rows(manifest)}, over the base "
        f"in {_precision(manifest)}. Rank {lora['r']}, alpha {lora['alpha']:g}{some}{scale}"
        f"{biases[lora['bias']]}, dropout {lora['dropout']:g}; prompt template "
        f"`{manifest.template}`. `run.yaml` is the whole configuration; `manifest.json` holds the "
        "fingerprint of the base and the digest of every file here."
    )


def trained_rows(manifest: AdapterManifest) -> str:
    """How many rows a run had, in words."""
    if window := manifest.data.get("window"):
        return f"rows that were read {window:,} at a time"
    return f"{manifest.data.get('num_train_rows', 0):,} rows"


def _precision(manifest: AdapterManifest) -> str:
    quantization = manifest.quantization
    if quantization["quant_type"] == "none":
        return str(quantization["compute_dtype"])
    scales = " with double quantisation" if quantization["double_quant"] else ""
    size = quantization["block_size"]
    blocks = f" in blocks of {size}" if size != BLOCK_SIZE else ""
    return f"{quantization['quant_type']}{scales}{blocks}"


def _warnings(manifest: AdapterManifest) -> list[str]:
    """What plain programs do differently, one paragraph each."""
    quantization = manifest.quantization
    paragraphs = []
    if classes := quantization["replaced_classes"]:
        names = ", ".join(f"`{name.rpartition('.')[2]}`" for name in classes)
        paragraphs.append(
            f"Plain transformers leaves this base's {names} layers unquantised without a word; the "
            "marked line below has it quantise them, as in training."
        )
    if quantization["block_size"] != BLOCK_SIZE and quantization["quant_type"] != "none":
        paragraphs.append(
            f"Plain transformers quantises in blocks of {BLOCK_SIZE} weights, not of "
            f"{quantization['block_size']}, so the lines below give a slightly different base."
        )
    return paragraphs


def _loading(manifest: AdapterManifest) -> list[str]:
    config, size = manifest.quantization_config, manifest.vocabulary_size
    name: Any = manifest.base["name"]
    lines = ["import json", "from pathlib import Path"]
    for replaced in manifest.quantization["replaced_classes"]:
        module, _, kind = replaced.rpartition(".")
        package, _, leaf = module.rpartition(".")
        lines += [
            "from torch import nn",
            f"from {package} import {leaf}",
            f"{leaf}.{kind} = nn.Linear  # otherwise unquantised",
        ]
    lines += [
        "from peft import PeftModel",
        f"from transformers import {manifest.auto_class}, AutoTokenizer, BitsAndBytesConfig",
        "",
        'folder = Path(".")',
        'manifest = json.loads((folder / "manifest.json").read_text())',
    ]
    if config is not None:
        lines.append('quantization = BitsAndBytesConfig(**manifest["quantization_config"])')
    place = repr(name) if _is_hub_name(name) else 'manifest["base"]["name"]'
    lines += [
        f"base = {manifest.auto_class}.from_pretrained(",
        f'    {place}, dtype="{manifest.quantization["unquantized_dtype"]}",',
    ]
    if manifest.base["revision"] is not None:
        lines.append(f"    revision={manifest.base['revision']!r},")
    if config is not None:
        lines.append('    quantization_config=quantization, device_map="auto",')
    return [
        *lines,
        ")",
        *([f"base.resize_token_embeddings({size})  # rows of its new tokens"] if size else []),
        "model = PeftModel.from_pretrained(base, folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]


def plain_lines(auto_class: str) -> list[str]:
    """Lines that load a whole model with plain transformers."""
    return [
        f"from transformers import {auto_class}, AutoTokenizer",
        "",
        f'model = {auto_class}.from_pretrained(".", dtype="auto", device_map="auto")',
        'tokenizer = AutoTokenizer.from_pretrained(".")',
    ]


def own_lines(loaded: str) -> list[str]:
    """Lines that load with this project and ask."""
    return [
        "from qlora_pl import generate, load_adapter",
        "",
        f"model = {loaded}",
        f"print(generate(model, {QUESTION!r}, max_new_tokens=64)[0].answer)",
    ]


def own_command(flag: str) -> list[str]:
    """The same as a command."""
    return [f'qlora-pl generate {flag} --prompt "{QUESTION}" --max-new-tokens 64']
