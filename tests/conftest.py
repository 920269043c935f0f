"""Fixtures that tests share: one small base, one laboratory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mycel.rounds.laboratory import Laboratory, laboratory


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lab() -> Iterator[Laboratory]:
    with laboratory(workers=0, base="micro") as opened:
        yield opened
