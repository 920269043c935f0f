"""Until a first answer has come there are no deadlines: what became of the first briefs is found out otherwise.

``brief -> silence -> a question that costs nothing -> its answer -> the brief again``

A party's node carries one message at a time, in their order. So a party that answers a later question has answered the
brief before it, or never got it: Flower loses a message whose node ends with it in its hands. A party that is at work
answers neither, and is left alone. From the first answer on, learnt deadlines do all this.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from mycel.engines.flower.engine import AGAIN
from mycel.rounds.leases import Lease

if TYPE_CHECKING:
    from mycel.engines.flower.engine import FlowerEngine
    from mycel.rounds.coordinator import Coordinator

ON_ITS_WAY = 3.0  # seconds in which an answer that the SuperLink has is asked for: it is looked for once a second


async def run_seeing_to_first_briefs(coordinator: Coordinator, engine: FlowerEngine) -> None:
    """Run to the end; what is lost before there are deadlines is sent again."""
    watch = asyncio.ensure_future(send_again(coordinator, engine))
    try:
        await coordinator.run()
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)


async def send_again(
    coordinator: Coordinator, engine: FlowerEngine, pause: float = AGAIN, on_its_way: float = ON_ITS_WAY
) -> None:
    """Send briefs again that were lost on their way, until something is known of how long answers take."""
    leases = coordinator.leases
    while not leases.deadlines.recent:
        await asyncio.sleep(pause)
        pause *= 2
        waiting = [lease for lease in leases.held.values() if lease.deadline is None]
        await asyncio.gather(*(_look_after(coordinator, engine, lease, on_its_way) for lease in waiting))


async def _look_after(coordinator: Coordinator, engine: FlowerEngine, lease: Lease, on_its_way: float) -> None:
    leases, request = coordinator.leases, lease.request
    before = engine.progress(request)
    control, _ = await engine.question(engine.addresses[request.node], {"verb": "name"})
    await asyncio.sleep(on_its_way)
    stands = engine.progress(request) == before  # in pieces, a frame may take long and be on its way all the time
    if "said" in control and stands and leases.held.get(request.node) is lease and lease.deadline is None:
        leases.drop(request.node, "lost", "the brief was lost on its way, and is sent again", engine.now())
        leases.meter.count(request.node, "down", "again", len(request.frame))
        engine.ask(request)
