"""An adapter folder is a plain PEFT folder: other programs load it, and it is whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from cards import blocks
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor, nn

from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.errors import AdapterFolderError, TrainingStoppedError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.folders.adapter_folder import (
    AdapterManifest,
    companion_files,
    model_card,
    read_adapter_folder,
    read_adapter_tensors,
    write_adapter_folder,
)
from qlora_pl.modeling.loading.base_loading import keep_gradients_on_cpu
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.modeling.parameters import adapter_tensors
from qlora_pl.training.checkpoints.adapter_save import held_out_rows, make_manifest

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]

IDS = torch.arange(5, 37).reshape(2, 16)


def train(base: Path, rows: Path, quantization: QuantizationConfig) -> QLoRAModule:
    """Nine steps, after which the adapters say something else than the base."""
    seed_everything(7)
    module = QLoRAModule(
        str(base),
        quantization=quantization,
        lora=LoRAConfig(r=4, dropout=0.1),
        optimizer=OptimizerConfig(lr=1e-2),
    )
    trainer = Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        use_distributed_sampler=False,
    )
    trainer.fit(module, InstructionDataModule(rows, val_size=4, batch_size=2))
    return module


@pytest.fixture(scope="module")
def trained(tiny_base: Path, rows_file: Path) -> QLoRAModule:
    """From packed weights, whose folder must not pass for the base anywhere."""
    for _ in range(2):
        module = train(tiny_base, rows_file, QuantizationConfig(compute_dtype="float32"))
    assert module.base.is_from_cache
    return module


def write(module: QLoRAModule, folder: Path, tokenizer: Any = "own") -> dict[str, Tensor]:
    data = module.trainer.datamodule
    manifest, tensors = make_manifest(module, data, step=9), adapter_tensors(module.model)
    used = data.tokenizer if tokenizer == "own" else tokenizer
    companions = companion_files(module.model, used, manifest)
    held_out = held_out_rows(data)
    write_adapter_folder(folder, tensors, companions, manifest, "model: {}\n", held_out)
    return tensors


@pytest.fixture
def folder(trained: QLoRAModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A written folder, seen from another working directory."""
    write(trained, tmp_path / "run" / "adapter")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "run" / "adapter"


def logits(model: nn.Module) -> Tensor:
    was_training = model.training
    with torch.no_grad():
        output = model.eval()(input_ids=IDS).logits
    model.train(was_training)
    return output


# --- other programs -------------------------------------------------------------------------------


def load_in_4_bits(folder: Path) -> nn.Module:
    """By the manifest alone: transformers and PEFT, nothing of ours."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    manifest = json.loads((folder / "manifest.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(
        manifest["base"]["name"],
        quantization_config=BitsAndBytesConfig(**manifest["quantization_config"]),
        device_map={"": "cpu"},
        dtype=getattr(torch, manifest["quantization"]["compute_dtype"]),
    )
    model = peft.PeftModel.from_pretrained(base, folder)
    keep_gradients_on_cpu(model)  # bitsandbytes' inference kernel rounds otherwise
    return model


def test_plain_peft_in_4_bits_gives_the_trained_models_logits(trained, folder):
    """Equal in every bit, in float32: the same packed weights and the same products."""
    model = load_in_4_bits(folder)
    assert torch.equal(logits(model), logits(trained.model))
    with model.disable_adapter(), trained.model.disable_adapter():
        off = logits(model)
        assert torch.equal(off, logits(trained.model))
    assert (off - logits(model)).abs().max() > 0.1


def test_plain_peft_in_4_bits_and_bf16_agrees_as_far_as_bf16_does(tiny_base, rows_file, tmp_path):
    """PEFT multiplies float32 adapters in float32, we in bf16: the adapters' products are rounded.

    2**-6 of the logits' norm: about four bf16 roundings of 2**-8 (two products in each of two
    layers) add up; the adapters themselves move the logits by more than 0.2 of it.
    """
    module = train(tiny_base, rows_file, QuantizationConfig(compute_dtype="bfloat16"))
    write(module, tmp_path / "adapter")
    model = load_in_4_bits(tmp_path / "adapter")
    ours, theirs = logits(module.model).float(), logits(model).float()
    with model.disable_adapter():
        off = logits(model).float()
    assert (ours - theirs).norm() < 2**-6 * theirs.norm()
    assert (ours - off).norm() > 0.2 * theirs.norm()


def test_plain_peft_loads_the_folder_over_the_base_in_16_bits(trained, folder):
    """Source: W x + (alpha / r) B A x, with the weights of the base's file and of the folder."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(trained.model_name_or_path, dtype=torch.bfloat16)
    by_hand = AutoModelForCausalLM.from_pretrained(trained.model_name_or_path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder)
    on = logits(model)
    with model.disable_adapter():
        off = logits(model)
    assert (on - off).abs().max() > 0.1
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, a in tensors.items():
            if "lora_A" in name:
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = tensors[name.replace("lora_A", "lora_B")]
                by_hand.get_submodule(module).weight += 16 / 4 * b @ a
    # 0.03 of the logits' norm: bf16 against float32 through two layers; the adapters' part is 0.3
    assert (on.float() - logits(by_hand)).norm() < 0.03 * on.float().norm()


def test_the_lines_of_the_readme_run_as_they_stand(trained, folder, monkeypatch):
    code = blocks(folder, "python")[0]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    tokenizer = trained.trainer.datamodule.tokenizer
    assert names["tokenizer"]("How many legs?") == tokenizer("How many legs?")
    keep_gradients_on_cpu(names["model"])
    # 0.03 of the logits' norm: the README lets the base's other tensors be bf16, as on disk
    expected = logits(trained.model)
    assert (logits(names["model"]).float() - expected).norm() < 0.03 * expected.norm()


