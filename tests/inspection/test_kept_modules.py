"""What `inspect model` suggests to keep in 16 bits: its lines run, and cost what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from adapter_runs import load
from conftest import save_base
from safetensors.torch import load_file, save_file
from trained import type_in

from qlora_pl.cli import read_runs
from qlora_pl.inspection.weights.command import ModelOptions
from qlora_pl.inspection.weights.formats import Format
from qlora_pl.inspection.weights.keeping import KeptScore
from qlora_pl.inspection.weights.numbers import LogitNumbers
from qlora_pl.inspection.weights.reporting import report
from qlora_pl.inspection.weights.tables import kept_table
from qlora_pl.merging.scoring import Score
from qlora_pl.modeling.base.quantization import ABSMAX_BLOCK_SIZE, BLOCK_SIZE
from qlora_pl.training.memory.held_bytes import held_by_model

__all__ = ["type_in"]
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process

Type = Callable[..., tuple[int, str, str]]
TABLES = 16 * 4 + 256 * 4 + 4
"""Bytes of a double-quantised matrix's two tables and its offset, which a report leaves out."""


def numbers_of(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out)
    return found


def lines_of(out: str) -> str:
    return out.split("```yaml\n")[1].split("```")[0]


def train(type_in: Type, lines: str, base: Path, rows: Path) -> list[str]:
    """One step of a run with these lines in its file; what it kept unquantised."""
    file = Path("kept.yaml")
    file.write_text(lines)
    code, _, said = type_in(
        *("fit", "--config", file, "--model.model_name_or_path", base, "--data.sources", rows),
        *("--data.template", "guanaco", "--data.val_size", "2", "--data.max_length", "48"),
        *("--model.lora.r", "4", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu"),
        *("--trainer.devices", "1", "--samples.num_prompts", "0"),
    )
    assert code == 0, said
    (manifest,) = Path().rglob("adapter/manifest.json")
    return list(json.loads(manifest.read_text())["quantization"]["skip_modules"])


def test_a_run_with_the_suggestion_trains_and_holds_the_bytes_it_says(
    type_in: Type, tiny_base: Path, rows_file: Path
) -> None:
    """Source: bytes of the tensors that are held, with the lines and without.

    Scales are kept in whole blocks of 256, which theory cuts in parts, and beside two tables.
    """
    code, out, said = type_in("inspect", "model", "--model", tiny_base, "--keep", "3")
    assert code == 0, said
    lines = lines_of(out)
    suggested = json.loads(Path("inspect-model/report.json").read_text())["kept"]
    names = [kept["module"] for kept in suggested]
    assert train(type_in, lines, tiny_base, rows_file) == names

    settings = yaml.safe_load(lines)["model"]["quantization"]
    with_it = load(tiny_base, "bfloat16", **settings).model
    plain = load(tiny_base, "bfloat16", **settings | {"skip_modules": ()}).model
    for kept in suggested:
        assert with_it.get_submodule(kept["module"]).weight.dtype.itemsize == 2  # type: ignore
        size = with_it.get_submodule(kept["module"]).weight.numel()  # type: ignore
        blocks = size / BLOCK_SIZE / ABSMAX_BLOCK_SIZE
        kept["added_bytes"] -= TABLES + 4 * (math.ceil(blocks) - blocks)
    counted = sum(held_by_model(with_it).values()) - sum(held_by_model(plain).values())
    assert counted == sum(kept["added_bytes"] for kept in suggested)


def test_the_lines_skip_what_the_format_does_not_fit(
    type_in: Type, tmp_path: Path, rows_file: Path
) -> None:
    """Blocks of 128 over rows of 64: a run refuses such matrices until it is told to skip them."""
    base = save_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    code, out, said = type_in(
        *("inspect", "model", "--model", base, "--kinds", "nf4", "--block-sizes", "128"),
        *("--keep", "1", "--double-quant", "false"),
    )
    assert code == 0, said
    (kept,) = json.loads(Path("inspect-model/report.json").read_text())["kept"]
    unfit = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    assert train(type_in, lines_of(out), base, rows_file) == [*unfit, kept["module"]]


def test_what_the_format_does_not_fit_is_counted_in_16_bits(type_in: Type, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    _, out, _ = type_in(
        *("inspect", "model", "--model", base, "--kinds", "nf4", "--block-sizes", "64", "128"),
        *("--double-quant", "false", "--json"),
    )
    found = numbers_of(out)
    sizes = {m["module"]: math.prod(m["shape"]) for m in found["matrices"]}
    fit = sum(n for name, n in sizes.items() if "down_proj" in name)
    total = sum(sizes.values())
    expected = fit * (0.5 + 4 / 128) + 2 * (total - fit)
    assert found["formats"]["nf4 128"]["packed_bytes"] == expected
    assert found["formats"]["nf4 64"]["packed_bytes"] == total * (0.5 + 4 / 64)


def test_the_lines_of_the_suggestion_are_what_the_training_parser_reads(
    type_in: Type, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    code, out, said = type_in(
        *("inspect", "model", "--model", tiny_base, "--keep", "2", "--skip-modules", "o_proj")
    )
    assert code == 0, said
    lines = lines_of(out)
    suggested = json.loads(Path("inspect-model/report.json").read_text())["kept"]
    file = tmp_path / "kept.yaml"
    file.write_text(lines)
    (read,) = read_runs(
        [
            [
                *("--config", str(file), "--model.model_name_or_path", str(tiny_base)),
                *("--data.sources", str(rows_file)),
            ]
        ]
    )
    quantization = read.model.quantization
    assert tuple(quantization.skip_modules) == ("o_proj", *(kept["module"] for kept in suggested))
    assert (quantization.quant_type, quantization.block_size) == ("nf4", 64)
    assert quantization.double_quant is True


def test_a_suggestion_costs_what_a_run_would_keep_more(type_in: Type, tiny_base: Path) -> None:
    """Source: footprint's packed bytes, and two bytes for a weight in 16 bits."""
    from qlora_pl.modeling.base.quantization import QuantizationConfig, packed_bytes

    _, out, _ = type_in("inspect", "model", "--model", tiny_base, "--json")
    found = numbers_of(out)
    sizes = {m["module"]: math.prod(m["shape"]) for m in found["matrices"]}
    for kept in found["kept"]:
        number = sizes[kept["module"]]
        expected = 2 * number - packed_bytes(number, QuantizationConfig())
        assert kept["added_bytes"] == pytest.approx(expected)


def test_a_matrix_that_fits_badly_is_the_first_suggestion(type_in: Type, tmp_path: Path) -> None:
    """One outlier in each block of one matrix, whose other weights all but vanish in its scale."""
    base = save_base(tmp_path / "base")
    path = base / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name][:, 0] = 20.0
    save_file(weights, path, metadata={"format": "pt"})
    code, out, said = type_in("inspect", "model", "--model", base, "--json", "--kinds", "nf4")
    assert code == 0, said
    found = numbers_of(out)
    assert found["kept"][0]["module"] == name.removesuffix(".weight")
    bad = next(m for m in found["matrices"] if m["module"] == name.removesuffix(".weight"))
    assert bad["normality"]["weights_beside_outliers"] == math.prod(bad["shape"])


def test_blocks_that_span_rows_of_some_matrices_are_left_out_of_these(
    type_in: Type, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", hidden_size=64, intermediate_size=128)
    code, out, said = type_in(
        *("inspect", "model", "--model", base, "--kinds", "nf4", "--block-sizes", "64", "128"),
        *("--double-quant", "false"),
    )
    assert code == 0, said
    assert "nf4 128: 'model.layers.0.self_attn.q_proj' has 64 inputs" in out
    assert "such matrices stay in 16 bits" in out
    found = json.loads(Path("inspect-model/report.json").read_text())
    fit = [m["module"] for m in found["matrices"] if "nf4 128" in m["errors"]]
    assert fit == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_a_suggestion_that_makes_it_worse_is_told_so(tiny_base: Path) -> None:
    """Errors may cancel each other, so that the rest is further off than the whole was."""
    numbers = report(ModelOptions(model=str(tiny_base), keep=1), [Format(kind="nf4")])
    before, after = (
        Score(kl_divergence=kl, top1_agreement=1, perplexity=1, trained_perplexity=1, tokens=1)
        for kl in (0.010, 0.012)
    )
    logits = LogitNumbers(
        whole=1,
        tokens=1,
        rows=1,
        by_format={"nf4 64": before},
        kept=[KeptScore(number=1, score=after)],
    )
    (row,) = kept_table(replace(numbers, logits=logits)).rows
    assert row[-2:] == ["0.0120", "+20.0 %"]
