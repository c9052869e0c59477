"""The errors a user of mqc can meet.

Every error names the thing that failed and the cause in its message; ``hint`` names the remedy.
"""

from __future__ import annotations


class MqcError(Exception):
    """Base of all errors raised on purpose by mqc.

    Args:
        message: what failed and why, one sentence, naming the thing (a path, a layer, an option).
        hint: what the user can do about it; shown on its own line.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        if self.hint is None:
            return self.message
        return f"{self.message}\n  hint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(cls: type[MqcError], message: str, hint: str | None) -> MqcError:
    """Unpickle an error with its keyword-only hint (errors cross process borders in workers)."""
    return cls(message, hint=hint)


class UsageError(MqcError):
    """An argument, option or recipe value is not valid."""


class CheckpointError(MqcError):
    """A model checkpoint is missing, incomplete or of an unsupported kind."""


class CaptureError(MqcError):
    """A model could not be captured as a graph."""


class PassPreconditionError(MqcError):
    """A program does not satisfy what a pass requires."""


class PassPostconditionError(MqcError):
    """A pass did not establish what it promises."""


class VerificationError(MqcError):
    """A program is malformed, or no longer computes the function it should."""


class CalibrationError(MqcError):
    """Calibration data or statistics are missing or unusable."""


class TargetError(MqcError):
    """A target cannot run or emit what is asked of it."""


class ArtifactError(MqcError):
    """A compiled artifact is missing, damaged or of another format version."""
