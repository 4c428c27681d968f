"""Adapters and bases that `inspect adapter` cannot hold together: each is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import save_base
from families import Saver
from peft_folders import Type, change, numbers_of, save_adapter
from trained import adapter, other_base, run, type_in

__all__ = ["adapter", "other_base", "run", "type_in"]
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


def test_another_base_is_refused(type_in: Type, adapter: Path, other_base: Path) -> None:
    code, out, said = type_in("inspect", "adapter", "--adapter", adapter, "--base", other_base)
    assert (code, out) == (2, "")
    assert "trained over other weights" in said


def test_a_base_of_other_shapes_is_refused(
    type_in: Type, tiny_base: Path, saved: Saver, tmp_path: Path
) -> None:
    """Of an adapter that nobody says the weights of, shapes and names are all that is known."""
    save_adapter(tmp_path / "adapter", tiny_base)
    wide = save_base(tmp_path / "wide", intermediate_size=192)
    for base, sentence in (
        (saved("GPT-2"), "--base: there is no 'model.layers.0.mlp.down_proj' in it"),
        (wide, "--base: 'model.layers.0.mlp.down_proj' is (64, 192) there, and the adapter's"),
    ):
        words = ("--adapter", tmp_path / "adapter", "--base", base)
        code, out, said = type_in("inspect", "adapter", *words)
        assert (code, out) == (2, "")
        assert sentence in said


def test_whether_a_base_of_the_same_shapes_is_the_right_one_is_not_known(
    type_in: Type, tiny_base: Path, other_base: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "adapter", tiny_base)
    words = ("--adapter", tmp_path / "adapter", "--base", other_base)
    (note,) = numbers_of(type_in, *words)["notes"]
    assert "No file says over which weights it was trained" in note


def test_beside_a_base_in_4_bits_shares_are_left_out(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=config, device_map={"": "cpu"}
    ).save_pretrained(tmp_path / "packed")
    save_adapter(tmp_path / "adapter", tiny_base)
    words = ("--adapter", tmp_path / "adapter", "--base", tmp_path / "packed")
    found = numbers_of(type_in, *words)
    assert {p["share"] for p in found["pairs"]} == {None}
    assert "is stored in 4 or 8 bits; name the base in 16 bits with --base." in found["notes"][0]


def test_half_a_pair_is_refused(type_in: Type, tiny_base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", tiny_base)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    change(tmp_path / "adapter", lambda tensors: tensors.__delitem__(name))
    code, _, said = type_in("inspect", "adapter", "--adapter", tmp_path / "adapter")
    assert code == 2
    assert f"lacks '{name}'" in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "--adapter: name an adapter folder."),
        (("--adapter", "./nowhere"), "--adapter: no folder './nowhere'."),
        (("--adapter", "BASE"), "holds no adapter (no adapter_config.json)."),
        (("--adapter", "ADAPTER", "--against", "BASE"), "--against:"),
        (("--adapter", "ADAPTER", "--output", "no/there"), "--output: no folder 'no'"),
        (("--adapter", "ADAPTER", "--base", "./nowhere"), "--base: no folder './nowhere'."),
        (("--adapter", "ADAPTER", "--base", "ADAPTER"), "--base: 'ADAPTER' is not a model folder"),
        (("--adaptor", "ADAPTER"), "did you mean '--adapter'?"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    words: tuple[str, ...], sentence: str, type_in: Type, adapter: Path, tiny_base: Path
) -> None:
    typed = [w.replace("BASE", str(tiny_base)).replace("ADAPTER", str(adapter)) for w in words]
    code, out, said = type_in("inspect", "adapter", *typed)
    assert (code, out) == (2, "")
    assert sentence.replace("ADAPTER", str(adapter)) in said


def test_experts_that_are_no_matrices_are_refused(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "adapter", tiny_base)
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"target_parameters": ["experts.up"]})
    )
    code, _, said = type_in("inspect", "adapter", "--adapter", tmp_path / "adapter")
    assert code == 2
    assert "no matrices (target_parameters" in said
