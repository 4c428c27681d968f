"""``qlora-pl export --to gguf``, up to the converter; `test_llama_cpp.py` goes on from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_runs import load, twin_of
from conftest import save_base
from families import Saver

from exporting.test_plain_adapter import save_adapter
from qlora_pl.exporting import gguf_file, llama_cpp
from qlora_pl.exporting.distance import in_words
from qlora_pl.merging.scored_rows import held_out_rows
from qlora_pl.merging.scoring import Score

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole commands run in this process

Type = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No converter of this machine's own is found."""
    monkeypatch.delenv(llama_cpp.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


def sources(folder: Path, *lines: str) -> Path:
    """A source tree whose converters are these lines of Python."""
    folder.mkdir(parents=True)
    for name in (llama_cpp.MODEL_CONVERTER, llama_cpp.ADAPTER_CONVERTER):
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def test_a_merged_model_and_the_command_are_left_when_nothing_is_converted(
    type_in: Type, adapter: Path, tmp_path: Path
) -> None:
    tree = sources(tmp_path / "llama.cpp")
    code, out, said = type_in(
        *("export", "--adapter", adapter, "--to", "gguf", "--output", "out"),
        *("--force", "--llama-cpp", tree),
    )
    assert code == 0, said
    assert "| dequantized |" in out
    script = tree / llama_cpp.MODEL_CONVERTER
    command = f"python {script} out/merged --outfile out/model.gguf --outtype bf16"
    assert f"\n    {command}\n" in out
    assert (Path("out") / "merged/model.safetensors").is_file()
    record = json.loads(Path("out/export.json").read_text())
    assert (record["form"], record["stop_token_ids"]) == ("merged", [2])
    assert command in Path("out/README.md").read_text()
    assert out.rstrip().endswith("export: out")


def test_an_adapter_alone_says_how_far_it_is_from_what_was_trained(
    type_in: Type, adapter: Path, tiny_base: Path
) -> None:
    """Source: the two models as plain transformers and PEFT load them, and a sum in float64."""
    code, out, said = type_in(
        *("export", "--adapter", adapter, "--to", "gguf", "--form", "adapter", "--output", "out"),
        *("--threshold", "1e-6"),
    )
    assert code == 0, said
    assert f"    python {llama_cpp.ADAPTER_CONVERTER} out/adapter --base {tiny_base}" in out
    assert "--outfile out/adapter.gguf --outtype f32" in out
    record = json.loads(Path("out/export.json").read_text())
    assert record["score"]["kl_divergence"] == pytest.approx(
        divergence_over_16_bits(adapter, tiny_base), rel=1e-3
    )
    assert "export it merged into the 4-bit base that it was trained over" in out
    assert "nats a token (KL)" in Path("out/README.md").read_text()
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *("README.md", "adapter", "chat_template.jinja", "export.json")
    ]


