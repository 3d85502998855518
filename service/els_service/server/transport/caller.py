"""Identity of the caller of the current call."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

_token_name: ContextVar[str] = ContextVar("token_name")


def set_token_name(name: str) -> None:
    """Set the name of the current call's token."""
    # Each call runs in a task, and therefore in a context, of its own.
    _token_name.set(name)


def token_name() -> str | None:
    """Return the name of the current call's token; None without a token."""
    return _token_name.get(None)


def caller_of(context: Any) -> str:
    """Return the caller: the name of the call's token, else its peer, which is one connection."""
    return _token_name.get(None) or context.peer()
