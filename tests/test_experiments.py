"""Every file under experiments/ and configs/ is parsed, and the paper's are run on a tiny base."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from families import BY_NAME
from transformers import AutoConfig

from qlora_pl.__main__ import main
from qlora_pl.cli import read_runs
from qlora_pl.data.batches.ordering import epoch_steps
from qlora_pl.data.reading.sources import SourceConfig
from qlora_pl.modeling.adapters.lora import LoRAConfig, refuse_unfit_ranks, resolve_targets
from qlora_pl.modeling.base.identity import is_hub_name
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.run_checks import settings

ROOT = Path(__file__).parent.parent
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
PARTS = sorted((ROOT / "configs").glob("*/*.yaml"))

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process


def name(path: Path) -> str:
    return path.stem


def llama(width: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    """LLaMA's shapes (Touvron et al. 2023, table 2, and its inner widths)."""
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": 128,
        "vocab_size": 32000,
    }


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v
            for key, inner in value.items()
            for k, v in leaves(inner, f"{prefix}/{key}").items()
        }
    return {prefix: value}


@pytest.fixture
def quickstart_base(monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:
    """The quickstart's base exists only after ``make quickstart``."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("qlora_pl.run_checks.locate_base", lambda *_: tiny_base)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_an_experiment_is_a_run_without_a_mistake(path: Path, quickstart_base: None) -> None:
    (run,) = read_runs([["--config", str(path)]])
    assert run.run.name == path.stem


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_part_fits_its_group(path: Path, quickstart_base: None) -> None:
    words = [
        "--config",
        str(ROOT / "experiments/quickstart.yaml"),
        f"--{path.parent.name}",
        str(path),
    ]
    assert len(read_runs([words])) == 1


@pytest.mark.parametrize("path", [*EXPERIMENTS, *PARTS], ids=name)
def test_a_file_says_its_numbers_so_that_every_parser_reads_them(path: Path) -> None:
    """No dotted keys (they lose references), no ``2e-4`` (YAML 1.1 reads text)."""
    for key, value in leaves(yaml.safe_load(path.read_text())).items():
        assert "." not in key, f"{path.name}: {key}"
        assert not re.fullmatch(r"[\d.]+e-?\d+", str(value)) or isinstance(value, float), key


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_an_experiment_opens_with_its_command_and_its_source(path: Path) -> None:
    opening = path.read_text().split("\n\n")[0]
    assert f"qlora-pl fit --config experiments/{path.name}" in opening
    assert "Source: " in opening


@pytest.mark.parametrize(
    ("size", "base", "rate", "dropout"),
    [
        ("7b", "llama-7b", 2.0e-4, 0.1),
        ("13b", "llama-13b", 2.0e-4, 0.1),
        ("33b", "llama-30b", 1.0e-4, 0.05),
        ("65b", "llama-65b", 1.0e-4, 0.05),
    ],
)
def test_guanaco_has_the_papers_numbers(size: str, base: str, rate: float, dropout: float) -> None:
    """Dettmers et al. 2023, table 9, the rows of OASST1."""
    (run,) = read_runs([["--config", str(ROOT / f"experiments/guanaco{size}.yaml")]])
    assert run.model.model_name_or_path == f"huggyllama/{base}"
    assert (run.model.optimizer.lr, run.model.lora.dropout) == (rate, dropout)
    assert (run.model.lora.r, run.model.lora.alpha) == (64, 16)
    assert run.model.quantization.quant_type == "nf4"
    assert run.model.quantization.double_quant
    assert run.model.optimizer.name == "paged_adamw_32bit"
    assert run.model.schedule.name == "constant"
    assert run.trainer.max_steps == 1875
    assert run.trainer.gradient_clip_val == 0.3
    assert run.data.global_batch_size == 16


# The architecture of each experiment's base: its family, and the shapes that its size depends on.
BASES: dict[str, tuple[str, dict[str, int]]] = {
    "guanaco7b": ("LLaMA", llama(4096, 11008, 32, 32)),
    "guanaco13b": ("LLaMA", llama(5120, 13824, 40, 40)),
    "guanaco33b": ("LLaMA", llama(6656, 17920, 60, 52)),
    "guanaco33b_assistant_only": ("LLaMA", llama(6656, 17920, 60, 52)),
    "guanaco65b": ("LLaMA", llama(8192, 22016, 80, 64)),
    "llama2_7b_guanaco": ("LLaMA", llama(4096, 11008, 32, 32)),
    "mistral7b_prompts": ("Mistral", llama(4096, 14336, 32, 32) | {"num_key_value_heads": 8}),
    "pythia12b_alpaca": (
        "GPT-NeoX, Pythia",
        {
            "hidden_size": 5120,
            "intermediate_size": 20480,
            "num_hidden_layers": 36,
            "num_attention_heads": 40,
            "vocab_size": 50688,
        },
    ),
    "bloom7b1_prompts": (
        "BLOOM",
        {"hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 250880},
    ),
    "falcon_rw_1b": (
        "Falcon RW",
        {
            "hidden_size": 2048,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "vocab_size": 50304,
        },
    ),
    "t5_superni": (
        "T5 v1.1, Flan-T5",
        {
            "d_model": 2048,
            "d_ff": 5120,
            "d_kv": 64,
            "num_layers": 24,
            "num_heads": 32,
            "vocab_size": 32128,
        },
    ),
}


@pytest.mark.parametrize(
    ("stem", "trained"),
    [
        # r (in + out) summed over the adapted layers; 65B's are 1,599.1 MB in 16 bits
        ("guanaco7b", 159_907_840),
        ("guanaco13b", 250_347_520),
        ("guanaco33b", 487_587_840),
        ("guanaco33b_assistant_only", 487_587_840),
        ("guanaco65b", 799_539_200),
        ("llama2_7b_guanaco", 159_907_840),
        ("mistral7b_prompts", 41_943_040),
        ("pythia12b_alpaca", 64 * 36 * (5120 * 2 + 5120 * 4 + 5120 * 5 + 5120 * 5)),
        ("bloom7b1_prompts", 7_864_320),
        ("falcon_rw_1b", 1_572_864),
        # four or eight attention matrices, and wi_0, wi_1 and wo, of 24 and 24 layers
        ("t5_superni", 64 * 24 * (12 * (2048 + 2048) + 6 * (2048 + 5120))),
    ],
)
def test_an_experiment_trains_as_many_weights_as_its_source_says(
    stem: str, trained: int, tmp_path: Path
) -> None:
    """On the meta device: every shape is the real one, and no weight exists."""
    family, shapes = BASES[stem]
    config = AutoConfig.for_model(BY_NAME[family].model_type, **BY_NAME[family].settings | shapes)
    config.save_pretrained(tmp_path)
    skeleton = build_skeleton(tmp_path)
    (run,) = read_runs([["--config", str(ROOT / f"experiments/{stem}.yaml")]])
    lora = LoRAConfig(**settings(run.model.lora))
    plan_quantization(skeleton, QuantizationConfig(**settings(run.model.quantization)))
    targets = resolve_targets(skeleton, lora)
    refuse_unfit_ranks(skeleton, lora, targets)
    sizes = [sum(skeleton.get_submodule(name).weight.shape) for name in targets]  # type: ignore[arg-type]
    assert lora.r * sum(sizes) == trained


def rows_like(source: SourceConfig, count: int) -> list[dict[str, str]]:
    """Rows in the real schema of an experiment's dataset."""
    if source.path.endswith("alpaca"):
        return [
            {"instruction": f"Add one to {n}.", "input": "", "output": f"{n + 1}", "text": "..."}
            for n in range(count)
        ]
    if source.path.endswith("prompts"):
        return [{"act": f"Act {n}", "prompt": f"Act as {n} coaches."} for n in range(count)]
    if source.path.endswith("natural-instructions"):
        return [
            {"definition": "Add one.", "inputs": f"{n}", "targets": f"{n + 1}", "id": f"task1-{n}"}
            for n in range(count)
        ]
    text = "### Human: What is {0}?### Assistant: It is {0}.### Human: Sure?### Assistant: Yes."
    return [{"text": text.format(n)} for n in range(count)]


# Which differ from guanaco7b in numbers alone.
ALIKE = ("guanaco13b", "guanaco33b", "guanaco65b", "llama2_7b_guanaco")


@pytest.mark.parametrize(
    "stem",
    [pytest.param(s, marks=pytest.mark.slow) if s in ALIKE else s for s in BASES],
)
def test_a_shrunken_base_trains_the_very_file_for_three_steps(
    stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same architecture and file; two layers of width 64, and rows of the same schema."""
    (run,) = read_runs([["--config", str(ROOT / f"experiments/{stem}.yaml")]])
    family = BASES[stem][0]
    changes = {"num_key_value_heads": 4} if family == "LLaMA" else {}  # which rank 64 needs
    base = BY_NAME[family].save(tmp_path / "base", **changes)
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", str(ROOT / f"experiments/{stem}.yaml")]
    words += ["--model.model_name_or_path", str(base), "--model.revision", "null"]
    words += ["--data.tokenizer", str(base)]
    (source,) = run.data.sources.sources
    source = source.resolved()
    if source.path.startswith("experiments/"):
        local = {"path": str(ROOT / source.path), "format": source.format}
    else:
        path = tmp_path / "rows.jsonl"
        rows = rows_like(source, 72)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        local = {"path": str(path), "format": source.format, "columns": source.columns}
    words += ["--data.sources", json.dumps(local)]
    if run.data.val_sources:
        words += ["--data.val_sources", json.dumps(local)]
    elif run.data.val_size == 1024:
        words += ["--data.val_size", "8"]
    words += ["--trainer.max_steps", "3", "--trainer.accelerator", "cpu", "--data.num_workers", "0"]
    words += ["--trainer.enable_progress_bar", "false", "--samples.decoding.max_new_tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["qlora-pl", *words])
    assert main() == 0
    folder = tmp_path / f"runs/{stem}/version_0"
    manifest = json.loads((folder / "adapter/manifest.json").read_text())
    assert manifest["step"] == 3
    assert manifest["quantization"]["quant_type"] == run.model.quantization.quant_type
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["rows"] == 3 * run.data.global_batch_size
    assert (folder / "samples.jsonl").read_text().count("\n") >= 2  # before and after


def test_the_fifty_prompts_take_sixty_five_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = read_runs([["--config", str(ROOT / "experiments/bloom7b1_prompts.yaml")]])
    (source,) = run.data.sources.sources
    assert source.limit == 50
    assert run.data.global_batch_size == 4
    steps = epoch_steps(np.full(50, 9), 4, 0, 0, run.data.group_by_length)
    assert len(steps) * run.trainer.max_epochs == 65


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name)
def test_hub_models_and_datasets_are_pinned_or_the_file_says_why_not(
    path: Path, quickstart_base: None
) -> None:
    (run,) = read_runs([["--config", str(path)]])
    if is_hub_name(run.model.model_name_or_path):
        assert re.fullmatch("[0-9a-f]{40}", str(run.model.revision)), path.name
    for source in [*run.data.sources.sources, *run.data.val_sources.sources]:
        if not Path(source.path).suffix:
            is_pinned = re.fullmatch("[0-9a-f]{40}", str(source.revision)) is not None
            assert is_pinned or "is not pinned here" in path.read_text(), path.name
