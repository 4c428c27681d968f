"""`qlora-pl doctor` as it is typed: exit codes, JSON, what it hides, what it looks like."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from broken_world import plant_metadata, plant_package
from typed import type_words

from qlora_pl.doctor import command
from qlora_pl.doctor.checks import CHECKS, HERE, Check
from qlora_pl.doctor.finding import Finding, Status
from qlora_pl.doctor.report import Lines, record
from qlora_pl.redaction import anonymous

PAGE = (Path(__file__).parents[2] / "docs/troubleshooting.md").read_text()
QUICK = ("python", "packages", "disk", "settings", "open-files")
KEYS = {"check", "group", "title", "status", "found", "meaning", "fix", "about"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A few of the checks, which take no time."""
    monkeypatch.setattr(command, "CHECKS", tuple(c for c in CHECKS if c.name in QUICK))
    monkeypatch.chdir(tmp_path)


def test_nothing_broken_is_exit_code_0(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = type_words(monkeypatch, capsys, "doctor", "--offline")
    assert code == 0, out
    assert "Nothing is broken" in out.splitlines()[-1]
    assert "\x1b" not in out  # no terminal


def test_something_broken_is_exit_code_1_and_named(
    quick: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plant_metadata(tmp_path / "planted", monkeypatch, "peft", "0.1.0")
    code, out, _ = type_words(monkeypatch, capsys, "doctor", "--offline")
    assert code == 1
    assert re.search(r"^Broken: peft[.;]", out.splitlines()[-1])
    assert '"peft>=0.19"' in out
    assert "docs/troubleshooting.md#packages" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ofline"], "no flag is called --ofline; did you mean '--offline'?"),
        (["--time-limit", "0"], "must be above 0 seconds"),
        (["--time-limit", "nan"], "must be above 0 seconds"),
        (["--time-limit", "soon"], "invalid float value"),
        (["gpu"], "'gpu' belongs to no flag"),
    ],
)
def test_a_mistake_in_the_words_is_one_sentence(
    words: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = type_words(monkeypatch, capsys, "doctor", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_the_json_has_these_names_and_no_others(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = type_words(monkeypatch, capsys, "doctor", "--offline", "--json")
    plain = json.loads(out)
    assert code == 0
    assert list(plain) == ["format", "qlora_pl", "verdict", "counts", "seconds", "findings"]
    assert (plain["format"], plain["verdict"]) == (1, "ok")
    assert list(plain["counts"]) == ["ok", "note", "warning", "broken"]
    assert sum(plain["counts"].values()) == len(plain["findings"])
    for finding in plain["findings"]:
        assert finding.keys() == KEYS
        assert finding["status"] in plain["counts"]


def test_every_check_is_explained_and_nothing_else_is() -> None:
    sections = re.findall(r"^### (\S+)$", PAGE, re.MULTILINE)
    assert sorted(sections) == sorted(check.name for check in CHECKS)
    groups = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    assert {check.group for check in CHECKS} <= set(groups)


PERSON = {
    "HF_TOKEN": "hf_" + "secret77" * 5,
    "WANDB_API_KEY": "wandb-key-" + "0123456789" * 3,
    "HOME": "/data/people/jane.doe",
    "USER": "jane.doe",
    "LOGNAME": "jd",
    "HOSTNAME": "gpu-box-7",
    "HTTPS_PROXY": "http://jane:pa55word99@proxy.example.org:3128",
    "HF_ENDPOINT": "https://mirror.example.org",
}
LEAKS = ("secret77", "wandb-key", "jane", "gpu-box-7", "people", "pa55word", "example.org", "/jd/")


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PERSON.items():
        monkeypatch.setenv(name, value)


SAID = (
    "/data/people/jane.doe/.cache/qlora_pl: writable",
    "/scratch/jane.doe/runs and /scratch/jd/runs",
    "ConnectError at https://mirror.example.org/api: proxy.example.org refused",
    f"header Bearer {PERSON['HF_TOKEN']}",
    f"wandb: {PERSON['WANDB_API_KEY']} is no key",
    "rank 0 on gpu-box-7:29500 waited",
    "via http://jane:pa55word99@proxy.example.org:3128",
)


@pytest.mark.parametrize("said", SAID)
def test_a_bug_report_names_neither_people_nor_machines(person: None, said: str) -> None:
    shown = anonymous(said)
    assert not any(leak in shown for leak in LEAKS), shown


def test_the_whole_json_names_neither_people_nor_machines(person: None) -> None:
    check = CHECKS[0]
    found = [
        (check, Finding(title=said, status=Status.OK, found=said, meaning=said, fix=said))
        for said in SAID
    ]
    text = json.dumps(record(found, 1.0))
    assert not any(leak in text for leak in LEAKS), text


def test_variables_and_folders_of_a_person_are_not_in_the_json(
    quick: None,
    person: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As it is typed: the check of variables shows paths, that of disks folders of the home."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/data/people/jane.doe/lib:/opt/jd/lib")
    monkeypatch.setenv("MASTER_ADDR", "gpu-box-7.example.org")
    monkeypatch.delenv("QLORA_PL_CACHE")
    monkeypatch.delenv("HF_HOME", raising=False)
    _, out, _ = type_words(monkeypatch, capsys, "doctor", "--offline", "--json")
    assert "LD_LIBRARY_PATH=~/lib:/opt/[user]/lib" in out
    assert "MASTER_ADDR is set" in out
    assert "~/.cache/qlora_pl" in out
    assert not any(leak in out for leak in LEAKS), out


def test_a_working_directory_that_cannot_be_written_to_is_exit_code_1(
    quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even root writes to /proc; the report itself needs no file."""
    monkeypatch.chdir("/proc")
    code, out, _ = type_words(monkeypatch, capsys, "doctor", "--offline")
    assert code == 1
    assert "Broken: runs" in out
    assert "no run starts from this working directory" in " ".join(out.split())
    assert "qlora-pl fit --run.root /path/with/room" in out


def test_words_that_happen_to_be_names_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/root")
    monkeypatch.setenv("USER", "root")
    monkeypatch.setenv("LOGNAME", "ab")
    said = "set run.root; about huggingface.co; /usr/lib; 127.0.0.1"
    assert anonymous(said) == said


class Terminal(io.StringIO):
    """Takes colour."""

    def __init__(self, encoding: str = "utf-8") -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True


def line(lines: Lines, status: Status = Status.WARNING) -> str:
    finding = Finding(
        title="disk", status=status, found="full", meaning="no run " * 40, fix="export A=B"
    )
    return lines.finding(_named("disk"), finding)


def _named(name: str) -> Check:
    return next(check for check in CHECKS if check.name == name)


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b[33m" in line(Lines(Terminal()))
    assert "\x1b" not in line(Lines(io.StringIO()))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in line(Lines(Terminal()))


def test_a_terminal_without_ticks_gets_letters() -> None:
    text = line(Lines(Terminal("ascii")), Status.OK)
    assert text.isascii()


def test_lines_fit_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    for row in line(Lines(io.StringIO())).splitlines():
        assert len(row) <= 70


def test_doctor_imports_nothing_that_could_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With libraries of which none can be imported it still says so, line by line."""
    for name in ("torch", "bitsandbytes", "transformers", "huggingface_hub", "lightning", "peft"):
        plant_package(tmp_path, monkeypatch, name, f"raise ImportError('{name} is gone')")
    monkeypatch.chdir(tmp_path)
    code, out, _ = type_words(monkeypatch, capsys, "doctor", "--json", "--time-limit", "60")
    plain = json.loads(out)
    assert code == 1
    found = {f["title"]: f["found"] for f in plain["findings"]}
    assert found["torch"] == "ImportError: torch is gone"
    assert found["NF4"] == "not tried"
    assert found["peft"] == "ImportError: peft is gone"
    assert found["Hub"] == "ImportError: huggingface_hub is gone"
    assert {f["check"] for f in plain["findings"]} == {check.name for check in CHECKS}


@pytest.mark.slow
def test_everything_is_looked_at_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All checks, with a planted secret and a person's folder; a machine for tests is fit."""
    secret = "hf_" + "wholerun" * 5
    home = tmp_path / "jane.roe"
    home.mkdir()
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "jane.roe")
    monkeypatch.chdir(home)
    code, out, _ = type_words(
        monkeypatch, capsys, "doctor", "--offline", "--json", "--time-limit", "90"
    )
    plain: dict[str, Any] = json.loads(out)
    assert secret not in out
    assert "jane.roe" not in out
    assert code == 0, [f for f in plain["findings"] if f["status"] == "broken"]
    assert {f["check"] for f in plain["findings"]} == {
        check.name for check in CHECKS if not check.asks_network
    }
    assert not any(f["found"] == "not tried" for f in plain["findings"])


def test_checks_that_touch_a_heavy_library_run_apart() -> None:
    heavy = {"arithmetic", "contact", "devices.segments", "devices.torch_devices"}
    heavy |= {"installation.imports"}
    for check in CHECKS:
        module = check.trial.partition(":")[0]
        is_heavy = module in heavy or module.partition(".")[0] in heavy
        assert is_heavy <= (check.lane != HERE), check.name
