"""Runs that are killed and go on, and optimizer state in memory that the driver moves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from processes import environment

from gpu.place import Findings, Place
from gpu.runs import MIDDLE, Run, complete

PAGED_BYTES = 1e9
"""Managed memory that a check may take."""


def proof(place: Place, findings: Findings) -> None:
    """``qlora-pl prove-resume``, deterministic and as it comes."""
    kinds = {"deterministic": True, "as it comes": False}
    started = {kind: _start_proof(place, kind, value) for kind, value in kinds.items()}
    for kind, (process, folder) in started.items():
        code = process.wait()
        record: dict[str, Any] = json.loads((folder / "resume_proof.json").read_text())
        left_out = ("command", "versions", "format")
        findings.note(**{kind: {k: v for k, v in record.items() if k not in left_out}})
        if code not in (0, 1):
            log = (folder.parent / f"{folder.name}.txt").read_text(errors="replace")
            raise RuntimeError(f"prove-resume ended with {code}\n{log[-3000:]}")
        if kind == "deterministic":
            findings.claim(
                "deterministic: two uninterrupted runs are equal in every byte",
                record.get("is_repeatable") is True,
            )
            findings.claim(
                "deterministic: killed and resumed is uninterrupted in every byte",
                code == 0 and record["verdict"] == "proven",
                exit_code=code,
                verdict=record["verdict"],
            )
        else:
            findings.claim(
                "as it comes: resumed is as near as a second uninterrupted run",
                code == 0 and record["verdict"] in ("proven", "within noise"),
                exit_code=code,
                verdict=record["verdict"],
            )


def _start_proof(
    place: Place, kind: str, is_deterministic: bool
) -> tuple[subprocess.Popen[bytes], Path]:
    name = f"proof-{kind.replace(' ', '-')}"
    run = Run(
        place,
        name,
        model={"lora": {"dropout": 0.1}, "gradient_checkpointing": False},
        trainer={"deterministic": is_deterministic},
    )
    run.logs.mkdir(parents=True, exist_ok=True)
    run.config["trainer"]["callbacks"] = []
    run.config_path.write_text(json.dumps(run.config))
    folder = place.folder / "logs" / f"{name}-runs"
    words = ["prove-resume", "--config", str(run.config_path), "--folder", str(folder)]
    with (folder.parent / f"{folder.name}.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlora_pl", *words, "--steps", "4"],
            env=environment(QLORA_PL_CACHE=f"{run.cache}-0"),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if place.is_rehearsal:
        process.wait()  # one after the other, for the sake of the cores
    return process, folder


def paging(place: Place, findings: Findings) -> None:
    """Paged optimizers against their twins in ordinary memory, whole and resumed."""
    pairs = {"32bit": "adamw_32bit", "8bit": "adamw_8bit"}
    plain = {bits: _optimizer_run(place, name) for bits, name in pairs.items()}
    paged = {bits: _optimizer_run(place, f"paged_adamw_{bits}") for bits in pairs}
    complete(*plain.values(), *paged.values())
    resumed = {bits: _optimizer_run(place, f"paged_adamw_{bits}", paged[bits]) for bits in pairs}
    complete(*resumed.values())
    for bits in pairs:
        for run in (paged[bits], resumed[bits]):
            findings.claim(
                f"{run.name}: the adapter is the one of ordinary memory in every byte",
                run.adapter_bytes() == plain[bits].adapter_bytes(),
            )
            _look_at_state(place, findings, run, bits)


def _optimizer_run(place: Place, name: str, resumes: Run | None = None) -> Run:
    """Rank 128, whose matrices are large enough to be paged."""
    return Run(
        place,
        f"{name}-resumed" if resumes else name,
        words=["--ckpt_path", str(resumes.checkpoint(MIDDLE))] if resumes else [],
        model={"lora": {"r": 128}, "optimizer": {"name": name, "lr": 1e-3}},
        trainer={"deterministic": True},
    )


def _look_at_state(place: Place, findings: Findings, run: Run, bits: str) -> None:
    state = run.notes()["state"]
    kind = {"32bit": "torch.float32", "8bit": "torch.uint8"}[bits]
    findings.claim(
        f"{run.name}: state is {kind.removeprefix('torch.')}",
        set(state["types"]) == {kind},
        types=state["types"],
    )
    text = f"{run.name}: all large state is paged, after a resume too"
    if place.is_rehearsal:
        findings.needs_cuda(text)
    else:
        findings.claim(
            text,
            0 < state["large_tensors"] == state["paged_tensors"]
            and state["paged_bytes"] < PAGED_BYTES,
            **{key: state[key] for key in ("large_tensors", "paged_tensors", "paged_bytes")},
        )
