"""The errors a user meets, as a tree.

    MycelError
    ├── RecipeError      a recipe says something impossible or unknown
    ├── DataError        a source of text is missing, unreadable or empty
    ├── ModelError       a model, tokeniser or adapter is missing or does not fit
    ├── ParcelError      bytes from a wire or a disk are not a sound parcel
    ├── EngineError      a node or its engine failed
    ├── GenerationError  a request for text is impossible, or cannot be served now
    ├── RunError         a run folder is in use, damaged, or cannot be written
    └── ExtraMissing     an optional library is not installed

Every message is a sentence that names the field, what was found, and what would do.
"""

from __future__ import annotations


class MycelError(Exception):
    """Base of every error raised on purpose; its text is meant for the person who ran the command."""


class RecipeError(MycelError):
    """A recipe, an override or a knob is unknown, mistyped or impossible."""


class DataError(MycelError):
    """A source of examples is missing, unreadable, empty or in the wrong shape."""


class ModelError(MycelError):
    """A model, tokeniser, trainable or checkpoint is missing or does not fit."""


class ParcelError(MycelError):
    """Bytes that came over a wire or from a disk are not a sound parcel."""


class EngineError(MycelError):
    """A node, a worker process or the engine that carries parcels failed."""


class GenerationError(MycelError):
    """A request for generated text is impossible, or the service cannot take it now."""


class UnknownModel(GenerationError):
    """A model or adapter is asked for that is not served."""


class BusyError(GenerationError):
    """The service has as much to do as it takes; ``seconds`` says when to try again."""

    def __init__(self, found: str, seconds: int) -> None:
        super().__init__(f"{found}, as many as are taken: try again in {seconds} s")
        self.seconds = seconds


class RunError(MycelError):
    """A run folder is in use, belongs to another recipe, is damaged, or cannot be written."""


class ExtraMissing(MycelError):
    """An optional library is not installed; the message holds the line that installs it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"this needs {library}, which is not installed: pip install 'mycel[{extra}]'")
