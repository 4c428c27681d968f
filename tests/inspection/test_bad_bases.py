"""Bases, rows and flags that `inspect model` cannot measure: each is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import save_base
from safetensors.torch import load_file, save_file
from trained import adapter, other_base, run, type_in
from transformers import AutoModelForCausalLM

__all__ = ["adapter", "other_base", "run", "type_in"]
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process

Type = Callable[..., tuple[int, str, str]]


def test_a_checkpoint_of_nan_is_refused_with_its_tensors(
    type_in: Type, tmp_path: Path, rows_file: Path
) -> None:
    base = save_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, :5] = float("nan")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    code, out, said = type_in("inspect", "model", "--model", base)
    assert (code, out) == (2, "")
    assert "model.layers.0.mlp.up_proj.weight (5 of 8,192)" in said
    assert "model.norm.weight (1 of 64)" in said
    assert "in 2 tensors" in said
    assert not Path("inspect-model").exists()
    code, out, said = type_in("inspect", "model", "--model", base, "--data", rows_file)
    assert (code, out) == (2, "")
    assert "NaN or infinite" in said


def test_a_checkpoint_of_nothing_but_nan_is_refused(type_in: Type, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    for weight in weights.values():
        weight.fill_(float("nan"))
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    code, out, said = type_in("inspect", "model", "--model", base)
    assert (code, out) == (2, "")
    assert f"in {len(weights)} tensors: model.embed_tokens.weight (32,768 of 32,768), " in said
    assert f" and {len(weights) - 5} more; such a base trains nothing" in said


def test_a_base_that_is_quantised_already_is_refused(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "packed")
    code, out, said = type_in("inspect", "model", "--model", tmp_path / "packed")
    assert (code, out) == (2, "")
    assert "is quantised already (nf4 with double quantisation, 14 matrices)" in said
    assert "name the model in 16 bits" in said


def test_an_adapter_of_another_base_is_refused(
    type_in: Type, adapter: Path, other_base: Path, tmp_path: Path
) -> None:
    """With held-out rows to ask or without."""
    lone = tmp_path / "lone"
    shutil.copytree(adapter, lone)
    manifest = json.loads((lone / "manifest.json").read_text())
    del manifest["files"]["held_out.safetensors"]
    (lone / "manifest.json").write_text(json.dumps(manifest))
    (lone / "held_out.safetensors").unlink()
    for folder in (adapter, lone):
        words = ("--adapter", folder, "--base", other_base, "--logits", "none")
        code, out, said = type_in("inspect", "model", *words)
        assert (code, out) == (2, "")
        assert "trained over other weights" in said


def test_mistakes_of_an_adapters_base_are_told_by_the_flag_that_names_it(
    type_in: Type, adapter: Path
) -> None:
    words = ("--adapter", adapter, "--base", "./nowhere")
    code, out, said = type_in("inspect", "model", *words)
    assert (code, out) == (2, "")
    assert "--base: no folder './nowhere'." in said


def test_a_folder_without_weights_is_refused(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    (base / "model.safetensors").unlink()
    code, out, said = type_in("inspect", "model", "--model", base)
    assert (code, out) == (2, "")
    assert f"--model: '{base}' cannot be loaded: it has no model.safetensors." in said


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "--model: name a model, or an adapter with --adapter."),
    "no folder": (("--model", "./nowhere"), "--model: no folder './nowhere'."),
    "no model": (("--model", "EMPTY"), "is not a model folder; it has no config.json."),
    "no data": (("--model", "BASE", "--data", "no.jsonl"), "--data: no file 'no.jsonl'"),
    "bad data": (("--model", "BASE", "--data", "EMPTY/bad.jsonl"), "bad.jsonl"),
    "kind": (("--model", "BASE", "--kinds", "nf5"), "--kinds: invalid choice: 'nf5'"),
    "flag": (("--model", "BASE", "--kind", "nf4"), "did you mean '--kinds'?"),
    "tokens": (("--model", "BASE", "--tokens", "0"), "--tokens: must be at least 1, got 0."),
    "block": (
        ("--model", "BASE", "--kinds", "nf4", "--block-sizes", "4096"),
        "--block-sizes: no matrix can be kept as nf4 4096 DQ",
    ),
    "skipped": (
        ("--model", "BASE", "--skip-modules", "q_prj"),
        "--skip-modules: no weight matrix belongs to q_prj",
    ),
    "output": (("--model", "BASE", "--output", "no/there"), "--output: no folder 'no'; make it"),
    "file": (("--model", "BASE", "--output", "EMPTY/bad.jsonl"), "is a file; name a folder."),
    "adapter": (("--adapter", "EMPTY"), "holds no adapter"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    name: str, type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "bad.jsonl").write_text("{not json\n")
    words, sentence = BAD[name]
    words = tuple(w.replace("BASE", str(tiny_base)).replace("EMPTY", str(empty)) for w in words)
    code, out, said = type_in("inspect", "model", *words)
    assert (code, out) == (2, "")
    assert sentence in said
    assert "Traceback" not in said


def test_a_missing_weight_is_no_number_out_of_thin_air(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    code, _, said = type_in("inspect", "model", "--model", base)
    assert code == 2
    assert "does not hold 1 of the weights" in said
