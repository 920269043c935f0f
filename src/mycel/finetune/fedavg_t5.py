"""FedAvg of LoRA on T5: an encoder-decoder tuned for summaries by parties that send A and B alone.

A thesis on federated LoRA of T5 (catalogue number 86), known from reviews: parties adapt the query and value
projections for some epochs and upload A and B; the coordinator averages them by sample count. For LoRA see Hu et al.
2021, for T5 Raffel et al. 2020.

    each q and v:  W + s B A,  A (r, d_in), B (d_out, r)
    coordinator:   A <- A + sum_k p_k dA_k,  B <- B + sum_k p_k dB_k,  p_k = n_k / sum n
    an answer:     2 r (d_in + d_out) numbers of 4 bytes for each attention layer: of the encoder, of the decoder,
                   and of the decoder over the encoder

Nothing differs from FedAvg but what it is said of, so the file only refuses what is not an encoder-decoder trained on
pairs of input and output. A recipe sets ``training.objective = "seq2seq"`` and ``trainable.targets = ["q", "v"]``.
With one party and one round it is centralised LoRA, up to the rounding of ``w + (w' - w)``.

Could not be verified: the thesis's title and author, its epochs, ranks and partitions, and so whether its centralised
model takes as many steps in a row as a party or as many as all parties together: the claim measures both. Its task
here is a sentence that names what a piece of code is about, and its measure the loss, not ROUGE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mycel.data.library import PRIVATE_DOMAINS, private_examples
from mycel.errors import RecipeError
from mycel.finetune.fedavg import FedAvg
from mycel.models.optimizer import make_optimizer
from mycel.models.sizes import SIZES
from mycel.models.trainable import build_trainable
from mycel.rounds.laboratory import Measured
from mycel.rounds.probe import probe_all
from mycel.rounds.training import batch_loss

if TYPE_CHECKING:
    from mycel.recipe.schema import Recipe
    from mycel.rounds.laboratory import Laboratory
    from mycel.wire.parcel import Tensors

T5 = {
    "model.base": "tiny-t5",
    "trainable.targets": ["q", "v"],
    "training.objective": "seq2seq",
    "data.parties": "iid",
}


class FedAvgT5(FedAvg):
    """Federated averaging that insists on an encoder-decoder and on LoRA."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        # A base that is not built in is known once it is open; its kind must then agree with the objective.
        size = SIZES.get(recipe.model.base)
        if size is not None and size.family != "t5":
            raise RecipeError(
                f"model.base is {recipe.model.base!r}, which is decoder-only; the system 'fedlora_t5' needs an"
                " encoder-decoder, such as 'tiny-t5' or a T5 model; for this one the system is 'fedavg'"
            )
        for key, found, needed in (
            ("training.objective", recipe.training.objective, "seq2seq"),
            ("trainable.kind", recipe.trainable.kind, "lora"),
        ):
            if found != needed:
                raise RecipeError(
                    f"{key} is {found!r}; 'fedlora_t5' tunes encoder-decoders with LoRA: set it to {needed!r}"
                )


def centralised(lab: Laboratory, recipe: Recipe) -> Tensors:
    """Return what plain LoRA makes of all examples on one machine: a loop that knows of no rounds and no parcels."""
    world, base = lab.world(recipe, pooled=True), lab.open_base(recipe.model.base)
    trainable = build_trainable(recipe.trainable, base)
    trainable.load(world.starting_state())
    live = trainable.parameters()
    optimizer = make_optimizer(live, recipe.training)
    with trainable.active():
        for batch in world.site.party(0, 0).batches():
            optimizer.zero_grad()
            batch_loss(base.model, batch).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(live.values(), recipe.training.clip_norm)
            optimizer.step()
    return trainable.state()


def write_topics(path: Path) -> None:
    """Write a task that a small T5 can learn: a documented definition goes in, one sentence on its topic comes out."""
    with path.open("w", encoding="utf-8") as file:
        for domain in PRIVATE_DOMAINS:
            topic = f"This is about {domain.replace('-', ' ')}."
            for example in private_examples(domain)[:150]:
                pair = {"prompt": example.prompt + example.response, "response": topic, "label": domain}
                file.write(json.dumps(pair) + "\n")


def claim(lab: Laboratory) -> Measured:
    """One party is centralised LoRA; four alike parties come within 5 % of it; an answer is as large as A and B."""
    write_topics(lab.folder / "topics.jsonl")
    task = {**T5, "data.source": str(lab.folder / "topics.jsonl"), "data.count": 4, "training.learning_rate": 1e-2}
    one = lab.recipe("fedlora_t5", {**task, "data.count": 1, "rounds.count": 1, "rounds.local_steps": 20})
    plain, alone = centralised(lab, one), lab.run(one)
    gap = max(float((alone.state.shared[name] - tensor).abs().max()) for name, tensor in plain.items())
    four = lab.run(lab.recipe("fedlora_t5", {**task, "rounds.local_steps": 10, "rounds.evaluate_every": 4}))
    arms = {"system": four}
    for name, steps in (("in a row", 40), ("together", 160)):
        recipe = lab.recipe("fedlora_t5", {**task, "rounds.count": 1, "rounds.local_steps": steps})
        arms[name] = lab.run(recipe, pooled=True)
    probes = probe_all(arms, lab.place.labour)
    base, federated, row, together = (probes.mixture(name) for name in ("base", "system", "in a row", "together"))
    width, rank, layers = four.world.base.model.config.d_model, 8, 3 * four.world.base.model.config.num_layers
    predicted = 2 * rank * (width + width) * layers * 4
    framing = four.meter.total("up", purpose="work") / four.meter.frames("up", purpose="work") - predicted
    return Measured(
        f"one party and centralised LoRA differ by at most {gap:.1e}; four alike parties come from {base:.3f} to"
        f" {federated:.3f} nats, centralised to {row:.3f} in as many steps in a row and to {together:.3f} in as many as"
        f" all parties take; an answer has {predicted:,} bytes of A and B and {framing:,.0f} of framing",
        gap < 1e-6 and federated <= 1.05 * row < 0.9 * base and 0 < framing < 0.1 * predicted,
        {"gap": gap, "base": base, "federated": federated, "in_a_row": row, "together": together, "framing": framing},
    )
