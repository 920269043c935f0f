"""FedPT: parties tune a small model; its change in logits steers a large model that nobody tunes.

Gao et al. 2024, "FedPT: Federated Proxy-Tuning of Large Language Models on Resource-Constrained Edge Devices"
(catalogue number 61); the logit arithmetic is that of Liu et al. 2024, "Tuning Language Models by Proxy".

    parties:      the small model s+ is tuned by FedAvg, starting from s- as it came
    coordinator:  p = softmax(z_L + (z_{s+} - z_{s-})),  z_L the logits of the large model, which is a black box
                  s+ <- distilled from p on public examples: cross-entropy + T^2 KL(p_T || s_T),
                  p_T and s_T both softened by the temperature T
    inference:    p with the last s+; the large model is untouched

The small model is the recipe's ``model.base``; the two must share their vocabulary. Only the small model's trainable
travels. Without distillation steps the rounds are FedAvg, to the bit; with s+ = s- the distribution p is that of the
large model, to the bit.

Could not be verified: whether s- stays the model as it came in every round (so here: the changes gather in s+), the
weight of the two losses (so here: one each), and how long and how fast a distillation goes (so here: a fixed number of
steps, a tenth as fast as the parties' usual rate: at their own rate it undoes what they learnt).
"""

from __future__ import annotations

from functools import cache, cached_property
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from mycel.data.library import public_examples
from mycel.data.table import IGNORED
from mycel.data.tokens import Batch, TokenTable, batches
from mycel.errors import ModelError, RecipeError
from mycel.evaluate.metrics import Scores, held_out
from mycel.finetune.fedavg import FedAvg, FedAvgKnobs
from mycel.models.base import Base, find_base, open_base
from mycel.models.optimizer import make_optimizer
from mycel.models.sizes import SIZES
from mycel.models.trainable import Trainable, build_trainable
from mycel.rounds.laboratory import Measured
from mycel.rounds.party import rank_of
from mycel.rounds.system import Outcome, State
from mycel.wire.algebra import seed_of

if TYPE_CHECKING:
    from mycel.recipe.schema import Recipe
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.world import World
    from mycel.wire.parcel import Tensors


everything_public = cache(public_examples)  # reading it takes seconds, and every run of a process shares it


class FedPTKnobs(FedAvgKnobs):
    """Settings of federated proxy tuning."""

    large: str = Field("small", description="the coordinator's large base: a built-in size, a folder, or a hub id")
    distillation_steps: int = Field(10, ge=0, description="optimiser steps at the coordinator in each round")
    distillation_rate: float = Field(3e-4, gt=0, description="learning rate of the distillation")
    temperature: float = Field(2.0, gt=0, description="softening of both distributions while distilling")
    public_examples: int = Field(256, ge=1, description="public examples to distil on, at most")


class ProxyTuned(nn.Module):
    """The large model steered by the small one; called as any causal model, it returns logits (B, T, vocabulary)."""

    def __init__(self, large: Base, small: Base, expert: Trainable) -> None:
        super().__init__()
        self.large, self.small, self.expert = large, small, expert
        # Sizes of one family may pad their output to unlike widths; what lies beyond the shorter stands for no token.
        self.width = min(base.model.config.vocab_size for base in (large, small))

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """Return ``z_L + (z_{s+} - z_{s-})``; the difference comes first, so that equal models cancel exactly."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        before = self.small.model(**inputs).logits
        with self.expert.active():
            after = self.small.model(**inputs).logits
        change = (after - before)[..., : self.width]
        return SimpleNamespace(logits=self.large.model(**inputs).logits[..., : self.width] + change)


class ProxyServer:
    """What the coordinator alone has: the large base, a small base of its own, and public examples."""

    def __init__(self, recipe: Recipe, knobs: FedPTKnobs) -> None:
        self.recipe, self.knobs = recipe, knobs
        self.large, self.small = open_base(find_base(knobs.large)), open_base(find_base(recipe.model.base))
        rank = rank_of(recipe, -1)
        self.expert, self.student = (build_trainable(recipe.trainable, self.small, rank) for _ in range(2))

    def check(self) -> None:
        """Refuse two bases whose logits cannot be added token by token."""
        for base in (self.large, self.small):
            if base.model.config.is_encoder_decoder:
                raise ModelError(f"the base {base.name!r} is an encoder-decoder: proxy tuning needs decoder-only bases")
        if self.large.tokenizer.get_vocab() != self.small.tokenizer.get_vocab():
            raise ModelError(
                f"knobs.large is {self.knobs.large!r}, whose vocabulary of {len(self.large.tokenizer)} tokens is not"
                f" that of model.base, {self.small.name!r} ({len(self.small.tokenizer)}): take two sizes of one family"
            )

    @cached_property
    def public(self) -> TokenTable:
        """The public examples, drawn by the recipe's seed."""
        every = everything_public()
        chosen = Random(seed_of(self.recipe.seed, "public")).sample(every, min(self.knobs.public_examples, len(every)))
        return TokenTable.from_examples(chosen, self.small.tokenizer, self.recipe.data.max_length)

    def proxy(self, shared: Tensors) -> ProxyTuned:
        """Return the large model as ``shared`` steers it: what answers in the end."""
        self.expert.load(shared)
        return ProxyTuned(self.large, self.small, self.expert)

    def distil(self, shared: Tensors, seed: int) -> Tensors:
        """Return ``shared`` after it has learnt from the proxy-tuned large model on public examples."""
        training = self.recipe.training.model_copy(update={"learning_rate": self.knobs.distillation_rate})
        teacher = self.proxy(shared)
        self.student.load(shared)
        live = self.student.parameters()
        optimizer = make_optimizer(live, training)
        pad_id = int(self.small.tokenizer.pad_token_id or 0)
        steps = self.knobs.distillation_steps
        for batch in batches(self.public, training.batch_size, steps, seed, pad_id, "causal"):
            wanted, labels = predictions(teacher, batch)
            optimizer.zero_grad(set_to_none=True)
            with self.student.active():
                found, _ = predictions(self.small.model, batch)
                distillation_loss(found[:, : teacher.width], wanted, labels, self.knobs.temperature).backward()  # type: ignore[no-untyped-call]
            if training.clip_norm:
                nn.utils.clip_grad_norm_(live.values(), training.clip_norm)
            optimizer.step()
        return self.student.state()


