"""A finished run in the hands of others: this project's commands, and programs without it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qlora_pl.smoke import plain_reload
from qlora_pl.smoke.checklist import Checklist, Step, StepError
from qlora_pl.smoke.shrunken_run import ShrunkenRun
from qlora_pl.training.run_folders.run_folder import newest_verified

WORKER_STEPS = ("validate", "generate", "merge")
ALLOWED = {"adapter": 0.01, "model": 0.01, "merged": 0.05}
"""Nats of KL that a reloaded model may lie from the trained one: of a merged one what ``merge``
allows, whose weights are rounded; of others what another order of additions makes of bfloat16."""


def try_finished(
    checklist: Checklist,
    run: Any,
    shrunken: ShrunkenRun,
    words: list[str],
    place: Path,
    **known: Any,
) -> None:
    """Validate, generate, merge and reload.

    Args:
        checklist: Takes the steps.
        run: The user's parsed configuration.
        shrunken: What was started.
        words: The user's own.
        place: The temporary folder.
        known: ``folder`` of the run, and ``why_no_validation``, a clause if there is none.
    """
    folder: Path = known["folder"]
    has_adapters = run.model.lora.method != "none"
    product = folder / ("adapter" if has_adapters else "model")
    settings = {
        "words": [*words, *shrunken.words, "--run.root", str(place / "validation")],
        "checkpoint": str(newest_verified(folder)),
        "why_no_validation": known["why_no_validation"],
        "product": str(product),
        "has_adapters": has_adapters,
        "merged": str(place / "merged"),
        "reference": str(place / "reference.pt"),
        "trust_remote_code": bool(run.model.trust_remote_code),
    }
    path = place / "worker.json"
    path.write_text(json.dumps(settings))
    log = place / "after_training.log"
    worker = [sys.executable, "-m", "qlora_pl.smoke.worker", str(path)]
    plain = [sys.executable, str(Path(plain_reload.__file__))]
    # Both import their libraries at once, which takes most of their time.
    with _started(worker, log) as working, _started(plain, log) as reloading:
        tried = list(_answers(checklist, working))
        failed = [step for step in tried if step["status"] == "failed"]
        _told_why(checklist, working, tried, log)
        if failed or checklist.has_failed:
            return
        with checklist.step("reload") as step:
            _reload(step, reloading, settings, product, log)


def _answers(checklist: Checklist, process: subprocess.Popen) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        plain = json.loads(line)
        checklist.take(plain)
        yield plain


def _told_why(
    checklist: Checklist, process: subprocess.Popen, tried: Sequence[dict[str, Any]], log: Path
) -> None:
    """A process that ended before its steps did has failed in the next one."""
    code = process.wait()
    names = WORKER_STEPS[len(tried) :]
    if names and not (tried and tried[-1]["status"] == "failed"):
        with checklist.step(names[0]):
            raise StepError(f"{names[0]}: {_last_line(log)} (exit code {code})")


def _reload(
    step: Step, process: subprocess.Popen, settings: dict[str, Any], product: Path, log: Path
) -> None:
    folders = {product.name: product}
    if settings["has_adapters"]:
        folders["merged"] = Path(settings["merged"])
    said = []
    for name, folder in folders.items():
        divergence = _ask(process, folder, settings["reference"], log)
        what = {"adapter": "PEFT", "merged": "the merged model", "model": "the model"}[name]
        if not divergence <= ALLOWED[name]:  # of no number, too
            raise StepError(
                f"{what}: loaded by the lines of '{folder.name}/README.md' it answers otherwise "
                f"than what was trained (KL {divergence:.3g} nats, allowed {ALLOWED[name]:g})."
            )
        said.append(f"{what} (KL {divergence:.1g})")
    step.said = f"without this project: {', '.join(said)}"


def _ask(process: subprocess.Popen, folder: Path, reference: str, log: Path) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    request = {"folder": str(folder), "reference": reference}
    with suppress(BrokenPipeError):
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise StepError(f"'{folder.name}' could not be loaded: {_last_line(log)}")
    found = json.loads(answer)
    if "error" in found:
        raise StepError(
            f"'{folder.name}' could not be loaded by the lines of its README: {found['error']}"
        )
    return float(found["divergence"])


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"


@contextmanager
def _started(command: list[str], log: Path) -> Iterator[subprocess.Popen]:
    """A process that does not outlive the block."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(BrokenPipeError, OSError):
            if process.stdin is not None:
                process.stdin.close()
        given_up = time.monotonic() + 1.0
        while process.poll() is None and time.monotonic() < given_up:
            time.sleep(0.01)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
