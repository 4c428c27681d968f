"""benchmarks/inference.py, tried at tiny size."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = [pytest.mark.filterwarnings("ignore:.*")]  # models are loaded in this process


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_both_answer_the_same_prompts_with_the_same_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is timed is equal work: in float32 all contenders give the same answers."""
    synthetic, speed = (module(name, monkeypatch) for name in ("synthetic", "inference_speed"))
    synthetic.save_base(tmp_path / "base", 5.0e5, 128, 256)
    adapter = synthetic.save_adapter(tmp_path / "adapter", tmp_path / "base")
    monkeypatch.setattr(
        "qlora_pl.modeling.loading.base_loading.resolve_compute_dtype",
        lambda *_: speed.torch.float32,
    )
    task = speed.Task(
        adapter=adapter, base=str(tmp_path / "base"), num_prompts=6, num_tokens=5, repeats=1
    )
    contenders = speed.Contenders(task, speed.prompts_of(task, None), has_plain=False)
    lengths = [len(one.ids) for one in contenders.encoded]
    assert max(lengths) > 2 * min(lengths)
    answers = [answer(size, 6) for answer in contenders.by_name.values() for size in (1, 4)]
    assert all(found == answers[0] for found in answers)
    assert len(set(answers[0])) > 1
    found = speed.speed(task, None, sizes=(1, 4), has_plain=False)
    for size in found["batch_sizes"]:
        assert size["against_alone"][speed.OURS] == {"differ": 0, "of": 6, "at_token": []}
        (ratio,) = size["ours_over"].values()
        rates = [rate["median"] for rate in size["tokens_per_second"].values()]
        assert ratio["median"] == rates[0] / rates[1]


def test_where_answers_part_is_counted_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = module("inference_speed", monkeypatch)

    def words(text: str, add_special_tokens: bool) -> dict[str, list[str]]:
        return {"input_ids": text.split()}

    alone = [("one two three four", 4), ("same", 1), ("a b", 2)]
    batched = [("one two tree four", 4), ("same", 1), ("b a", 2)]
    assert speed.parted(alone, batched, words) == {"differ": 2, "of": 3, "at_token": [0, 3]}


@pytest.mark.slow
def test_the_command_measures_every_part(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "inference.py"), "--quick"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "found.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [size["batch_size"] for size in found["speed"]["batch_sizes"]] == [1, 8, 32]
    for size in found["speed"]["batch_sizes"]:
        assert len(set(size["answer_tokens"].values())) == 1
        assert all(rate["median"] > 0 for rate in size["tokens_per_second"].values())
    stored = found["kinds"]["stored_bytes"]
    assert stored["4 bits"] < stored["dequantised"]
    for parts in found["start"].values():
        pieces = sum(value["median"] for part, value in parts.items() if part != "all")
        assert abs(pieces - parts["all"]["median"]) < 0.01
    assert "ours over theirs" in done.stdout
