"""What went wrong, for the person who can fix it.

A `UserError` says in one line what is wrong, where, and what to do. Every verb prints it without a traceback and
exits with code 2. Anything else that escapes is a defect of this library.
"""

from __future__ import annotations


class UserError(Exception):
    """Wrong input, a missing file or a missing optional package: one line, no traceback, exit code 2."""


class ConfigError(UserError, ValueError):
    """A `LigerConfig` or `config.json` that no model can be built from."""


class CheckpointError(UserError):
    """A checkpoint directory that is missing, truncated, or of an architecture that is not supported."""


class BundleError(UserError):
    """A bundle that is missing, corrupt, or newer than this library."""


class StateError(UserError, ValueError):
    """A state that does not belong to this model, batch or file format."""


class TokenError(UserError, ValueError):
    """Token ids of the wrong type, shape or range."""


class SessionError(UserError, RuntimeError):
    """A session used after an error, or stepped before it holds a state."""
