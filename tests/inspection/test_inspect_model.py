"""``qlora-pl inspect model`` as it is typed, beside plain transformers and bitsandbytes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from families import Saver
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from trained import adapter, run, type_in
from transformers import AutoModelForCausalLM

from qlora_pl.inspection.weights.command import parse
from qlora_pl.merging.scored_rows import ScoredRow, held_out_rows

__all__ = ["adapter", "run", "type_in"]
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process

Type = Callable[..., tuple[int, str, str]]
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def numbers_of(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out)
    return found


def through_bitsandbytes(weight: Tensor) -> Tensor:
    """NF4 in blocks of 64 with double quantisation, in two calls of the library."""
    packed, state = bnb.quantize_4bit(
        weight.float(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    decoded: Tensor = bnb.dequantize_4bit(packed, state)
    return decoded


def is_quantised(name: str) -> bool:
    return any(f".{part}." in name for part in NAMES)


# -- weights alone ---------------------------------------------------------------------------------


def test_a_base_is_measured_without_rows(type_in: Type, tiny_base: Path) -> None:
    code, out, said = type_in("inspect", "model", "--model", tiny_base)
    assert code == 0, said
    assert sorted(p.name for p in Path("inspect-model").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]
    assert Path("inspect-model/report.md").read_text() == out
    for name in ("nf4 64 DQ", "nf4 64", "fp4 64", "int4 64 DQ", "int8"):
        assert f"| {name} " in out
    assert "skip_modules:" in out
    assert "Shapiro-Wilk" in out
    assert [p.name for p in Path().iterdir()] == ["inspect-model"]


def test_errors_are_those_of_the_files_tensors(type_in: Type, tiny_base: Path) -> None:
    """Source: the safetensors file, bitsandbytes and sums in float64."""
    code, out, said = type_in("inspect", "model", "--model", tiny_base, "--json")
    assert code == 0, said
    found = numbers_of(out)
    weights = {n: t.double() for n, t in load_file(tiny_base / "model.safetensors").items()}
    quantised = {n: t for n, t in weights.items() if is_quantised(n)}
    assert [f"{m['module']}.weight" for m in found["matrices"]] == [
        n for n in _in_model_order(tiny_base) if n in quantised
    ]
    errors = {n: (through_bitsandbytes(t) - t).double() for n, t in quantised.items()}
    for m in found["matrices"]:
        name = f"{m['module']}.weight"
        expected = float(errors[name].norm() / weights[name].norm())
        assert m["relative_rms"]["nf4 64 DQ"] == pytest.approx(expected, rel=1e-5)
        largest = float(errors[name].abs().max())
        assert m["errors"]["nf4 64 DQ"]["largest_error"] == pytest.approx(largest, rel=1e-6)
    total = math.sqrt(sum(float(e.square().sum()) for e in errors.values()))
    total /= math.sqrt(sum(float(t.square().sum()) for t in quantised.values()))
    assert found["formats"]["nf4 64 DQ"]["relative_rms"] == pytest.approx(total, rel=1e-5)
    assert found["kept_weights"] == sum(
        t.numel() for n, t in weights.items() if n not in quantised and t.ndim > 1
    )


def _in_model_order(folder: Path) -> list[str]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [name for name, _ in model.named_parameters()]


def test_random_normal_weights_are_found_normal(type_in: Type, tiny_base: Path) -> None:
    """The tiny base is drawn from a normal distribution: 5 % of its neurons fail, by chance.

    1,664 rows in all: 5 % has a standard deviation of 0.5 %. The bfloat16 they are kept in and the
    mending of theory's other assumptions move the error by less than 1 %.
    """
    code, out, said = type_in("inspect", "model", "--model", tiny_base, "--json")
    assert code == 0, said
    found = numbers_of(out)
    tested = sum(m["normality"]["neurons"] for m in found["matrices"])
    failed = sum(m["normality"]["non_normal"] for m in found["matrices"])
    assert 0.03 < failed / tested < 0.07
    for name in ("nf4 64", "fp4 64", "int4 64", "int8"):
        row = found["formats"][name]
        assert row["relative_rms"] == pytest.approx(row["relative_rms_if_normal"], rel=0.01), name


def test_matrices_are_read_through_the_pages_of_their_files(tiny_base: Path) -> None:
    """No weight has memory of its own but the matrix in hand."""
    from qlora_pl.inspection.weights.opening import open_folder

    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("asks Linux which pages are a file's")
    base = open_folder(str(tiny_base))
    for name, parameter in base.model.named_parameters():
        place = parameter.data_ptr()
        line = next(
            line
            for line in maps.read_text().splitlines()
            if int(line.split("-")[0], 16) <= place < int(line.split("-")[1].split()[0], 16)
        )
        assert line.split()[-1] == str(tiny_base / "model.safetensors"), name


@pytest.mark.parametrize("family", ["GPT-2", "T5 v1.1, Flan-T5", "Falcon (rotary)"])
def test_other_families_are_measured(type_in: Type, saved: Saver, family: str) -> None:
    """GPT-2's matrices lie transposed, T5 has two stacks, Falcon's linears a class of their own."""
    from families import BY_NAME

    folder = saved(family)
    code, out, said = type_in("inspect", "model", "--model", folder, "--json", "--kinds", "nf4")
    assert code == 0, said
    found = numbers_of(out)
    assert len(found["matrices"]) == BY_NAME[family].num_linears
    weights = load_file(folder / "model.safetensors")
    for m in found["matrices"]:
        stored = next(t for n, t in weights.items() if n.endswith(f"{m['module']}.weight"))
        matrix = stored.t().contiguous() if family == "GPT-2" else stored
        expected = float(
            (through_bitsandbytes(matrix) - matrix).double().norm() / matrix.double().norm()
        )
        assert tuple(m["shape"]) == tuple(matrix.shape)
        assert m["relative_rms"]["nf4 64 DQ"] == pytest.approx(expected, rel=1e-5), m["module"]


# -- with rows -------------------------------------------------------------------------------------


def expected_kl(base: Path, rows: list[ScoredRow], quantised: Callable[[str], bool]) -> float:
    """Source: plain transformers in float32, with and without bitsandbytes' rounding."""
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    changed = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if is_quantised(name) and quantised(name):
                parameter.copy_(through_bitsandbytes(parameter))
        total, tokens = 0.0, 0
        for row in rows:
            logits = [
                m(input_ids=row.input_ids[None]).logits[0, row.places] for m in (whole, changed)
            ]
            p, q = (functional.log_softmax(x.double(), -1) for x in logits)
            total += float((p.exp() * (p - q)).sum())
            tokens += len(row.places)
    return total / tokens


