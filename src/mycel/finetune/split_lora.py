"""SplitLoRA: the first blocks are tuned at the clients, the rest once, at the server.

Lin et al., "SplitLoRA: A Split Parameter-Efficient Fine-Tuning Framework for Large Language Models", 2024.

The model is cut after ``cut`` blocks, with LoRA on both sides. For every batch, each client in turn runs its part and
sends the activations with the labels; the server runs on, takes an optimiser step of its own LoRA at once, and sends
the activations' gradient back, with which the client takes its step. Every ``every`` steps the clients' adapters are
averaged, plainly; the server's is shared by all and is never averaged.

    client k:  h = f_c(x; A_k)        server:  l = loss(f_s(h; A_s), y),  A_s <- A_s - lr dl/dA_s
    client k:  A_k <- A_k - lr (dl/dh) dh/dA_k

With one client it is centralised LoRA, step by step. With ``cut`` at the last block it is federated LoRA (FedAvg of
adapters), to which it is compared.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mycel.models.cut import Cut
from mycel.rounds.laboratory import Laboratory, Measured
from mycel.segments.boundary import Boundary, sound

RANK, RATE = 8, 2e-3
BATCH, LENGTH, STEPS, EVERY = 4, 48, 40, 8
SOURCES = ("argparse", "email.message", "statistics")  # one module's text for each client


class Part:
    """One side of the cut: some blocks with LoRA, and what optimises it."""

    def __init__(self, folder: Path, first: int, last: int | None, embed: bool, head: bool, seed: int) -> None:
        self.cut = Cut.open(folder, first, last, embed=embed, head=head)
        self.lora: dict[str, nn.Parameter] = {}
        paths = [self.cut.parts.block_path(index) for index in range(self.cut.first, self.cut.last)]
        self.frozen = sum(p.numel() for index in range(self.cut.first, self.cut.last) for p in self._block(index))
        modules = dict(self.cut.model.named_modules())
        targets = [
            name
            for name, layer in modules.items()
            if isinstance(layer, nn.Linear) and any(name.startswith(f"{path}.") for path in paths)
        ]
        if targets:
            inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets), self.cut.model)
            self.lora = {n: p for n, p in self.cut.model.named_parameters() if "lora_" in n}
        for name, parameter in sorted(self.lora.items()):
            parameter.data = _start(name, parameter, seed)
        self.optimiser = torch.optim.AdamW(self.lora.values(), lr=RATE) if self.lora else None

    def step(self) -> None:
        """Take an optimiser step and forget the gradients."""
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad()

    def _block(self, index: int) -> list[nn.Parameter]:
        return list(self.cut.block(index).parameters())


class SplitLora:
    """Clients and a server around one cut.

    Parameters
    ----------
    folder : Path
        The base.
    clients : int
        How many.
    cut : int
        Blocks at the clients.
    codec : str
        How activations and gradients cross.
    seed : int
        Of the adapters' start.
    """

    def __init__(self, folder: Path, clients: int, cut: int, codec: str = "raw", seed: int = 0) -> None:
        self.clients = [Part(folder, 0, cut, True, False, seed) for _ in range(clients)]
        self.server = Part(folder, cut, None, False, True, seed)
        self.boundary = Boundary(codec)

    def step(self, client: int, ids_BT: Tensor) -> float:
        """Train on one batch of one client; return its loss."""
        mine, server = self.clients[client], self.server
        left = mine.cut.run(mine.cut.embed(ids_BT))
        frame = self.boundary.pack("activations", {}, hidden=left, labels=ids_BT)
        parcel = Boundary.unpack(frame, ("activations",))
        arrived = sound(parcel, "hidden", tuple(left.shape)).requires_grad_()
        loss = next_token_loss(server.cut.head(server.cut.run(arrived)), parcel.tensors["labels"])
        loss.backward()  # type: ignore[no-untyped-call]
        server.step()
        assert arrived.grad is not None
        answer = self.boundary.pack("gradient", {}, gradient=arrived.grad)
        if mine.lora:
            back = sound(Boundary.unpack(answer, ("gradient",)), "gradient", tuple(left.shape))
            left.backward(back)  # type: ignore[no-untyped-call]
            mine.step()
        return float(loss.detach())

    def average(self) -> None:
        """Give every client the mean of the clients' adapters."""
        for name in self.clients[0].lora:
            mean = torch.stack([client.lora[name].detach() for client in self.clients]).mean(0)
            for client in self.clients:
                client.lora[name].data = mean.clone()

    def train(self, batches: Sequence[Sequence[Tensor]], every: int = EVERY) -> None:
        """Train on ``batches[step][client]``, averaging every so many steps and at the end."""
        for count, row in enumerate(batches, 1):
            for client, ids in enumerate(row):
                self.step(client, ids)
            if count % every == 0 or count == len(batches):
                self.average()

    def loss(self, ids_BT: Tensor) -> float:
        """Return the loss of the first client's model with the server's."""
        mine, server = self.clients[0].cut, self.server.cut
        with torch.no_grad():
            return float(next_token_loss(server.head(server.run(mine.run(mine.embed(ids_BT)))), ids_BT))

    def adapters(self) -> Tensor:
        """Return all numbers of the first client's and the server's adapters in the order of the blocks."""
        both = {**self.clients[0].lora, **self.server.lora}
        return torch.cat([both[name].detach().flatten() for name in sorted(both)])


