"""Runs that stop themselves: numbers that are none, and adapters that learn nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS, save_base
from lightning.pytorch import Callback, Trainer
from module_runs import Recorder, fit
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_pl.modeling.steps.loss as loss_module
from qlora_pl.errors import TrainingStoppedError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose embedding of '~' is not a number, and rows of which the 14th holds one."""
    folder = tmp_path_factory.mktemp("poisoned")
    base = save_base(folder / "base")
    rows = [dict(row) for row in ROWS]
    rows[13]["response"] += " ~"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    vocabulary = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    tensors = load_file(base / "model.safetensors")
    for token in ("~", "Ġ~"):
        if token in vocabulary:
            tensors["model.embed_tokens.weight"][vocabulary[token]] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base, folder / "rows.jsonl"


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_step_and_row(poisoned):
    base, rows = poisoned
    recorder = Recorder()
    with pytest.raises(TrainingStoppedError) as caught:
        fit(base, rows, recorder, batch_size=1, accumulation=4, data={"val_size": 0})
    number = len(recorder.steps) + 1
    message = str(caught.value)
    assert message.startswith(f"Step {number}: the loss is nan, with {rows}, row 14;")
    assert message.count("row 1") == 1
    assert "last good checkpoint is none yet" in message


def test_nothing_is_updated_in_the_step_that_stops_the_run(poisoned):
    base, rows = poisoned
    recorder, modules = Recorder(), []

    class Keep(Callback):
        def on_fit_start(self, trainer: Trainer, module: Any) -> None:
            modules.append(module)

    with pytest.raises(TrainingStoppedError):
        fit(base, rows, recorder, Keep(), data={"val_size": 0, "group_by_length": False})
    expected = recorder.adapters[-1] if recorder.adapters else recorder.start
    for name, parameter in modules[0].trained_tensors().items():
        assert torch.equal(parameter, expected[name])


def test_rows_of_one_micro_batch_are_all_named(poisoned):
    base, rows = poisoned
    with pytest.raises(TrainingStoppedError, match=r"row 14\b") as caught:
        fit(base, rows, batch_size=4, accumulation=2, data={"val_size": 0})
    assert str(caught.value).count(f"{rows}, row") == 4


class Interfere(Callback):
    """Calls a function with the trained model when training starts."""

    def __init__(self, change: Callable[[nn.Module], Any]) -> None:
        self.change = change

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.change(module.model)


V_PROJ = "base_model.model.model.layers.1.self_attn.v_proj"


def test_a_gradient_that_is_not_finite_stops_the_run(tiny_base, rows_file):
    def change(model: nn.Module) -> None:
        parameter = model.get_parameter(f"{V_PROJ}.lora_B.default.weight")
        parameter.register_hook(lambda gradient: gradient + float("inf"))

    with pytest.raises(TrainingStoppedError, match="Step 1: the gradient's norm is inf, with"):
        fit(tiny_base, rows_file, Interfere(change))


def test_a_loss_of_exactly_zero_stops_the_run_before_its_silence_is_blamed_on_adapters(
    tiny_base, rows_file, monkeypatch
):
    monkeypatch.setattr(loss_module, "token_losses", lambda logits, labels: 0 * logits.sum(dim=1))
    with pytest.raises(TrainingStoppedError, match="Step 1: the loss is exactly 0, with"):
        fit(tiny_base, rows_file)


@pytest.mark.parametrize("how", ["detached", "zeroed"])
def test_an_adapter_without_a_gradient_is_named_at_step_1(tiny_base, rows_file, how):
    def change(model: nn.Module) -> None:
        module = model.get_submodule(f"{V_PROJ}.lora_B.default")
        if how == "detached":
            module.register_forward_hook(lambda _, x, y: y.detach())
        else:
            module.weight.register_hook(torch.zeros_like)

    with pytest.raises(TrainingStoppedError) as caught:
        fit(tiny_base, rows_file, Interfere(change))
    assert str(caught.value).startswith(
        f"Step 1: 1 adapters received no gradient ('model.{V_PROJ}.lora_B.default.weight' is one)"
    )
