"""How long a party keeps what runs leave with it: tokens, what stays at home, and its latest answer."""

from __future__ import annotations

import logging
import re
import shutil
import time
from pathlib import Path

DAYS = 30.0  # after which nobody has spoken of a run any more
logger = logging.getLogger("mycel.party")
ARM = re.compile(r"[0-9a-f]{24}(\.safetensors)?")


def forget_old_runs(folder: Path, days: float = DAYS) -> int:
    """Remove what runs left in a party's folder that were silent for so long; return of how many things.

    A run that comes back later finds a party that has kept nothing: one whose system keeps nothing at home goes on as
    if nothing were missing, another begins anew there.
    """
    until, removed = time.time() - 86400 * days, 0
    for path in (*folder.iterdir(), *(folder / "home").glob("*")):
        if ARM.fullmatch(path.name) and _latest(path) < until:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            removed += 1
    if removed:
        logger.info("removed what runs left here that were silent for %.0f days", days)
    return removed


def _latest(path: Path) -> float:
    return max(each.stat().st_mtime for each in (path, *path.rglob("*")))