def next_token_loss(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Return the mean cross-entropy of each next token."""
    return cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def claim(lab: Laboratory) -> Measured:
    """Compare one client with centralised LoRA, count bytes and shares, and compare three clients with FedLoRA."""
    base = lab.open_base()
    folder, depth = base.folder, int(base.model.config.num_hidden_layers)
    batches, held_out = texts(base.tokenizer)
    alone = [row[:1] for row in batches]
    split, whole = SplitLora(folder, 1, depth // 4 or 1), SplitLora(folder, 1, 0)
    split.train(alone)
    whole.train(alone)
    gap = float((split.adapters() - whole.adapters()).abs().max())
    per_step = split.boundary.sent / len(alone)
    numbers = 2 * 4 * BATCH * LENGTH * int(base.model.config.hidden_size)
    share = split.clients[0].frozen / whole.server.frozen
    ours, federated = SplitLora(folder, len(SOURCES), depth // 4 or 1), SplitLora(folder, len(SOURCES), depth)
    start = ours.loss(held_out)
    ours.train(batches)
    federated.train(batches)
    ended = (ours.loss(held_out), federated.loss(held_out))
    return Measured(
        f"one client is within {gap:.1g} of centralised LoRA after {STEPS} steps; a client computes {share:.2f} of the"
        f" blocks and a step takes {per_step:,.0f} bytes ({numbers:,} of them states and gradients);"
        f" three clients end at"
        f" a loss of {ended[0]:.3f}, federated LoRA at {ended[1]:.3f} (before: {start:.3f})",
        gap < 1e-5 and numbers < per_step < 1.1 * numbers and ended[0] <= ended[1] < start,
        {"gap": gap, "bytes": per_step, "states": numbers, "share": share, "loss": ended[0], "federated": ended[1]},
    )


def texts(tokenizer: object) -> tuple[list[list[Tensor]], Tensor]:
    """Return ``batches[step][client]`` from a module's source for each client, and held-out rows of all."""
    batches: list[list[Tensor]] = [[] for _ in range(STEPS)]
    held_out = []
    for name in SOURCES:
        text = inspect.getsource(importlib.import_module(name))
        ids = torch.tensor(tokenizer(text).input_ids)  # type: ignore[operator]
        rows = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        held_out.append(rows[order[:8]])
        rest = rows[order[8:]]
        for step in range(STEPS):
            batches[step].append(rest[[(step * BATCH + row) % len(rest) for row in range(BATCH)]])
    return batches, torch.cat(held_out)


def _start(name: str, parameter: nn.Parameter, seed: int) -> Tensor:
    if "lora_B" in name:
        return torch.zeros(parameter.shape)
    source = torch.Generator().manual_seed(seed + sum(name.encode()))
    started: Tensor = torch.randn(parameter.shape, generator=source) / parameter.shape[1] ** 0.5
    return started
