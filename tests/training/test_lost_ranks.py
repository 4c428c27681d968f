"""Two processes through gloo: what one of them meets, both answer alike, and neither hangs.

Whole commands, as ``qlora-pl fit`` with ``trainer.devices: 2`` starts them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
import warm
import yaml

from qlora_pl.training.processes.agreement import FAILED, GO_ON, RankAgreement
from qlora_pl.training.processes.lost_ranks import lost_rank
from qlora_pl.training.run_folders.run_folder import newest_verified, step_of

TESTS = Path(__file__).parent.parent
ENVIRONMENT = {
    "PYTHONPATH": f"{TESTS}:{TESTS.parent}",
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
}


# -- agreement -------------------------------------------------------------------------------------


def exchange_words(rank: int, folder: Path) -> None:
    """Words of two ranks in five calls, then a partner that is gone."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    agreement = RankAgreement(2, timedelta(seconds=30))
    words = [0, 0, 15, 0, 0] if rank else [0, 0, 0, 0, 0]
    heard = [agreement.exchange(word) for word in words]
    said = {
        "heard": heard,
        "gathered": agreement.gather(rank),
        "agreed": [agreement.agree(10 * rank), agreement.agree(FAILED if rank == 0 else 15)],
    }
    if rank:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        agreement.agree(0)
    except RuntimeError as error:
        trainer = SimpleNamespace(world_size=2, global_rank=0)
        trainer.strategy = SimpleNamespace(launcher=None)
        said["lost"] = str(lost_rank(error, trainer))
    (folder / "said.json").write_text(json.dumps(said))


