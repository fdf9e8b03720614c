"""Addresses without their secrets: who may use a server stands in its address, and must stand nowhere else.

Everything that is printed, logged or written as text goes through :func:`without_secrets`, so that neither an error of
a library nor a setting can carry a password into a log, a tag, a parameter, a report or a file.
"""

from __future__ import annotations

import re

_USER = re.compile(
    r"(?<=://)"
    # A name without a password, or both. SQLAlchemy takes a password with any letter but @; a port is no password.
    r"(?:[^\s/?#@:\"'<>]*@|[^\s/?#@:\"'<>]*:(?!\d{1,5}(?:[/?#\s]|$))[^\s@\"'<>]*@)+"
)
_PART = re.compile(
    r"(?P<name>[?&;](?:[\w.-]*(?:user|passw|pwd|token|secret|credential|signature|api_?key|access_?key)[\w.-]*|sig)=)"
    r"[^&;\s#\"'<>]+",
    re.IGNORECASE,
)


def without_secrets(text: str) -> str:
    """The text with user and password cut out of every address in it, and ``***`` for what a query names as a secret.

    ``http://ann:pw@host/a?token=x`` -> ``http://host/a?token=***``.
    """
    if "://" not in text:
        return text
    return _PART.sub(r"\g<name>***", _USER.sub("", text))
