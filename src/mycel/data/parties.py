"""Whose examples: a training set and a held-out set for each party, with nothing held out leaking into training."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mycel.data.cleaned import clean_examples
from mycel.data.examples import Example
from mycel.data.partition import parse_partition, partition
from mycel.data.sources import load_examples
from mycel.errors import DataError
from mycel.recipe.schema import Data

CLOSED_SET = 4.0  # mean number of different prompts per response from which responses count as classes


@dataclass(frozen=True)
class PartyData:
    """What one party holds: examples to train on, and to be measured by; ``cleaned`` counts what cleaning did."""

    name: str
    train: list[Example]
    held_out: list[Example]
    cleaned: dict[str, int] = field(default_factory=dict)


def load_parties(spec: Data, seed: int) -> list[PartyData]:
    """Load every party's data, shuffled by ``seed`` and de-duplicated.

    The response of a held-out example occurs in no party's training set. Where responses are classes or short
    answers that many prompts share, that is asked of prompt and response together.

    Parameters
    ----------
    spec : Data
        The recipe's section. ``parties`` is a partition of ``source``, or a list of sources, one per party.
    seed : int
        The recipe's seed.

    Raises
    ------
    DataError
        A source or the partition is unsound, or a party has too few examples.
    """
    cleaned: dict[str, dict[str, int]] = {}
    pools = []
    for name, examples in _pools(spec, seed):
        if spec.cleaning:
            examples, cleaned[name] = clean_examples(examples, spec.cleaning, name)
        pools.append((name, _shuffled(examples, f"{seed}/{name}")))
    fingerprint = _fingerprint(example for _, pool in pools for example in pool)
    uses = Counter(fingerprint(example) for _, pool in pools for example in pool)
    parties: list[PartyData] = []
    for name, pool in pools:
        if len(pool) <= spec.held_out:
            raise DataError(_too_few(name, f"{len(pool)} unlike examples", spec))
        # A response that is used once is held out first, for then no one loses a training example by it.
        pool.sort(key=lambda example: uses[fingerprint(example)] > 1)
        parties.append(PartyData(name, pool[spec.held_out :], pool[: spec.held_out], cleaned.get(name, {})))
    measured = {fingerprint(example) for party in parties for example in party.held_out}
    return [_clean(party, spec, lambda example: fingerprint(example) not in measured, seed) for party in parties]


def _clean(party: PartyData, spec: Data, allowed: Callable[[Example], bool], seed: int) -> PartyData:
    train = [example for example in party.train if allowed(example)]
    if not train:
        raise DataError(_too_few(party.name, "none whose response is not also held out", spec))
    chosen = _shuffled(train, f"{seed}/{party.name}/train")[: spec.examples]
    return PartyData(party.name, chosen, party.held_out, party.cleaned)


def _too_few(name: str, found: str, spec: Data) -> str:
    return (
        f"party {name!r} has {found}, and needs {spec.held_out + 1}: {spec.held_out} held out and 1 to train on; "
        "give it more, or lower data.held_out or data.count"
    )


def _pools(spec: Data, seed: int) -> list[tuple[str, list[Example]]]:
    if isinstance(spec.parties, list):
        if not spec.parties:
            raise DataError("data.parties is an empty list: name one source per party, or a partition")
        return [(name, load_examples(source)) for name, source in zip(_names(spec.parties), spec.parties, strict=True)]
    rule, _ = parse_partition(spec.parties)
    examples = load_examples(spec.source)
    held = partition([example.label for example in examples], spec.parties, spec.count, seed)
    if rule == "pooled":
        return [("pooled", examples)]
    width = len(str(len(held) - 1))
    pools = []
    for number, indices in enumerate(held):
        label = examples[indices[0]].label or "unlabelled"
        name = label if rule == "by-domain" else f"party-{number:0{width}}"
        pools.append((name, [examples[index] for index in indices]))
    return pools


def _names(sources: list[str]) -> list[str]:
    """File stems; where two are alike, the folder's name goes before them."""
    stems = [Path(source).stem for source in sources]
    counts = Counter(stems)
    names = [
        f"{Path(source).resolve().parent.name}-{stem}" if counts[stem] > 1 else stem
        for source, stem in zip(sources, stems, strict=True)
    ]
    for name, count in Counter(names).items():
        if count > 1:
            raise DataError(f"data.parties has {count} sources that would both be called {name!r}: rename the files")
    return names


def _shuffled(examples: Iterable[Example], seed: str) -> list[Example]:
    unlike = list({(_plain(example.prompt), _plain(example.response)): example for example in examples}.values())
    random.Random(seed).shuffle(unlike)
    return unlike


def _fingerprint(examples: Iterable[Example]) -> Callable[[Example], str]:
    """What may not stand on both sides: the response, or the whole example where responses are a closed set."""
    pairs = {(_plain(example.prompt), _plain(example.response)) for example in examples}
    responses = {response for _, response in pairs}
    if len(pairs) > CLOSED_SET * len(responses):
        return lambda example: f"{_plain(example.prompt)}\0{_plain(example.response)}"
    return lambda example: _plain(example.response)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
