"""Fixtures that tests share: one small base, one laboratory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from mycel.rounds.laboratory import Laboratory, laboratory

settings.register_profile("busy", settings(), deadline=None)  # how long an example takes is the machine's affair
settings.load_profile("busy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that starts federations first: what takes longest must not be what begins last."""
    items.sort(key=lambda item: item.path.stem != "test_federation_processes")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lab() -> Iterator[Laboratory]:
    with laboratory(workers=0, base="micro") as opened:
        yield opened
