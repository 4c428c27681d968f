"""``qlora-pl inspect model`` as it is typed, beside plain transformers and bitsandbytes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from conftest import save_base
from families import Saver
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from trained import adapter, run, type_in
from transformers import AutoModelForCausalLM

from qlora_pl.cli import read_runs
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


# -- the suggestion --------------------------------------------------------------------------------


def test_the_lines_of_the_suggestion_are_what_the_training_parser_reads(
    type_in: Type, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    code, out, said = type_in(
        *("inspect", "model", "--model", tiny_base, "--keep", "2", "--skip-modules", "o_proj")
    )
    assert code == 0, said
    lines = out.split("```yaml\n")[1].split("```")[0]
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


# -- bad input -------------------------------------------------------------------------------------


def test_a_checkpoint_of_nan_is_refused_with_its_tensors(
    type_in: Type, tmp_path: Path, rows_file: Path
) -> None:
    base = save_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, :5] = float("nan")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    code, out, said = type_in("inspect", "model", "--model", base)
    assert (code, out) == (2, "")
    assert "model.layers.0.mlp.up_proj.weight (5 of 8,192)" in said
    assert "model.norm.weight (1 of 64)" in said
    assert "in 2 tensors" in said
    assert not Path("inspect-model").exists()
    code, out, said = type_in("inspect", "model", "--model", base, "--data", rows_file)
    assert (code, out) == (2, "")
    assert "NaN or infinite" in said


def test_a_base_that_is_quantised_already_is_refused(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path / "packed")
    code, out, said = type_in("inspect", "model", "--model", tmp_path / "packed")
    assert (code, out) == (2, "")
    assert "is quantised already (nf4 with double quantisation, 14 matrices)" in said
    assert "name the model in 16 bits" in said


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), "--model: name a model, or an adapter with --adapter."),
    "no folder": (("--model", "./nowhere"), "--model: no folder './nowhere'."),
    "no model": (("--model", "EMPTY"), "is not a model folder; it has no config.json."),
    "no data": (("--model", "BASE", "--data", "no.jsonl"), "--data: no file 'no.jsonl'"),
    "bad data": (("--model", "BASE", "--data", "EMPTY/bad.jsonl"), "bad.jsonl"),
    "kind": (("--model", "BASE", "--kinds", "nf5"), "--kinds: invalid choice: 'nf5'"),
    "flag": (("--model", "BASE", "--kind", "nf4"), "did you mean '--kinds'?"),
    "tokens": (("--model", "BASE", "--tokens", "0"), "--tokens: must be at least 1, got 0."),
    "block": (
        ("--model", "BASE", "--kinds", "nf4", "--block-sizes", "4096"),
        "--block-sizes: no matrix can be kept as nf4 4096 DQ",
    ),
    "skipped": (
        ("--model", "BASE", "--skip-modules", "q_prj"),
        "--skip-modules: no weight matrix belongs to q_prj",
    ),
    "output": (("--model", "BASE", "--output", "no/there"), "--output: no folder 'no'; make it"),
    "file": (("--model", "BASE", "--output", "EMPTY/bad.jsonl"), "is a file; name a folder."),
    "adapter": (("--adapter", "EMPTY"), "holds no adapter"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    name: str, type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "bad.jsonl").write_text("{not json\n")
    words, sentence = BAD[name]
    words = tuple(w.replace("BASE", str(tiny_base)).replace("EMPTY", str(empty)) for w in words)
    code, out, said = type_in("inspect", "model", *words)
    assert (code, out) == (2, "")
    assert sentence in said
    assert "Traceback" not in said


def test_a_folder_of_somebody_else_is_left_alone(type_in: Type, tiny_base: Path) -> None:
    Path("mine").mkdir()
    Path("mine/report.md").write_text("mine")
    code, _, said = type_in("inspect", "model", "--model", tiny_base, "--output", "mine")
    assert code == 2
    assert "is of no report of this command" in said
    assert Path("mine/report.md").read_text() == "mine"


def test_a_report_is_replaced(type_in: Type, tiny_base: Path) -> None:
    for _ in range(2):
        assert type_in("inspect", "model", "--model", tiny_base, "--kinds", "nf4")[0] == 0


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
    found = json.loads(Path("inspect-model/report.json").read_text())
    fit = [m["module"] for m in found["matrices"] if "nf4 128" in m["errors"]]
    assert fit == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_a_missing_weight_is_no_number_out_of_thin_air(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    code, _, said = type_in("inspect", "model", "--model", base)
    assert code == 2
    assert "does not hold 1 of the weights" in said
