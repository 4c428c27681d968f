"""A checkpoint that is quantised already is read as it is, or one sentence says what it holds.

The checkpoints are made by plain transformers, and of what this project quantised; the tensors of
their files are the expected values.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import Killed
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from conftest import CHAT_TEMPLATE, save_base, save_tokenizer
from families import BY_NAME
from plain_peft import reload_with_plain_peft
from safetensors.torch import load_file, save_file
from small_runs import fit, logits, one_thread  # noqa: F401
from torch import Tensor, nn

from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.identity import identify_base
from qlora_pl.modeling.base.prequantized import is_prequantized, make_plan
from qlora_pl.modeling.base.quantization import QuantizationConfig
from qlora_pl.modeling.base.quantization_plan import build_skeleton
from qlora_pl.modeling.loading.base_loading import LoadedBase, load_base

CPU = torch.device("cpu")
HELD = {
    "nf4": {"quant_type": "nf4", "double_quant": False},
    "nf4+dq": {"quant_type": "nf4", "double_quant": True},
    "fp4": {"quant_type": "fp4", "double_quant": False},
    "nf4 in words": {"quant_type": "nf4", "double_quant": False, "storage_dtype": "bfloat16"},
    "int8": {"quant_type": "int8"},
}

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs happen in this process


def load(folder: Path, **settings: Any) -> LoadedBase:
    config = QuantizationConfig(**{"compute_dtype": "float32", "cache": False} | settings)
    plan = make_plan(folder, build_skeleton(folder), config)
    return load_base(identify_base(str(folder), None, None), config, plan, device=CPU)


def save_quantized(
    base: Path,
    folder: Path,
    shard: str = "1GB",
    skip: list[str] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **held: Any,
) -> Path:
    """What a plain transformers program leaves behind after ``save_pretrained``."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if held["quant_type"] == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=held["quant_type"],
            bnb_4bit_use_double_quant=held["double_quant"],
            bnb_4bit_compute_dtype="float16",
            bnb_4bit_quant_storage=held.get("storage_dtype", "uint8"),
            llm_int8_skip_modules=skip,
        )
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder, adds_bos=True, chat_template=CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Any:
    """The folder of the tiny base under a quantisation, made when it is first asked for."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("quantised") / "model"
            made[name] = save_quantized(tiny_base, folder, **HELD[name])
        return made[name]

    return get


def file_tensors(folder: Path) -> dict[str, Tensor]:
    files = [load_file(path) for path in folder.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


def assert_holds_the_files_tensors(loaded: LoadedBase, folder: Path, num_packed: int) -> None:
    """Every parameter and statistic is what lies in the file, bit for bit."""
    tensors = file_tensors(folder)
    assert loaded.source == "quantised already"
    assert len(loaded.plan.quantized) == num_packed
    for name in loaded.plan.quantized:
        weight: Any = loaded.model.get_parameter(name)
        stored = tensors[name]
        assert weight.dtype == stored.dtype
        assert torch.equal(weight.view(torch.uint8), stored.view(torch.uint8))
        if weight.dtype == torch.int8:
            layer: Any = loaded.model.get_submodule(name.rpartition(".")[0])
            assert torch.equal(layer.state.SCB, tensors[name.replace("weight", "SCB")])
            continue
        state = weight.quant_state
        assert torch.equal(state.absmax, tensors[f"{name}.absmax"])
        assert torch.equal(state.code, tensors[f"{name}.quant_map"])
        if state.nested:
            assert torch.equal(state.state2.absmax, tensors[f"{name}.nested_absmax"])
            assert torch.equal(state.state2.code, tensors[f"{name}.nested_quant_map"])
    for name, parameter in loaded.model.named_parameters():
        if name not in loaded.plan.quantized and name in tensors:
            assert torch.equal(parameter, tensors[name].to(parameter.dtype)), name


def packed_layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Linear4bit | Linear8bitLt)]


# --- what is loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HELD)
def test_what_plain_transformers_saved_loads_bit_for_bit(
    kind: str, prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source: the files' tensors, and plain transformers' logits in the same types."""
    from transformers import AutoModelForCausalLM

    held = HELD[kind] | {"compute_dtype": "bfloat16"}
    monkeypatch.setenv("QLORA_PL_CACHE", str(tmp_path / "cache"))
    folder = prepared(kind)
    assert is_prequantized(folder)
    loaded = load(folder, **held, cache=True)
    assert_holds_the_files_tensors(loaded, folder, 14)
    assert not (tmp_path / "cache" / "packed").exists()  # it is packed where it lies
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for layer in packed_layers(plain):
        layer.support_avx512bf16_for_cpu = False
        layer.compute_dtype = torch.bfloat16
    assert torch.equal(logits(loaded.model), logits(plain))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["nf4+dq", "nf4 in words"])
