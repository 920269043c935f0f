"""What a layout costs on given devices: seconds, bytes, memory, energy and money of one step.

Units: seconds, bytes, joules, and the fleet's own currency. With M micro-batches, P stages, D data, S sequence and N
tensor ranks, R = D S replicas, and a stage's weights W (numbers of 4 bytes):

    compute     a rank's flops / (D S N) / speed of its stages' slowest device; a step: M x slowest + w x the others,
                w by the schedule (`mycel.decisions.stages`)
    FSDP        gathers of W for the way forward and, of blocks, again for the way back; one reduce-scatter of W:
                each 4 W (R - 1) / R / N bytes a rank; one gather where the way back is divided
    tensor      7 all-reduces a block and micro-batch of its hidden states (2 forward; 5 back, one for each matrix that
                they enter): 8 (N - 1) / N bytes a number
    sequence    keys and values gathered and their gradients scattered: 4 x 4 (S - 1) bytes a number and block
    pipeline    hidden states and their gradients to the neighbour: 4 bytes a number, each way; a stage waits for what
                it is sent as well as for what it sends
    memory      4 x (W / R / N) x (value, gradient, 2 moments) + what is gathered at once + activations kept
    energy      watts x seconds of the step, each device; money: price an hour x hours + price a GiB x GiB sent

Ranks that share the cores of one machine wait for them and slow each other down; what travels does not.
``Coefficients`` turn operations into seconds where a device's ``gflops`` alone would not do: `mycel fleet probe` and
``benchmarks/planner.py`` fit them. Sources: Narayanan et al. 2021 (pipeline bubble, tensor-parallel traffic);
Zhao et al. 2023 (FSDP); docs/planning.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mycel.decisions.graph import Graph
from mycel.decisions.keeping import DIVIDED, in_flight
from mycel.decisions.stages import ends, held, repeated, sides, waited, ways
from mycel.fleet.device import Device
from mycel.recipe.schema import Layout

NUMBER = 4  # bytes of a float32
GIB = 1 << 30
KEPT = {"keep", "selective"}  # ways that leave a block's inner numbers, at most


@dataclass(frozen=True)
class Coefficients:
    """How this kind of machine departs from its nominal speed.

    Attributes
    ----------
    operation : float
        Seconds that a block's pass costs whatever its size: its kernels' launches.
    call : float
        Seconds that a collective costs whatever its size, for each rank in it.
    update : float
        Seconds that the optimiser takes for a number of a rank's own shard.
    copy : float
        Seconds that handling a byte takes which a rank exchanges, besides its travelling.
    contention : float
        By how much cores of one machine slow each other down when all compute at once.
    reference : float
        The ``gflops`` at which the other seconds were measured: a slower device takes longer for them too; 0: they are
        the same everywhere.
    activation : float
        Factor on the activations' bytes.
    cores : float
        Cores that all ranks share, where they run on one machine; 0: every device has its own.
    """

    operation: float = 0.0
    call: float = 0.0
    activation: float = 1.0
    cores: float = 0
    update: float = 0.0
    copy: float = 0.0
    contention: float = 0.0
    reference: float = 0.0

    def slower(self, device: Device) -> float:
        """How many times as long a device takes for what is no multiplication."""
        return self.reference / device.gflops if self.reference else 1.0


NOMINAL = Coefficients()


@dataclass(frozen=True)
class Work:
    """What a step is made of: rows of a step over all ranks, and the model's chain."""

    graph: Graph
    batch_size: int


@dataclass(frozen=True)
class RankCost:
    """One rank's part of a step."""

    seconds: float
    bytes: float
    calls: float
    memory: float


@dataclass(frozen=True)
class Predicted:
    """What a step of a layout will take.

    Attributes
    ----------
    ranks : tuple of RankCost
        By place: pipeline outermost, then data, sequence, tensor.
    """

    seconds: float
    ranks: tuple[RankCost, ...]
    joules: float
    money: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        """Sent by all ranks together."""
        return sum(rank.bytes for rank in self.ranks)

    @property
    def memory(self) -> float:
        """Of the rank that needs most."""
        return max(rank.memory for rank in self.ranks)