def test_ranks_agree_on_the_greatest_word_one_call_later_and_notice_a_dead_one(
    tmp_path: Path,
) -> None:
    """The signal of rank 1, handed in with the third call, counts in the fourth, on both."""
    server = warm.server()
    ranks = [server.Process(target=exchange_words, args=(rank, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, -signal.SIGKILL]
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["heard"] == [0, 0, 0, 15, 0]
    assert said["gathered"] == [0, 1]
    assert said["agreed"] == [10, FAILED]
    assert said["lost"].startswith("Another process of this run is gone")


def test_a_process_alone_hears_itself_at_once() -> None:
    agreement = RankAgreement()
    assert agreement.exchange(15) == 15
    assert agreement.agree(GO_ON) == GO_ON
    assert agreement.gather("x") == ["x"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("Timed out waiting")])
def test_other_errors_are_not_taken_for_a_lost_rank(error: Exception) -> None:
    trainer: Any = SimpleNamespace(world_size=2, strategy=SimpleNamespace(launcher=None))
    assert lost_rank(error, trainer) is None


# -- whole commands --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path) -> Path:
    """Two epochs of five micro-batches on each of two processes, in steps of 2, 2 and 1."""
    folder = tmp_path_factory.mktemp("workplace")
    experiment = {
        "seed_everything": 3,
        "model": {
            "model_name_or_path": str(tiny_base),
            "lora": {"r": 4, "dropout": 0.1},
            "optimizer": {"lr": 1.0e-2},
            "gradient_checkpointing": False,
        },
        "data": {
            "sources": [{"path": str(rows_file)}],
            "template": "guanaco",
            "val_size": 2,
            "batch_size": 2,
        },
        "samples": {"num_prompts": 0},
        "checkpoint": {"every_n_steps": 100, "keep_best": 0},
        "run": {"timeout_seconds": 120},
        "trainer": {
            "max_epochs": 2,
            "accumulate_grad_batches": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "accelerator": "cpu",
            "devices": 2,
        },
    }
    (folder / "two.yaml").write_text(yaml.safe_dump(experiment))
    return folder


def fit(workplace: Path, name: str, *words: str, harm: Any = None) -> Any:
    """Run the command; ``harm`` is a callback of ``killing`` with its settings."""
    words = ("fit", "--config", "two.yaml", "--run.name", name, *words)
    for class_name, settings in ({} if harm is None else harm).items():
        callback = {"class_path": f"killing.{class_name}", "init_args": settings}
        words += ("--trainer.callbacks+", json.dumps(callback))
    return subprocess.run(
        [sys.executable, "-m", "qlora_pl", *words],
        cwd=workplace,
        env=os.environ
        | {
            "PYTHONPATH": f"{TESTS}:{TESTS.parent}",
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=400,
    )


def run_folder(workplace: Path, name: str) -> Path:
    return workplace / "runs" / name / "version_0"


def adapter(workplace: Path, name: str) -> bytes:
    return (run_folder(workplace, name) / "adapter/adapter_model.safetensors").read_bytes()


def sentences(ended: Any) -> list[str]:
    assert "Traceback" not in ended.stderr, ended.stderr
    return [line for line in ended.stderr.splitlines() if line.startswith("qlora-pl: ")]


def newest_step(workplace: Path, name: str) -> int:
    newest = newest_verified(run_folder(workplace, name))
    assert newest is not None
    return step_of(newest)


@pytest.fixture(scope="module")
def whole(workplace: Path) -> bytes:
    """The adapter of the uninterrupted run."""
    done = fit(workplace, "whole")
    assert done.returncode == 0, done.stderr
    return adapter(workplace, "whole")


def assert_continues(workplace: Path, name: str, whole: bytes) -> None:
    resumed = fit(workplace, name, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert adapter(workplace, name) == whole


def assert_other_ends(workplace: Path) -> None:
    """The second process is gone; what nobody has asked for its exit code yet is a zombie."""
    status = Path(f"/proc/{(workplace / 'rank1.pid').read_text()}/status")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if "State:\tZ" in status.read_text():
                return
        except OSError:
            return
        time.sleep(0.1)
    raise AssertionError(status.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_both_after_the_same_micro_batch(
    workplace: Path, whole: bytes, rank: int
) -> None:
    """Sent in micro-batch 2, heard with the next: the end of the second step, and of the window."""
    name = f"told-{rank}"
    harm = {"KillAt": {"micro_batch": 2, "number": int(signal.SIGTERM), "rank": rank}}
    stopped = fit(workplace, name, harm=harm)
    assert stopped.returncode == 143, stopped.stderr
    assert sentences(stopped) == ["qlora-pl: Stopped at step 2; continue with --ckpt_path last."]
    assert_continues(workplace, name, whole)


@pytest.mark.slow
def test_ranks_that_share_a_model_stop_alike_and_save_it_whole(workplace: Path) -> None:
    """Under FSDP2 a rank that stopped alone would leave the other in the middle of a forward.

    The second start is told before the last samples are drawn, which both ranks do together.
    """
    words = ("--trainer.strategy", "fsdp2", "--samples.num_prompts", "1")
    done = fit(workplace, "shared-whole", *words)
    assert done.returncode == 0, done.stderr
    name = "shared"
    for resume, micro_batch, step in (((), 2, 2), (("--ckpt_path", "last"), 9, 6)):
        harm = {"KillAt": {"micro_batch": micro_batch, "number": int(signal.SIGUSR1), "rank": 1}}
        stopped = fit(workplace, name, *words, *resume, harm=harm)
        assert stopped.returncode == 143, stopped.stderr
        assert newest_step(workplace, name) == step
    resumed = fit(workplace, name, *words, "--ckpt_path", "last")
    assert resumed.returncode == 0, resumed.stderr
    assert adapter(workplace, name) == adapter(workplace, "shared-whole")
    asked = (run_folder(workplace, name) / "samples.jsonl").read_text()
    assert asked == (run_folder(workplace, "shared-whole") / "samples.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("killed-in-a-step", {"KillAt": {"micro_batch": 3, "rank": 1}}),
        ("killed-in-a-save", {"KillInSave": {"micro_batch": 5, "rank": 1}}),
    ],
)
def test_a_rank_that_is_killed_ends_the_run_with_a_sentence(
    workplace: Path, whole: bytes, name: str, harm: Any
) -> None:
    ended = fit(workplace, name, "--checkpoint.every_n_steps", "1", harm=harm)
    assert ended.returncode == 1, ended.stderr
    assert sentences(ended) == [
        "qlora-pl: Process 1 of this machine was killed (SIGKILL); continue with --ckpt_path last."
    ]
    assert newest_step(workplace, name) in (1, 4)
    assert_continues(workplace, name, whole)


@pytest.mark.slow
def test_the_others_end_when_the_first_is_killed(workplace: Path, whole: bytes) -> None:
    name = "first-killed"
    harm = {"NotePid": {}, "KillAt": {"micro_batch": 3, "rank": 0}}
    ended = fit(workplace, name, harm=harm)
    assert ended.returncode == -signal.SIGKILL
    assert_other_ends(workplace)
    assert_continues(workplace, name, whole)


@pytest.mark.slow
def test_a_rank_that_stands_still_is_given_up(workplace: Path, whole: bytes) -> None:
    name = "stalled"
    harm = {"NotePid": {}, "KillAt": {"micro_batch": 3, "number": int(signal.SIGSTOP), "rank": 1}}
    ended = fit(workplace, name, "--run.timeout_seconds", "30", harm=harm)
    assert ended.returncode == 1, ended.stderr
    (sentence,) = sentences(ended)
    assert "did not answer within run.timeout_seconds" in sentence
    assert_other_ends(workplace)
    assert_continues(workplace, name, whole)


@pytest.mark.slow
def test_no_number_in_one_rank_stops_all_at_the_same_step(workplace: Path) -> None:
    name = "nan"
    ended = fit(workplace, name, harm={"NanAt": {"micro_batch": 2, "rank": 1}})
    assert ended.returncode == 1, ended.stderr
    told = sentences(ended)
    assert told
    assert all("Step 2: the loss is nan" in sentence for sentence in told)
    assert newest_step(workplace, name) == 1


@pytest.mark.slow
def test_a_save_that_fails_on_the_first_rank_ends_all_with_its_sentence(
    workplace: Path, whole: bytes
) -> None:
    name = "full"
    words = ("--checkpoint.every_n_steps", "2")
    ended = fit(workplace, name, *words, harm={"NotePid": {}, "FullDiskAt": {"step": 2}})
    assert ended.returncode == 1, ended.stderr
    told = sentences(ended)
    assert sum("The disk is full" in sentence for sentence in told) == 1
    assert all("full" in sentence or "first rank" in sentence for sentence in told)
    assert_other_ends(workplace)
    assert_continues(workplace, name, whole)
