"""One process of a comparison, which ``against`` starts: ``bench --worker BACKEND FOLDER``.

``prepare`` writes the packed weights and the rows into the folder; the others train over them and
write what they measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from qlora_pl.benching.clock import summary
from qlora_pl.benching.device import chosen_device, limit_memory
from qlora_pl.benching.fitting import refuse_misfit
from qlora_pl.benching.rows import PAD_ID, draw_rows, training_batches
from qlora_pl.benching.settings import Timing, Workload
from qlora_pl.benching.shapes import shape_named
from qlora_pl.benching.surroundings import describe_surroundings
from qlora_pl.benching.synthetic import draw_base, write_config
from qlora_pl.benching.training import settings_of, train_module
from qlora_pl.data.rows.encoded_rows import EncodedRows
from qlora_pl.errors import ConfigurationError
from qlora_pl.modeling.base.quantization_plan import build_skeleton, plan_quantization
from qlora_pl.modeling.module import QLoRAModule

ROWS = "rows.safetensors"


def work(backend: str, folder: Path) -> int:
    """Prepare the files, or measure one program over them."""
    spec = json.loads((folder / "spec.json").read_text())
    workload, timing = Workload(**spec["workload"]), Timing(**spec["timing"])
    if backend == "prepare":
        result: dict[str, Any] = prepare(folder, workload, timing, spec["accumulation"])
    elif backend == "qlora_pl":
        result = measure_own(folder, workload, timing)
    else:
        result = measure_peer(backend, folder, workload, timing, spec["accumulation"])
    (folder / f"{backend}.json").write_text(json.dumps(result))
    return 0


def prepare(
    folder: Path, workload: Workload, timing: Timing, accumulation: int = 1
) -> dict[str, Any]:
    """Write a base that every program loads as it is, and the rows of every step.

    ``base/``: packed safetensors in transformers' format. ``rows.safetensors``: tokens.
    ``steps.json``: the rows of each step, by micro-batch and line.

    Raises:
        ConfigurationError: if the other program could not cut every step as it is asked to.
    """
    device = chosen_device(workload)
    empty = write_config(folder / "shape", shape_named(workload.shape))
    refuse_misfit(empty, workload, device)
    quantization = settings_of(workload)["quantization"]
    plan = plan_quantization(build_skeleton(empty, workload.attention), quantization)
    base: Any = draw_base(empty, quantization, plan, device=device, seed=workload.seed)
    base.model.save_pretrained(folder / "base")
    _save_tokenizer(folder / "base")
    vocabulary = int(base.model.get_input_embeddings().weight.shape[0])
    num_steps = timing.num_steps
    rows = draw_rows(workload, vocabulary, num_steps)
    columns = ("input_ids", "is_trained", "starts", "lengths", "num_trained")
    save_file({name: getattr(rows, name) for name in columns}, folder / ROWS)
    batches = training_batches(rows, workload)
    steps: list[list[list[list[int]]]] = [[] for _ in range(num_steps)]
    for position in range(num_steps * workload.accumulation):
        key = batches.key_at(0, position)
        steps[key.step].append([unit.tolist() for unit in batches.rows_of(key)])
    fewest = min(sum(len(line) for batch in step for line in batch) for step in steps)
    if fewest < accumulation:
        raise ConfigurationError(
            f"--against-accumulation: a step of {fewest} rows cannot be cut into {accumulation} "
            "micro-batches; lower it, or raise --tokens-per-micro."
        )
    (folder / "steps.json").write_text(json.dumps(steps))
    return {"vocabulary": vocabulary}


def read_rows(folder: Path) -> EncodedRows:
    """The rows that were prepared."""
    return EncodedRows(**load_file(folder / ROWS))


def measure_own(folder: Path, workload: Workload, timing: Timing) -> dict[str, Any]:
    """This program, over the prepared files."""
    module = QLoRAModule(str(folder / "base"), **settings_of(workload))
    timer = train_module(module, read_rows(folder), workload, timing)
    assert timer.clock is not None
    contents = timer.timed
    return _result(
        timer.clock.seconds(),
        [step.num_tokens for step in contents],
        [step.loss for step in timer.statistics],
        timer.clock,
    )


def measure_peer(
    backend: str, folder: Path, workload: Workload, timing: Timing, accumulation: int
) -> dict[str, Any]:
    """Another program, over the same."""
    from qlora_pl.benching.peers import PEERS  # slow to import

    limit_memory(workload, chosen_device(workload))
    rows = read_rows(folder)
    steps = json.loads((folder / "steps.json").read_text())
    clock, losses = PEERS[backend](folder / "base", rows, steps, workload, timing, accumulation)
    tokens = [
        sum(int(rows.lengths[row]) for batch in step for line in batch for row in line)
        for step in steps
    ]
    return _result(clock.seconds(), tokens[timing.warmup :], losses, clock)


def _result(
    seconds: list[float], tokens: list[int], losses: list[float], clock: Any
) -> dict[str, Any]:
    tokens = tokens[: len(seconds)]
    return {
        "tokens_per_second": sum(tokens) / sum(seconds),
        "step_seconds": summary(seconds),
        "tokens_of_steps": tokens,
        "losses": losses,
        "peak_of_first_step": clock.peak_of_first,
        "peak": clock.peak,
        "environment": describe_surroundings(),
    }


def _save_tokenizer(folder: Path) -> None:
    """A tokenizer of three tokens, for trainers that want one; nothing is tokenised with it."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    known = {"<pad>": PAD_ID, "<s>": 1, "</s>": 2}
    made = Tokenizer(models.WordLevel(known, unk_token="<pad>"))
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
