"""One example: what is asked and what should be answered."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and the response to learn.

    Attributes
    ----------
    prompt : str
        What comes before; not learnt. Plain text has the empty prompt.
    response : str
        What is learnt.
    label : str
        A class or domain by which examples can be spread over parties; empty when there is none.
    """

    prompt: str
    response: str
    label: str = ""
