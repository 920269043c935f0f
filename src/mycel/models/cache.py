"""Where built-in bases are kept once trained; two processes never train the same one."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

import mycel.data
from mycel.errors import ModelError
from mycel.models.base import Progress
from mycel.models.pretrain import RECIPE_VERSION, train_base
from mycel.models.sizes import SPECIAL_TOKENS, VOCABULARY, Size

TICK = 0.25  # seconds between reports while another process trains
# The files of the data room that decide what the public corpus is.
READERS = ("definitions.py", "library.py", "modules.py", "prose.py")


def cache_folder() -> Path:
    """Return the folder for what is made once per machine: ``MYCEL_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("MYCEL_CACHE") or user_cache_dir("mycel"))


def cached_base(size: Size, progress: Progress | None = None) -> Path:
    """Return the folder of a built-in base; the first call on a machine trains it.

    Raises
    ------
    ModelError
        When the cache folder cannot be written.
    """
    report = progress or _silent
    folder = cache_folder() / "bases" / f"{size.name}-{base_key(size)}"
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock"), report):
            if not (folder / "config.json").is_file():
                _publish(size, folder, report)
    except OSError as error:
        raise ModelError(
            f"the cache {folder.parent} cannot be written ({error}): set MYCEL_CACHE to a folder that can"
        ) from error
    return folder


def base_key(size: Size) -> str:
    """Return 16 hexadecimal digits of what the base follows from: its size, the corpus and the training recipe."""
    content = (asdict(size), VOCABULARY, SPECIAL_TOKENS, RECIPE_VERSION, _corpus_listing())
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def _corpus_listing() -> list[object]:
    """List what the corpus is read from; sizes tell two libraries apart in milliseconds, reading takes seconds."""
    listing: list[object] = [platform.python_version()]
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - {"site-packages", "dist-packages", "__pycache__", "test"})
        place = Path(folder)
        listing += [(name, (place / name).stat().st_size) for name in sorted(names) if name.endswith(".py")]
    room = Path(mycel.data.__path__[0])
    return listing + [hashlib.sha256((room / name).read_bytes()).hexdigest() for name in READERS]


def _publish(size: Size, folder: Path, report: Progress) -> None:
    # A folder appears under its final name only when it is whole; what a killed process left is swept away.
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    train_base(size, partial, report)
    partial.rename(folder)


@contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=TICK)
            break
        except Timeout:
            report("waiting for another process that trains it", 0, 1)
    try:
        yield
    finally:
        lock.release()


def _silent(phase: str, done: int, total: int) -> None:
    return None
