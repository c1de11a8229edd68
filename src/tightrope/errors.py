"""Every error Tightrope raises on purpose.

    TightropeError
    ├── InputError        a file, option, model name, image or pattern that the user gave
    ├── TraceError        a network, or one operation of it, that cannot be traced or lowered
    ├── BudgetError       a budget that cannot be read, or that no choice can meet
    ├── BundleError       a bundle that is missing parts, corrupt, or of another version
    └── ProtocolError     a peer that vanished, disagreed, or sent something it must not

The command line prints the message and exits with status 2; anything else is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

FEW = 12  # words that a hint lists in full


class TightropeError(Exception):
    """Base class. The message says what is wrong, where, what was got, what is allowed and how to go on."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        allowed: object = None,
        fix: str | None = None,
    ) -> None:
        parts = [what]
        if where is not None:
            parts.append(f"  where:   {where}")
        if got is not None:
            parts.append(f"  got:     {got}")
        if allowed is not None:
            parts.append(f"  allowed: {_words(allowed)}")
        if fix is not None:
            parts.append(f"  try:     {fix}")
        super().__init__("\n".join(parts))
        self.what = what


class InputError(TightropeError):
    """Something the user named does not exist or has the wrong form."""


class TraceError(TightropeError):
    """The network, or one operation of it, is outside what can be traced or lowered."""


class BudgetError(TightropeError):
    """The budget cannot be parsed, names an unknown quantity, or is infeasible."""


class BundleError(TightropeError):
    """The bundle on disk is incomplete, corrupt, or written by another schema."""


class ProtocolError(TightropeError):
    """A secure session failed: a peer is gone, disagrees, or broke the protocol."""


def near(name: str, known: Iterable[str]) -> str:
    """A short hint, the closest first: all known words if they are few, else some and how many there are."""
    words = sorted(known)
    close = _closest(name, words, 0.4)
    if len(words) <= FEW:
        return ", ".join([*close, *(word for word in words if word not in close)])
    close = close or _closest(name, words, 0.0)
    return ", ".join(close) + f", … ({len(words)} in all)"


def meant(name: str, known: Iterable[str]) -> str | None:
    """Beside a list of all known words: those that `name` may be a slip for; None if it is like none."""
    close = _closest(name, sorted(known), 0.6)
    return f"near: {', '.join(close)}" if close else None


def _closest(name: str, words: list[str], least: float) -> list[str]:
    """Up to 4, the closest first; words as close as each other in their own order."""
    apart = {word: -SequenceMatcher(None, word, name).ratio() for word in words}
    return [word for word in sorted(words, key=apart.__getitem__) if -apart[word] >= least][:4]


def _words(allowed: object) -> str:
    """Several words as a person lists them; a shape stays a shape."""
    if isinstance(allowed, tuple) and any(isinstance(word, str) for word in allowed):
        return ", ".join(map(str, allowed))
    return str(allowed)
