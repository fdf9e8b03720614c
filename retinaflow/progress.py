"""What a user sees of work in progress: plain lines."""

from __future__ import annotations


def report(text: str) -> None:
    """Print a line at once, even when the output goes to a file."""
    print(text, flush=True)
