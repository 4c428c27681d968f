"""What a checkpoint holds, and which runs may load it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from module_runs import fit, make_data, make_module, make_trainer

from qlora_pl.errors import CheckpointError
from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]


@pytest.fixture(scope="module")
def trained(
    tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[QLoRAModule, Path]:
    """A module after one epoch, and the checkpoint that Lightning saves of it."""
    module, _ = fit(tiny_base, rows_file, optimizer=OptimizerConfig(lr=1e-2))
    path = tmp_path_factory.mktemp("checkpoint") / "x.ckpt"
    module.trainer.save_checkpoint(path)
    return module, path


def test_a_checkpoint_holds_trained_tensors_only_and_loads_with_weights_only(trained):
    module, path = trained
    checkpoint = torch.load(path, weights_only=True)
    names = set(module.trained_tensors())
    assert set(checkpoint["state_dict"]) == names
    assert len(names) == 28
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert set(checkpoint["optimizer_states"][0]["state"]) == names


def test_loading_a_state_copies_it_and_names_what_differs(trained):
    module, _ = trained
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    first, *_, last = state
    pointers = [parameter.data_ptr() for parameter in module.trained_tensors().values()]
    module.load_state_dict({name: tensor + 1 for name, tensor in state.items()})
    for name, parameter in module.trained_tensors().items():
        assert torch.equal(parameter, state[name] + 1)
    assert pointers == [parameter.data_ptr() for parameter in module.trained_tensors().values()]
    module.load_state_dict(state)
    cases = [
        ({n: t for n, t in state.items() if n != last}, f"lacks '{last}'."),
        (state | {"x": torch.ones(1)}, "has an unknown 'x'."),
        (state | {first: state[first][:2]}, f"has '{first}' of shape (2, 64), not (4, 64)."),
        ({first: state[first]}, "(and 26 more)."),
    ]
    for wrong, words in cases:
        with pytest.raises(CheckpointError) as caught:
            module.load_state_dict(wrong)
        assert words in str(caught.value)
        assert all(torch.equal(p, state[n]) for n, p in module.trained_tensors().items())


@pytest.mark.parametrize(
    ("group", "key", "value", "words"),
    [
        ("base", "weights", "f" * 64, "has other weights than"),
        ("base", "config", "f" * 64, "its config.json says another computation"),
        (
            "quantization",
            "quant_type",
            "fp4",
            "model.quantization.quant_type=fp4, this run has nf4",
        ),
        ("quantization", "double_quant", False, "model.quantization.double_quant=False"),
        ("quantization", "skip_modules", ["q_proj"], "model.quantization.skip_modules=['q_proj']"),
        ("quantization", "compute_dtype", "bfloat16", "model.quantization.compute_dtype=bfloat16"),
        ("lora", "r", 64, "model.lora.r=64, this run has 4. Use the checkpoint's value"),
        ("lora", "alpha", 32.0, "model.lora.alpha=32.0, this run has 16.0"),
        ("lora", "dropout", 0.1, "model.lora.dropout=0.1, this run has 0.0"),
        ("lora", "target_modules", ["q_proj"], "model.lora.target_modules=['q_proj']"),
        ("optimizer", "lr", 1.0, "model.optimizer.lr=1.0, this run has 0.01"),
        ("optimizer", "name", "sgd", "model.optimizer.name=sgd"),
        ("schedule", "name", "linear", "model.schedule.name=linear, this run has constant"),
        ("loss", "normalize_loss_by", "rows", "model.normalize_loss_by=rows, this run has tokens"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(trained, group, key, value, words):
    module, path = trained
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["qlora_pl"][group][key] = value
    with pytest.raises(CheckpointError) as caught:
        module.on_load_checkpoint(checkpoint)
    (problem,) = caught.value.problems
    assert words in problem


def test_all_differences_are_named_at_once_and_a_foreign_checkpoint_is_refused(trained):
    module, path = trained
    checkpoint = torch.load(path, weights_only=True)
    other = copy.deepcopy(checkpoint)
    other["qlora_pl"]["lora"] |= {"r": 8, "alpha": 1.0}
    with pytest.raises(CheckpointError) as caught:
        module.on_load_checkpoint(other)
    assert len(caught.value.problems) == 2
    del checkpoint["qlora_pl"]
    with pytest.raises(CheckpointError, match="was not written by qlora_pl"):
        module.on_load_checkpoint(checkpoint)


@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_to_validate_a_checkpoint_only_what_shapes_the_model_must_agree(
    trained, tiny_base, rows_file
):
    module, path = trained
    expected = module.last_evaluation["val/loss"]
    other = make_module(tiny_base, optimizer=OptimizerConfig(lr=5.0), normalize_loss_by="rows")
    make_trainer().validate(other, make_data(rows_file), ckpt_path=path, verbose=False)
    # 1e-5: float32 sums of batches of other shapes
    assert other.last_evaluation["val/loss"] == pytest.approx(expected, rel=1e-5)
    shaped = make_module(tiny_base, lora=LoRAConfig(r=4, alpha=1.0))
    with pytest.raises(CheckpointError, match=r"model\.lora\.alpha=16\.0, this run has 1\.0"):
        make_trainer().validate(shaped, make_data(rows_file), ckpt_path=path, verbose=False)
