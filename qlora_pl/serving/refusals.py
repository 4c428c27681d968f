"""What a client is told when it gets no answer: a status, and a sentence in OpenAI's format."""

from __future__ import annotations

from typing import Any


class RefusedError(Exception):
    """A request that is not answered.

    Args:
        status: Of HTTP.
        message: One sentence: what is wrong, and what to do. It quotes no prompt.
        param: The key of the body that is wrong.
        code: A word that programs look for.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    def as_dict(self) -> dict[str, Any]:
        """The body of the reply."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def stopping() -> RefusedError:
    """The server is about to end."""
    return RefusedError(503, "The server is stopping; ask again when it is back.", code="stopping")


def busy(num_waiting: int) -> RefusedError:
    """Too much is waited for already."""
    return RefusedError(
        503, f"{num_waiting} answers are waited for already; ask again later.", code="busy"
    )


def out_of_memory() -> RefusedError:
    """Even alone the request takes more memory than there is."""
    return RefusedError(
        503,
        "The model ran out of memory over this request; shorten the prompt, lower max_tokens, or "
        "ask again when less is going on.",
        code="out_of_memory",
    )


def broken() -> RefusedError:
    """Something failed that should not have."""
    return RefusedError(
        500, "The model failed over this request; the server's log says where.", code="failed"
    )
