"""Every error mergekern raises on purpose. Texts read `op: what is wrong; got X; expected Y`."""

from __future__ import annotations


class MergekernError(Exception):
    """Base of all errors below; the command line prints it as one line."""


class ArgumentError(MergekernError, ValueError):
    """An argument has a value, shape, dtype or device that the call cannot accept."""

    @classmethod
    def of(cls, op: str, what: str, got: object, expected: object) -> ArgumentError:
        return cls(f"{op}: {what}; got {got}; expected {expected}")


class BackendError(MergekernError, RuntimeError):
    """The requested backend cannot serve this call; the text says why and what to do."""


class ConfigError(MergekernError, ValueError):
    """A merge configuration has an unknown, unsupported or contradictory key."""


class ConfigWarning(UserWarning):
    """A merge configuration holds settings that have no effect; the text lists them."""


class CheckpointError(MergekernError, ValueError):
    """A checkpoint is corrupt, incomplete or incompatible with the others."""


class RankError(MergekernError, RuntimeError):
    """Another process of the same job failed, died or cannot be reached."""
