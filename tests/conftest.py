"""Fixtures that tests share: one small base, one laboratory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mycel.rounds.laboratory import Laboratory, laboratory


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start federations first: what takes longest must not be what begins last."""
    items.sort(key=lambda item: not item.path.stem.endswith(("federation_processes", "guard_federation")))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def lab() -> Iterator[Laboratory]:
    with laboratory(workers=0, base="micro") as opened:
        yield opened
