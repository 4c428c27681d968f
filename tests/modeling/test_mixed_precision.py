"""Products in float16 under a loss scaler: near the float32 run's, and skipped if they overflow.

The references are the same run in float32, torch's own rule for the scale (halved after an
overflow, doubled after enough good steps), and byte equality of resumed runs.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import Killed, make_data
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from small_runs import fit, logits, make_trainer, one_thread  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_pl.errors import ConfigurationError, TrainingStoppedError
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.loading.base_loading import load_base
from qlora_pl.modeling.module import QLoRAModule
from qlora_pl.modeling.optimization import mixed_precision
from qlora_pl.modeling.optimization.mixed_precision import MAX_SKIPPED
from qlora_pl.modeling.steps import micro_batches
from qlora_pl.training.run_folders.run_folder import newest_verified

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process

NO_DROPOUT = {"dropout": 0.0}
TOO_HIGH = 2.0**14
"""A scale at which the tiny base overflows in its first three steps, and no more at an eighth."""


class Recorder(Callback):
    """Gradients, weights and optimizer state after each step, and what the step was."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.steps: list[Any] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.state: list[list[Tensor]] = []
        self.plugin: Precision | None = None

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        self.plugin = trainer.precision_plugin
        self.start = {name: p.detach().clone() for name, p in module.trained_tensors().items()}

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        trained = module.trained_tensors()
        (optimizer,) = trainer.optimizers
        self.steps.append(module.last_step)
        self.gradients.append({name: p.grad.clone() for name, p in trained.items()})
        self.weights.append({name: p.detach().clone() for name, p in trained.items()})
        state = [value for held in optimizer.state.values() for value in held.values()]
        self.state.append([value.clone() for value in state if isinstance(value, Tensor)])


class Products(TorchDispatchMode):
    """Counts matrix products by the types of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packed = torch.ops.bitsandbytes.gemm_4bit
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, packed):
            self.counts.update({args[0].dtype: 1})
        return func(*args, **kwargs or {})


def count_products(monkeypatch: pytest.MonkeyPatch) -> tuple[Products, Products]:
    """Those of all forward passes of training, and those of all backward passes."""
    counts = Products(), Products()
    for name, products in zip(("language_model_loss", "back_propagate"), counts, strict=True):
        run = getattr(micro_batches, name)

        def counted(*arguments: Any, run: Any = run, products: Products = products) -> Any:
            with products:
                return run(*arguments)

        monkeypatch.setattr(micro_batches, name, counted)
    return counts


@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_products_are_in_float16_and_what_lies_beside_packed_weights_in_float32(
    quant_type: str,
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Source: the operations that torch dispatches in training steps."""
    forward, backward = count_products(monkeypatch)
    module = fit(
        tmp_path,
        tiny_base,
        rows_file,
        lora=NO_DROPOUT,
        quant_type=quant_type,
        compute_dtype="float16",
    )
    # 14 matrices and the head, with two products for each adapter; backward likewise, and more
    assert forward.counts == {torch.float16: 3 * (14 * 3 + 1)}
    assert set(backward.counts) == {torch.float16}
    assert module.base is not None
    rest = {p.dtype for n, p in module.base.model.named_parameters() if "lora_" not in n} - {
        torch.uint8
    }
    assert rest == {torch.float32 if quant_type == "nf4" else torch.float16}
    assert {p.dtype for p in module.trained_tensors().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("quant_type", "optimizer"), [("nf4", "paged_adamw_32bit"), ("int8", "adamw_torch")]
)
def test_unscaled_gradients_are_the_float32_runs(
    quant_type: str, optimizer: str, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    """1e-2 of each tensor's largest: ten roundings of 2**-11, measured 7e-4 to 3e-3.

    A gradient that is left scaled, or unscaled twice, is 16 times off.
    """
    recorders = {}
    for compute in ("float16", "float32"):
        recorders[compute] = Recorder()
        fit(
            tmp_path / compute,
            tiny_base,
            rows_file,
            callbacks=[recorders[compute]],
            lora=NO_DROPOUT,
            optimizer={"name": optimizer},
            trainer={"gradient_clip_val": 1e4},
            quant_type=quant_type,
            compute_dtype=compute,
        )
    half, full = recorders["float16"], recorders["float32"]
    assert [step.loss_scale for step in half.steps] == [16.0] * 3
    assert [step.loss_scale for step in full.steps] == [None] * 3
    for name, expected in full.gradients[0].items():
        error = (half.gradients[0][name] - expected).abs().max()
        assert error <= 1e-2 * expected.abs().max(), name
    for ours, theirs in zip(half.steps[:2], full.steps[:2], strict=True):
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-2)
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "adamw_torch"])
def test_a_step_that_overflows_is_left_out_and_halves_the_scale(
    optimizer: str,
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mixed_precision, "INITIAL_SCALE", TOO_HIGH)
    recorder = Recorder()
    fit(
        tmp_path,
        tiny_base,
        rows_file,
        callbacks=[recorder],
        lora=NO_DROPOUT,
        optimizer={"name": optimizer},
        trainer={"max_steps": 6, "gradient_clip_val": 0.3},
        compute_dtype="float16",
    )
    skipped = [step.is_skipped for step in recorder.steps]
    assert skipped == [True, True, True, False, False, False]
    scales = [step.loss_scale for step in recorder.steps]
    assert scales == [TOO_HIGH / 2 ** min(number, 3) for number in range(6)]
    for number in range(3):
        for name, weight in recorder.weights[number].items():
            assert torch.equal(weight, recorder.start[name]), (number, name)
        assert recorder.state[number] == []
    assert len(recorder.state[3]) > 0
    moved = [n for n, w in recorder.weights[3].items() if not torch.equal(w, recorder.start[n])]
    assert len(moved) == 14  # every B; A has no gradient yet
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 7)]
    norms = [float(row["optim/grad_norm"]) for row in rows]
    assert [not math.isfinite(norm) for norm in norms] == skipped
    assert all(math.isfinite(float(row["train/loss"])) for row in rows)


