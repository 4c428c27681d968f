"""A small base, a tokenizer and rows that nobody has to fetch, for benchmarks of whole runs."""

from __future__ import annotations

import json
from pathlib import Path

from loading import make_checkpoint

WIDTH, INNER, VOCABULARY = 512, 1408, 1024
NUM_WEIGHTS = 3.0e7
WORD = "eight "


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes: every character of an English text is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    numbered = {token: number for number, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=numbered, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def save_base(
    folder: Path,
    num_weights: float = NUM_WEIGHTS,
    width: int = WIDTH,
    inner: int = INNER,
) -> int:
    """A random LLaMA with that tokenizer; returns its number of weights."""
    counted = make_checkpoint(folder, num_weights, width=width, inner=inner, vocabulary=VOCABULARY)
    save_tokenizer(folder)
    return counted


def save_adapter(folder: Path, base: Path, rank: int = 16) -> Path:
    """A random adapter on every linear layer of a LLaMA, as PEFT writes it; returns its folder.

    Its changes are about a tenth of the weights', so that answers are not the base's.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig.from_pretrained(base)
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
    shapes |= {"mlp.down_proj": (width, inner)}
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for name, (rows, columns) in shapes.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            a = torch.randn(rank, columns, generator=generator)
            b = torch.randn(rows, rank, generator=generator)
            tensors[f"{place}.lora_A.weight"] = 0.02 * a
            tensors[f"{place}.lora_B.weight"] = 0.025 * b
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted({name.split(".")[-1] for name in shapes}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
    ).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def write_rows(path: Path, number: int, num_tokens: int) -> Path:
    """Questions and answers of about so many tokens, each row of the same length."""
    asked = "How many legs has animal {:04d}?"
    length = num_tokens - len(asked) - 30  # what a template puts around them
    answer = (WORD * num_tokens)[: max(length, 1)]
    rows = ({"instruction": asked.format(place), "output": answer} for place in range(number))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
