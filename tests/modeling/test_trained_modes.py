"""What the trainer must not change: modes, types, and any bit of the base; and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import ROWS, save_base
from lightning.pytorch import Callback, Trainer
from module_runs import fit, make_data, make_module, make_trainer
from torch import Tensor

from qlora_pl.modeling.adapters.lora import LoRAConfig
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]


def test_modes_and_types_hold_while_training_after_a_validation(tiny_base, rows_file):
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: Any, *_: Any) -> None:
            model = module.model
            seen.append(trainer.global_step)
            assert all(m.training for m in model.modules())
            assert all(p.dtype == torch.float32 for p in module.trained_tensors().values())
            buffers = dict(model.named_buffers())
            assert {b.dtype for n, b in buffers.items() if "inv_freq" in n} == {torch.float32}
            assert model.get_input_embeddings().weight.dtype == torch.bfloat16

    fit(tiny_base, rows_file, Look(), compute="bfloat16", trainer={"val_check_interval": 4})
    assert seen[-1] == 4


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_train_besides_float32_adapters(tmp_path, rows_file, bias):
    """The base's biases are bf16 and the adapters float32: one step, one norm and one clip."""
    base = save_base(tmp_path / "base", attention_bias=True)
    _, recorder = fit(
        base,
        rows_file,
        compute="bfloat16",
        lora=LoRAConfig(r=4, bias=bias),
        optimizer=OptimizerConfig(lr=1e-2),
        trainer={"gradient_clip_val": 0.05},
    )
    biases = [name for name in recorder.start if name.endswith(".bias")]
    assert len(biases) == 8
    for name in biases:
        assert not torch.equal(recorder.adapters[-1][name], recorder.start[name]), name
    norms = [gradient.float().norm() for gradient in recorder.gradients[-1].values()]
    # 2**-8: the biases' part of the norm is rounded to bf16
    assert torch.stack(norms).norm().item() == pytest.approx(0.05, rel=2**-8)


def test_the_base_does_not_change_by_a_bit(tiny_base, rows_file):
    before: dict[str, Tensor] = {}

    class Keep(Callback):
        def on_fit_start(self, trainer: Trainer, module: Any) -> None:
            trained = module.trained_tensors()
            before.update({n: p.clone() for n, p in module.named_parameters() if n not in trained})

    module, _ = fit(tiny_base, rows_file, Keep(), trainer={"val_check_interval": 4})
    assert before
    for name, tensor in before.items():
        assert torch.equal(module.get_parameter(name), tensor), name


def test_predict_answers_every_validation_row_with_its_reference(tiny_base, rows_file):
    module = make_module(tiny_base, decoding=DecodingConfig(max_new_tokens=3))
    batches = make_trainer().predict(module, make_data(rows_file, eval_batch_size=3))
    rows: Sequence[dict[str, Any]] = [row for batch in batches for row in batch]
    references = {row["response"] for row in ROWS}
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert all(row["reference"] in references for row in rows)
    assert all("How many legs has animal" in row["prompt"] for row in rows)
