"""The door of a swarm: embedding and head here, blocks at peers, everything else as for one machine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

from transformers import AutoTokenizer

from mycel.generation.engine import Engine, Limits
from mycel.generation.executor import Executor
from mycel.generation.served import Served
from mycel.generation.service import Service
from mycel.generation.speculation import Drafter
from mycel.generation.streaming import Notice
from mycel.models.base import Progress, find_base
from mycel.segments.client import SwarmModel
from mycel.segments.door import join_model
from mycel.segments.executor import Pipeline


class SwarmService(Service):
    """A service whose executor asks peers; leaving the swarm is part of closing it."""

    def __init__(self, engine: Engine, most: int, hall: Hall) -> None:
        self.hall = hall
        super().__init__(engine, most)

    def report_to(self, notice: Notice) -> None:
        """Tell also who comes and goes with which blocks, and which peers were lost and at what price."""
        super().report_to(notice)
        self.hall.report_to(notice)

    def close(self) -> None:
        """End what is under way and leave the swarm."""
        super().close()
        self.hall.close()


class Hall:
    """An event loop on a thread of its own, in which a swarm's model is open.

    Parameters
    ----------
    opening : AsyncContextManager
        Opens the model, as ``segments.door.join_model`` does.
    """

    def __init__(self, opening: AbstractAsyncContextManager[SwarmModel]) -> None:
        self.loop = asyncio.new_event_loop()
        self._leave = AsyncExitStack()
        self._watching: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self.loop.run_forever, name="swarm", daemon=True)
        self._thread.start()
        try:
            self.model = asyncio.run_coroutine_threadsafe(self._leave.enter_async_context(opening), self.loop).result()
        except BaseException:
            self._end()
            raise

    def report_to(self, notice: Notice) -> None:
        """Tell who comes and goes with which blocks, and what the loss of peers costs."""

        async def watch() -> None:
            depth, serving = self.model.cut.depth, self.model.model
            async for change in self.model.peers.watch():
                if change.kind == "left":
                    notice("gone", peer=change.name)
                    continue
                first, last = change.facts.get("first"), change.facts.get("last")
                sane = isinstance(first, int) and isinstance(last, int) and 0 <= first < last <= depth
                if sane and change.facts.get("model") == serving:
                    notice("holds", peer=change.name, first=first, last=last, of=depth)

        def begin() -> None:
            self.model.notice = notice
            self._watching = self.loop.create_task(watch())

        self.loop.call_soon_threadsafe(begin)

    def close(self) -> None:
        """Leave the swarm and end the thread."""
        if self._watching is not None:
            self.loop.call_soon_threadsafe(self._watching.cancel)
        try:
            asyncio.run_coroutine_threadsafe(self._leave.aclose(), self.loop).result()
        finally:
            self._end()

    def _end(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def open_swarm(
    swarm: str,
    model: str,
    most: int,
    progress: Progress | None = None,
    drafter: Callable[[int], Drafter] | None = None,
    guesses: int = 4,
) -> Served:
    """Serve a model that the peers of a swarm hold.

    Parameters
    ----------
    swarm : str
        Folder of the swarm, or of an invitation.
    model : str
        What the peers were started with.
    most : int
        Largest number of unfinished requests.
    progress : callable, optional
        Told while a built-in size is trained.
    drafter : callable, optional
        Given the vocabulary, returns what guesses tokens ahead.
    guesses : int
        Most tokens guessed ahead.
    """
    folder = find_base(model, progress)
    return swarm_served(Path(model).name, folder, join_model(swarm, model), most, drafter, guesses)


def swarm_served(
    name: str,
    folder: Path,
    opening: AbstractAsyncContextManager[SwarmModel],
    most: int,
    drafter: Callable[[int], Drafter] | None = None,
    guesses: int = 4,
) -> Served:
    """Serve a model under a name whose tokeniser lies in a folder and whose blocks are wherever ``opening`` leads."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    hall = Hall(opening)
    executor: Executor = Pipeline(hall.model, hall.loop)
    guessing = drafter(executor.vocabulary) if drafter is not None else None
    limits = Limits(share=False, guesses=guesses)
    service = SwarmService(Engine(executor, tokenizer, limits, drafter=guessing), most, hall)
    return Served(name, tokenizer, service)
