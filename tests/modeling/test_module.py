"""Real runs of ``QLoRAModule`` against a float32 twin, other cuts of a step, hand arithmetic."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import peft
import pytest
import torch
from conftest import ROWS, save_base
from lightning.pytorch import Callback, Trainer, seed_everything
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

import qlora_pl.modeling.steps.loss as loss_module
from qlora_pl.data.datamodule import InstructionDataModule
from qlora_pl.errors import CheckpointError, ConfigurationError, TrainingStoppedError
from qlora_pl.modeling.adapters.lora import LoRAConfig, attach_adapters
from qlora_pl.modeling.answers.decoding import DecodingConfig
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.loading.base_loading import load_base
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization.optimizers import OptimizerConfig
from qlora_pl.modeling.summary import summarize

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]

SGD = OptimizerConfig(name="sgd", lr=0.1)


class Recorder(Callback):
    """What each optimizer step was: statistics, gradients after clipping, adapters after it."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.steps: list[Any] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.adapters: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.start = {name: p.detach().clone() for name, p in module.trained_tensors().items()}

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.steps):
            trained = module.trained_tensors()
            self.steps.append(module.last_step)
            self.gradients.append({name: p.grad.clone() for name, p in trained.items()})
            self.adapters.append({name: p.detach().clone() for name, p in trained.items()})


def make_module(base: Path, compute: str = "float32", **changes: Any) -> QLoRAModule:
    settings: dict[str, Any] = {
        "quantization": QuantizationConfig(compute_dtype=compute),
        "lora": LoRAConfig(r=4),
        "optimizer": SGD,
        "gradient_checkpointing": False,
    }
    return QLoRAModule(str(base), **settings | changes)


def make_data(rows: Path, **changes: Any) -> InstructionDataModule:
    return InstructionDataModule(rows, **{"template": "guanaco", "val_size": 4} | changes)


def make_trainer(*callbacks: Callback, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 1,
        "num_sanity_val_steps": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "devices": 1,
        "use_distributed_sampler": False,
    }
    return Trainer(callbacks=list(callbacks), **settings | changes)


def fit(
    base: Path,
    rows: Path,
    *callbacks: Callback,
    batch_size: int = 2,
    accumulation: int = 2,
    data: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **model: Any,
) -> tuple[QLoRAModule, Recorder]:
    """Train on 18 of the 22 rows, four to a step: the last step of an epoch has two."""
    seed_everything(7)
    module, recorder = make_module(base, **model), Recorder()
    run = make_trainer(recorder, *callbacks, accumulate_grad_batches=accumulation, **trainer or {})
    run.fit(module, make_data(rows, batch_size=batch_size, **data or {}))
    return module, recorder


# --- the twin -------------------------------------------------------------------------------------


class Twin:
    """A float32 model whose base holds the dequantised weights, with plain PEFT adapters.

    Made of the file's tensors, bitsandbytes' quantiser, transformers and PEFT; nothing of ours.
    """

    def __init__(self, base: Path, start: dict[str, Tensor]) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        for name, tensor in load_file(base / "model.safetensors").items():
            if name.endswith("_proj.weight"):
                packed = bnb.quantize_4bit(
                    tensor.float(), quant_type="nf4", compress_statistics=True
                )
                model.get_parameter(name).data = bnb.dequantize_4bit(*packed)
        parts = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = peft.LoraConfig(r=4, lora_alpha=16, target_modules=parts, task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(model, lora).train()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(start[f"model.{name}"])

    def token_losses(self, ids: Any, labels: Any) -> Tensor:
        """Nats of each trained token of one row, without padding."""
        logits = self.model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
        targets = torch.from_numpy(labels)[1:]
        kept = targets != -100
        return functional.cross_entropy(logits[kept], targets[kept], reduction="none")

    def step(
        self, rows: list[Any], normalize_by: str, lr: float
    ) -> tuple[float, dict[str, Tensor]]:
        """One step of plain gradient descent; loss per token, and the gradients."""
        losses = [self.token_losses(*row) for row in rows]
        tokens = torch.cat(losses).mean()
        mean = (
            tokens if normalize_by == "tokens" else torch.stack([x.mean() for x in losses]).mean()
        )
        self.model.zero_grad()
        mean.backward()
        with torch.no_grad():
            for parameter in self.trained.values():
                parameter -= lr * parameter.grad
        return tokens.item(), {n: p.grad.clone() for n, p in self.trained.items()}


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


# --- how a step is cut ----------------------------------------------------------------------------


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


# --- what the trainer must not change -------------------------------------------------------------


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


# --- runs that stop themselves --------------------------------------------------------------------


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


# --- before weights are loaded --------------------------------------------------------------------


def set_up(base: Path, **model: Any) -> QLoRAModule:
    module = make_module(base, **model)
    module.trainer = make_trainer()
    module.setup("fit")
    return module


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"lora": LoRAConfig(target_modules=["q_porj"])}, "'q_porj'; did you mean 'q_proj'"),
        ({"quantization": QuantizationConfig(skip_modules=("x",))}, "skip_modules: .* x;"),
    ],
)
def test_a_misspelt_module_is_found_before_weights_are_loaded(tiny_base, model, named):
    module = make_module(tiny_base, **model)
    module.trainer = make_trainer()
    with pytest.raises(ConfigurationError, match=named):
        module.setup("fit")
    assert module.model is None


