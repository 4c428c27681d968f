"""``qlora-pl prove-resume`` as it is typed, over real runs on a tiny base."""

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

from qlora_pl.proof.command import _parse
from qlora_pl.proof.cut import RECORD

ROOT = Path(__file__).parents[2]


@pytest.fixture
def words(tmp_path: Path, tiny_base: Path, rows_file: Path) -> list[str]:
    """A run of sixteen rows a step, five micro-batches an epoch."""
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"model: {{model_name_or_path: '{tiny_base}', lora: {{r: 4, dropout: 0.1}}}}\n"
        f"data: {{sources: '{rows_file}', template: guanaco, val_size: 2, max_length: 64}}\n"
        "trainer: {accelerator: cpu, max_epochs: 2}\n"
        f"run: {{root: '{tmp_path / 'runs'}'}}\n"
    )
    return ["--config", str(config)]


def command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "qlora_pl", "prove-resume", *words]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(Path(__file__).parent)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def prove(words: list[str]) -> tuple[int, dict[str, Any], str]:
    """Exit code, the record as printed, and what was said besides."""
    done = subprocess.run(
        command([*words, "--json"]), env=environment(), capture_output=True, text=True
    )
    record = json.loads(done.stdout or "{}")
    return done.returncode, record, "\n".join([done.stderr, *record.get("details", [])])


@pytest.mark.slow
def test_a_run_is_proven_and_leaves_its_record_alone(words: list[str], tmp_path: Path) -> None:
    code, record, said = prove([*words, "--steps", "3"])
    assert code == 0, said
    assert record["verdict"] == "proven"
    assert record["is_repeatable"]
    assert record["is_inside_an_epoch"]
    assert record["num_differences"] == 0
    assert record["num_adapter_tensors"] == 28
    assert [run["exit_code"] for run in record["runs"]] == [0, 0, -signal.SIGKILL, 0]
    assert said.startswith("prove-resume: 4 runs of 3 steps")
    folder = tmp_path / "prove-resume" / "mine"
    assert json.loads((folder / RECORD).read_text()) == record
    assert not [path for path in folder.iterdir() if path.is_dir() and path.name != ".lock"]
    assert not (tmp_path / "runs").exists()  # the user's


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callback", "part", "name"),
    [
        ("ExtraDraw", "random state", "rank 0 (python.internal)"),
        ("OtherMoment", "optimizer state", "q_proj.lora_A.default.weight (state1)"),
    ],
)
def test_what_breaks_a_resume_is_named(
    words: list[str], callback: str, part: str, name: str, tmp_path: Path
) -> None:
    """The first tensor that the optimizer holds is layer 0's q_proj.lora_A."""
    code, record, said = prove([*words, f"--trainer.callbacks+=breaking.{callback}"])
    assert code == 1, said
    assert record["verdict"] == "not proven"
    assert record["is_repeatable"]
    first = record["first_difference"]
    assert (first["part"], first["step"]) == (part, record["killed_after_step"] + 1)
    assert first["name"].endswith(name)
    assert f"differs first at step {first['step']} in the {part}" in record["sentence"]
    assert (tmp_path / "prove-resume" / "mine" / "interrupted").is_dir()  # to be looked at


@pytest.mark.slow
def test_a_run_that_cannot_be_resumed_is_not_proven(words: list[str]) -> None:
    code, record, said = prove([*words, "--trainer.callbacks+=breaking.Fails"])
    assert code == 1, said
    assert record["verdict"] == "not proven"
    assert "does not resume" in record["sentence"]


@pytest.mark.slow
def test_chance_is_told_from_a_broken_resume(words: list[str]) -> None:
    code, record, said = prove([*words, "--trainer.callbacks+=breaking.Noise"])
    assert code == 0, said
    assert record["verdict"] == "within noise"
    assert not record["is_repeatable"]
    assert record["repeat_difference_in_learning_rates"] > 0
    assert "bytes cannot be compared" in record["sentence"]
    code, record, said = prove([*words, "--trainer.callbacks+=breaking.NoiseAndOtherMoment"])
    assert code == 1, said
    assert record["verdict"] == "not proven"


@pytest.mark.slow
def test_a_run_on_two_devices_is_proven(words: list[str]) -> None:
    code, record, said = prove([*words, "--trainer.devices", "2", "--trainer.strategy", "ddp"])
    assert code == 0, said
    assert record["verdict"] == "proven"


@pytest.mark.slow
def test_a_run_without_validation_rows_whose_epoch_is_one_step_is_proven(
    words: list[str], tmp_path: Path
) -> None:
    more = ["--data.val_size", "0", "--trainer.accumulate_grad_batches", "8"]
    other = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path / 'logs'}}}}}"
    code, record, said = prove([*words, *more, "--trainer.logger", other])
    assert code == 0, said
    assert record["verdict"] == "proven"
    assert not record["is_inside_an_epoch"]
    assert not (tmp_path / "logs").exists()  # the user's logger is not written to


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_proof_that_is_stopped_takes_its_runs_along(
    words: list[str], tmp_path: Path, number: int
) -> None:
    process = subprocess.Popen(
        command(words),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A shell that starts something in the background lets it ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    root = tmp_path / "prove-resume" / "mine" / "uninterrupted"
    deadline = time.monotonic() + 120
    while not root.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert runs_under(root)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert not runs_under(root)


def runs_under(root: Path) -> list[int]:
    """Numbers of the processes whose command names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(root).encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


# -- mistakes --------------------------------------------------------------------------------------


MISTAKES = {
    "steps": (["--steps", "1"], "--steps: must be at least 2, one before the kill"),
    "own flag": (["--folde", "x"], "no flag is called '--folde'; did you mean '--folder'?"),
    "rehearsal": (["--trainer.fast_dev_run", "true"], "trainer.fast_dev_run: a rehearsal"),
    "nodes": (["--trainer.num_nodes", "2"], "trainer.num_nodes: prove-resume starts its runs on"),
    "start": (["--ckpt_path", "last"], "ckpt_path: prove-resume begins its runs anew, got 'last'"),
}


@pytest.fixture
def typed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> Any:
    """Types the command in this process."""
    from qlora_pl.__main__ import main

    def type_in(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["qlora-pl", "prove-resume", *words, *more])
        capsys.readouterr()
        code = main()
        return code, capsys.readouterr().err

    return type_in


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_started(
    name: str, typed: Any, tmp_path: Path
) -> None:
    more, sentence = MISTAKES[name]
    code, said = typed(*more)
    assert code == 2
    assert sentence in said
    assert "Traceback" not in said
    assert not (tmp_path / "prove-resume").exists()


@pytest.mark.filterwarnings("ignore:.*")
def test_a_folder_that_holds_something_else_is_left_alone(typed: Any, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "uninterrupted").write_text("of mine")
    code, said = typed("--folder", str(tmp_path / "notes"))
    assert code == 2
    assert "holds something else than a proof" in said
    assert (tmp_path / "notes" / "uninterrupted").read_text() == "of mine"


@pytest.mark.slow
def test_a_mistake_that_only_fit_finds_is_told_in_its_words(
    words: list[str], rows_file: Path
) -> None:
    code, _, said = prove([*words, "--data.max_length", "4"])
    assert code == 2, said
    assert "data." in said
    assert "Traceback" not in said


def test_the_run_s_own_flags_are_left_for_its_parser() -> None:
    options, rest = _parse(["--config", "x.yaml", "--steps", "6", "--run.root", "r", "--json"])
    assert (options.steps, options.json, options.folder) == (6, True, None)
    assert rest == ["--config", "x.yaml", "--run.root", "r"]
