"""ServerlessLLM: load a model as fast as the disk gives it, move a running answer, and start where starting is soonest.

Source: Fu et al. 2024, "ServerlessLLM: Low-Latency Serverless Inference for Large Language Models" (OSDI 2024).

- *Loading-optimised checkpoint*: all tensors in one file, each aligned, and an index of offsets; read in large pieces
  by several threads past the page cache into one block, of which the parameters are views (`generation/checkpoint.py`).
- *Live migration*: tokens travel, not keys and values. The target recomputes what the source has so far while the
  source goes on; the gap is sent again until it is at most ``gap`` tokens, then the source stops and the target goes
  on from there.
- *Choice of server*: ``estimate = queue + size / bandwidth of the tier where the checkpoint lies``; where only a busy
  server has it, moving its answer away costs ``a * tokens + b``. The least estimate wins.

Not built: the knapsack over several victims; GPUs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from mycel.errors import GenerationError
from mycel.generation.checkpoint import Loader, write_checkpoint
from mycel.generation.engine import Engine
from mycel.generation.request import Request, Token
from mycel.rounds.laboratory import Laboratory, Measured


@dataclass(frozen=True)
class Server:
    """What is known of a server.

    Attributes
    ----------
    queue : float
        Seconds until its disk is free.
    free : bool
        Whether a place to run is free.
    bandwidth : dict of str to float
        Bytes a second at which each checkpoint that lies there loads, by model.
    running : int
        Tokens of the answer that would have to move away, if none is free.
    """

    queue: float
    free: bool
    bandwidth: dict[str, float]
    running: int = 0


def estimate(server: Server, model: str, size: int, a: float = 0.01, b: float = 0.1) -> float:
    """Return the seconds until a model of ``size`` bytes could start there; infinite where it does not lie."""
    if model not in server.bandwidth:
        return float("inf")
    moving = 0.0 if server.free else a * server.running + b
    return server.queue + size / server.bandwidth[model] + moving


def choose_server(servers: Sequence[Server], model: str, size: int) -> int:
    """Return the server on which the model starts soonest.

    Raises
    ------
    GenerationError
        When no server holds the checkpoint.
    """
    estimates = [estimate(server, model, size) for server in servers]
    best = min(range(len(servers)), key=lambda index: (estimates[index], index))
    if estimates[best] == float("inf"):
        raise GenerationError(f"no server holds a checkpoint of {model!r}: copy it to one first")
    return best


def migrate(
    source: Engine, target: Engine, request: Request, listener: Callable[[Token], None], after: int, gap: int = 4
) -> dict[str, int]:
    """Generate on ``source``, and move to ``target`` after ``after`` tokens; the listener sees one stream.

    Returns
    -------
    dict
        Tokens sent in all and the number of times they were sent.
    """
    made: list[int] = []

    def watch(token: Token) -> None:
        if token.id >= 0:
            made.append(token.id)
            listener(token)

    identity = source.submit(request, watch)
    while len(made) < after and source.step():
        pass
    sent, rounds, known = 0, 0, 0
    while source.waiting and (rounds == 0 or len(made) - known > gap):
        known, rounds = len(made), rounds + 1
        sent += len(made) if rounds > 1 else len(request.prompt) + len(made)
        # The target computes what is known so far, which its pages keep for the real request; the source goes on.
        ahead = target.submit(Request((*request.prompt, *made), 1, request.sampling), lambda token: None)
        while target.waiting:
            target.step()
            source.step()
        target.cancel(ahead)
    left = request.most - len(made)
    if left > 0 and source.waiting:
        source.cancel(identity)
        target.submit(Request((*request.prompt, *made), left, request.sampling, request.stop, request.ends), listener)
        target.run()
    return {"sent": sent + len(made) - known, "rounds": rounds}


def claim(lab: Laboratory) -> Measured:
    """Tensors equal to the bit; the moved answer unbroken for tokens alone; starts sooner than by chance."""
    from mycel.generation.executor import Whole

    base = lab.open_base()
    with tempfile.TemporaryDirectory(prefix="mycel-") as folder:
        state = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
        write_checkpoint(state, Path(folder) / "fast")
        loaded = Loader(threads=4).load(Path(folder) / "fast")
    equal = loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    prompt = tuple(base.tokenizer("def add(first, second):\n    ")["input_ids"])
    request = Request(prompt, 48)
    whole: list[int] = []
    engines = [Engine(Whole(lab.open_base().model)) for _ in range(2)]
    engines[0].submit(request, lambda token: whole.append(token.id))
    engines[0].run()
    moved: list[int] = []
    report = migrate(engines[0], engines[1], request, lambda token: moved.append(token.id), after=20)
    kept = engines[0].executor.position_bytes * (len(prompt) + 20)
    ours, chance = trace(seed=1)
    return Measured(
        f"tensors {'equal' if equal else 'differ'}; the moved answer is {'unbroken' if moved == whole else 'broken'}, "
        f"{report['sent'] * 4} bytes sent for {kept:,} of keys and values; mean start {ours:.2f} s against "
        f"{chance:.2f} on a random holder",
        equal and moved == whole and report["sent"] * 4 * 20 < kept and ours < 0.8 * chance,
        {"start": ours, "start_random": chance, "sent": float(report["sent"] * 4)},
    )


def trace(seed: int, requests: int = 400) -> tuple[float, float]:
    """Mean seconds to start over a random trace: least estimate, and a random server that holds the model."""
    source = np.random.default_rng(seed)
    means = []
    for random in (False, True):
        draws = np.random.default_rng(seed)
        queues, waits = np.zeros(6), []
        for _ in range(requests):
            queues = np.maximum(0.0, queues - draws.exponential(0.6))
            model, size = f"m{draws.integers(8)}", int(draws.integers(1, 14)) * 10**9
            servers = [
                Server(float(queues[at]), bool(draws.random() < 0.7), {model: float(draws.choice([2e9, 2e10]))}, 200)
                for at in range(6)
            ]
            chosen = int(source.integers(6)) if random else choose_server(servers, model, size)
            waits.append(estimate(servers[chosen], model, size))
            queues[chosen] += size / servers[chosen].bandwidth[model]
        means.append(fmean(waits))
    return means[0], means[1]
