"""One folder per run: who may write to it, and how files come to be in it whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from mycel.errors import DataError, ModelError, RecipeError, RunError
from mycel.recipe.load import check
from mycel.recipe.schema import Recipe
from mycel.wire.shelf import SUFFIX


class RunFolder:
    """A run's folder, held by one process at a time.

    Parameters
    ----------
    path : Path
        Created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events = path / "events.jsonl"
        self.result = path / "result.json"
        self.recipe = path / "recipe.json"
        self.model = path / "model"
        self.work = path / "work"
        self.tokens = self.work / "tokens.safetensors"
        self.cleaning = self.work / "cleaning.json"

    def checkpoint(self, arm: str) -> Path:
        """Where an arm's checkpoint lies."""
        return self.work / f"{arm}.safetensors"

    @contextmanager
    def held(self, recipe: Recipe, resume: bool) -> Iterator[None]:
        """Hold the folder for ``recipe``: fresh, or with ``resume`` where the same recipe was stopped."""
        if resume and not self.recipe.exists():
            raise RunError(f"{str(self.path)!r} holds no run to resume: leave --resume out to start one there")
        with writing(self.path):
            self.work.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.work / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise RunError(
                f"another run is writing to {str(self.path)!r}: wait for it, or choose another folder with --out"
            ) from error
        for path in (*self.work.glob(f"*{SUFFIX}"), *self.work.glob(".*.[0-9]*")):  # a run that was killed left them
            path.unlink()
        try:
            fresh = self._claim(recipe, resume)
            try:
                yield
            except (RecipeError, DataError, ModelError):
                if fresh and not any(path != self.tokens for path in self.work.glob("[!.]*.safetensors")):
                    self._forget()
                raise
        finally:
            lock.release()

    def _forget(self) -> None:
        """Remove what a run left that was refused before any work: the mended recipe may start here afresh."""
        for path in (self.events, self.recipe):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.work, ignore_errors=True)
        with suppress(OSError):  # whatever else lies in the folder stays
            self.path.rmdir()

    def _claim(self, recipe: Recipe, resume: bool) -> bool:
        """Make the folder the recipe's, and return whether it is a fresh one."""
        if not self.recipe.exists():
            write_text(self.recipe, recipe.model_dump_json(indent=2))
            return True
        if not resume:
            raise RunError(
                f"{str(self.path)!r} already holds a run: add --resume to go on with it, or choose another --out"
            )
        before = read_recipe(self.path)
        if before.sha256() != recipe.sha256():
            raise RunError(
                f"{str(self.path)!r} holds a run of another recipe ({before.sha256()[:9]}, not {recipe.sha256()[:9]}): "
                "resume with the same recipe and overrides, or choose another --out"
            )
        return False


def read_recipe(path: Path) -> Recipe:
    """Return the recipe of the run in ``path``."""
    try:
        content = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"the run folder {str(path)!r} holds no readable recipe.json: is it a run folder?") from error
    return check(content, where=f"the recipe of {str(path)!r}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into a sentence; what was written before stays whole."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        full = number in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        reason = "the disk is full" if full else os.strerror(number).lower() if number else str(error)
        raise RunError(
            f"{str(path)!r} cannot be written: {reason}. Nothing done so far is lost: "
            "make room or choose another place, then run again with --resume"
        ) from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))  # safetensors tells the system's errors as text
    return int(found[1]) if found else None


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: under a temporary name, which ``write`` fills, to the disk, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes whole or not at all."""
    write_file(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, content: str) -> None:
    """Write UTF-8 text whole or not at all."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