def test_a_skip_in_the_middle_leaves_weights_and_state_as_they_were(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient is made infinite in the third step, after the backward pass that scaled it."""

    class Overflow(Callback):
        def on_after_backward(self, trainer: Trainer, module: Any) -> None:
            if trainer.global_step == 2:
                next(iter(module.trained_tensors().values())).grad.view(-1)[0] = torch.inf

    recorder = Recorder()
    fit(
        tmp_path,
        tiny_base,
        rows_file,
        callbacks=[Overflow(), recorder],
        trainer={"max_steps": 4},
        compute_dtype="float16",
    )
    assert [step.is_skipped for step in recorder.steps] == [False, False, True, False]
    assert [step.loss_scale for step in recorder.steps] == [16.0, 16.0, 16.0, 8.0]
    before, after = recorder.weights[1], recorder.weights[2]
    assert all(torch.equal(before[name], after[name]) for name in before)
    pairs = zip(recorder.state[1], recorder.state[2], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(after[name], recorder.weights[3][name]) for name in after)


def test_twenty_skips_in_a_row_stop_the_run_with_one_sentence(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixed_precision, "INITIAL_SCALE", 2.0**60)
    recorder = Recorder()
    with pytest.raises(TrainingStoppedError) as caught:
        fit(
            tmp_path,
            tiny_base,
            rows_file,
            callbacks=[recorder],
            trainer={"max_steps": 50},
            compute_dtype="float16",
        )
    assert "\n" not in str(caught.value)
    assert f"Step {MAX_SKIPPED}: " in str(caught.value)
    assert f"in {MAX_SKIPPED} steps in a row" in str(caught.value)
    assert len(recorder.steps) == MAX_SKIPPED - 1


def test_the_scale_grows_after_enough_good_steps(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source: torch.amp.GradScaler's rule; a resumed run remembers the steps that were good."""
    monkeypatch.setattr(mixed_precision, "GROWTH_INTERVAL", 2)
    recorder = Recorder()
    with pytest.raises(Killed):
        fit(tmp_path, tiny_base, rows_file, 3, trainer={"max_steps": 5}, compute_dtype="float16")
    fit(
        tmp_path,
        tiny_base,
        rows_file,
        callbacks=[recorder],
        trainer={"max_steps": 5},
        compute_dtype="float16",
    )
    assert [step.loss_scale for step in recorder.steps] == [32.0, 32.0, 64.0][
        -len(recorder.steps) :
    ]


# --- resuming -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, the first three of them skipped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed_precision, "INITIAL_SCALE", TOO_HIGH)
        fit(folder, tiny_base, rows_file, trainer={"max_steps": 6}, compute_dtype="float16")
    return folder


def test_the_checkpoint_holds_the_scalers_state(whole: Path) -> None:
    checkpoint = torch.load(newest_verified(whole), weights_only=True)
    (scaler,) = (v for v in checkpoint.values() if isinstance(v, dict) and "growth_factor" in v)
    assert scaler["scale"] == TOO_HIGH / 8
    assert scaler["_growth_tracker"] == 3


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([2], id="after-a-skipped-first-step"),
        pytest.param([4], id="between-a-skipped-and-a-good-step"),
        pytest.param([2, 3, 4], id="three-times"),
    ],
)
def test_a_resumed_run_ends_in_the_bytes_of_the_uninterrupted_one(
    kills: list[int],
    whole: Path,
    tiny_base: Path,
    rows_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second start has the usual scale, which must give way to the saved one."""
    monkeypatch.setattr(mixed_precision, "INITIAL_SCALE", TOO_HIGH)
    settings = {"trainer": {"max_steps": 6}, "compute_dtype": "float16"}
    for kill_at in kills:
        with pytest.raises(Killed):
            fit(tmp_path, tiny_base, rows_file, kill_at, **settings)
        monkeypatch.undo()
    fit(tmp_path, tiny_base, rows_file, **settings)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert history(tmp_path) == history(whole)


def history(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "metrics.csv").open() as file:
        names = ("step", "train/loss", "optim/grad_norm")
        return [tuple(row[name] for name in names) for row in csv.DictReader(file)]


# --- where there is no scaler ---------------------------------------------------------------------


@pytest.mark.parametrize(("compute", "quant_type"), [("bfloat16", "nf4"), ("float32", "none")])
def test_other_types_over_a_frozen_base_need_no_plugin(
    compute: str, quant_type: str, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    fit(
        tmp_path,
        tiny_base,
        rows_file,
        callbacks=[recorder],
        trainer={"max_steps": 1},
        compute_dtype=compute,
        quant_type=quant_type,
    )
    assert type(recorder.plugin) is Precision
    assert recorder.steps[0].loss_scale is None
    checkpoint = torch.load(newest_verified(tmp_path), weights_only=True)
    assert not any(isinstance(v, dict) and "growth_factor" in v for v in checkpoint.values())


def test_validation_alone_multiplies_in_float16_too(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    module = fit(tmp_path, tiny_base, rows_file, callbacks=[recorder], compute_dtype="float16")
    assert isinstance(recorder.plugin, MixedPrecision)
    assert recorder.plugin.scaler is not None
    assert module.model is not None
    with torch.autocast("cpu", torch.float16):
        assert logits(module.model).dtype == torch.float16


class Stop(Exception):
    """Ends a run where a test has seen enough."""


def test_the_plugin_is_of_the_device_that_the_run_will_use(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning moves a module to its device only after the model is made; here it never does."""
    asked = []

    def note(*arguments: Any) -> None:
        asked.append(arguments)
        raise Stop

    monkeypatch.setattr("qlora_pl.modeling.optimization.mixed_precision.precision_plugin", note)
    monkeypatch.setattr(QLoRAModule, "device", torch.device("meta"))
    with pytest.raises(Stop):
        fit(tmp_path, tiny_base, rows_file, compute_dtype="float16")
    ((compute_dtype, _, device),) = asked
    assert compute_dtype == torch.float16
    assert device == torch.device("cpu")


def test_a_second_trainer_of_the_same_module_has_its_own_scaler(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    module = fit(tmp_path / "first", tiny_base, rows_file, compute_dtype="float16")
    recorder = Recorder()
    trainer = make_trainer(tmp_path / "second", recorder, enable_checkpointing=False)
    trainer.fit(module, make_data(rows_file))
    assert isinstance(recorder.plugin, MixedPrecision)
    assert [step.loss_scale for step in recorder.steps] == [16.0] * 3


def test_an_adapter_that_never_learns_is_found_once_a_step_is_good(
    tiny_base: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first steps are skipped, after which every adapter is still as it was; that is no fault.

    One here has no gradient at all.
    """

    class Mute(Callback):
        def on_fit_start(self, trainer: Trainer, module: Any) -> None:
            name = next(name for name in module.trained_tensors() if "lora_B" in name)
            module.trained_tensors()[name].register_hook(torch.zeros_like)

    monkeypatch.setattr(mixed_precision, "INITIAL_SCALE", TOO_HIGH)
    settings: dict[str, Any] = {"trainer": {"max_steps": 6}, "compute_dtype": "float16"}
    settings["is_saved_often"] = True
    with pytest.raises(TrainingStoppedError, match=r"After step 4 the adapter .* is still zero"):
        fit(tmp_path / "mute", tiny_base, rows_file, callbacks=[Mute()], **settings)


def test_a_base_that_leaves_float16s_range_is_one_sentence(tiny_base: Path) -> None:
    """Here its norms multiply by 10 million."""
    config = QuantizationConfig(compute_dtype="float16", cache=False)
    plan = plan_quantization(build_skeleton(tiny_base), config)
    identity = identify_base(str(tiny_base), None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transformers.models.llama.modeling_llama.LlamaRMSNorm.forward",
            lambda self, x: 1e7 * x,
        )
        with pytest.raises(ConfigurationError, match="in float16 the base's logits are not num"):
            load_base(identity, config, plan, device=torch.device("cpu"))
