"""How the suites of this room speak: a law that does not hold is an ``AssertionError`` that names it."""

from __future__ import annotations


def law(holds: object, sentence: str) -> None:
    """Raise ``AssertionError`` with ``sentence`` unless ``holds``."""
    if not holds:
        raise AssertionError(f"broken law: {sentence}")
