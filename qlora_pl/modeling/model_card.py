"""README.md of an adapter folder, as model hubs show it: what it is, and lines that load it.

The lines are for plain transformers and PEFT, and give the very model that was trained: its base in
its quantisation and types. What plain programs do differently without a word is said, and undone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_pl.modeling.quantization import BLOCK_SIZE

if TYPE_CHECKING:
    from qlora_pl.modeling.adapter_folder import AdapterManifest


def model_card(manifest: AdapterManifest) -> str:
    """The whole page."""
    base, lora = manifest.base["name"], manifest.lora
    scale = ", rank-stabilised scale" if lora["use_rslora"] else ""
    kind = "DoRA" if lora["method"] == "dora" else "LoRA"
    some = ", others in some modules" if lora["rank_pattern"] or lora["alpha_pattern"] else ""
    biases = {
        "none": "",
        "lora_only": ", biases of adapted layers trained too",
        "all": ", every bias trained too",
    }
    return f"""---
base_model: {base}
library_name: peft
tags: [lora, qlora, qlora-pl]
---

# {kind} adapter for {base}

Trained for {manifest.step:,} optimizer steps on {trained_rows(manifest)}, over
the base in {_precision(manifest)}.
Rank {lora["r"]}, alpha {lora["alpha"]:g}{some}{scale}{biases[lora["bias"]]}, dropout {
        lora["dropout"]:g}; prompt template
`{
        manifest.template
    }`. `run.yaml` is the whole configuration; `manifest.json` holds the fingerprint of
the base and the digest of every file here.
{_warnings(manifest)}
{_loading(manifest)}
"""


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


def _warnings(manifest: AdapterManifest) -> str:
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
    return "".join(f"\n{paragraph}\n" for paragraph in paragraphs)


def _loading(manifest: AdapterManifest) -> str:
    base = manifest.base["name"]
    config, size = manifest.quantization_config, manifest.vocabulary_size
    lines = ["import json", "from pathlib import Path"]
    for name in manifest.quantization["replaced_classes"]:
        module, _, kind = name.rpartition(".")
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
    lines += [
        f"base = {manifest.auto_class}.from_pretrained(",
        f'    {base!r}, dtype="{manifest.quantization["unquantized_dtype"]}",',
    ]
    if manifest.base["revision"] is not None:
        lines.append(f"    revision={manifest.base['revision']!r},")
    if config is not None:
        lines.append('    quantization_config=quantization, device_map={"": 0},')
    lines += [
        ")",
        *([f"base.resize_token_embeddings({size})  # rows of its new tokens"] if size else []),
        "model = PeftModel.from_pretrained(base, folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    return "\n".join(f"    {line}".rstrip() for line in lines)