def test_logits_are_asked_with_each_part_quantised(
    type_in: Type, tiny_base: Path, adapter: Path
) -> None:
    """KL of all, of a layer and of a kind, beside a model that was changed by hand.

    float32 sums in another order: the KL, some 1e-2, is good to 1e-5 of itself at least.
    """
    code, out, said = type_in("inspect", "model", "--adapter", adapter, "--json")
    assert code == 0, said
    asked = numbers_of(out)["logits"]
    rows = held_out_rows(adapter)
    assert asked["tokens"] == sum(len(row.places) for row in rows)
    for found, quantised in (
        (asked["by_format"]["nf4 64 DQ"], lambda name: True),
        (asked["by_layer"]["1"], lambda name: ".layers.1." in name),
        (asked["by_kind"]["down_proj"], lambda name: "down_proj" in name),
    ):
        expected = expected_kl(tiny_base, rows, quantised)
        assert expected > 1e-5
        assert found["kl_divergence"] == pytest.approx(expected, rel=1e-3)
    assert list(asked["by_format"]) == list(numbers_of(out)["formats"])
    # The weights are put back each time: the whole base's perplexity never moves.
    perplexities = {
        round(score["trained_perplexity"], 6)
        for part in ("by_format", "by_layer", "by_kind")
        for score in asked[part].values()
    }
    assert len(perplexities) == 1


