"""FewFedPIT: parameters trained on private examples leave only mixed with parameters trained on invented ones.

Zhang et al. 2024, "FedPIT: Towards Privacy-preserving and Few-shot Federated Instruction Tuning" (journal version
PPFedIT; catalogue number 27).

    party k:      invent:    the received model continues beginnings of local prompts, then answers them
                  filter:    drop what is too near to a private example (ROUGE-L), keep the half with the lowest
                             L(y | x) / L(y) under the privately trained W_l
                  isolate:   W_l = train(W, private),  W_s = train(W, invented); the two sets never mix
                  share:     W_a = beta W_l + (1 - beta) W_s
    coordinator:  averages W_a by private examples

With ``beta = 1`` this is federated averaging to the bit. The paper invents instructions from eight demonstrations in
context, which bases of this size cannot do; here a prompt is invented by continuing the beginning of a private one,
which shares that beginning (``opening`` tokens at most).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from rouge_score.rouge_scorer import RougeScorer

from mycel.data.examples import Example
from mycel.data.tokens import TokenTable
from mycel.evaluate.metrics import generate_text
from mycel.finetune.fedavg import FedAvg, FedAvgKnobs
from mycel.guard.attacks.memorisation import losses
from mycel.rounds.assaults import canary_exposure, stage
from mycel.rounds.laboratory import Measured
from mycel.wire.algebra import add, group, scale, seed_of, subtract
from mycel.wire.parcel import Parcel

if TYPE_CHECKING:
    from mycel.models.trainable import Trainable
    from mycel.rounds.laboratory import Laboratory
    from mycel.rounds.party import Party


class FewFedPitKnobs(FedAvgKnobs):
    """Settings of inventing and sharing."""

    beta: float = Field(0.5, ge=0, le=1, description="share of the privately trained parameters in what leaves")
    candidates: int = Field(16, ge=2, description="examples invented by a party in a round")
    opening: int = Field(3, ge=1, description="tokens of a private prompt that an invented one begins with")
    length: int = Field(24, ge=4, description="most tokens of an invented response")
    likeness: float = Field(0.7, gt=0, le=1, description="ROUGE-L beyond which an invented example is dropped")


class FewFedPit(FedAvg):
    """Two trainings from one start, of which a mixture leaves."""

    Knobs = FewFedPitKnobs

    def work(self, brief: Parcel, party: Party) -> Parcel:
        """Train on private examples; invent, filter, train on those; send the mixture's change."""
        trainable, start = self.adopt(brief, party), group(brief.tensors, "shared")
        beta = self.knobs.beta
        invented = self.invent(trainable, party) if beta < 1 else []
        result = party.train(trainable)
        change = subtract(trainable.state(), start)
        samples = party.samples
        kept = self.keep(trainable, party, invented)
        if kept is not None:
            trainable.load(start)
            party.examples = kept
            party.train(trainable)
            made = subtract(trainable.state(), start)
            change = add(scale(change, beta), made, 1 - beta)
        elif beta < 1:
            change = scale(change, beta)
        answer = party.answer(result.loss, change)
        return Parcel(answer.kind, {**answer.header, "samples": samples}, answer.tensors)

    def invent(self, trainable: Trainable, party: Party) -> list[Example]:
        """Continue beginnings of private prompts, and answer what comes of it."""
        chance = torch.Generator().manual_seed(seed_of(party.seed, "invent"))
        drawn = torch.randint(len(party.examples), (self.knobs.candidates,), generator=chance).tolist()
        tokenizer, model = party.base.tokenizer, party.base.model
        beginnings = []
        for place in drawn:
            first = int(party.examples.offsets[place])
            beginnings.append(tokenizer.decode(party.examples.ids[first : first + self.knobs.opening].tolist()))
        with trainable.active():
            made = generate_text(model, tokenizer, beginnings, self.knobs.length // 2)
            prompts = [f"{start}{rest}\n" for start, rest in zip(beginnings, made, strict=True)]
            responses = generate_text(model, tokenizer, prompts, self.knobs.length)
        return [Example(ask, reply) for ask, reply in zip(prompts, responses, strict=True) if reply.strip()]

    def keep(self, trainable: Trainable, party: Party, invented: list[Example]) -> TokenTable | None:
        """Drop what is too near to a private example, and keep the half that follows best from its prompt."""
        tokenizer, table = party.base.tokenizer, party.examples
        scorer = RougeScorer(["rougeL"])
        private = [
            tokenizer.decode(table.ids[table.offsets[place] : table.offsets[place + 1]].tolist())
            for place in range(len(table))
        ]
        far = [
            example
            for example in invented
            if max(scorer.score(text, example.prompt + example.response)["rougeL"].fmeasure for text in private)
            <= self.knobs.likeness
        ]
        if not far:
            return None
        length = self.recipe.data.max_length
        asked, bare = (
            TokenTable.from_examples(rows, tokenizer, length) for rows in (far, [Example("", e.response) for e in far])
        )
        with trainable.active():
            ratios = losses(party.base.model, asked, party.pad_id) / losses(
                party.base.model, bare, party.pad_id
            ).clamp_min(1e-6)
        best = ratios.argsort(stable=True)[: max(len(far) // 2, 1)].tolist()
        return TokenTable.from_examples([far[place] for place in best], tokenizer, length)


def claim(lab: Laboratory) -> Measured:
    """Exposure of a canary and the loss at three mixtures; beta of 1 is federated averaging to the bit."""
    few = {"data.examples": 16, "rounds.local_steps": 8, "rounds.evaluate_every": 4, "training.learning_rate": 1e-2}
    scenes = {beta: stage(lab, lab.recipe("fewfedpit", {**few, "knobs": {"beta": beta}})) for beta in (0.0, 0.5, 1.0)}
    plain = stage(lab, lab.recipe("fedavg", few))
    exposed = {beta: canary_exposure(scene) for beta, scene in scenes.items()}
    loss = {beta: scene.finished.loss() for beta, scene in scenes.items()}
    ends = [scene.finished.state.shared for scene in (scenes[1.0], plain)]
    same = all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    return Measured(
        f"canary exposure {exposed[0.0]:.1f}, {exposed[0.5]:.1f}, {exposed[1.0]:.1f} bits at beta 0, 0.5, 1 (plain "
        f"averaging {canary_exposure(plain):.1f}); loss {loss[0.0]:.3f}, {loss[0.5]:.3f}, {loss[1.0]:.3f}; beta 1 is "
        f"{'' if same else 'not '}plain averaging to the bit",
        same and exposed[0.0] <= exposed[0.5] < exposed[1.0] and loss[0.5] < loss[1.0],
        {f"exposure_{beta:g}": value for beta, value in exposed.items()}
        | {f"loss_{beta:g}": value for beta, value in loss.items()},
    )
