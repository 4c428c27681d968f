"""Loads finished folders by the lines of their own README, in a process without this project.

Started as a file of its own, not as a module, so that nothing of the project is imported. Reads one
request a line from standard input, as JSON: ``folder``, and ``reference``, a file with the ids of a
prompt and the logits that the project's own model has after it. Answers each with one line.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Answer requests until there are no more."""
    import peft  # noqa: F401
    import torch  # slow to import, which happens while others still work
    import transformers

    transformers.utils.logging.set_verbosity_error()
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer: dict[str, Any] = {"divergence": _divergence(request, torch)}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {_first_line(error)}"}
        if strangers := sorted(name for name in sys.modules if name.startswith("qlora_pl")):
            answer = {"error": f"it needed {strangers[0]}"}
        print(json.dumps(answer), file=answers, flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _divergence(request: dict[str, str], torch: Any) -> float:
    """KL of the next token's distribution from the reference, in nats."""
    os.chdir(request["folder"])
    blocks = re.findall(r"```python\n(.*?)\n```", Path("README.md").read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    exec(blocks[0], scope)
    model = scope["model"].eval()
    for module in model.modules():  # the kernel for inference multiplies otherwise
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    reference = torch.load(request["reference"], weights_only=True)
    ids = reference["input_ids"].to(model.device)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[0, -1].double().cpu()
    wanted = reference["logits"].double().log_softmax(-1)
    found = logits[: len(wanted)].log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum())


if __name__ == "__main__":
    main()
