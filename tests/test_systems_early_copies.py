"""Pages are copied aside and back while the model computes, before they run out and before they are needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import wait

import pytest
from torch import Tensor

from mycel.generation.engine import Engine, Limits, _collector, greedy
from mycel.generation.executor import Piece, Whole
from mycel.generation.memory import Memory
from mycel.generation.request import Request
from mycel.generation.scheduler import FirstComeFirstServed, Step, View
from mycel.generation.simulator import Clock, Costs
from mycel.serve.fastserve import FastServe
from test_generation import MOST, PROMPTS, made, plain

PATIENCE = 20.0  # seconds after which a copy that waits for the computing has waited in vain


class Watched(Whole):
    """Notes when it computes, and lets copies end only while it does."""

    def __init__(self) -> None:
        super().__init__(made("Llama", seed=1))
        self.events: list[str] = []
        self.computing = threading.Event()
        self.copied = threading.Semaphore(0)
        self.await_copy = False

    def reserve(self, pages: int, size: int) -> None:
        super().reserve(pages, size)
        assert self.memory is not None
        for name in ("copy_out", "copy_in"):
            setattr(self.memory, name, self._gated(name, getattr(self.memory, name)))

    def _gated(self, name: str, copy):  # type: ignore[no-untyped-def]
        def gated(*arguments: object) -> object:
            beside = threading.current_thread() is not threading.main_thread()
            if beside:
                assert self.computing.wait(PATIENCE), "nothing was computed beside this copy"
            found = copy(*arguments)
            self.events.append(f"{name} {'beside' if beside else 'between'}")
            if beside:
                self.copied.release()
            return found

        return gated

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        self.computing.set()
        if self.await_copy:
            assert self.copied.acquire(timeout=PATIENCE), "no copy was made beside this iteration"
        found = super().run(pieces)
        self.computing.clear()
        self.events.append("computed")
        return found


class Early(FirstComeFirstServed):
    """Copies what it is told, ahead."""

    leave: tuple[int, ...] = ()
    come: tuple[int, ...] = ()

    def decide(self, view: View) -> Step:
        step = super().decide(view)
        moving = {*self.leave, *self.come}
        run = tuple((job, tokens) for job, tokens in step.run if job not in moving)
        back = tuple(job for job in step.back if job not in moving)
        return Step(run, step.aside, back, None, self.leave, self.come)


def test_copies_are_made_while_an_iteration_computes_and_pages_come_free_before_they_run_out() -> None:
    executor, policy = Watched(), Early()
    limits = Limits(page=4, memory=64 * 4 * executor.position_bytes, share=False)
    engine = Engine(executor, limits=limits, policy=policy)
    found: list[list[int]] = [[], []]
    for index in (0, 1):
        engine.submit(Request(tuple(PROMPTS[index]), MOST), _collector(found[index]))
    for _ in range(4):
        engine.step()
    held = engine.pool.held
    # The copy ends within the very iteration beside which it was begun: that iteration waits for it, and the copy
    # waits for the iteration.
    policy.leave, executor.await_copy = (2,), True
    executor.events.clear()
    engine.step()
    assert executor.events == ["copy_out beside", "computed"]
    wait(engine.aside._leaving.values(), PATIENCE)  # the copy is made, and its thread may not have said so yet
    policy.leave, policy.come = (), (2,)
    executor.events.clear()
    engine.step()
    assert executor.events == ["copy_in beside", "computed"]
    assert engine.pool.held <= held, "while it was aside, its pages were free"
    policy.come, executor.await_copy = (), False
    engine.run()
    assert found == plain(made("Llama", seed=1), PROMPTS[:2])
    assert engine.counts.early == 2
    assert engine.counts.set_aside == 0, "nobody had to make room"
    assert not any("between" in event for event in executor.events)
    assert engine.pool.held == engine.aside.bytes == 0


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("pages", [16, 24])
def test_copying_ahead_changes_no_token(pages: int, background: bool) -> None:
    model, clock = made("Llama", seed=1), Clock()

    class Ticking(FastServe):
        def decide(self, view: View) -> Step:
            clock.wait(1e-3)
            return super().decide(view)

    executor = Whole(model)
    limits = Limits(page=4, memory=pages * 4 * executor.position_bytes, jobs=2, share=False)
    policy = Ticking(Costs(1e-3, 1e-4, 1e-5), alpha=0.02, spare=0.3)
    engine = Engine(executor, limits=limits, policy=policy, clock=clock, background=background)
    assert greedy(engine, PROMPTS, MOST) == plain(made("Llama", seed=1), PROMPTS)
    assert engine.counts.early > 0
    assert engine.pool.held == engine.aside.bytes == 0


def test_who_leaves_or_runs_in_the_middle_of_a_copy_spoils_nothing() -> None:
    executor, policy = Whole(made("Llama", seed=1)), Early()
    limits = Limits(page=4, memory=64 * 4 * executor.position_bytes, share=False)
    engine = Engine(executor, limits=limits, policy=policy)
    permits, memory = threading.Semaphore(0), executor.memory
    assert isinstance(memory, Memory)
    copy = memory.copy_out
    memory.copy_out = lambda table: (permits.acquire(timeout=PATIENCE), copy(table))[1]  # type: ignore[method-assign]
    found: list[list[int]] = [[], [], []]
    for index in range(3):
        engine.submit(Request(tuple(PROMPTS[index]), MOST), _collector(found[index]))
    for _ in range(4):
        engine.step()
    policy.leave = (3, 2)
    engine.step()
    policy.leave = ()
    threading.Timer(0.2, permits.release).start()
    engine.cancel(3)
    threading.Timer(0.2, permits.release).start()
    engine.run()  # the second runs on: its copy is void
    wanted = plain(made("Llama", seed=1), PROMPTS[:2])
    assert found[0] == wanted[0]
    assert found[1] == wanted[1]
    assert engine.pool.held == engine.aside.bytes == 0