def test_types_are_the_runs_and_not_the_checkpoints(compute: str, kind: str, prepared: Any) -> None:
    """The checkpoint was made to be multiplied in float16, with its rest in bfloat16."""
    loaded = load(prepared(kind), **HELD[kind], compute_dtype=compute)
    dtype = getattr(torch, compute)
    assert {layer.compute_dtype for layer in packed_layers(loaded.model)} == {dtype}
    rest = {p.dtype for n, p in loaded.model.named_parameters() if n not in loaded.plan.quantized}
    assert rest == {dtype}
    assert logits(loaded.model).dtype == dtype


def test_several_files_are_read(tiny_base: Path, tmp_path: Path) -> None:
    folder = save_quantized(tiny_base, tmp_path / "model", shard="20KB", **HELD["nf4+dq"])
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_holds_the_files_tensors(load(folder), folder, 14)


@pytest.mark.parametrize("kind", ["nf4+dq", "int8"])
def test_what_the_checkpoint_left_unquantised_stays_so(
    kind: str, tiny_base: Path, tmp_path: Path
) -> None:
    skip = ["lm_head", "model.layers.1.mlp.down_proj", "q_proj"]
    folder = save_quantized(tiny_base, tmp_path / "model", skip=skip, **HELD[kind])
    loaded = load(folder, **HELD[kind])
    assert_holds_the_files_tensors(loaded, folder, 11)
    kept = {name for name, role in loaded.plan.kept.items() if role == "linear"}
    assert kept == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }
    assert load(folder, **HELD[kind], skip_modules=("q_proj",)).plan == loaded.plan


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    folder = save_quantized(base, tmp_path / "model", **HELD["nf4+dq"])
    loaded = load(folder)
    assert_holds_the_files_tensors(loaded, folder, 14)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ["nf4+dq", "int8"])
def test_gpt2_comes_as_its_transposed_matrices_were_packed(kind: str, tmp_path: Path) -> None:
    base = BY_NAME["GPT-2"].save(tmp_path / "base")
    folder = save_quantized(base, tmp_path / "model", **HELD[kind])
    loaded = load(folder, **HELD[kind])
    assert_holds_the_files_tensors(loaded, folder, 8)
    if kind == "nf4+dq":
        quantised_here = load(base, **HELD[kind])
        assert torch.equal(logits(loaded.model), logits(quantised_here.model))


# --- runs over it ---------------------------------------------------------------------------------


