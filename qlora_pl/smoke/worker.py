"""What a finished run is good for, tried by the commands themselves: validate, generate, merge.

One process, since importing the libraries takes longer than any of them does here. Told what to do
by a file of settings; answers each step with a line of JSON.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from qlora_pl.modeling.base.encoder_decoder import whole_inputs
from qlora_pl.smoke.checklist import Checklist, Step, StepError

PROMPT_TOKENS = 12
"""Of the prompt that every reloaded model is asked."""
SCORED_TOKENS = 128
"""By ``merge``."""


def main(path: str) -> int:
    """Try each step of the settings in a file."""
    settings = json.loads(Path(path).read_text())
    answers = sys.stdout
    sys.stdout = sys.stderr  # what commands print is no answer
    logging.basicConfig(level=logging.WARNING)
    checklist = Checklist(lambda _: None)
    steps: dict[str, Callable[[Step, dict[str, Any]], None]] = {
        "validate": validate,
        "generate": generate,
        "merge": merge,
    }
    for name, try_step in steps.items():
        with checklist.step(name) as step:
            try_step(step, settings)
        print(json.dumps(step.to_plain()), file=answers, flush=True)
        if step.status == "failed":
            return 1
    return 0


def validate(step: Step, settings: dict[str, Any]) -> None:
    """``qlora-pl validate`` with the finished run's checkpoint, in one process."""
    from qlora_pl.cli import QLoRACLI

    if settings["why_no_validation"]:
        step.leave_out(settings["why_no_validation"])
        return
    words = [*settings["words"], "--trainer.devices", "1", "--trainer.strategy", "auto"]
    words += ["--ckpt_path", settings["checkpoint"]]
    told = _said(lambda: QLoRACLI(["validate", *words]))  # validate: FIGURES: FOLDER
    step.said = told.rpartition(":")[0].removeprefix("validate: ")
    if "loss" not in step.said:
        raise StepError("validate ended without a loss.")


def generate(step: Step, settings: dict[str, Any]) -> None:
    """``qlora-pl generate`` with what was trained, and logits for others to be held against."""
    from qlora_pl.inference.generate import generate_command

    folder = settings["product"]
    flag = "--adapter" if settings["has_adapters"] else "--model"
    words = [flag, folder, "--prompt", "What is a lock?", "--max-new-tokens", "4"]
    words += ["--devices", "cpu", "--format", "jsonl"]
    answer = json.loads(_said(lambda: generate_command(words)))
    step.said = f"answered {answer['answer'][:40]!r}"
    _write_reference(settings)


def merge(step: Step, settings: dict[str, Any]) -> None:
    """``qlora-pl merge``."""
    from qlora_pl.merging.merge import merge_command

    if not settings["has_adapters"]:
        step.leave_out("every weight was trained, so there is nothing to merge")
        return
    words = ["--adapter", settings["product"], "--output", settings["merged"]]
    words += ["--policy", "dequantized", "--score-tokens", str(SCORED_TOKENS), "--devices", "cpu"]
    _said(lambda: merge_command(words))
    record = json.loads((Path(settings["merged"]) / "merge.json").read_text())
    scores = [f"KL {score['kl_divergence']:.1g} nats" for score in record["scores"].values()]
    step.said = f"onto the {record['policy']} base ({', '.join(scores) or 'not scored'})"


def _said(command: Callable[[], Any]) -> str:
    """What a command prints on standard output."""
    with redirect_stdout(io.StringIO()) as out:
        command()
    return out.getvalue().strip()


def _write_reference(settings: dict[str, Any]) -> None:
    """The logits after a prompt, by this project's own loading."""
    from qlora_pl.inference.loading import load
    from qlora_pl.inference.machine import place_of
    from qlora_pl.inference.source import ModelChoice, resolve_source

    kind: dict[str, Any] = (
        {"adapter": (settings["product"],)}
        if settings["has_adapters"]
        else {"model": settings["product"]}
    )
    choice = ModelChoice(**kind, devices="cpu", trust_remote_code=settings["trust_remote_code"])
    model = load(resolve_source(choice), place_of(choice), is_exact=True)
    size = len(model.tokenizer)
    ids = torch.arange(1, PROMPT_TOKENS + 1).unsqueeze(0) * 7 % size
    with torch.no_grad():
        logits = model.model.eval()(**whole_inputs(model.model, ids), use_cache=False).logits
    torch.save({"input_ids": ids, "logits": logits[0, -1].float()}, settings["reference"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