def predict(
    work: Work, layout: Layout, split: Sequence[int], devices: Sequence[Device], known: Coefficients
) -> Predicted:
    """Return the cost of one step; ``devices`` are the ranks' by place, ``split`` the blocks of every stage."""
    inside = layout.data * layout.sequence * layout.tensor
    stages = [devices[stage * inside : (stage + 1) * inside] for stage in range(layout.pipeline)]
    micro = [stage_seconds(work, layout, split, place, stages[place], known) for place in range(layout.pipeline)]
    compute = computing(micro, layout.micro_batches, inside, known, waited(layout))
    ranks, exchange = [], 0.0
    for place, those in enumerate(stages):
        sent, calls = traffic(work, layout, split, place)
        memory = memory_of(work, layout, split, place, known)
        crossing = sent + received(work, layout, place)
        handling = calls * known.call + crossing * known.copy + known.update * own_weights(work, layout, split, place)
        # Handling is work for cores, which ranks may have to share; travelling is not.
        crowd = max(1.0, len(devices) / known.cores) if known.cores else 1.0
        moving = max(
            crowd * known.slower(device) * handling + travel_seconds(device, crossing, calls) for device in those
        )
        exchange = max(exchange, moving)
        ranks += [RankCost(micro[place] * layout.micro_batches, sent, calls, memory)] * inside
    seconds = compute + exchange
    joules = seconds * sum(device.watts for device in devices)
    money = sum(rank_money(device, rank, seconds) for device, rank in zip(devices, ranks, strict=True))
    return Predicted(seconds, tuple(ranks), joules, money, {"compute": compute, "exchange": exchange})


def computing(micro: Sequence[float], pieces: int, inside: int, known: Coefficients, waits: float = 1.0) -> float:
    """Seconds in which the stages compute: the longest way through the pipeline, on cores that may be shared.

    ``waits`` is the share of the other ranks' time for a micro-batch that the slowest waits.
    """
    path, total = pieces * max(micro) + waits * (sum(micro) - max(micro)), sum(micro) * pieces * inside
    if not known.cores:
        return path
    # Ranks that wait leave their core to others, so neither the longest path nor the whole work can be undercut.
    at_once = min(known.cores, total / path)
    slowed = 1 + known.contention * (at_once - 1) / max(1.0, known.cores - 1)
    return slowed * max(path, total / known.cores)


def rank_money(device: Device, rank: RankCost, seconds: float) -> float:
    """Price of a device for a step's seconds, and of what its rank sends."""
    return seconds / 3600 * device.price_per_hour + rank.bytes / GIB * device.link.price_per_gib


def stage_seconds(
    work: Work, layout: Layout, split: Sequence[int], place: int, devices: Sequence[Device], known: Coefficients
) -> float:
    """Seconds of a rank's stages for one micro-batch, forward and back, on the slowest of its devices."""
    share = layout.data * layout.sequence * layout.tensor
    tokens = work.batch_size * work.graph.length / layout.micro_batches
    passes = 3.0 * held(layout, split, place) + repeated(layout, split, place)
    flops = passes * work.graph.blocks[0].flops * tokens / share
    if ends(layout, place)[1]:
        # The head is not divided over the tensor ranks.
        flops += 3.0 * work.graph.operators[-1].flops * tokens / (layout.data * layout.sequence)
    slowest = min(devices, key=lambda device: device.gflops)
    launches = known.operation * passes * known.slower(slowest)
    return flops / (slowest.gflops * 1e9) + launches


