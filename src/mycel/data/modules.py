"""The Python source files of a folder, by module name, parsed and never imported."""

from __future__ import annotations

import ast
import gc
import io
import tokenize
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Tests, data tables and code that is not the library's own say little about what a package is for.
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "lib-dynload", "test", "tests", "idle_test", "lib2to3"),
    *("encodings", "pydoc_data", "__pycache__", "config"),
}


@dataclass(frozen=True)
class SourceFile:
    """A parsed module: its dotted name, its text and its tree."""

    module: str
    text: str
    tree: ast.Module


def source_files(root: Path, wanted: Callable[[str], bool], prefix: str = "") -> Iterator[SourceFile]:
    """Parse the files under ``root`` whose first name is ``wanted``, in the order of their paths.

    Parameters
    ----------
    root : Path
        Folder that holds modules and packages.
    wanted : callable
        Says of a module's or package's first name whether its files are read.
    prefix : str
        What stands before each dotted name, e.g. ``"package."``.
    """
    if not root.is_dir():
        return
    for place in sorted(root.iterdir()):
        name = place.stem.partition("-")[0]  # "config-3.12-x86_64-linux-gnu"
        if name in SKIPPED_FOLDERS or name.startswith("_sysconfigdata") or not wanted(name):
            continue
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            parts = path.relative_to(root).with_suffix("").parts
            if path.suffix == ".py" and SKIPPED_FOLDERS.isdisjoint(parts):
                name_of_module = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
                file = read_source(path, prefix + name_of_module)
                if file is not None:
                    yield file


def read_source(path: Path, module: str) -> SourceFile | None:
    """Parse a file; ``None`` when it is not source that this version of Python reads."""
    try:
        data = path.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
        with warnings.catch_warnings(), _no_collection():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            return SourceFile(module, text, ast.parse(text))
    except (OSError, SyntaxError, ValueError):
        return None


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the cycle collector from walking the whole heap again and again while a tree, which has no cycle, grows."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
