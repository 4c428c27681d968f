"""``qlora-pl bench`` as it is typed: what it measures, says and refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_runs
import pytest
import torch
from bench_runs import FEW, SMALL, Bench, refused

from qlora_pl.benching.measuring import LARGE_SETUP
from qlora_pl.benching.parts import PARTS
from qlora_pl.benching.protocol import TINY

bench = bench_runs.bench
pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # whole runs in this process


def test_a_shape_is_measured_from_nothing_but_its_sizes(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    words = ("--shape", "tiny", *SMALL, *FEW, "--repeats", 2)
    code, out, err = bench(*words, "--json", "--out", "record.json")
    assert code == 0, err
    record = json.loads(out)
    assert record == json.loads(Path("record.json").read_text())
    speed, compute = record["speed"], record["compute"]
    assert len(record["loss"]["of_steps"]) == 1 + 2 * 2
    assert abs(record["loss"]["first"] - math.log(512)) < 0.5
    assert 0 < speed["trained_tokens_per_second"] < speed["tokens_per_second"]
    assert speed["tokens_per_second"] <= speed["padded_tokens_per_second"]
    assert len(speed["tokens_per_second_of_repeats"]) == 2
    assert 0 < compute["mfu"] < compute["hfu"]
    assert set(record["parts"]["seconds"]) == set(PARTS)
    shares = record["parts"]["shares"]
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[name] for name in PARTS if name != "communication") >= 0
    assert shares["communication"] == 0
    assert shares["dequantisation"] * shares["GEMM"] * shares["optimizer"] > 0
    assert record["memory"]["of_timed_steps"]
    assert record["memory"]["predicted"]["bytes"] > 0
    assert record["environment"]["versions"]["bitsandbytes"]
    assert not record["timing"]["follows_protocol"]
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny", tmp_path / "record.json"]


def test_what_is_printed_has_the_figures_and_ends_in_advice(bench: Bench, tiny_base: Path) -> None:
    code, out, _ = bench("--shape", tiny_base, *SMALL, *FEW, "--packing", "false")
    assert code == 0
    for words in ("tokens/s", "MFU", "HFU", "4 operations", "median", "p90", "dequantisation"):
        assert words in out
    assert "bench: fewer than 5 steps" in out


def test_a_users_run_is_measured_with_its_own_words(
    bench: Bench, tiny_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    words = ("--model.model_name_or_path", tiny_base, "--data.sources", rows_file)
    words += ("--model.lora.r", 8, "--trainer.accelerator", "cpu", "--data.batch_size", 2)
    words += ("--trainer.accumulate_grad_batches", 2, "--run.root", tmp_path / "runs")
    (tmp_path / "run.yaml").write_text("model:\n  gradient_checkpointing: false\n")
    code, out, err = bench("--config", "run.yaml", *words, *FEW, "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["config"] == ["run.yaml"]
    assert len(record["loss"]["of_steps"]) == 3
    assert record["speed"]["samples_per_second"] > 0
    assert record["memory"]["predicted"]["bytes"] > 0
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shape", "llama2-7"), "llama2-7b"),
        (("--shape", "qwen2.5-7"), "qwen2.5-7b"),
        (("--shape",), "--shape: expected one argument"),
        (("--shape", "llama-1b", "--seq", 0), "--seq: must be at least 8, got 0"),
        (
            ("--shape", "llama-1b", "--tokens-per-micro", 0),
            "--tokens-per-micro: must be at least 1",
        ),
        (("--shape", "llama-1b", "--accumulation", 0), "--accumulation: must be at least 1"),
        (("--shape", "llama-1b", "--repeats", 0), "--repeats: must be at least 1"),
        (("--shape", "llama-1b", "--steps", "many"), "--steps"),
        (("--shape", "llama-1b", "--tokens-per-micro", 1000), "no multiple of --seq 512"),
        (("--shape", "llama-1b", "--tokens-per-micro", 100), "take 512, or lower --seq"),
        (("--shape", "llama-1b", "--steps", 0), "--steps: must be at least 1"),
        (("--shape", "llama-1b", "--warmup", 0), "--warmup: must be at least 1"),
        (("--shape", "llama-1b", "--r", 0), "--r: must be at least 1"),
        (("--shape", "llama-1b", "--lengths", "novel"), "--lengths: invalid choice: 'novel'"),
        (("--shape", "llama-1b", "--tokens", 8), "no flag is called --tokens"),
        (("--shape", "llama-1b", "--against", "axolotl"), "--against: invalid choice"),
        (("--shape", "llama-1b", "--against-accumulation", 4), "add --against"),
        (("--shape", "llama-1b", "--out", "."), "is a folder"),
        (("--shape", "llama-1b", "--out", "no/file"), "make it first"),
        (("--shape", "llama-1b", "--config", "x.yaml"), "two things to measure"),
        (("--steps", 3), "say what to measure"),
        (("--config", "no.yaml"), "no.yaml"),
        (("--config", "."), "."),
        (("--config",), "--config"),
        (("--config", "run.yaml", "--tokens-per-micro", 8), "belongs to --shape"),
        (("--config", "run.yaml", "--step", 8), "did you mean '--steps'"),
        (("--protocol", "gpu"), "name a folder"),
        (("--protocol", "gpu", "--out", "x", "--only", "7b-520"), "did you mean '7b-512'"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence(bench: Bench, words: Any, said: str) -> None:
    assert said in refused(bench(*words))


def test_rows_longer_than_the_models_positions_are_refused(bench: Bench) -> None:
    err = refused(bench("--shape", "llama-1b", "--seq", 4096, "--tokens-per-micro", 4096))
    assert "4096 tokens are more than the 2048 positions of 'llama-1b'" in err


def test_a_shape_with_an_encoder_is_refused(bench: Bench) -> None:
    assert "measure a run of yours" in refused(bench("--shape", "t5-small"))


def test_a_folder_without_sizes_is_refused(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(bench("--shape", "empty"))
    (tmp_path / "config.json").write_text("{}")
    assert "model_type" in refused(bench("--shape", "config.json"))
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in refused(bench("--shape", "config.json"))


def test_a_file_of_something_else_is_never_replaced(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "thesis.json").write_text('{"chapter": 1}')
    err = refused(bench("--shape", "llama-1b", "--out", "thesis.json"))
    assert "no record of this command" in err
    assert "chapter" in (tmp_path / "thesis.json").read_text()


def test_a_program_that_is_not_installed_is_named_with_its_command(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trl" else name)
    err = refused(bench("--shape", "llama-1b", "--against", "trl"))
    assert "trl is not installed; run: pip install 'qlora-pl[bench]'" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_only_a_gpu_can_do_is_refused_without_one(bench: Bench, tmp_path: Path) -> None:
    assert "no CUDA device" in refused(bench("--shape", "llama-1b", "--device", "cuda"))
    assert "only a GPU's" in refused(bench("--shape", "llama-1b", "--memory-limit", 4))
    assert "--rehearse" in refused(bench("--protocol", "gpu", "--out", tmp_path / "records"))
    assert not (tmp_path / "records").exists()


def test_weights_that_do_not_fit_are_refused_before_any_is_drawn(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_pl.benching.fitting.free_bytes", lambda device: 10**10)
    err = refused(bench("--shape", "llama2-70b"))
    assert "take 3" in err
    assert "10.0 GB are free" in err


def test_the_time_of_a_large_set_up_is_told_first(
    bench: Bench,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("qlora_pl.benching.measuring.LARGE_SETUP", 1.0)
    words = ("--shape", tiny_base, *SMALL, "--warmup", 1, "--steps", 1, "--profiled", 0)
    bench(*words)
    assert "weights are drawn and packed first, which takes about" in caplog.messages[0]
    assert LARGE_SETUP == 1e9


def test_a_run_that_does_not_compute_what_it_should_is_not_quoted(
    bench: Bench, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights forty times as large give a loss that is no guess."""
    monkeypatch.setattr("qlora_pl.benching.synthetic.LOGIT_DEVIATION", 100.0)
    monkeypatch.setattr("qlora_pl.benching.synthetic.STANDARD_DEVIATION", 0.8)
    words = ("--shape", tiny_base, *SMALL, "--warmup", 1, "--steps", 1, "--profiled", 0)
    code, out, _ = bench(*words)
    assert code == 1
    assert "do not quote this" in out


def test_help_names_the_flags_with_their_meaning(bench: Bench) -> None:
    code, out, _ = bench("--help")
    assert code == 0
    for flag in ("--shape", "--tokens-per-micro", "--against", "--protocol", "--config"):
        assert flag in out


def test_mistakes_are_told_without_importing_torch() -> None:
    code = (
        "import sys; sys.argv = ['qlora-pl', 'bench', '--shape', 'lama-7b']\n"
        "from qlora_pl.__main__ import main; code = main()\n"
        "assert code == 2 and 'torch' not in sys.modules, code"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "run.yaml"),
        ("model:\n  lora:\n    rank: 8\n", "rank"),
        ("just words", "run.yaml"),
        ("\x00", "run.yaml"),
    ],
    ids=repr,
)
def test_a_run_file_that_cannot_be_read_is_refused_as_by_fit(
    bench: Bench, tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert said in refused(bench("--config", "run.yaml"))
