"""``qlora-pl export --to vllm``: what vLLM is given. vLLM itself is not run here.

Source of its rules: vllm/config/lora.py and vllm/lora/peft_helper.py of its releases.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig

from qlora_pl.errors import ConfigurationError
from qlora_pl.exporting.vllm import allowed_rank

Type = Callable[..., tuple[int, str, str]]

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), (16, 16), (17, 32), (257, 320), (512, 512)]
)
def test_a_rank_is_rounded_up_to_one_that_vllm_takes(rank: int, allowed: int):
    assert allowed_rank(rank) == allowed


def test_a_rank_above_the_largest_is_refused():
    with pytest.raises(ConfigurationError, match="rank 513, and vLLM takes up to 512"):
        allowed_rank(513)


@pytest.fixture
def served(type_in: Type, adapter: Path) -> tuple[str, list[list[str]]]:
    """What an export of the adapter says, and the commands in it, word by word."""
    code, out, said = type_in(
        *("export", "--adapter", adapter, "--to", "vllm", "--output", "served"),
        *("--score-tokens", "40"),
    )
    assert code == 0, said
    lines = [line.strip() for line in out.splitlines()]
    return out, [shlex.split(line) for line in lines if line.startswith("vllm serve ")]


def test_an_adapter_is_served_over_16_and_over_4_bits(
    served: tuple[str, list[list[str]]], tiny_base: Path
):
    out, (whole, packed) = served
    assert whole == [
        *("vllm", "serve", str(tiny_base), "--tokenizer", "served/tokenizer"),
        *("--enable-lora", "--lora-modules", "adapter=served/adapter", "--max-lora-rank", "8"),
        *("--chat-template", "served/tokenizer/chat_template.jinja"),
        *("--generation-config", "served/generation", "--max-model-len", "256"),
        *("--dtype", "bfloat16"),
    ]
    assert packed == [*whole, "--quantization", "bitsandbytes"]
    assert "vLLM itself was not run for this" in out
    assert "nats a token (KL)" in out, "how far 16 bits are from what was trained"
    assert "Prompts are those of training, token for token, by the chat template" in out


def test_the_files_are_those_that_the_command_names(
    served: tuple[str, list[list[str]]], adapter: Path
):
    mine = load_file("served/adapter/adapter_model.safetensors")
    theirs = load_file(adapter / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name].float()) for name in mine)
    config = json.loads(Path("served/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 64.0, False)
    tokenizer = AutoTokenizer.from_pretrained("served/tokenizer")
    asked = [{"role": "user", "content": "How many legs?"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == "<s>### Human: How many legs?### Assistant:"
    assert Path("served/tokenizer/chat_template.jinja").read_text() == tokenizer.chat_template
    generation = GenerationConfig.from_pretrained("served/generation").to_diff_dict()
    assert generation["eos_token_id"] == [2]
    assert (generation["temperature"], generation["max_new_tokens"]) == (0.0, 256)


def test_a_model_alone_is_served_as_it_is(type_in: Type, tiny_base: Path):
    code, out, said = type_in("export", "--model", tiny_base, "--to", "vllm", "--output", "served")
    assert code == 0, said
    (line,) = [line for line in out.splitlines() if line.startswith("    vllm serve ")]
    assert shlex.split(line)[2] == str(tiny_base)
    assert "--enable-lora" not in line
    assert not Path("served/adapter").exists()


@pytest.mark.parametrize("target", ["vllm", "ollama", "gguf"])
def test_a_folder_that_is_no_model_is_refused(type_in: Type, tmp_path: Path, target: str):
    code, out, said = type_in("export", "--model", tmp_path, "--to", target, "--output", "served")
    assert (code, out) == (2, "")
    assert "is not a model folder; it has no config.json" in said
    assert not list(Path().iterdir())


@pytest.mark.parametrize("target", ["vllm", "ollama", "gguf"])
def test_an_encoder_decoder_model_is_refused(
    type_in: Type, saved: Callable[[str], Path], target: str
):
    code, out, said = type_in(
        "export", "--model", saved("T5"), "--to", target, "--output", "served"
    )
    assert (code, out) == (2, "")
    assert "is an encoder-decoder model" in said
    assert not list(Path().iterdir())
