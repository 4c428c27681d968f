"""Where the page listens and who may open it, settled before any weights are loaded.

A page that others can reach, on the network or through a public link, has a password.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from getpass import getpass

from qlora_pl.errors import ConfigurationError

PASSWORD_VARIABLE = "QLORA_PL_WEB_PASSWORD"
"""Of the environment; a password in a command would be read by everybody who lists processes."""
MIN_PASSWORD_LENGTH = 8
"""Characters; nothing keeps anybody from trying one after the other."""
DEFAULT_USER = "qlora"
INSTALL = 'pip install "qlora-pl[web]"'


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """Where the page is, and who may open it."""

    web: bool = False
    """A page in the browser in place of the terminal."""
    host: str = "127.0.0.1"
    """The address that the page listens on; any but this machine's own needs a password."""
    port: int = 7860
    """The port that it listens on; 0: one that is free."""
    share: bool = False
    """Whether everybody on the internet who has a password can reach it for a week, through a
    server of Gradio's."""
    user: str | None = None
    """Who may open the page, with the password in QLORA_PL_WEB_PASSWORD, or else one that is asked
    for here."""

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.port <= 65535:
            problems.append(f"--port: must lie between 0 and 65535, got {self.port}.")
        if not self.host.strip():
            problems.append("--host: is empty; leave it out for this machine alone.")
        if self.user is not None and not self.user.strip():
            problems.append("--user: is empty; name somebody, or leave it out.")
        if problems:
            raise ConfigurationError(problems)

    @property
    def is_reachable(self) -> bool:
        """Whether other machines can reach the page."""
        return self.share or not is_loopback(self.host)


@dataclass(frozen=True)
class Login:
    """Who may open the page."""

    user: str
    password: str

    def __repr__(self) -> str:
        return f"Login({self.user!r}, ...)"


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no other can reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def require_gradio() -> None:
    """Make sure that what the page is made with is there.

    Raises:
        ConfigurationError: if it is not, with the command that installs it.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigurationError(
            f"--web: the page needs Gradio, which is not installed; run: {INSTALL}"
        )


def login_for(
    options: PageOptions,
    environment: Mapping[str, str] = os.environ,
    ask: Callable[[str], str] | None = None,
) -> Login | None:
    """Who may open the page; None: everybody who can reach it, which is this machine alone.

    Args:
        options: Where it is.
        environment: That may hold the password.
        ask: Asks for it; None: the terminal, if there is one.

    Raises:
        ConfigurationError: if a password is needed, and is missing or too short.
    """
    password = environment.get(PASSWORD_VARIABLE, "")
    if not password and options.user is not None:
        if ask is None and not sys.stdin.isatty():
            raise ConfigurationError(
                f"--user: there is no terminal to ask for a password; set {PASSWORD_VARIABLE}."
            )
        password = (ask or getpass)(f"Password for {options.user}: ")
    elif not password and options.is_reachable:
        reason = (
            "--share: everybody on the internet could use the page"
            if options.share
            else f"--host: other machines can reach {options.host}"
        )
        raise ConfigurationError(
            f"{reason}, so it needs a password; set {PASSWORD_VARIABLE}, or be asked for one with "
            "--user NAME."
        )
    if not password and options.user is None:
        return None
    if len(password) < MIN_PASSWORD_LENGTH:
        raise ConfigurationError(
            f"The password has {len(password)} characters; take at least {MIN_PASSWORD_LENGTH}."
        )
    return Login(options.user or DEFAULT_USER, password)


def free_port(options: PageOptions) -> int:
    """The port that is asked for, if nobody listens on it.

    Raises:
        ConfigurationError: if somebody does, or the address is not this machine's.
    """
    host = options.host.strip("[]")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except socket.gaierror as error:
        raise ConfigurationError(
            f"--host: '{options.host}' is no address that this machine knows."
        ) from error
    except OSError as error:
        raise ConfigurationError(taken(options.host, options.port, error)) from error


def taken(host: str, port: int, error: OSError) -> str:
    """A sentence for an address that cannot be listened on."""
    return (
        f"--port: the page cannot listen on port {port} of {host} "
        f"({(error.strerror or str(error)).lower()}); choose another with --port, or 0 for any "
        "that is free."
    )
