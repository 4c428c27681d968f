"""Keys, tokens and passwords, told from other text, so that they are neither written nor said.

A configuration that holds one is refused, because it is written to ``run.yaml``, which must stay a
file that runs. Whatever is said (messages, logs, tracebacks, the recorded command) is redacted.
What is meant for strangers (a bug report) names neither people nor machines.
"""

from __future__ import annotations

import getpass
import logging
import os
import re
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

REDACTED = "[redacted]"
LEAST_LENGTH = 12
"""Of a variable's or flag's value that is looked for; ordinary words hold shorter ones."""

SECRET_VARIABLE = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|SECRET|PRIVATE)_?KEY)(_|$)",
    re.IGNORECASE,
)
SECRET_KEY = re.compile(
    r"(^|_)((api|access|secret|private)_?key(_id)?|secret|passw(or)?d|credentials?"
    r"|(auth|access|api|hf|bearer|session)_?token)$|^token$",
    re.IGNORECASE,
)
"""Last parts of keys; ``eos_token`` and ``max_new_tokens`` are none."""
SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|sk-(proj-|ant-)?\w{20,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{30,}|glpat-[\w-]{20,}|xox[abeoprs]-[\w-]{10,}|(AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})"
)
"""Tokens by their issuers' prefixes: Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS, JWT."""
IN_ADDRESS = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)|(?<=://)[^\s/@:]+(?=@[^\s/]+/)")
"""The user and password of an address."""
IN_QUERY = re.compile(
    r"(?<=[?&])((?:[\w-]*(?:token|signature|credential|password|secret)|sig|(?:api_?)?key)=)"
    r"[^&\s'\"]+",
    re.IGNORECASE,
)
"""The signed part of an address."""


def redact(text: str) -> str:
    """The text with ``[redacted]`` for every key, token and password that can be told."""
    for secret in known_secrets().values():
        text = text.replace(secret, REDACTED)
    text = IN_ADDRESS.sub(REDACTED, text)
    return SHAPES.sub(REDACTED, IN_QUERY.sub(rf"\1{REDACTED}", text))


PERSON, HOST = "[user]", "[host]"
IMPERSONAL = frozenset({"root", "user", "users", "home", "ubuntu", "admin", "runner", "localhost"})
"""Names that tell nothing of a person or a machine, and occur as words."""
HOST_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT", "MASTER_ADDR")
PUBLIC_HOSTS = frozenset({"huggingface.co", "github.com", "download.pytorch.org", "127.0.0.1"})


def anonymous(text: str) -> str:
    """The text redacted, and without the path of the home, the user's name and names of hosts."""
    text = redact(text)
    with suppress(RuntimeError):  # no home can be told
        home = Path.home()
        for path in sorted({str(home), str(home.resolve())}, key=len, reverse=True):
            if path != "/":
                text = re.sub(rf"{re.escape(path)}(?=/|\b|$)", "~", text)
    for names, label in ((_host_names(), HOST), (_user_names(), PERSON)):
        for name in sorted(names, key=len, reverse=True):
            word = rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"
            part = rf"(?<=/){re.escape(name)}(?=/|\s|$)"  # of a path: short names too
            text = re.sub(word if len(name) > 2 else part, label, text)
    return text


def _user_names() -> set[str]:
    names = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with suppress(OSError, KeyError, ImportError):
        names.add(getpass.getuser())
    with suppress(RuntimeError):
        names.add(Path.home().name)
    return names - IMPERSONAL - {""}


def _host_names() -> set[str]:
    own = {socket.gethostname(), os.environ.get("HOSTNAME", "")}
    names = {name for full in own for name in (full, full.partition(".")[0])}
    for variable in HOST_VARIABLES:
        for value in (os.environ.get(variable, ""), os.environ.get(variable.lower(), "")):
            with suppress(ValueError):
                names.add(urlsplit(value if "//" in value else f"//{value}").hostname or "")
    return names - IMPERSONAL - PUBLIC_HOSTS - {""}


def known_secrets() -> dict[str, str]:
    """Where this process was given secrets, by variable or flag, and which; the longest first."""
    found = {
        name: value
        for name, value in os.environ.items()
        if SECRET_VARIABLE.search(name) and len(value) >= LEAST_LENGTH and not os.path.exists(value)
    }
    for word, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        flag, equals, value = word.partition("=")
        value = value if equals else following
        if flag.startswith("--") and is_secret_key(flag) and len(value) >= LEAST_LENGTH:
            found[flag] = value
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def is_secret_key(key: str) -> bool:
    """Whether a key's name says that its value is a secret."""
    return SECRET_KEY.search(key.lstrip("-").rpartition(".")[2]) is not None


def secrets_in(value: Any, key: str = "") -> Iterator[str]:
    """A sentence for each key of a configuration that holds a secret; never the secret itself.

    Args:
        value: The configuration in plain types, or a part of it.
        key: Of that part.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from secrets_in(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from secrets_in(inner, f"{key}[{index}]")
    elif isinstance(value, str) and value and (what := _kind_of_secret(value, key)):
        yield (
            f"{key}: it holds {what}, and a run's configuration is written to run.yaml; leave it "
            "out and set it in the environment (HF_TOKEN, WANDB_API_KEY and so on), where "
            "libraries look for it."
        )


def _kind_of_secret(value: str, key: str) -> str | None:
    if is_secret_key(key):
        return "a key or password"
    if IN_ADDRESS.search(value) or IN_QUERY.search(value):
        return "an address with a password or signature"
    if SHAPES.search(value):
        return "what looks like an access token"
    names = [name for name, secret in known_secrets().items() if secret in value]
    return f"the value of {names[0]}" if names else None


class RedactingFormatter(logging.Formatter):
    """Redacts what a handler is about to write."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text, redacted."""
        return redact(super().format(record))


def print_redacted_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What ``sys.excepthook`` prints, redacted: an error of a library quotes what it was given."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