def test_what_is_kept_in_16_bits_is_measured_too(
    type_in: Type, tiny_base: Path, adapter: Path
) -> None:
    code, out, said = type_in(
        *("inspect", "model", "--adapter", adapter, "--json", "--keep", "3", "--kinds", "nf4")
    )
    assert code == 0, said
    found = numbers_of(out)
    assert [kept["number"] for kept in found["logits"]["kept"]] == [1, 2, 3]
    spared = [kept["module"] for kept in found["kept"]]
    expected = expected_kl(
        tiny_base, held_out_rows(adapter), lambda n: n.removesuffix(".weight") not in spared
    )
    assert found["logits"]["kept"][-1]["score"]["kl_divergence"] == pytest.approx(
        expected, rel=1e-3
    )


def test_outputs_are_those_of_the_modules_real_inputs(
    type_in: Type, tiny_base: Path, adapter: Path
) -> None:
    """Source: hooks on plain transformers, and one product in float64 for each module."""
    code, out, said = type_in(
        *("inspect", "model", "--adapter", adapter, "--json", "--logits", "none")
    )
    assert code == 0, said
    found = numbers_of(out)
    assert found["logits"] is None
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for m in [found["matrices"][0], found["matrices"][-1]]:
        owner = model.get_submodule(m["module"])
        caught: list[Tensor] = []
        handle = owner.register_forward_pre_hook(
            lambda _, given, kept=caught: kept.append(given[0])
        )
        with torch.no_grad():
            for row in held_out_rows(adapter):
                model(input_ids=row.input_ids[None])
        handle.remove()
        x = torch.cat([part.flatten(0, 1) for part in caught]).double()
        weight = owner.weight.detach()
        error = (through_bitsandbytes(weight) - weight).double()
        expected = float((x @ error.t()).norm() / (x @ weight.double().t()).norm())
        measured = m["errors"]["nf4 64 DQ"]["output_squared_error"] / m["output_squared_sum"]
        assert math.sqrt(measured) == pytest.approx(expected, rel=1e-4)


def test_rows_of_a_file_are_read_for_a_model(
    type_in: Type, tiny_base: Path, rows_file: Path
) -> None:
    code, out, said = type_in(
        *("inspect", "model", "--model", tiny_base, "--data", rows_file, "--tokens", "30"),
        *("--logits", "formats", "--json"),
    )
    assert code == 0, said
    found = numbers_of(out)
    assert 0 < found["logits"]["tokens"] <= 30
    assert found["logits"]["by_layer"] == {}
    assert found["data"] == "rows.jsonl"
    assert found["measure"] == "outputs"
    by_format = found["logits"]["by_format"]
    assert by_format["int8"]["kl_divergence"] < 0.1 * by_format["nf4 64"]["kl_divergence"]


def test_an_encoder_decoder_model_is_asked(type_in: Type, saved: Saver, rows_file: Path) -> None:
    code, out, said = type_in(
        *("inspect", "model", "--model", saved("T5"), "--data", rows_file, "--tokens", "40"),
        *("--template", "instruction-response", "--kinds", "nf4", "--double-quant", "true"),
        "--json",
    )
    assert code == 0, said
    found = numbers_of(out)
    assert set(found["logits"]["by_layer"]) == {
        f"{stack} {i}" for stack in ("encoder", "decoder") for i in range(2)
    }
    assert found["logits"]["by_format"]["nf4 64 DQ"]["kl_divergence"] > 0
    assert all(m["output_squared_sum"] > 0 for m in found["matrices"])


# -- the command ----------------------------------------------------------------------------------


def test_flags_of_ways_are_every_combination() -> None:
    _, formats = parse(
        [
            "--model",
            "x",
            "--kinds",
            "nf4",
            "int8",
            "--block-sizes",
            "64",
            "128",
            "--double-quant",
            "false",
        ]
    )
    assert [f.name for f in formats] == ["nf4 64", "nf4 128", "int8"]


def test_a_report_is_replaced(type_in: Type, tiny_base: Path) -> None:
    for _ in range(2):
        assert type_in("inspect", "model", "--model", tiny_base, "--kinds", "nf4")[0] == 0


def test_a_folder_of_somebody_else_is_left_alone(type_in: Type, tiny_base: Path) -> None:
    Path("mine").mkdir()
    Path("mine/report.md").write_text("mine")
    code, _, said = type_in("inspect", "model", "--model", tiny_base, "--output", "mine")
    assert code == 2
    assert "is of no report of this command" in said
    assert Path("mine/report.md").read_text() == "mine"
