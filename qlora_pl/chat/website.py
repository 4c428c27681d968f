"""The page on the network: served where it was asked for, to whom it is for, and to nobody else.

Gradio would ask its own servers for its newest version, load a script and count visits, and keep
every answer in the browser; all of that is off, and the browser is told to fetch nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from qlora_pl.chat.address import Login, PageOptions, free_port, is_loopback, login_for, taken
from qlora_pl.errors import ConfigurationError, HardwareError
from qlora_pl.inference.loading import Model
from qlora_pl.modeling.answers.decoding import DecodingConfig

if TYPE_CHECKING:
    from qlora_pl.chat.page import Page

POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
    ]
)
"""What the browser may fetch and send: to and from this page alone, whatever a model writes.
Gradio's own page is begun by a script that stands in it."""
HEADERS = {
    "content-security-policy": POLICY,
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
SANS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Guard:
    """ASGI middleware: ``HEADERS`` for every answer, no uploads, and no visitors by a detour.

    Args:
        app: What answers.
        is_local: Whether only this machine's own names may be asked for. Another page in the same
            browser could otherwise give its own name this machine's address, and read answers.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], is_local: bool):
        self._app = app
        self._is_local = is_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._is_refused(scope):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    def _is_refused(self, scope: Scope) -> bool:
        if scope["path"].rstrip("/").endswith("/upload"):
            return True
        host = dict(scope["headers"]).get(b"host", b"").decode(errors="replace")
        return self._is_local and not is_loopback(urlsplit(f"//{host}").hostname or "")


class Website:
    """A page that is served, until it is closed.

    Args:
        page: What is on it.
        blocks: The same as Gradio knows it, launched.
    """

    def __init__(self, page: Page, blocks: Any) -> None:
        self._page = page
        self._blocks = blocks
        self.address: str = blocks.share_url or blocks.local_url
        """Where it is."""

    def wait(self) -> None:
        """Serve until Ctrl-C."""
        print(f"The page is at {self.address} and Ctrl-C ends it.", file=sys.stderr)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print("Closed; what was not saved is gone.", file=sys.stderr)
        finally:
            self.close()

    def close(self) -> None:
        """Stop what is being written, and end."""
        self._page.end()
        self._blocks.close(verbose=False)


def open_website(
    model: Model,
    options: PageOptions | None = None,
    decoding: DecodingConfig | None = None,
    system: str | None = None,
    login: Login | None = None,
) -> Website:
    """Serve the page in threads of its own; a notebook shows it below the cell.

    Args:
        model: What answers, from ``load_adapter``.
        options: Where the page is.
        decoding: How answers are drawn, until a visitor chooses otherwise.
        system: A system message, until a visitor writes another.
        login: Who may open it; None: see ``login_for``.

    Raises:
        ConfigurationError: if the address is taken, or a password is needed and missing.
        HardwareError: if there is no public link to be had.
    """
    options = options or PageOptions(web=True)
    login = login or login_for(options)
    port = free_port(options)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read in places where no argument leads
    import gradio
    from gradio.utils import colab_check  # Gradio is slow to import
    from starlette.middleware import Middleware

    from qlora_pl.chat.page import CSS, Page

    page = Page(model, decoding or DecodingConfig(), system, _title(model))
    blocks = page.blocks()
    is_local = login is None and not colab_check()  # Colab's own proxy has another name
    host = options.host.strip("[]")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            blocks.launch(
                server_name=f"[{host}]" if ":" in host else host,
                server_port=port,
                share=options.share,
                auth=(login.user, login.password) if login else None,
                prevent_thread_lock=True,
                quiet=True,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                root_path="",
                num_workers=0,
                app_kwargs={"middleware": [Middleware(Guard, is_local=is_local)]},
                theme=gradio.themes.Soft(font=SANS, font_mono=MONO, primary_hue="teal"),
                css_paths=CSS,
            )
    except OSError as error:
        raise ConfigurationError(taken(options.host, port, error)) from error
    website = Website(page, blocks)
    if options.share and not blocks.share_url:
        website.close()
        raise HardwareError(
            "--share: Gradio's server gave no public link; leave --share out, and forward the port "
            f"with ssh -L {port}:localhost:{port}."
        )
    return website


def _title(model: Model) -> str:
    base = Path(model.source.base).name
    return f"{', '.join(model.adapters)} over {base}" if model.adapters else base
