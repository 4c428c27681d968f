"""A job that SLURM ends and starts again loses nothing, in a real SLURM of one node."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launched import adapter_bytes, has_slurm, write_config
from one_node import Cluster, one_node_slurm

from qlora_pl.training.run_folders.run_folder import checkpoints_newest_first

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not has_slurm(), reason="there is no SLURM here (Debian: apt install slurm-wlm munge)"
    ),
]
ROOT = Path(__file__).parent.parent.parent
SLOW_AT_FIRST = """#!{python}
import os, sys, time
from qlora_pl.__main__ import main
from qlora_pl.training.watching.step_layout import StepLayout

def wait(self, trainer, *rest):
    if trainer.global_step >= 2 and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        time.sleep(float(os.environ.get("PAUSE", "0")))

StepLayout.on_train_batch_start = wait
sys.exit(main())
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with one_node_slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def script(folder: Path) -> Path:
    """The example that ships, without the GPUs that a test does not have."""
    text = (ROOT / "experiments" / "slurm" / "train.sbatch").read_text()
    lines = [line for line in text.splitlines() if "gpus-per-node" not in line]
    lines = [line for line in lines if "cpus-per-task" not in line]
    path = folder / "train.sbatch"
    path.write_text("\n".join(lines) + "\n")
    program = folder / "bin" / "qlora-pl"
    program.parent.mkdir()
    program.write_text(SLOW_AT_FIRST.format(python=sys.executable))
    program.chmod(0o755)
    return path


@pytest.mark.parametrize("kind", ["job", "task of an array"])
def test_a_requeued_job_ends_with_the_adapter_of_the_uninterrupted_one(
    kind: str, slurm: Cluster, tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """Byte for byte: two ranks, and two numbers add up to the same in any order.

    The signal is sent by hand, where ``--signal`` would send it before the end of the job's time.
    """
    config = write_config(tmp_path, tiny_base, rows_file)
    batch, log = script(tmp_path), tmp_path / "log"
    variables = {"PATH": f"{batch.parent}/bin:{slurm.environment()['PATH']}"}

    def submit(name: str, pause: float, *options: str) -> str:
        words = [str(batch), "--config", str(config), "--run.name", name]
        output = f"--output={log}-{name}"
        return slurm.submit(*options, output, *words, PAUSE=str(pause), **variables)

    def said(name: str) -> str:
        return Path(f"{log}-{name}").read_text()

    whole = submit("whole", 0.0)
    assert slurm.wait_for_end(whole, 180) == "COMPLETED", said("whole")
    assert "2 processes on 1 node" in said("whole")

    stopped = submit("stopped", 3.0, *(["--array=3"] if kind != "job" else []))
    folder = tmp_path / "runs" / "stopped" / "version_0"
    slurm.wait_until(lambda: len(checkpoints_newest_first(folder)) >= 2, 180, "two checkpoints")
    slurm.signal(stopped, signal.SIGUSR1)
    slurm.wait_until(lambda: slurm.state(stopped) == "PENDING", 90, "the requeue")
    assert slurm.wait_for_end(stopped, 300) == "COMPLETED", said("stopped")

    text = said("stopped")
    assert "fit: resuming" in text
    assert text.count("qlora-pl: Stopped at step") == 1
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    assert not list(folder.glob("**/hpc_ckpt*"))
    uninterrupted = tmp_path / "runs" / "whole" / "version_0"
    assert adapter_bytes(folder) == adapter_bytes(uninterrupted)


def test_a_job_whose_numbers_differ_says_so_once_and_ends(
    slurm: Cluster, tmp_path: Path, tiny_base: Path, rows_file: Path
) -> None:
    """And a job that ends by itself is not queued again."""
    config = write_config(tmp_path, tiny_base, rows_file)
    words = [str(script(tmp_path)), "--config", str(config), "--trainer.devices", "1"]
    path = f"{tmp_path}/bin:{slurm.environment()['PATH']}"
    job = slurm.submit(f"--output={tmp_path}/log", *words, PATH=path)
    assert slurm.wait_for_end(job, 120) == "FAILED"
    text = (tmp_path / "log").read_text()
    assert text.count("qlora-pl: ") == 1
    assert "trainer.devices: 1, but srun started 2 processes on this node" in text
