"""What only a GPU can show; ``make test-gpu`` runs it in one command."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_base
from families import BY_NAME, FAMILIES, Family

sys.path.insert(0, str(Path(__file__).parent / "training"))

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.*"),
]


def fit(folder: Path, base: Path, rows: Path, steps: int, **options: Any) -> Any:
    """A few deterministic steps on one GPU, resumed if the folder holds a checkpoint."""
    from lightning.pytorch import Trainer, seed_everything

    from qlora_pl import (
        AdapterCheckpoint,
        InstructionDataModule,
        LoRAConfig,
        OptimizerConfig,
        QLoRAModule,
        QuantizationConfig,
        RunMetrics,
    )
    from qlora_pl.training.run_folders.run_folder import newest_verified

    seed_everything(5)
    module = QLoRAModule(
        str(base),
        lora=LoRAConfig(r=options.pop("r", 8), dropout=0.1),
        optimizer=OptimizerConfig(name=options.pop("optimizer", "paged_adamw_32bit"), lr=1e-2),
        quantization=QuantizationConfig(**options.pop("quantization", {})),
        gradient_checkpointing=False,
    )
    data = InstructionDataModule(rows, template="guanaco", val_size=2, batch_size=2)
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=steps,
        accelerator="gpu",
        devices=1,
        deterministic=True,
        gradient_clip_val=0.3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[RunMetrics(), AdapterCheckpoint(every_n_steps=1)],
    )
    trainer.fit(module, data, ckpt_path=newest_verified(folder))
    return trainer


def test_training_on_a_gpu_lowers_the_loss(
    tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    trainer = fit(tmp_path, tiny_base, rows_file, steps=10)
    metrics = trainer.callbacks[0]
    assert metrics.last["val/loss"] < metrics.first["val/loss"]


def test_a_resumed_run_is_byte_equal_when_deterministic(
    tmp_path: Path, tiny_base: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, tiny_base, rows_file, steps=6)
    fit(parts, tiny_base, rows_file, steps=3)
    fit(parts, tiny_base, rows_file, steps=6)
    files = [folder / "adapter/adapter_model.safetensors" for folder in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_paged_state_lies_in_managed_memory(tmp_path: Path, rows_file: Path) -> None:
    """Paged are tensors of at least 1e5 elements: A of a 1,024-wide layer at rank 128 has more."""
    base = save_base(tmp_path / "base", hidden_size=1024, num_key_value_heads=4)
    trainer = fit(tmp_path / "run", base, rows_file, steps=1, r=128)
    optimizer = trainer.optimizers[0]
    states = [s["state1"] for s in getattr(optimizer, "optimizer", optimizer).state.values()]
    assert any(getattr(state, "is_paged", False) for state in states)


def test_paged_state_is_paged_again_in_a_resumed_run(tmp_path: Path, rows_file: Path) -> None:
    """Through Lightning, which moves loaded state to the GPU before the first step."""
    base = save_base(tmp_path / "base", hidden_size=1024, num_key_value_heads=4)
    fit(tmp_path / "run", base, rows_file, steps=1, r=128)
    trainer = fit(tmp_path / "run", base, rows_file, steps=2, r=128)
    optimizer = trainer.optimizers[0]
    held = getattr(optimizer, "optimizer", optimizer).state
    large = [s for p, s in held.items() if p.numel() >= 1e5]
    assert large
    assert all(s[key].is_paged for s in large for key in ("state1", "state2"))
    assert {s["step"] for s in held.values()} == {2}


@pytest.mark.parametrize(
    "name", ["paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit"]
)
def test_paged_state_goes_on_from_a_checkpoint_in_equal_bytes(name: str) -> None:
    """Reference: steps that were never interrupted. 128 x 1,024 elements are paged, 512 are not."""
    from lightning.fabric.utilities.optimizer import _optimizer_to_device

    from qlora_pl.modeling.optimization.optimizer_state import (
        named_optimizer_state,
        optimizer_state_from_names,
    )
    from qlora_pl.modeling.optimization.optimizers import OptimizerConfig, build_optimizer

    shapes = {"large": (128, 1024), "small": (512,)}
    device = torch.device("cuda", torch.cuda.current_device())

    def make() -> tuple[dict[str, torch.nn.Parameter], Any]:
        named = {n: torch.nn.Parameter(torch.ones(s, device=device)) for n, s in shapes.items()}
        return named, build_optimizer(OptimizerConfig(name=name, lr=1e-2), named.items())

    def train(named: dict[str, torch.nn.Parameter], optimizer: Any, steps: range) -> None:
        for step in steps:
            draw = torch.Generator().manual_seed(step)
            for parameter in named.values():
                parameter.grad = torch.randn(parameter.shape, generator=draw).to(device)
            optimizer.step()

    expected, uninterrupted = make()
    train(expected, uninterrupted, range(5))
    begun, first = make()
    train(begun, first, range(3))
    saved = named_optimizer_state(first, begun.items())
    assert not any(hasattr(s["state1"], "is_paged") for s in saved["state"].values())
    named, resumed = make()
    with torch.no_grad():
        for key, parameter in named.items():
            parameter.copy_(begun[key])
    resumed.load_state_dict(optimizer_state_from_names(saved, resumed, named.items()))
    _optimizer_to_device(resumed, device)  # as Lightning does after loading
    train(named, resumed, range(3, 5))
    assert resumed.state[named["large"]]["state1"].is_paged
    assert resumed.state[named["small"]]["state1"].device == device
    for key, parameter in named.items():
        assert torch.equal(parameter, expected[key]), key
        for part in ("state1", "state2"):
            if part in (held := resumed.state[parameter]):
                assert torch.equal(held[part], uninterrupted.state[expected[key]][part])


def test_packed_weights_on_a_gpu_reload_bit_for_bit(tiny_base: Path) -> None:
    from qlora_pl.modeling.base.identity import identify_base
    from qlora_pl.modeling.base.quantization import QuantizationConfig
    from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
    from qlora_pl.modeling.loading.base_loading import load_base

    identity = identify_base(str(tiny_base), None, None)
    config = QuantizationConfig()
    plan = plan_quantization(build_skeleton(identity.folder), config)
    device = torch.device("cuda", 0)
    made = load_base(identity, config, plan, device=device)
    read = load_base(identity, config, plan, device=device)
    assert read.is_from_cache
    for name in plan.quantized:
        a, b = made.model.get_parameter(name), read.model.get_parameter(name)
        assert torch.equal(a, b)
        assert torch.equal(a.quant_state.absmax, b.quant_state.absmax)


@pytest.mark.parametrize(
    "name", ["paged_adamw_8bit", "paged_lion_32bit", "adamw_8bit", "adamw_torch"]
)
def test_every_kind_of_optimizer_steps(
    tmp_path: Path, tiny_base: Path, rows_file: Path, name: str
) -> None:
    fit(tmp_path, tiny_base, rows_file, steps=2, optimizer=name)
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_familys_loss_and_gradients_are_its_float32_twins(family: Family, tmp_path: Path) -> None:
    """1e-3 of the largest gradient: float32 products on a GPU, TF32 off."""
    sys.path.insert(0, str(Path(__file__).parent / "modeling"))
    from adapter_runs import load, twin_of
    from test_families import LORA, give_random_b, loss_and_gradients

    from qlora_pl.modeling.adapters.lora import attach_adapters
    from qlora_pl.modeling.loading.base_loading import prepare_for_training
    from qlora_pl.modeling.parameters import trainable_tensors

    folder = BY_NAME[family.name].save(tmp_path / "base")
    device = torch.device("cuda", 0)
    loaded = load(folder, device=device)
    model = attach_adapters(loaded.model, LORA, seed=0)
    prepare_for_training(model, gradient_checkpointing=True)
    give_random_b(model)
    twin = attach_adapters(twin_of(loaded, folder).to(device), LORA, seed=0)
    twin.load_state_dict({n: p.data for n, p in trainable_tensors(model).items()}, strict=False)
    expected, reference = loss_and_gradients(twin.to(device), family)
    loss, gradients = loss_and_gradients(model, family)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    for name, gradient in gradients.items():
        largest = reference[name].abs().max()
        assert (gradient - reference[name]).abs().max() <= 1e-3 * largest, name


@pytest.mark.parametrize("kind", ["float16", "int8", "fp4", "none"])
def test_every_kind_of_base_trains_and_resumes(
    kind: str, tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    quantization = {"compute_dtype": kind} if kind == "float16" else {"quant_type": kind}
    fit(tmp_path, tiny_base, rows_file, steps=2, quantization=quantization)
    trainer = fit(tmp_path, tiny_base, rows_file, steps=4, quantization=quantization)
    assert trainer.global_step == 4
    assert (trainer.precision_plugin.precision == "16-mixed") is (kind == "float16")


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_base_that_lies_half_on_the_cpu_gives_the_logits_of_the_gpu(
    share: float, tiny_base: Path, tmp_path: Path
) -> None:
    """In float32, whose products CPU and GPU add up in another order."""
    from qlora_pl.modeling.base.identity import identify_base
    from qlora_pl.modeling.base.prequantized import make_plan
    from qlora_pl.modeling.base.quantization import QuantizationConfig
    from qlora_pl.modeling.base.quantization_plan import build_skeleton
    from qlora_pl.modeling.loading.base_loading import load_base
    from qlora_pl.modeling.loading.spread_loading import load_spread, weight_bytes

    identity = identify_base(str(tiny_base), None, None)
    config = QuantizationConfig(compute_dtype="float32")
    skeleton = build_skeleton(identity.folder)
    plan = make_plan(identity.folder, skeleton, config)
    gpu, host = torch.device("cuda", 0), torch.device("cpu")
    whole = load_base(identity, config, plan, device=gpu).model
    cap = int(weight_bytes(skeleton.float(), config, plan) * share)
    spread = load_spread(identity, config, plan, memory={gpu: cap, host: 2**40}).model
    assert {p.device.type for p in spread.parameters()} == {"cuda", "cpu"}
    ids = torch.arange(5, 60, device=next(spread.parameters()).device)[None]
    with torch.no_grad():
        found = spread(input_ids=ids).logits.cpu()
        expected = whole(input_ids=ids.to(gpu)).logits.cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


SAYS_WHETHER_SEGMENTS_EXPAND = """
import os
from qlora_pl.allocator import prefer_expandable_segments
prefer_expandable_segments(os.environ)
import torch
torch.zeros(1, device="cuda")
print(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
"""


@pytest.mark.parametrize(
    ("variables", "expands"),
    [({}, True), ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False)],
)
def test_the_allocators_segments_expand_unless_the_user_says_otherwise(
    variables: dict[str, str], expands: bool
) -> None:
    inherited = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    said = subprocess.run(
        [sys.executable, "-c", SAYS_WHETHER_SEGMENTS_EXPAND],
        env=inherited | variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert said.split() == [str(expands)]


def test_what_the_allocator_holds_for_each_byte_in_use_is_logged(
    tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    fit(tmp_path, tiny_base, rows_file, steps=2)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["memory/reserved_over_allocated"]) >= 1


def test_doctor_finds_that_segments_grow() -> None:
    from qlora_pl.doctor.checks import BY_NAME
    from qlora_pl.doctor.command import examine

    checks = [BY_NAME[name] for name in ("torch", "devices", "allocator")]
    found = {check.name: findings for check, findings in examine(checks, 60.0)}
    [finding] = found["allocator"]
    inherited = any("ALLOC_CONF" in name for name in os.environ)
    assert inherited or finding.found.startswith("segments grow")


WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
}


def long_rows(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    row = {"instruction": "Count your legs.", "output": "eight legs " * 300}
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(26)))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": False, "lora": {"dtype": "bfloat16", "dropout": 0.1}},
    ],
    ids=["recomputing", "keeping", "half, with dropout"],
)
def test_the_peak_of_a_step_is_what_was_planned(options: dict[str, Any], tmp_path: Path) -> None:
    """Source: ``max_memory_allocated`` over the largest batch and the first step, within 5 %."""
    from lightning.pytorch import Trainer

    from qlora_pl import InstructionDataModule, LoRAConfig, OptimizerConfig, QLoRAModule
    from qlora_pl.training.memory.memory_record import MemoryRecord
    from qlora_pl.training.memory.rehearsal import Rehearsal

    options = dict(options)
    module = QLoRAModule(
        str(save_base(tmp_path / "base", **WIDE)),
        lora=LoRAConfig(r=16, **options.pop("lora", {})),
        optimizer=OptimizerConfig(name="adamw_32bit"),
        **options,
    )
    data = InstructionDataModule(
        long_rows(tmp_path), template="guanaco", val_size=0, batch_size=4, max_length=1024
    )
    record = MemoryRecord(tmp_path)
    trainer = Trainer(
        default_root_dir=tmp_path / "run",
        max_steps=1,
        accelerator="gpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[record, Rehearsal()],
    )
    trainer.fit(module, data)
    peak = record.counted["peak_allocated"]
    assert abs(record.planned["allocated"] / peak - 1) <= 0.05, (record.planned, record.counted)


def test_a_batch_that_is_too_large_for_the_device_is_found_by_trying(tmp_path: Path) -> None:
    """The plan sees all of the device; the allocator is allowed less than eight rows take."""
    from auto_runs import LARGE, auto_run

    from qlora_pl.training.memory.auto_batch import AutoBatch
    from qlora_pl.training.memory.planned_memory import RunPlanner

    class Less(AutoBatch):
        def _settle(self) -> None:
            device = self._trainer.strategy.root_device
            planner = RunPlanner(self._trainer, self._module)
            eight, four = (planner.largest(rows, False, 8 // rows).allocated for rows in (8, 4))
            more = (eight + four) / 2 - torch.cuda.memory_allocated(device)
            total = torch.cuda.get_device_properties(device).total_memory
            share = (torch.cuda.memory_reserved(device) + more) / total
            torch.cuda.set_per_process_memory_fraction(share, device)
            super()._settle()
            torch.cuda.set_per_process_memory_fraction(1.0, device)

    base = save_base(tmp_path / "base", **WIDE)
    choice = Less(LARGE)
    module = auto_run(
        tmp_path / "run",
        base,
        long_rows(tmp_path),
        choice,
        data={"max_length": 1024},
        trainer={"accelerator": "gpu"},
    )
    assert choice.number > 0
    assert module.trainer.datamodule.batch_size in (4, 2)
    assert module.trainer.global_step == 3
