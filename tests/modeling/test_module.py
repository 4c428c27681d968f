"""Real runs of ``QLoRAModule`` against a float32 twin, other cuts of a step, hand arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from module_runs import Twin, fit

from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.loading.base_loading import load_base
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]


@pytest.mark.parametrize(
    ("normalize_by", "accumulation", "checkpointing"),
    [("tokens", 1, False), ("tokens", 4, True), ("rows", 2, False)],
)
def test_after_a_validation_every_step_is_that_of_a_float32_twin_of_dequantised_weights(
    tiny_base, rows_file, normalize_by, accumulation, checkpointing
):
    """The sanity validation is the forward after which bitsandbytes' CPU kernel loses gradients.

    2e-5 of a gradient's norm: float32 sums over 100 tokens in another order, through two layers
    whose adapters are a little apart after each step (measured: 1.4e-6).
    """
    validated = []

    class Validated(Callback):
        def on_validation_end(self, trainer: Trainer, module: Any) -> None:
            validated.append(trainer.global_step)

    module, recorder = fit(
        tiny_base,
        rows_file,
        Validated(),
        batch_size=4 // accumulation,
        accumulation=accumulation,
        normalize_loss_by=normalize_by,
        gradient_checkpointing=checkpointing,
    )
    assert validated[0] == 0
    assert [len(step.row_ids) for step in recorder.steps] == [4, 4, 4, 4, 2]
    twin = Twin(tiny_base, recorder.start)
    rows = module.trainer.datamodule.splits["train"].rows
    for step, gradients in zip(recorder.steps, recorder.gradients, strict=True):
        loss, expected = twin.step([rows[i] for i in step.row_ids], normalize_by, lr=0.1)
        assert step.loss == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            error = (gradients[f"model.{name}"] - gradient).norm()
            assert error <= 2e-5 * gradient.norm(), name
            assert gradient.any() or "lora_A" in name, name
    for name, parameter in twin.trained.items():
        torch.testing.assert_close(
            recorder.adapters[-1][f"model.{name}"], parameter.detach(), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_the_training_loss_falls(tiny_base, rows_file, compute):
    _, recorder = fit(
        tiny_base,
        rows_file,
        compute=compute,
        optimizer=OptimizerConfig(lr=1e-2),
        trainer={"max_epochs": 4},
    )
    losses = [step.loss for step in recorder.steps]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("normalize_by", ["tokens", "rows"])
def test_however_a_step_is_cut_the_same_adapters_come_out(tiny_base, rows_file, normalize_by):
    """Plain gradient descent, since Adam would hide a wrong scale; ten steps of four rows or two.

    1e-4 of a tensor's norm: rows padded to other widths are summed in another order in float32,
    and ten steps carry it on (measured: 7e-6; a mean of means is up to 6e-2 off).
    """
    cuts = [(4, 1), (2, 2), (1, 4)]
    runs = [
        fit(
            tiny_base,
            rows_file,
            batch_size=batch_size,
            accumulation=accumulation,
            normalize_loss_by=normalize_by,
            trainer={"max_epochs": 2, "gradient_clip_val": 0.3},
        )[1]
        for batch_size, accumulation in cuts
    ]
    whole = runs[0]
    assert [len(step.row_ids) for step in whole.steps] == [4, 4, 4, 4, 2] * 2
    assert any(step.grad_norm > 0.3 for step in whole.steps)
    for run in runs[1:]:
        assert [step.row_ids for step in run.steps] == [step.row_ids for step in whole.steps]
        for a, b in zip(run.steps, whole.steps, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=1e-5)
            assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
            assert (a.num_tokens, a.num_trained_tokens) == (b.num_tokens, b.num_trained_tokens)
        for name, tensor in whole.adapters[-1].items():
            moved = (tensor - whole.start[name]).norm()
            assert (run.adapters[-1][name] - tensor).norm() < 1e-4 * moved, name


def test_clipping_sees_the_gradient_of_the_steps_mean(tiny_base, rows_file):
    _, recorder = fit(tiny_base, rows_file, trainer={"gradient_clip_val": 0.05})
    for step, gradients in zip(recorder.steps, recorder.gradients, strict=True):
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        assert step.grad_norm > 0.05
        # 1e-4: clipping divides by the norm plus 1e-6
        assert norm.item() == pytest.approx(0.05, rel=1e-4)


def test_the_statistics_of_a_step_are_those_of_its_rows(tiny_base, rows_file):
    """By hand from the rows' lengths; a micro-batch is padded to its longest row."""
    module, recorder = fit(tiny_base, rows_file, batch_size=3, accumulation=2)
    rows = module.trainer.datamodule.splits["train"].rows
    assert [len(step.row_ids) for step in recorder.steps] == [6, 6, 6]
    assert sorted(i for step in recorder.steps for i in step.row_ids) == list(range(18))
    for step, gradients in zip(recorder.steps, recorder.gradients, strict=True):
        lengths = [len(rows[i][0]) for i in step.row_ids]
        assert step.num_rows == 6
        assert step.num_tokens == sum(lengths)
        assert step.num_token_pairs == sum(length**2 for length in lengths)
        widths = [-(-max(part) // 8) * 8 for part in (lengths[:3], lengths[3:])]
        assert step.num_padded_tokens == 3 * widths[0] + 3 * widths[1]
        assert step.num_trained_tokens == sum((rows[i][1] != -100).sum() for i in step.row_ids)
        assert step.learning_rate == 0.1
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        assert step.grad_norm == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("eval_batch_size", [1, 3, 4])
def test_validation_is_the_mean_over_all_tokens_of_the_split(tiny_base, rows_file, eval_batch_size):
    """Source: the twin, row by row; 1e-5: float32 sums in another order."""
    values: list[float] = []

    class Evaluations(Callback):
        def on_validation_end(self, trainer: Trainer, module: Any) -> None:
            values.append(float(trainer.callback_metrics["val/loss"]))
            perplexity = float(trainer.callback_metrics["val/perplexity"])
            assert perplexity == pytest.approx(torch.tensor(values[-1]).exp().item(), rel=1e-5)

    module, recorder = fit(
        tiny_base, rows_file, Evaluations(), data={"eval_batch_size": eval_batch_size}
    )
    rows = module.trainer.datamodule.splits["val"].rows
    for value, adapters in zip(values, (recorder.start, recorder.adapters[-1]), strict=True):
        twin = Twin(tiny_base, adapters)
        losses = torch.cat([twin.token_losses(*rows[i]) for i in range(len(rows))])
        assert value == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_twin_is_a_twin(tiny_base):
    """Logits of the 4-bit model and of its twin, both fresh; 1e-4 at logits of about 5."""
    config = QuantizationConfig(compute_dtype="float32")
    identity = identify_base(str(tiny_base), None, None)
    plan = plan_quantization(build_skeleton(tiny_base), config)
    base = load_base(identity, config, plan, device=torch.device("cpu")).model
    model = attach_adapters(base, LoRAConfig(r=4), seed=0)
    start = {f"model.{n}": p for n, p in model.named_parameters() if p.requires_grad}
    ids = torch.arange(5, 37).reshape(2, 16)
    ours, theirs = model(input_ids=ids).logits, Twin(tiny_base, start).model(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
