"""Every error hasten raises on purpose: one tree, each with a hint that says what to do next.

Callers may catch `HastenError` for everything, or the leaf they care about. Errors about a value a caller gave are
also `ValueError`, so code that knows nothing of hasten still handles them.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class HastenError(Exception):
    """Base of all hasten errors.

    `message` says what is wrong, `hint` (may be empty) says the way out, and `field` (may be empty) names the
    offending request or config field. `str(error)` is the message followed by the hint, on one line.
    """

    def __init__(self, message: str, *, hint: str = "", field: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.field = field

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(HastenError, ValueError):
    """A setting or request field has a value outside its allowed range."""


class UnknownNameError(ConfigError):
    """A model, method or option name that nothing answers to; the hint lists the nearest names."""


class IncompatibleError(ConfigError):
    """Two parts, or a part and a model, cannot work together; both are named in the message."""


class ContextLengthError(ConfigError):
    """Prompt plus requested tokens exceed the model's window."""


class FormatError(HastenError, ValueError):
    """A file is damaged, truncated or not of the format its name claims; `path` names it."""

    def __init__(self, message: str, *, path: str = "", hint: str = "", field: str = "") -> None:
        super().__init__(f"{path}: {message}" if path else message, hint=hint, field=field)
        self.path = path


class UnsupportedError(HastenError):
    """The input is well formed but asks for something this version of hasten does not do."""


class RuleError(HastenError):
    """A logit rule cannot decide a token: the request that asked for it ends, and no other is touched."""


class MemoryFitError(HastenError):
    """Loading or admitting this would not fit into memory; the message carries the numbers in bytes."""


class BusyError(HastenError):
    """There is not enough free memory right now; try again in `retry_after_s` seconds."""

    def __init__(self, message: str, *, hint: str = "", field: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, hint=hint, field=field)
        self.retry_after_s = retry_after_s


class DownloadError(HastenError):
    """A model could not be fetched; the message lists every source tried and its cause."""


class MissingExtraError(HastenError, ImportError):
    """An optional dependency is not installed; the hint is the pip command that installs it."""


def out_of_range(field: str, value: object, allowed: str, hint: str = "") -> ConfigError:
    """A `ConfigError` in the house form: field, value given, allowed range, way out."""
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return ConfigError(f"{field} = {shown} is not allowed; {field} must be {allowed}", hint=hint, field=field)


def unknown_name(kind: str, name: str, known: Iterable[str], hint: str = "") -> UnknownNameError:
    """An `UnknownNameError` for `name` of this `kind`, suggesting up to three of the `known` names."""
    known = sorted(known)
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    parts = []
    if near:
        parts.append("did you mean " + " or ".join(repr(n) for n in near) + "?")
    if hint:
        parts.append(hint)
    if not parts:
        parts.append("known: " + ", ".join(known[:12]) + (", ..." if len(known) > 12 else "") if known else "none known")
    return UnknownNameError(f"unknown {kind} {name!r}", hint=" ".join(parts), field=kind)
