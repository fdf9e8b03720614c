"""Errors that a user can cause or meet. The command line shows these without a traceback; anything else is a bug.

The first two are ValueErrors, so that code which calls retinaflow from Python can catch them as such.
"""

from __future__ import annotations


class SettingError(ValueError):
    """A setting, or a combination of settings, that breaks a rule. The message names setting, rule and value."""


class DataError(ValueError):
    """A file that is missing, unreadable or breaks a rule. The message names file, line, rule and value."""


class StoreError(RuntimeError):
    """A store of runs or trials (MLflow, a database) that cannot be reached, or that refused what it was given."""


class Interrupted(Exception):
    """Work that ended early on request: a signal, or the end of the process that started it."""
