"""Read examples from wherever they lie: the built-in corpus, a file, a folder of text, or the Hugging Face hub."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mycel.data.columns import Columns
from mycel.data.examples import Example
from mycel.data.library import PRIVATE_DOMAINS, private_examples, public_text
from mycel.data.lines import read_lines
from mycel.errors import DataError

BUILT_IN = "python-library"
RUNNING_TEXT = "python-text"
KNOWN = (
    '"python-library", "python-text", a .jsonl or .parquet file, a folder of .txt or .md files, '
    'or a Hugging Face id such as "org/name:split"'
)
HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.\[\]%:+-]+))?", re.ASCII)
HUB_PATIENCE = 10.0  # seconds
PASSAGE = 600  # characters of a text file in one example


def load_examples(source: str, *, limit: int | None = None) -> list[Example]:
    """Read examples, in the order of the source.

    Parameters
    ----------
    source : str
        ``"python-library"``, a ``.jsonl`` or ``.parquet`` file, a folder of ``.txt`` and ``.md`` files (label: the
        sub-folder), or a Hugging Face id, ``"org/name"`` or ``"org/name:split"``.
    limit : int, optional
        Read at most so many.

    Raises
    ------
    DataError
        The source is missing, unreadable, malformed, or holds no example.
    """
    examples = list(islice(_examples(source), limit))
    if not examples:
        raise DataError(f"{source} is empty: it holds no example with a response")
    return examples


def _examples(source: str) -> Iterator[Example]:
    if not source:
        raise DataError(f"data.source is empty text: it is {KNOWN}")
    if source == BUILT_IN:
        return (example for domain in PRIVATE_DOMAINS for example in private_examples(domain))
    if source == RUNNING_TEXT:
        return (Example("", piece) for piece in public_text())
    path = Path(source)
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:
        raise DataError(f"{source[:200]!r} cannot be looked up: {error}: a data.source is {KNOWN}") from error
    if is_folder:
        return _folder(path)
    if path.suffix in READERS:
        if not path.is_file():
            raise DataError(f"there is no file {source}: a data.source is {KNOWN}")
        return READERS[path.suffix](path)
    if exists:
        raise DataError(f"{source} is not a kind of file that is read: a data.source is {KNOWN}")
    match = HUB_ID.fullmatch(source)
    if match is None or source.startswith("."):
        raise DataError(f"there is no source {source!r}: a data.source is {KNOWN}")
    return _hub(match[1], match[2] or "train")


def _jsonl(path: Path) -> Iterator[Example]:
    columns: Columns | None = None
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({error}): every line must be one JSON object") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON {type(row).__name__}, where an object with columns is needed")
        if columns is None or not columns.fits(row):
            columns = Columns.find(row, where)
        if (example := columns.example(row, where)) is not None:
            yield example


def _folder(path: Path) -> Iterator[Example]:
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md") and file.is_file())
    if not files:
        raise DataError(f"the folder {path} has no .txt or .md file: a data.source is {KNOWN}")
    for file in files:
        parts = file.relative_to(path).parts
        for passage in _passages(line for _, line in read_lines(file)):
            yield Example("", passage, parts[0] if len(parts) > 1 else "")


def _passages(lines: Iterator[str]) -> Iterator[str]:
    """Cut running text into passages of about ``PASSAGE`` characters, at blank lines where they are near."""
    kept: list[str] = []
    length = 0
    for line in lines:
        for part in textwrap.wrap(line, PASSAGE) if len(line) > PASSAGE else [line]:
            if length > PASSAGE or (length > PASSAGE // 2 and not part.strip()):
                yield "\n".join(kept).strip("\n")
                kept, length = [], 0
            kept.append(part)
            length += len(part.strip())
    if length:
        yield "\n".join(kept).strip("\n")


def _parquet(path: Path) -> Iterator[Example]:
    # Streaming reads the file where it lies; otherwise a converted copy would stay behind in a cache.
    with _datasets() as datasets, TemporaryDirectory() as scratch:
        try:
            table = datasets.load_dataset(
                "parquet", data_files=str(path), split="train", streaming=True, cache_dir=scratch
            )
            yield from _rows(table, str(path))
        except DataError:
            raise
        except Exception as error:  # the reader's errors have no common base
            raise DataError(f"{path} is not a sound Parquet file: {_first_line(error)}") from error


def _hub(name: str, split: str) -> Iterator[Example]:
    with _datasets() as datasets:
        try:
            if not datasets.config.HF_HUB_OFFLINE:
                from huggingface_hub import HfApi

                # One short question first: the library itself asks an absent hub for half a minute.
                HfApi().dataset_info(name, timeout=HUB_PATIENCE)
            table = datasets.load_dataset(name, split=split)
        except Exception as error:  # errors of network, hub and builder have no common base
            raise DataError(
                f"there is no file or folder {name!r} here, and the Hugging Face dataset of that name "
                f"(split {split!r}) cannot be loaded: {_first_line(error)}; "
                "check the name and the connection, or give a file"
            ) from error
    yield from _rows(table, f"{name}:{split}")


@contextmanager
def _datasets() -> Iterator[Any]:
    """The ``datasets`` library, imported on use and kept from writing to the terminal."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield datasets
    finally:
        datasets.logging.set_verbosity(verbosity)


def _rows(table: Any, where: str) -> Iterator[Example]:
    columns: Columns | None = None
    for number, row in enumerate(table, 1):
        columns = columns or Columns.find(row, where)
        if (example := columns.example(row, f"{where}, row {number}")) is not None:
            yield example


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".rstrip(": .")


READERS: dict[str, Callable[[Path], Iterator[Example]]] = {".jsonl": _jsonl, ".parquet": _parquet}