def traffic(work: Work, layout: Layout, split: Sequence[int], place: int) -> tuple[float, float]:
    """Bytes that a rank of a stage sends in a step, and how many collective calls or messages it takes part in."""
    graph, blocks = work.graph, held(layout, split, place)
    replicas, tensor, sequence = layout.data * layout.sequence, layout.tensor, layout.sequence
    hidden = work.batch_size / layout.data * graph.length / sequence * graph.hidden * NUMBER
    sent, calls = 0.0, 0.0
    if replicas > 1:
        ring = (replicas - 1) / replicas * NUMBER
        within = blocks * sharded_block(graph, tensor)
        times = 2 * layout.micro_batches if layout.pipeline == 1 else 1 + layout.micro_batches
        times = 1 if layout.schedule in DIVIDED else times
        sent += ring * (within * (times + 1) + 2 * outside_weights(graph, layout, place))
        calls += 3 * blocks + 2
    if tensor > 1:
        sent += 7 * blocks * hidden * 2 * (tensor - 1) / tensor
        calls += 7 * blocks * layout.micro_batches
    if sequence > 1:
        sent += 4 * blocks * hidden / tensor * (sequence - 1)
        calls += 4 * blocks * layout.micro_batches
    if layout.pipeline > 1:
        crossing = sides(layout, place)
        sent += hidden * crossing
        calls += 2 * crossing * layout.micro_batches
    return sent, calls


def received(work: Work, layout: Layout, place: int) -> float:
    """Bytes that a rank of a stage waits for from its neighbours in a step; in rings, what comes in while it sends."""
    share = layout.data * layout.sequence
    return sides(layout, place) * work.batch_size / share * work.graph.length * work.graph.hidden * NUMBER


def sharded_block(graph: Graph, tensor: int) -> float:
    """Numbers of a block that a tensor rank holds: its matrices' share, and its norms whole."""
    norms = 2 * graph.hidden
    return (graph.blocks[0].weights - norms) / tensor + norms


def outside_weights(graph: Graph, layout: Layout, place: int) -> float:
    """Numbers of the embedding, final norm and head that a rank holds."""
    first, last = ends(layout, place)
    table = graph.vocabulary * graph.hidden
    tables = 1 if first and last and graph.tied else int(first) + int(last)
    return float(tables * table + (graph.hidden if last else 0))


def memory_of(work: Work, layout: Layout, split: Sequence[int], place: int, known: Coefficients) -> float:
    """Bytes of tensors that a rank of a stage holds at once, at most."""
    graph, left = work.graph, ways(layout, split, place)
    replicas = layout.data * layout.sequence
    block, outside = sharded_block(graph, layout.tensor), outside_weights(graph, layout, place)
    own = own_weights(work, layout, split, place)
    whole = len(left) if layout.schedule in DIVIDED else 2
    gathered = (outside + whole * block) if replicas > 1 else 0.0
    tokens = work.batch_size / layout.data / layout.micro_batches * graph.length / layout.sequence
    flying = in_flight(layout) - (place if layout.schedule == "1f1b" else 0)
    one = graph.blocks[0]
    # What is computed again or comes back from a file is there for one block at a time.
    most = min(len(left), sum(way in KEPT for way in left) + any(way not in KEPT for way in left))
    kept = len(left) * one.leaves + most * one.kept / layout.tensor
    if ends(layout, place)[1]:
        kept += graph.operators[-1].kept
    return NUMBER * (4 * own + gathered + known.activation * tokens * flying * kept)


def own_weights(work: Work, layout: Layout, split: Sequence[int], place: int) -> float:
    """Numbers of the weights that a rank of a stage keeps for itself."""
    block, outside = sharded_block(work.graph, layout.tensor), outside_weights(work.graph, layout, place)
    return (held(layout, split, place) * block + outside) / (layout.data * layout.sequence)


def travel_seconds(device: Device, crossing: float, calls: float) -> float:
    """Seconds that a device's share of the traffic is on its link."""
    link = device.link
    return calls * link.latency_ms / 1e3 + 8e-6 * crossing / min(link.up_mbps, link.down_mbps)