class FedPT(FedAvg):
    """Federated averaging of a small model, with a fit at the coordinator after each average."""

    Knobs = FedPTKnobs

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if recipe.training.objective != "causal":
            raise RecipeError(
                f"training.objective is {recipe.training.objective!r}; the system 'fedpt' adds the logits of"
                " decoder-only models: set it to 'causal'"
            )

        for name in (self.knobs.large, recipe.model.base):
            if name in SIZES and SIZES[name].family != "llama":
                raise RecipeError(f"{name!r} is an encoder-decoder; the system 'fedpt' needs decoder-only bases")

    def bases(self) -> tuple[str, ...]:
        """Name the large base, which only the coordinator opens."""
        return (self.knobs.large,)

    def begin(self, world: World) -> State:
        """Start as FedAvg does; built-in sizes fit each other, any other pair is opened and checked first."""
        if not {self.knobs.large, self.recipe.model.base} <= SIZES.keys():
            self.server.check()
        return super().begin(world)

    def step(self, state: State, outcome: Outcome) -> State:
        """Move along the mean change, then distil the proxy-tuned large model into the small one."""
        moved = super().step(state, outcome)
        if self.knobs.distillation_steps == 0:
            return moved
        fits = state.facts.get("fits", 0)
        shared = self.server.distil(moved.shared, seed_of(self.recipe.seed, "distillation", fits))
        return moved.but(shared=shared, facts={**state.facts, "fits": fits + 1})

    @cached_property
    def server(self) -> ProxyServer:
        """The coordinator's models; parties have no use for them and never open them."""
        return ProxyServer(self.recipe, self.knobs)


def predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits (N, vocabulary) that predict the batch's N target tokens, and those tokens (N)."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[:, :-1]
    labels = batch.labels[:, 1:]
    counted = labels != IGNORED
    return logits[counted], labels[counted]


def distillation_loss(found: Tensor, wanted: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Cross-entropy with the labels plus ``T^2 KL(softmax(wanted / T) || softmax(found / T))``, nats per token.

    ``T^2`` keeps the gradient of the second part as large as that of the first (Hinton et al. 2015).
    """
    soft = [log_softmax(logits / temperature, dim=-1) for logits in (found, wanted)]
    divergence = kl_div(soft[0], soft[1], reduction="batchmean", log_target=True)
    return cross_entropy(found, labels) + temperature**2 * divergence


def claim(lab: Laboratory) -> Measured:
    """Steered by the tuned small model, the untouched large one is better than both on the parties' examples."""
    pair = {"model.base": "micro", "rounds.local_steps": 10, "rounds.evaluate_every": 4}
    finished = lab.run(lab.recipe("fedpt", {**pair, "knobs": {"large": "tiny"}}))
    plain = lab.run(lab.recipe("fedpt", {**pair, "knobs": {"large": "tiny", "distillation_steps": 0}}))
    server = ProxyServer(finished.world.recipe, finished.system.knobs)

    def loss(model: Any) -> float:
        store, pad_id = finished.world.site.store, int(server.small.tokenizer.pad_token_id or 0)
        return sum((held_out(model, store.held_out(node), pad_id=pad_id) for node in range(len(store))), Scores()).loss

    undistilled = loss(server.proxy(plain.state.shared))
    steered, large, small = (
        loss(server.proxy(finished.state.shared)),
        loss(server.large.model),
        loss(server.small.model),
    )
    tuned = finished.loss()
    frame = finished.meter.total("up", purpose="work") / finished.meter.frames("up", purpose="work")
    spec = finished.world.recipe.trainable
    adapter, large_adapter = (4 * build_trainable(spec, base).size() for base in (server.small, server.large))
    return Measured(
        f"steered large model {steered:.3f} nats ({undistilled:.3f} without distilling), alone {large:.3f}; small model"
        f" tuned {tuned:.3f}, as it came {small:.3f}; an answer has {frame / 1e3:.0f} kB, the small model's adapter"
        f" {adapter / 1e3:.0f} kB, the large one's would have {large_adapter / 1e3:.0f} kB",
        steered < min(large, tuned) and frame < 1.1 * adapter < large_adapter,
        {"steered": steered, "undistilled": undistilled, "large": large, "tuned": tuned, "answer_bytes": frame},
    )