def falcon_packed_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What this project quantises of a Falcon, saved by transformers."""
    monkeypatch.setenv("QLORA_PL_CACHE", str(folder / "cache"))
    loaded: Any = load(BY_NAME["Falcon (rotary)"].save(folder / "base"))
    packed = folder / "packed"
    loaded.model.save_pretrained(packed)
    save_tokenizer(packed, adds_bos=True, chat_template=CHAT_TEMPLATE)
    return packed


@pytest.mark.parametrize("kind", ["nf4", "int8", "Falcon"])
def test_a_killed_run_ends_in_the_same_bytes_and_plain_peft_reads_them(
    kind: str, tiny_base: Path, tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-6 of the largest logit: the same codes in the same types."""
    held = HELD.get(kind, {})
    if kind == "Falcon":
        base = falcon_packed_here(tmp_path, monkeypatch)
    else:  # float32, because plain transformers takes a quantised checkpoint's types
        base = save_quantized(tiny_base, tmp_path / "base", dtype=torch.float32, **held)
    module = fit(tmp_path / "whole", base, rows_file, **held)
    assert module.base is not None
    assert module.base.source == "quantised already"
    with pytest.raises(Killed):
        fit(tmp_path / "killed", base, rows_file, kill_at=2, **held)
    fit(tmp_path / "killed", base, rows_file, **held)
    weights = "adapter/adapter_model.safetensors"
    whole, killed = ((tmp_path / run / weights).read_bytes() for run in ("whole", "killed"))
    assert whole == killed
    expected = logits(module.base.model)
    reloaded = reload_with_plain_peft(tmp_path / "whole" / "adapter")
    for layer in packed_layers(reloaded):
        layer.compute_dtype = torch.float32  # plain transformers takes the checkpoint's
    tolerance = 1e-6 * float(expected.abs().max())
    torch.testing.assert_close(logits(reloaded), expected, rtol=0, atol=tolerance)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "asked", "words"),
    [
        ("nf4", {}, "with double_quant: false;"),
        ("nf4+dq", {"double_quant": False}, "with double_quant: true;"),
        ("fp4", {"double_quant": False}, "with quant_type: fp4;"),
        ("nf4+dq", {"block_size": 128}, "with block_size: 64;"),
        ("nf4 in words", {"double_quant": False}, "with storage_dtype: bfloat16;"),
        ("nf4+dq", {"quant_type": "int8"}, "with quant_type: nf4"),
        ("int8", {}, "with quant_type: int8;"),
        ("int8", {"quant_type": "none"}, "with quant_type: int8;"),
        ("nf4+dq", {"quant_type": "none"}, "with quant_type: nf4"),
    ],
)
def test_another_quantisation_is_refused_with_what_it_holds(
    kind: str, asked: dict[str, Any], words: str, prepared: Any
) -> None:
    folder = prepared(kind)
    with pytest.raises(ConfigurationError) as caught:
        load(folder, **asked)
    (sentence,) = caught.value.problems
    assert sentence.startswith(f"model.quantization: '{folder}' is quantised already, with ")
    assert words in sentence
    held = dict(part.split(": ") for part in sentence.split("with ")[1].split(";")[0].split(", "))
    settings = {
        key: {"true": True, "false": False}.get(value, value) for key, value in held.items()
    }
    if "block_size" in settings:
        settings["block_size"] = int(settings["block_size"])
    assert load(folder, **asked | settings).source == "quantised already"  # as the sentence says


def test_a_quantised_matrix_cannot_be_skipped_and_a_misspelt_one_is_named(prepared: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"skip_modules: .*q_proj.weight' is quantised in"):
        load(prepared("nf4+dq"), skip_modules=("q_proj",))
    with pytest.raises(ConfigurationError, match=r"skip_modules: no weight matrix .* q_porj;"):
        load(prepared("nf4+dq"), skip_modules=("q_porj",))


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8"},
        {"bits": 4},
    ],
)
def test_what_others_quantised_is_one_sentence(
    settings: dict[str, Any], tiny_base: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    with pytest.raises(ConfigurationError) as caught:
        load(folder)
    (sentence,) = caught.value.problems
    assert str(folder) in sentence
    assert f"quantised by {settings.get('quant_method', 'another program')}," in sentence


def test_codes_under_other_names_are_one_sentence(prepared: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared("nf4+dq"), tmp_path / "copy"))
    tensors = file_tensors(folder)
    renamed = {name.replace("model.layers", "model.blocks"): t for name, t in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError) as caught:
        load(folder)
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("kind", ["nf4+dq", "int8"])
@pytest.mark.parametrize("lost", ["weight", "scales"])
def test_codes_or_scales_that_are_missing_are_one_sentence(
    kind: str, lost: str, prepared: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(prepared(kind), tmp_path / "copy"))
    tensors = file_tensors(folder)
    owner = "model.layers.1.mlp.up_proj"
    scales = f"{owner}.SCB" if kind == "int8" else f"{owner}.weight.absmax"
    del tensors[f"{owner}.weight" if lost == "weight" else scales]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError) as caught:
        load(folder, **HELD[kind])
    (sentence,) = caught.value.problems
    assert "\n" not in sentence
    assert owner in sentence


def test_pickled_codes_are_one_sentence(prepared: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared("nf4+dq"), tmp_path / "copy"))
    torch.save(file_tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"pickled") as caught:
        load(folder)
    assert len(caught.value.problems) == 1


def test_an_int8_checkpoint_with_another_outlier_threshold_is_refused(
    prepared: Any, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(prepared("int8"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = 0.0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="llm_int8_threshold") as caught:
        load(folder, quant_type="int8")
    assert len(caught.value.problems) == 1
