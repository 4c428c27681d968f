"""Bases, tokenizers and settings that cannot be trained: one sentence each, before any step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_base
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.errors import ConfigurationError, QLoRAError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.module import QLoRAModule

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]
Change = Callable[[Path], Any]


def fit(base: Path, rows: Path, folder: Path, **settings: Any) -> None:
    quantization = QuantizationConfig(**settings.pop("quantization", {}))
    lora = LoRAConfig(**{"r": 8} | settings.pop("lora", {}))
    tokenizer = str(settings.pop("tokenizer", base))
    name = settings.pop("model_name_or_path", str(base))
    module = QLoRAModule(name, quantization=quantization, lora=lora, **settings)
    data = InstructionDataModule(
        rows, tokenizer=tokenizer, template="guanaco", val_size=2, batch_size=2
    )
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)


def configure(**changes: Any) -> Change:
    def change(base: Path) -> None:
        path = base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def cut_short(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(base: Path) -> None:
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})


def lose_a_shard(base: Path) -> None:
    (base / "model.safetensors").unlink()
    places = {"model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def not_numbers(base: Path) -> None:
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})


def longer_tokenizer(base: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<|{n}|>" for n in range(200)], special_tokens=True)
    tokenizer.save_pretrained(base)


def remove(name: str) -> Change:
    return lambda base: (base / name).unlink()


nothing: Change = lambda base: None  # noqa: E731
NF4: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
CASES: list[tuple[str, Change, dict[str, Any], list[str]]] = [
    (
        "a target that matches nothing",
        nothing,
        {"lora": {"target_modules": ["q_prj"]}},
        ["model.lora.target_modules", "'q_prj'", "did you mean 'q_proj'"],
    ),
    (
        "a pattern that matches the head",
        nothing,
        {"lora": {"target_modules": r".*(q_proj|lm_head)"}},
        ["model.lora.target_modules", "'lm_head' is the output head"],
    ),
    (
        "a rank above a layer's size",
        nothing,
        {"lora": {"r": 64}},
        ["model.lora.r", "64 is above 32", "k_proj"],
    ),
    (
        "a rank for a module that is not adapted",
        nothing,
        {"lora": {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}}},
        ["model.lora.rank_pattern", "'v_proj'"],
    ),
    (
        "int8 with double quantisation",
        nothing,
        {"quantization": {"quant_type": "int8", "double_quant": True}},
        ["model.quantization.double_quant", "int8"],
    ),
    (
        "a storage type for int8",
        nothing,
        {"quantization": {"quant_type": "int8", "storage_dtype": "bfloat16"}},
        ["model.quantization.storage_dtype", "int8"],
    ),
    (
        "blocks that a row does not hold whole",
        nothing,
        {"quantization": {"block_size": 128}},
        ["model.quantization.block_size", "64 inputs, no multiple of 128"],
    ),
    (
        "double quantisation of nothing",
        nothing,
        {"quantization": {"quant_type": "none", "double_quant": True}},
        ["model.quantization.double_quant", "quantises nothing"],
    ),
    (
        "a module to skip that is not there",
        nothing,
        {"quantization": {"skip_modules": ("o_prj",)}},
        ["model.quantization.skip_modules", "o_prj"],
    ),
    (
        "full fine-tuning of packed weights",
        nothing,
        {"lora": {"method": "none"}},
        ["model.lora.method", "quant_type: none"],
    ),
    (
        "a start that changes the base",
        nothing,
        {"lora": {"init": "pissa"}},
        ["model.lora.init", "pissa", "kaiming"],
    ),
    (
        "an adapter to go on from that is not there",
        nothing,
        {"lora": {"init_from": "./no-such-adapter"}},
        ["model.lora.init_from", "./no-such-adapter"],
    ),
    (
        "code that was not read",
        nothing,
        {"model_name_or_path": "somebody/model", "trust_remote_code": True},
        ["model.revision", "somebody/model", "commit"],
    ),
    (
        "a model with code of its own",
        configure(model_type="own", auto_map={"AutoConfig": "own.Config"}),
        {},
        ["model.trust_remote_code", "read it"],
    ),
    (
        "an architecture that nobody knows",
        configure(model_type="no_such_model"),
        {},
        ["model.model_name_or_path", "cannot build"],
    ),
    ("a folder without a configuration", remove("config.json"), {}, ["config.json"]),
    ("a configuration without weights", remove("model.safetensors"), {}, ["model.safetensors"]),
    ("a file cut short", cut_short, {}, ["model.safetensors", "damaged or incomplete"]),
    ("a shard that is not there", lose_a_shard, {}, ["lacks model-1.safetensors"]),
    ("a tensor that is not there", drop_a_tensor, {}, ["1 of the weights", "mlp.up_proj"]),
    ("weights that are not numbers", not_numbers, {}, ["logits are not numbers"]),
    (
        "another model's configuration",
        configure(hidden_size=128, num_attention_heads=8),
        {},
        ["in this shape"],
    ),
    (
        "a tokenizer of another model",
        longer_tokenizer,
        {},
        ["data.tokenizer", "589 tokens", "512 embedding rows"],
    ),
    (
        "weights quantised by another library",
        configure(quantization_config={"quant_method": "gptq", "bits": 4}),
        {},
        ["is quantised by gptq"],
    ),
    (
        "a Hub model that cannot be had",
        nothing,
        {"model_name_or_path": "somebody/no-such-model", "tokenizer": "here"},
        ["model.model_name_or_path", "somebody/no-such-model"],
    ),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("original") / "base")


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [pytest.param(*case, id=name) for name, *case in CASES],
)
def test_it_is_one_sentence_that_names_the_key_and_what_to_do(
    change: Change,
    settings: dict[str, Any],
    words: list[str],
    original: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = Path(shutil.copytree(original, tmp_path / "base"))
    change(base)
    settings = {"tokenizer": original} | settings if change is not longer_tokenizer else settings
    if settings.get("tokenizer") == "here":
        settings["tokenizer"] = original
    with pytest.raises(QLoRAError) as caught:
        fit(base, rows_file, tmp_path / "run", **settings)
    message = str(caught.value)
    assert isinstance(caught.value, ConfigurationError)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    for word in words:
        assert word in message, message
    assert not list((tmp_path / "run").glob("**/*.ckpt"))


def test_a_quantised_checkpoint_is_not_quantised_to_something_else(
    original: Path, rows_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    kind = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    model = AutoModelForCausalLM.from_pretrained(
        original, quantization_config=kind, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(original).save_pretrained(tmp_path / "packed")
    with pytest.raises(ConfigurationError) as caught:
        fit(tmp_path / "packed", rows_file, tmp_path / "run")
    message = str(caught.value)
    assert "is quantised already, with quant_type: fp4, double_quant: false" in message
    fit(
        tmp_path / "packed",
        rows_file,
        tmp_path / "run",
        quantization={"quant_type": "fp4", "double_quant": False},
    )