def divergence_over_16_bits(adapter: Path, base: Path) -> float:
    """The same, without this project's loading of adapters."""
    import peft
    from transformers import AutoModelForCausalLM

    packed = twin_of(load(base), base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    models = [peft.PeftModel.from_pretrained(model, adapter).eval() for model in (packed, plain)]
    total, number = 0.0, 0
    for row in held_out_rows(adapter):
        with torch.no_grad():
            p, q = (
                model(row.input_ids[None]).logits[0, row.places].double().log_softmax(-1)
                for model in models
            )
        total += float((p.exp() * (p - q)).sum())
        number += len(row.places)
    return total / number


def test_the_recommendation_follows_the_threshold() -> None:
    found = Score(
        kl_divergence=0.04,
        top1_agreement=0.9,
        perplexity=8.0,
        trained_perplexity=7.5,
        tokens=100,
    )
    assert "(--form merged)" not in in_words(found, threshold=0.05)
    assert "(--form merged)" in in_words(found, threshold=0.03)
    assert "was not measured" in in_words(None, threshold=0.05)


def test_scores_are_minus_the_ranks_of_merges(tmp_path: Path) -> None:
    """By hand: "ab" is made first, "abc" by the second and the third merge."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    model = {
        "type": "BPE",
        "byte_fallback": True,
        "vocab": vocabulary,
        "merges": [["a", "b"], ["ab", "c"], "b c", ["a", "bc"]],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    assert gguf_file.merge_ranks(tmp_path) == {3: 0, 5: 1, 4: 2}
    assert gguf_file.lacks_scores(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    assert not gguf_file.lacks_scores(tmp_path)


def test_an_answer_ends_where_training_or_the_model_says(tmp_path: Path) -> None:
    assert gguf_file.stop_ids(tmp_path, []) == []
    path = tmp_path / "generation_config.json"
    for saved, expected in (
        ({}, []),
        ({"eos_token_id": 7}, [7]),
        ({"eos_token_id": [7, 8]}, [7, 8]),
    ):
        path.write_text(json.dumps(saved))
        assert gguf_file.stop_ids(tmp_path, []) == expected
    assert gguf_file.stop_ids(tmp_path, [3]) == [3]


def test_converters_are_found_where_they_are_named_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = llama_cpp.MODEL_CONVERTER
    assert llama_cpp.find_converter(name) is None
    usual = sources(tmp_path / llama_cpp.UNPACKED) / name
    assert llama_cpp.find_converter(name) == usual
    archive = sources(tmp_path / "archive" / llama_cpp.SOURCES) / name
    monkeypatch.setenv(llama_cpp.VARIABLE, str(tmp_path / "archive"))
    assert llama_cpp.find_converter(name) == archive
    named = sources(tmp_path / "named") / name
    assert llama_cpp.find_converter(name, str(named.parent)) == named


ALONE = ("--form", "adapter", "--to", "gguf", "--output", "x")
MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "no target": (("--model", "BASE", "--output", "x"), "--to: say for which engine"),
    "no output": (("--model", "BASE", "--to", "gguf"), "--output: name the folder"),
    "taken": (("--model", "BASE", "--to", "gguf", "--output", "taken"), "'taken' exists already"),
    "nowhere": (("--model", "BASE", "--to", "gguf", "--output", "no/x"), "there is no folder 'no'"),
    "target": (("--model", "BASE", "--to", "onnx", "--output", "x"), "invalid choice"),
    "no converter": (
        ("--model", "BASE", "--to", "gguf", "--output", "x", "--convert"),
        "convert_hf_to_gguf.py was not found",
    ),
    "no converter there": (
        ("--model", "BASE", "--to", "gguf", "--output", "x", "--llama-cpp", "taken"),
        "--llama-cpp: 'taken' holds no convert_hf_to_gguf.py",
    ),
    "not a model": (
        ("--model", "taken", "--to", "gguf", "--output", "x"),
        "'taken' is not a model folder; it has no config.json",
    ),
    "an adapter as a model": (
        ("--model", "ADAPTER", "--to", "gguf", "--output", "x"),
        "is an adapter; name it with --adapter",
    ),
    "a model as an adapter": (
        ("--adapter", "BASE", "--to", "gguf", "--output", "x"),
        "there is no adapter_config.json",
    ),
    "no adapter to leave alone": (
        ("--model", "BASE", "--form", "adapter", "--to", "gguf", "--output", "x"),
        "--form: adapter is for --adapter",
    ),
    "two adapters": (
        ("--adapter", "a=ADAPTER", "--adapter", "b=ADAPTER", "--to", "gguf", "--output", "x"),
        "--adapter: name one adapter folder",
    ),
    "precision": (
        ("--adapter", "ADAPTER", "--precision", "float32", "--to", "gguf", "--output", "x"),
        "--precision: is for answers",
    ),
    "tokens": (
        ("--model", "BASE", "--to", "gguf", "--output", "x", "--score-tokens", "-1"),
        "--score-tokens: must be 0 or more",
    ),
    "DoRA": (
        ("--adapter", "DORA", "--base", "BASE", *ALONE),
        "is a DoRA, which rescales rows of the base, which engines do not read of an adapter",
    ),
    "transposed": (
        ("--adapter", "GPT2", "--base", "GPT2BASE", *ALONE),
        "keeps its matrices transposed",
    ),
    "an architecture that llama.cpp lacks": (
        ("--model", "BASE", "--to", "gguf", "--output", "x", "--convert", "--llama-cpp", "FAILS"),
        "llama.cpp's convert_hf_to_gguf.py failed (exit code 1): INFO: reading | "
        "ERROR: Model Tiny is not supported",
    ),
    "a converter that writes nothing": (
        ("--model", "BASE", "--to", "gguf", "--output", "x", "--convert", "--llama-cpp", "SILENT"),
        "failed (exit code 0): it said nothing",
    ),
    "a converter that the system ended": (
        ("--model", "BASE", "--to", "gguf", "--output", "x", "--convert", "--llama-cpp", "KILLED"),
        "was ended by signal 9",
    ),
}


@pytest.fixture(scope="module")
def places(
    adapter: Path, tiny_base: Path, saved: Saver, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What stands for the capital letters above, the longest first."""
    root = tmp_path_factory.mktemp("places")
    found: dict[str, Any] = {
        "GPT2BASE": saved("GPT-2"),
        "GPT2": save_adapter(
            saved("GPT-2"), root / "gpt2", target_modules=["c_attn"], fan_in_fan_out=True
        ),
        "DORA": save_adapter(tiny_base, root / "dora", use_dora=True),
        "ADAPTER": adapter,
        "BASE": tiny_base,
        "FAILS": sources(
            root / "fails",
            "print('INFO: reading', flush=True)",
            "raise SystemExit('ERROR: Model Tiny is not supported')",
        ),
        "SILENT": sources(root / "silent"),
        "KILLED": sources(root / "killed", "import os", "os.kill(os.getpid(), 9)"),
    }
    return {name: str(place) for name, place in found.items()}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    type_in: Type, places: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "NEEDED", ())  # which an ordinary environment lacks
    Path("taken").mkdir()
    words, sentence = MISTAKES[kind]
    for name, place in places.items():
        words = tuple(word.replace(name, place) for word in words)
    code, out, said = type_in("export", *words)
    assert code == 2, said
    assert out == ""
    assert sentence in said
    assert "Traceback" not in said
    assert [path.name for path in Path().iterdir()] == ["taken"]


def test_a_package_that_is_missing_is_named_with_the_command_that_brings_it(
    type_in: Type, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_file, "NEEDED", ("gguf", "no_such_package"))
    to = ("--to", "gguf", "--output", "x", "--convert")
    code, _, said = type_in("export", "--model", tiny_base, *to)
    assert code == 2
    assert "need no_such_package; run: pip install 'qlora-pl[export]'." in said


def test_a_vocabulary_that_must_be_put_right_is_not_left_to_a_printed_command(
    type_in: Type, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    path = base / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["model"]["byte_fallback"] = True
    path.write_text(json.dumps(saved))
    code, _, said = type_in("export", "--model", base, "--to", "gguf", "--output", "x")
    assert code == 2
    assert "--convert: is needed for" in said


def test_a_base_that_is_stored_in_4_bits_is_refused(type_in: Type, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    path = base / "config.json"
    kind = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": kind}))
    code, _, said = type_in("export", "--model", base, "--to", "gguf", "--output", "x")
    assert code == 2
    assert "is stored in 4 or 8 bits, and engines read 16" in said
