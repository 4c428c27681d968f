"""From nothing to the first token of an answer, in a process of its own.

    python benchmarks/inference_start.py qlora_pl ADAPTER BASE BEGAN

Prints seconds since BEGAN (of ``time.time``) after imports, after loading and after the token.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from processes import REPOSITORY

QUESTION = "What does NF4 stand for?"
BACKENDS = ("qlora_pl", "transformers and PEFT")


def ours(adapter: str, base: str, note: Any) -> None:
    """As from Python, and as the commands do."""
    from qlora_pl.inference.api import generate, load_adapter

    note("imported")
    model = load_adapter(adapter, base=base)
    note("loaded")
    generate(model, QUESTION, max_new_tokens=1)
    note("first_token")


def theirs(adapter: str, base: str, note: Any) -> None:
    """As an adapter folder's own page shows it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    note("imported")
    where = "cuda:0" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(
        base,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        dtype=torch.bfloat16,
        device_map={"": where},
    )
    model = PeftModel.from_pretrained(loaded, adapter)
    tokenizer = AutoTokenizer.from_pretrained(base)
    note("loaded")
    given = tokenizer(QUESTION, return_tensors="pt").to(where)
    with torch.no_grad():
        model.generate(**given, max_new_tokens=1, do_sample=False)
    note("first_token")


def measure(backend: str, adapter: Path, base: str) -> dict[str, float]:
    """Seconds of each part, and of all."""
    words = [sys.executable, __file__, backend, str(adapter), base, repr(time.time())]
    variables = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, sys.path)])}
    done = subprocess.run(
        words, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    at: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {
        "start_and_imports": at["imported"],
        "load": at["loaded"] - at["imported"],
        "first_token": at["first_token"] - at["loaded"],
        "all": at["first_token"],
    }


def main() -> None:
    """Do it here."""
    backend, adapter, base, began = sys.argv[1:]
    at: dict[str, float] = {}

    def note(word: str) -> None:
        at[word] = time.time() - float(began)

    (ours if backend == BACKENDS[0] else theirs)(adapter, base, note)
    print(json.dumps(at))


if __name__ == "__main__":
    main()
