"""``qlora-pl smoke`` as it is typed: every experiment, and runs of other kinds, from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import BY_NAME

from qlora_pl.smoke.reaper import processes_of

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
STEPS = ["configuration", "base", "tokenizer", "template", "data", "train", "resume", "validate"]
STEPS += ["generate", "merge", "reload"]


def smoke(*words: object, cwd: Path = ROOT) -> tuple[int, dict[str, Any], str]:
    """Exit code, the record, and what was said besides."""
    command = [sys.executable, "-m", "qlora_pl", "smoke", "--offline", "--json", *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def statuses(record: dict[str, Any]) -> dict[str, str]:
    return {step["step"]: step["status"] for step in record["steps"]}


def assert_passed(code: int, record: dict[str, Any], said: str, *left_out: str) -> None:
    expected = {step: "left out" if step in left_out else "passed" for step in STEPS}
    assert statuses(record) == expected, (record, said)
    assert code == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_passes_without_a_network(path: Path, tiny_base: Path) -> None:
    """Names of bases and datasets are the files' own; the quickstart's base is made elsewhere.

    The tiny one in its place has short words, so that its rows have more tokens.
    """
    other = ["--model.model_name_or_path", tiny_base, "--data.max_length", 256]
    words = other if path.stem == "quickstart" else []
    code, record, said = smoke("--config", path, *words)
    has_no_rows = path.stem in ("bloom7b1_prompts", "mistral7b_prompts")
    assert_passed(code, record, said, *(["validate"] if has_no_rows else []))
    is_hub = path.stem != "quickstart"
    assert bool(record["stand_ins"]) == is_hub
    assert not list(ROOT.glob("runs/smoke*"))


@pytest.fixture
def settings(tiny_base: Path, rows_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A small run, whose base lies in a folder."""
    return {
        "model": {"model_name_or_path": str(tiny_base), "lora": {"r": 4, "dropout": 0.1}},
        "data": {"sources": str(rows_file), "template": "guanaco", "max_length": 64},
        "trainer": {"max_steps": 100},
        "run": {"root": str(tmp_path / "runs")},
    }


def write(settings: dict[str, Any], place: Path) -> Path:
    path = place / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


OTHERS: dict[str, dict[str, Any]] = {
    "fsdp2 on four devices": {
        "trainer": {"strategy": "fsdp2", "devices": 4},
        "data": {"global_batch_size": 16, "batch_size": 2},
    },
    "fsdp2 with parts in host memory": {"trainer": {"strategy": "fsdp2_offload", "devices": 2}},
    "packed rows": {"data": {"packing": True}},
    "micro-batches by tokens": {"data": {"tokens_per_batch": 256}},
    "int8": {"model": {"quantization": {"quant_type": "int8"}}},
    "sixteen bits": {"model": {"quantization": {"quant_type": "none"}}},
    "every weight": {"model": {"quantization": {"quant_type": "none"}, "lora": {"method": "none"}}},
    "dora": {"model": {"lora": {"method": "dora"}}},
    "eva": {"model": {"lora": {"init": "eva"}}},
    "flash attention": {"model": {"attn_implementation": "flash_attention_2"}},
    "windows": {"data": {"window": 8, "val_sources": "ROWS", "val_size": 0}},
    "layers by number": {
        "model": {"lora": {"target_modules": [f"model.layers.{n}.mlp.up_proj" for n in (2, 3)]}}
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_run_of_another_kind_passes(
    name: str, settings: dict[str, Any], tmp_path: Path, rows_file: Path
) -> None:
    for group, values in OTHERS[name].items():
        for key, value in values.items():
            own = settings[group].get(key)
            new = str(rows_file) if value == "ROWS" else value
            settings[group][key] = own | new if isinstance(own, dict) else new
    if name == "layers by number":
        base = BY_NAME["LLaMA"].save(tmp_path / "deep", num_hidden_layers=4)
        settings["model"]["model_name_or_path"] = str(base)
    code, record, said = smoke("--config", write(settings, tmp_path), cwd=tmp_path)
    assert_passed(code, record, said, *(["merge"] if name == "every weight" else []))
    assert not (tmp_path / "runs").exists()
    if name.startswith("fsdp2"):
        assert "2 processes" in record["steps"][STEPS.index("train")]["said"]
    if name == "flash attention":
        assert any("flash_attention_2 needs a GPU" in note for note in record["not_tested"])
    if name == "layers by number":
        assert any(note.startswith("model.lora.target_modules") for note in record["not_tested"])


CALLBACKS = """
from lightning.pytorch import Callback
class AtOnce(Callback):
    def on_train_batch_end(self, *_):
        raise ValueError('the callback is broken')
class WhenResumed(Callback):
    def on_train_start(self, trainer, *_):
        if trainer.global_step > 0:
            raise RuntimeError('no way back')
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step", "sentence"),
    [
        ("AtOnce", "train", "fit: ValueError: the callback is broken"),
        ("WhenResumed", "resume", "fit: RuntimeError: no way back"),
    ],
)
def test_what_fails_in_training_is_told_in_the_words_of_its_error(
    name: str, step: str, sentence: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(CALLBACKS)
    settings["trainer"]["callbacks"] = [{"class_path": f"broken.{name}"}]
    command = [sys.executable, "-m", "qlora_pl", "smoke", "--offline"]
    command += ["--config", str(write(settings, tmp_path))]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(command, env=paths, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert sentence in done.stdout
    assert f"smoke: failed: {step}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_smoke_that_is_ended_in_training_leaves_nothing_and_another_goes_on(
    number: signal.Signals, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Two processes of each are training over gloo when one of the tests is ended."""
    settings["trainer"] |= {"strategy": "ddp", "devices": 2}
    path = write(settings, tmp_path)
    places = [tmp_path / "ended", tmp_path / "other"]
    command = [sys.executable, "-m", "qlora_pl", "smoke", "--offline", "--config", str(path)]
    processes = []
    for place in places:
        place.mkdir()
        variables = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(place)}
        processes.append(
            subprocess.Popen(
                command,
                env=variables | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        )
    ended, other = processes
    while not list(places[0].glob("*/runs/smoke/version_0/metrics.csv")):
        assert ended.poll() is None
        time.sleep(0.05)
    (folder,) = places[0].iterdir()
    assert len(processes_of(folder)) >= 2
    ended.send_signal(number)
    ended.communicate(timeout=60)
    given_up = time.monotonic() + 20
    while list(places[0].iterdir()) and time.monotonic() < given_up:
        time.sleep(0.05)
    assert list(places[0].iterdir()) == []
    assert processes_of(folder) == []
    out, _ = other.communicate(timeout=600)
    assert other.returncode == 0, out
    assert list(places[1].iterdir()) == []


@pytest.mark.slow
def test_rows_that_fit_are_shown_with_what_is_trained(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    _, record, _ = smoke("--config", write(settings, tmp_path), cwd=tmp_path)
    shown = "\n".join(record["steps"][STEPS.index("data")]["more"])
    assert "| ### Human: How many legs has animal" in shown
    assert "### Assistant:[[ It has" in shown
    assert shown.endswith("</s>]]")
