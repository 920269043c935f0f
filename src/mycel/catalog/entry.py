"""What the catalogue says of a system."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One system.

    Attributes
    ----------
    name : str
        As recipes write it.
    number : int or None
        In the catalogue of surveyed papers; None for a baseline.
    paper : str
        Authors, year and title.
    stage, way : str
        Stage of the pipeline, and the way machines work together.
    claim : str
        What the paper says and ``mycel claims`` measures.
    module, factory, measure : str
        Where the class lives, and the function beside it that measures the claim.
    """

    name: str
    number: int | None
    paper: str
    stage: str
    way: str
    claim: str
    module: str
    factory: str
    measure: str = "claim"

    def public(self) -> dict[str, Any]:
        """Return what ``mycel systems --json`` prints."""
        return {key: value for key, value in asdict(self).items() if key not in {"module", "factory", "measure"}}
