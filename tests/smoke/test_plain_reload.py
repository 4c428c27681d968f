"""Folders are loaded by their own README without this project, and held against the trained one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trained import adapter, other_base, run  # noqa: F401 (fixtures)

from qlora_pl.smoke import plain_reload
from qlora_pl.smoke.worker import _write_reference

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]


def ask(requests: list[dict[str, str]]) -> list[dict[str, Any]]:
    """What the program answers, started as ``smoke`` starts it: as a file."""
    done = subprocess.run(
        [sys.executable, str(Path(plain_reload.__file__))],
        input="".join(json.dumps(request) + "\n" for request in requests),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_adapter_is_told_from_another_and_a_card_that_fails_is_told(
    adapter: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    same, other = tmp_path / "same.pt", tmp_path / "other.pt"
    settings = {"product": str(adapter), "has_adapters": True, "trust_remote_code": False}
    _write_reference(settings | {"reference": str(same)})
    reference = torch.load(same, weights_only=True)
    torch.save(reference | {"logits": reference["logits"].roll(1)}, other)
    (tmp_path / "README.md").write_text("```python\nimport qlora_pl\nmodel = nothing\n```\n")
    answers = ask(
        [
            {"folder": str(adapter), "reference": str(same)},
            {"folder": str(adapter), "reference": str(other)},
            {"folder": str(tmp_path), "reference": str(same)},
        ]
    )
    assert answers[0]["divergence"] < 1e-3  # the same codes and adapters, multiplied in float32
    assert answers[1]["divergence"] > 0.1
    assert "it needed qlora_pl" in answers[2]["error"]
