"""Faults of a run on two processes, started as Kubernetes starts them: nobody else ends the other.

Each rank is a fork with the variables of its place; they meet through gloo as they would on nodes.
"""

from __future__ import annotations

import socket

from faults.fault import Fault
from faults.fork_server import Ended
from faults.proving import Outcome, lost_saves, newest_step, torn_files
from faults.runs import Runs

WORDS = (
    "--trainer.devices=2",
    "--trainer.strategy=ddp",
    "--trainer.accumulate_grad_batches=1",  # as many rows a step as one process takes in two
    "--trainer.val_check_interval=2",
    "--run.timeout_seconds=20",
)
CHECKPOINT = "runs/tiny/version_0/checkpoints/.incomplete-step-00000004.ckpt"
RANK_FAULTS = {
    "two ranks: the second is killed in the backward pass": Fault(
        action="kill", moment="backward", occurrence=10, rank=1
    ),
    "two ranks: the second is killed between two tensors of an optimizer step": Fault(
        action="kill", moment="optimizer", occurrence=150, rank=1
    ),
    "two ranks: the first is killed in the backward pass": Fault(
        action="kill", moment="backward", occurrence=10
    ),
    "two ranks: the first is killed while it saves": Fault(
        action="kill", operation=f"write {CHECKPOINT}"
    ),
    "two ranks: the first one's disk is full": Fault(
        action="ENOSPC", operation=f"write {CHECKPOINT}", persists=True
    ),
    "two ranks: the second is killed in a validation": Fault(
        action="kill", moment="validation", occurrence=3, rank=1
    ),
    "two ranks: the second stalls (SIGSTOP)": Fault(
        action="stall", moment="forward", occurrence=10, rank=1
    ),
    "two ranks: SIGTERM to the second alone": Fault(
        action="terminate", moment="forward", occurrence=10, rank=1
    ),
}


def places() -> list[dict[str, str]]:
    """The variables of two processes that meet at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def prove_ranks(runs: Runs, name: str) -> Outcome:
    """Break one rank of two, look at how the other ends, resume both, compare."""
    expected = runs.of_two_ranks
    fault, workplace = RANK_FAULTS[name], runs.new_workplace()
    outcome = Outcome(fault)
    broken = runs.run(workplace, fault, *WORDS, environments=places())
    outcome.said = broken.said
    outcome.problems = _problems(fault, broken) + torn_files(*runs.all(workplace))
    outcome.ending = "died" if fault.action in ("kill", "stall") else "said so and stopped"
    outcome.problems += lost_saves(broken, newest_step(runs, workplace))
    resumed = runs.run(workplace, None, *WORDS, environments=places())
    outcome.said += "\n--- resumed ---\n" + resumed.said
    if any(resumed.codes):
        outcome.problems.append(f"the resumed run ended with {resumed.codes}")
        return outcome
    outcome.lost_steps = broken.steps - (resumed.begins_at or 0)
    different = runs.left(workplace).differences(expected)
    outcome.problems += [f"{part} differs" for part in different] + torn_files(*runs.all(workplace))
    return outcome


def _problems(fault: Fault, ended: Ended) -> list[str]:
    """The rank that broke is gone; the other says so, in words, with a code that is not 0."""
    problems = [] if ended.is_reached else ["harness: the fault was not reached"]
    if ended.is_timeout:
        problems.append("a rank hung")
    other = ended.codes[1 - fault.rank]
    if fault.action in ("kill", "stall"):
        if ended.codes[fault.rank] != -9 or other <= 0:
            problems.append(f"exit codes {ended.codes}")
    elif fault.action == "terminate":
        if ended.codes != [143, 143]:
            problems.append(f"exit codes {ended.codes}")
    elif 0 in ended.codes:
        problems.append(f"exit codes {ended.codes}")
    if "qlora-pl: " not in ended.said:
        problems.append("no sentence")
    if "Traceback" in ended.said:
        problems.append("a traceback")
    return problems