def test_the_adapters_configuration_names_the_base_and_not_the_cache(trained, folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == trained.model_name_or_path
    assert config["inference_mode"] is True
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 16.0, "LORA")
    live = trained.model.peft_config["default"]
    assert live.inference_mode is False


# --- what is in it --------------------------------------------------------------------------------


def test_the_manifest_holds_every_other_file_with_its_sha256(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {path.name: path for path in folder.iterdir() if path.name != "manifest.json"}
    assert manifest["files"].keys() == files.keys()
    for name, path in files.items():
        assert manifest["files"][name] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files.keys()
    assert {"run.yaml", "README.md", "held_out.safetensors"} <= files.keys()


def test_the_tensors_read_back_are_the_trained_ones(trained, folder):
    read, live = read_adapter_tensors(folder), adapter_tensors(trained.model)
    assert read.keys() == live.keys()
    assert len(read) == 28
    for name, tensor in live.items():
        assert read[name].dtype == tensor.dtype == torch.float32
        assert torch.equal(read[name], tensor)


def test_the_manifest_reads_back_as_it_was_made(trained, folder):
    made = make_manifest(trained, trained.trainer.datamodule, step=9)
    read = read_adapter_folder(folder)
    assert read.step == 9
    assert read.base["weights"] == trained.identity.weights
    assert json.loads(json.dumps(vars(made) | {"files": read.files})) == vars(read)


def test_held_out_rows_are_the_encoded_validation_rows(trained, folder):
    rows = trained.trainer.datamodule.splits["val"].rows.compact()
    held_out = {n: t.numpy() for n, t in load_file(folder / "held_out.safetensors").items()}
    assert np.array_equal(held_out["input_ids"], rows.input_ids)
    assert np.array_equal(held_out["is_trained"], rows.is_trained)
    assert np.array_equal(held_out["starts"], [*rows.starts, len(rows.input_ids)])


def test_an_unquantised_run_names_no_quantisation(tiny_base, rows_file, tmp_path):
    quantization = QuantizationConfig(quant_type="none", compute_dtype="float32")
    module = train(tiny_base, rows_file, quantization)
    write(module, tmp_path / "adapter")
    manifest = read_adapter_folder(tmp_path / "adapter")
    assert manifest.quantization_config is None
    assert "BitsAndBytesConfig(" not in model_card(manifest)
    assert "the base in float32." in model_card(manifest)


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_further_chat_templates_and_no_tokenizer_at_all_are_written(
    trained, tmp_path, has_tokenizer
):
    """The tokenizer puts templates besides the first into a folder of their own."""
    from transformers import AutoTokenizer

    tokenizer = None
    if has_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(trained.model_name_or_path)
        tokenizer.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    write(trained, tmp_path / "adapter", tokenizer)
    files = read_adapter_folder(tmp_path / "adapter").files
    assert ("additional_chat_templates/rag.jinja" in files) is has_tokenizer
    if has_tokenizer:
        read = AutoTokenizer.from_pretrained(tmp_path / "adapter")
        assert read.chat_template == tokenizer.chat_template
    else:
        assert not any("tokenizer" in name for name in files)


# --- whole or refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["altered", "missing"])
def test_any_file_that_is_altered_or_missing_is_named(folder, tmp_path, how):
    names = read_adapter_folder(folder).files
    for name in names:
        copy = shutil.copytree(folder, tmp_path / name)
        path = Path(copy) / name
        if how == "missing":
            path.unlink()
            words = rf"lacks {name}, which its manifest names"
        else:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
            words = rf"'{path}' was altered since it was written"
        with pytest.raises(AdapterFolderError, match=words):
            read_adapter_folder(Path(copy))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "it has no manifest.json"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"base": {}}', "cannot be read"),
    ],
)
def test_a_folder_without_a_manifest_is_one_sentence(folder, text, words):
    path = folder / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(AdapterFolderError, match=words) as caught:
        read_adapter_folder(folder)
    assert "\n" not in str(caught.value)


def test_a_manifest_of_a_later_format_is_refused(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(AdapterFolderError, match="format 2"):
        read_adapter_folder(folder)


def test_a_folder_is_never_overwritten(trained, folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(TrainingStoppedError, match=f"'{folder}' exists already"):
        write(trained, folder)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("number", [1, 4, 8])
def test_a_disk_that_fills_up_half_way_is_named_and_nothing_is_left_behind(
    trained, tmp_path, monkeypatch, number
):
    calls: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    folder = tmp_path / "run" / "adapter"
    with pytest.raises(TrainingStoppedError, match=f"The disk is full: '{folder}' was not written"):
        write(trained, folder)
    assert list((tmp_path / "run").iterdir()) == []
    write(trained, folder)
    read_adapter_folder(folder)


@pytest.mark.parametrize("size", [1_000, 10_000])
def test_a_temporary_folder_that_is_full_is_named(trained, tmp_path, size):
    """PEFT and the tokenizer write theirs through one; the kernel's own EFBIG (RLIMIT_FSIZE).

    At 10,000 bytes it is tokenizer.json that does not fit, which is written outside Python.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(TrainingStoppedError) as caught:
            write(trained, tmp_path / "run" / "adapter")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert f"could not be written to '{tempfile.gettempdir()}'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_model_card_says_what_the_adapter_is(trained):
    manifest = make_manifest(trained, trained.trainer.datamodule, step=1234)
    card = model_card(manifest)
    assert f"# LoRA adapter for {Path(trained.model_name_or_path).name}\n" in card
    assert trained.model_name_or_path not in card
    assert "1,234 optimizer steps on 18 rows" in card
    assert "nf4 with double quantisation" in card
    assert "Rank 4, alpha 16, dropout 0.1" in card
    assert isinstance(manifest, AdapterManifest)
