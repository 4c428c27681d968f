"""The folder of a report: a page to look at, a summary to read, and every number as JSON.

A report of the same command is replaced; nothing else in the folder is ever touched.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from qlora_pl.errors import ConfigurationError
from qlora_pl.files import write_atomic

PAGE, SUMMARY, NUMBERS = "report.html", "report.md", "report.json"


def signature(subject: str) -> str:
    """By which a page of ``inspect SUBJECT`` is told from any other file."""
    return f'<meta name="generator" content="qlora-pl inspect {subject}">'


def refuse_other_contents(folder: Path, subject: str) -> None:
    """Refuse a place where a report cannot go, before anything is measured.

    Raises:
        ConfigurationError: if it is a file, lies nowhere, or holds files of these names that are
            not of a report of the same command.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"--output: '{folder}' is a file; name a folder.")
    if not folder.parent.is_dir():
        raise ConfigurationError(f"--output: no folder '{folder.parent}'; make it first.")
    taken = [name for name in (PAGE, SUMMARY, NUMBERS) if (folder / name).exists()]
    if not taken:
        return
    page = folder / PAGE
    opening = page.read_bytes()[:1024] if page.is_file() else b""
    if signature(subject).encode() not in opening:
        raise ConfigurationError(
            f"--output: '{folder / taken[0]}' exists and is of no report of this command; name "
            "another folder."
        )


def write_report(folder: Path, page: str, summary: str, numbers: Mapping[str, Any]) -> None:
    """Write the three files.

    Raises:
        TrainingStoppedError: if the disk is full or not to be written to.
    """
    folder.mkdir(exist_ok=True)
    write_atomic(folder / PAGE, page)
    write_atomic(folder / SUMMARY, summary + "\n")
    write_atomic(folder / NUMBERS, as_json(numbers) + "\n")


def as_json(numbers: Mapping[str, Any]) -> str:
    """Numbers as JSON; what is NaN or infinite, which JSON has no word for, is null."""
    return json.dumps(_finite(numbers), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def whole_page(
    subject: str, title: str, head: str, sections: Mapping[str, tuple[str, str]], version: str
) -> str:
    """One HTML page that needs nothing else.

    Args:
        subject: Of the command.
        title: Plain text.
        head: HTML below the heading.
        sections: Headings and HTML by the name of their anchor; empty ones are left out.
        version: Of this project.
    """
    shown = {name: part for name, part in sections.items() if part[1]}
    links = "".join(f'<a href="#{name}">{escape(part[0])}</a>' for name, part in shown.items())
    body = [
        f"<header>\n<h1>{escape(title)}</h1>\n{head}\n<nav>{links}</nav>\n</header>",
        *(
            f'<section id="{name}">\n<h2>{escape(heading)}</h2>\n{content}\n</section>'
            for name, (heading, content) in shown.items()
        ),
        f"<footer>Written by qlora-pl {escape(version)} inspect {subject}.</footer>",
    ]
    folder = files("qlora_pl.inspection")
    return Template((folder / "page.html").read_text("utf-8")).substitute(
        signature=signature(subject),
        title=escape(title),
        style=(folder / "page.css").read_text("utf-8"),
        body="\n".join(body),
    )


def tiles(named: Mapping[str, str]) -> str:
    """Numbers that are read first; values are plain text."""
    shown = "".join(
        f"<li><b>{escape(value)}</b><span>{escape(name)}</span></li>"
        for name, value in named.items()
    )
    return f'<ul class="tiles">{shown}</ul>'
