"""Rows are encoded once a machine, and a bad one ends all processes with one sentence."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm

HERE = Path(__file__).parent
SENTENCE = "bad.jsonl, row 4: no 'response' field; found 'prompt'."


def write(folder: Path) -> None:
    rows = [{"prompt": f"q{n}", "response": "7" * (1 + n % 5)} for n in range(12)]
    lines = [json.dumps(row) + "\n" for row in rows]
    for name in ("good", "own-0"):  # the second process has a bad one
        (folder / f"{name}.jsonl").write_text("".join(lines))
    lines[3] = json.dumps({"prompt": "q3"}) + "\n"
    for name in ("bad", "own-1"):
        (folder / f"{name}.jsonl").write_text("".join(lines))


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(HERE.parents[1]), *sys.path])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Any:
    """What two real processes say of each case, by rank; and what is left of temporary files."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tmp").mkdir()
    write(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "QLORA_PL_CACHE": str(folder / "cache"),
        "TMPDIR": str(folder / "tmp"),
    }
    ended = warm.run(
        HERE / "shared_rows.py",
        *(str(folder), str(tiny_base)),
        environments=[given | {"RANK": str(rank)} for rank in range(2)],
    )
    assert [process.returncode for process in ended] == [0, 0], ended
    ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return ranks, list((folder / "tmp").glob("qlora_pl-*"))


@pytest.mark.parametrize(
    ("case", "encoded"), [("kept", (1, 0)), ("kept before", (0, 0)), ("not kept", (1, 0))]
)
def test_the_first_process_of_a_machine_encodes_for_all(
    found: Any, case: str, encoded: tuple[int, int]
) -> None:
    """Every process has the same rows, whether they are kept on disk or not."""
    (first, second), _ = found
    assert (first[case]["encoded"], second[case]["encoded"]) == encoded
    assert first[case]["rows"] == second[case]["rows"] == first["kept"]["rows"]


def test_no_temporary_folder_stays(found: Any) -> None:
    assert found[1] == []


@pytest.mark.parametrize("case", ["bad", "bad, not kept", "bad window"])
def test_a_bad_row_is_the_first_processs_to_name(found: Any, case: str) -> None:
    """The one that Lightning started leaves without a word, and with a code that kills nobody."""
    (first, second), _ = found
    assert SENTENCE in first[case]["error"]
    assert first[case]["error"].startswith("DatasetFormatError")
    assert second[case]["exit"] == 0


def test_under_another_launcher_all_end_with_the_error(found: Any) -> None:
    """Each has an exit code of its own there."""
    (first, second), _ = found
    assert SENTENCE in first["bad under torchrun"]["error"]
    assert SENTENCE in second["bad under torchrun"]["error"]


def test_what_only_one_process_meets_ends_the_others_too(found: Any) -> None:
    (first, second), _ = found
    for case in ("bad on one", "bad on one under torchrun"):
        assert first[case]["error"].startswith("QLoRAError: Rank 1: ")
        assert "own-1.jsonl, row 4" in first[case]["error"]
    assert second["bad on one"]["exit"] == 0
    assert "own-1.jsonl" in second["bad on one under torchrun"]["error"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--data.cache", "false"]], ids=["kept", "not kept"])
def test_the_command_says_it_once_and_ends_with_code_2(
    tmp_path: Path, tiny_base: Path, more: list[str]
) -> None:
    """Two processes of Lightning's own launcher."""
    write(tmp_path)
    words = [
        *("fit", "--model.model_name_or_path", str(tiny_base), "--model.lora.r", "4"),
        *("--data.sources", "bad.jsonl", "--trainer.accelerator", "cpu"),
        *("--trainer.devices", "2", "--trainer.max_steps", "1", *more),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "qlora_pl", *words],
        cwd=tmp_path,
        env=environment(QLORA_PL_CACHE=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert done.stderr.count(SENTENCE) == 1
    assert "Traceback" not in done.stderr