def test_a_tokenizer_with_more_tokens_than_the_base_has_embeddings_is_refused(
    tmp_path, tiny_base, rows_file
):
    small = save_base(tmp_path / "small", vocab_size=256)
    with pytest.raises(
        ConfigurationError, match=r"has \d+ tokens, the base has 256 embedding rows"
    ):
        fit(small, rows_file, data={"tokenizer": str(tiny_base)})


@pytest.mark.parametrize(
    ("shape", "lr", "warns"),
    [
        pytest.param((6656, 17920, 60, 52), 2e-4, "33B weights", id="33B"),
        pytest.param((6656, 17920, 60, 52), 1e-4, None, id="33B-low"),
        pytest.param((5120, 13824, 40, 40), 2e-4, None, id="13B"),
    ],
)
def test_a_learning_rate_above_the_papers_for_a_large_base_is_warned_about(
    tmp_path, caplog, shape, lr, warns
):
    """Shapes of the public LLaMA configurations; the folder's weights are one number."""
    from transformers import LlamaConfig

    hidden, intermediate, layers, heads = shape
    LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
    ).save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        set_up(tmp_path, optimizer=OptimizerConfig(lr=lr))
    warnings = [record.getMessage() for record in caplog.records]
    if warns is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert warns in warning
        assert f"model.optimizer.lr: {lr}" in warning
        assert "0.0001" in warning


def test_a_second_start_of_the_same_module_loads_nothing_again(tiny_base):
    module = set_up(tiny_base)
    module.configure_model()
    model = module.model
    module.setup("validate")
    module.configure_model()
    assert module.model is model


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (QuantizationConfig(), ["14 matrices in nf4, blocks of 64, double_quant"]),
        (QuantizationConfig(quant_type="none"), []),
        (
            QuantizationConfig(skip_modules=("0.mlp.up_proj",)),
            [
                "13 matrices in nf4, blocks of 64, double_quant",
                "not quantised: model.layers.0.mlp.up_proj.weight",
            ],
        ),
    ],
    ids=["nf4", "none", "skip"],
)
def test_the_summary_lists_what_was_skipped_and_nothing_else(tiny_base, quantization, expected):
    """By hand: 73,728 weights in linears, 65,856 in the other tensors, 8,192 in adapters."""
    module = set_up(tiny_base, quantization=quantization)
    module.configure_model()
    lines = summarize(str(tiny_base), module.model, module.base, quantization).splitlines()
    assert lines[0].startswith(f"{tiny_base}: 147,776 weights (")
    assert lines[1].startswith("trainable: 8,192 (5.544%)")
    for line, words in zip(lines[2:], expected, strict=True):
        assert line.startswith(words)


# --- checkpoints ----------------------------------------------------------------------------------


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


# --- answers --------------------------------------------------------------------------------------


def test_predict_answers_every_validation_row_with_its_reference(tiny_base, rows_file):
    module = make_module(tiny_base, decoding=DecodingConfig(max_new_tokens=3))
    batches = make_trainer().predict(module, make_data(rows_file, eval_batch_size=3))
    rows: Sequence[dict[str, Any]] = [row for batch in batches for row in batch]
    references = {row["response"] for row in ROWS}
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert all(row["reference"] in references for row in rows)
    assert all("How many legs has animal" in row["prompt"] for row in rows)


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
