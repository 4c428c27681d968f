"""What a SLURM job knows of itself: which run it began before it was queued again, and how to be.

SLURM starts a requeued job with the very command of the first time, under the same job id. So a run
notes the job in its folder, and a restarted job looks for its own note.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from qlora_pl.files import write_json
from qlora_pl.training.run_folders.run_folder import RunConfig, runs_newest_first

logger = logging.getLogger(__name__)

JOB_FILE = "slurm_job.json"


def this_job(variables: Mapping[str, str] = os.environ) -> dict[str, str] | None:
    """What names this job and the command in it, over every requeue; None outside of SLURM.

    Each task of an array has a job id of its own; the step tells two ``srun`` of a script apart.
    """
    if "SLURM_JOB_ID" not in variables:
        return None
    return {
        "cluster": variables.get("SLURM_CLUSTER_NAME", ""),
        "job": variables["SLURM_JOB_ID"],
        "step": variables.get("SLURM_STEP_ID", "batch"),
    }


def note_job(folder: Path) -> None:
    """Write into a run's folder which job it belongs to, where there is one."""
    if (job := this_job()) is not None:
        write_json(folder / JOB_FILE, job)


def begun_before(config: RunConfig) -> Path | None:
    """The run that this job began before SLURM started it again; None if it is here first."""
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0:
        return None
    job = this_job()
    for run in runs_newest_first(config) if job is not None else ():
        try:
            noted = json.loads((run / JOB_FILE).read_text())
        except (OSError, ValueError):
            continue
        if noted == job:
            return run
    return None


def name_for_scontrol(variables: Mapping[str, str] = os.environ) -> str | None:
    """The job as ``scontrol`` takes it; None outside of SLURM.

    One task of an array has the id of the whole array for its job id, which would requeue all.
    """
    array, task = (variables.get(f"SLURM_ARRAY_{part}") for part in ("JOB_ID", "TASK_ID"))
    return f"{array}_{task}" if array and task else variables.get("SLURM_JOB_ID")


def asks_for_requeue(number: int | None) -> bool:
    """Whether a signal is the one of ``#SBATCH --signal=SIGUSR1@120``, in a job."""
    return number == signal.SIGUSR1 and name_for_scontrol() is not None


def requeue() -> bool:
    """Have SLURM queue this job again; call it on one rank, when everything is saved.

    SLURM then ends the processes that are left, with SIGTERM first.

    Returns:
        Whether it will; if not, a line says why.
    """
    if (name := name_for_scontrol()) is None:
        return False
    try:
        done = subprocess.run(
            ["scontrol", "requeue", name], capture_output=True, text=True, timeout=60
        )
        problem = done.stderr.strip() if done.returncode else None
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem is not None:
        logger.warning(
            "SLURM does not queue job %s again (%s); submit it anew, with --ckpt_path auto.",
            name,
            " ".join(problem.split()),
        )
        return False
    logger.info("SLURM queues job %s again; it will continue in this folder.", name)
    return True
