"""Secure aggregation: exact whatever leaves, opaque to whoever relays, and refusing what does not fit."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from mycel.errors import ParcelError
from mycel.guard.secagg.coordinator import MaskingCoordinator
from mycel.guard.secagg.graph import complete, need, sparse
from mycel.guard.secagg.guard import MaskGuard, MaskParty
from mycel.guard.secagg.keys import Ring, add_mask, agree, new_secret, public_key
from mycel.guard.secagg.party import MaskingParty, purpose
from mycel.guard.secagg.shamir import join, split
from mycel.testing import check_guard
from mycel.wire.codecs.fixed import Fixed
from mycel.wire.parcel import Parcel

PHASES = ("keys", "shares", "input", "reveal", "stays")


@dataclass
class Played:
    coordinator: MaskingCoordinator
    parties: dict[int, MaskingParty]
    values: dict[int, Ring]
    hidden: dict[int, Ring]

    def expected(self) -> Ring:
        total = np.zeros_like(next(iter(self.values.values())))
        for node in self.coordinator.inputs:
            total += self.values[node]
        return total


def inputs(count: int, size: int = 33, kind: str = "uint32") -> dict[int, Ring]:
    source = np.random.default_rng(count)
    return {node: source.integers(0, np.iinfo(kind).max, size, dtype=kind, endpoint=True) for node in range(count)}


def play(
    values: dict[int, Ring],
    leaves: dict[int, str],
    staying: float,
    thin: bool,
    parties: dict[int, MaskingParty] | None = None,
) -> Played:
    """Play one round; ``leaves`` names the phase before which a party falls silent."""

    def there(nodes: Collection[int], phase: str) -> list[int]:
        return [node for node in nodes if PHASES.index(leaves.get(node, "stays")) > PHASES.index(phase)]

    parties = parties or {node: MaskingParty(node) for node in values}
    keys = {node: parties[node].advertise() for node in there(values, "keys")}
    terms = sparse("r1", sorted(keys), staying, 7) if thin else complete("r1", sorted(keys), staying)
    coordinator = MaskingCoordinator(terms, keys)
    for node in there(keys, "shares"):
        coordinator.take_shares(node, *parties[node].share(terms, keys))
    present = set(coordinator.sealed)
    hidden = {node: parties[node].hide(values[node], present) for node in there(present, "input")}
    for node, content in hidden.items():
        coordinator.take_input(node, content)
    for node in there(coordinator.inputs, "reveal"):
        coordinator.take_reveal(node, parties[node].reveal(coordinator.wanted(node), coordinator.inputs))
    return Played(coordinator, parties, values, hidden)


def opens(played: Played) -> bool:
    """Whether enough holders answered for every secret that is in the sum."""
    coordinator = played.coordinator
    alive = {holder for shares in coordinator.shares.values() for holder in shares}
    concerned = [node for node in coordinator.sealed if coordinator._concerns(node)]
    return all(len(alive & set(coordinator.terms.holders(node))) >= coordinator.terms.threshold for node in concerned)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    some.data(), some.one_of(*[some.integers(2, 16)] * 4, some.integers(17, 100)), some.sampled_from([0.51, 0.67, 0.9])
)
def test_the_sum_is_exact_for_every_dropout_that_the_threshold_allows(
    data: some.DataObject, count: int, staying: float
) -> None:
    values = inputs(count)
    gone = data.draw(some.integers(0, count - need(count, staying)))
    order = data.draw(some.randoms(use_true_random=False)).sample(range(count), gone)
    # Who never sends keys is not in the cohort that the threshold counts.
    leaves = {node: data.draw(some.sampled_from(PHASES[1:4])) for node in order}
    if count - sum(phase != "reveal" for phase in leaves.values()) < 2:
        return
    played = play(values, leaves, staying, thin=False)
    assert np.array_equal(played.coordinator.sum(), played.expected())


@pytest.mark.parametrize("count", [2, 3, 4])
def test_of_a_small_cohort_every_dropout_opens_exactly_or_is_below_the_threshold(count: int) -> None:
    values = inputs(count, 3)
    for phases in product(PHASES[1:], repeat=count):
        staying, sent = phases.count("stays"), phases.count("stays") + phases.count("reveal")
        try:
            played = play(values, dict(enumerate(phases)), 0.67, thin=False)
            total = played.coordinator.sum()
        except ParcelError:
            assert staying < need(count, 0.67) or sent < 2, phases
            continue
        assert np.array_equal(total, played.expected()), phases


@pytest.mark.parametrize(("thin", "kind"), [(False, "uint32"), (True, "uint16")])
def test_the_sum_of_a_hundred_is_exact_when_thirty_leave(thin: bool, kind: str) -> None:
    chance = random.Random(3)
    leaves = {node: chance.choice(PHASES[1:4]) for node in chance.sample(range(100), 30)}
    played = play(inputs(100, 5, kind), leaves, 0.67, thin)
    assert np.array_equal(played.coordinator.sum(), played.expected())


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    some.one_of(some.integers(2, 40), some.just(100)),
    some.floats(0, 0.33),
    some.integers(0, 1000),
    some.sampled_from(["uint16", "uint64"]),
)
def test_the_sparse_graph_opens_exactly_or_refuses(count: int, share: float, seed: int, kind: str) -> None:
    chance = random.Random(seed)
    leaves = {node: chance.choice(PHASES[:4]) for node in chance.sample(range(count), int(share * count))}
    if count - len(leaves) < 2:
        return
    try:
        played = play(inputs(count, 5, kind), leaves, 0.67, thin=True)
    except ParcelError:
        return
    if opens(played):
        assert np.array_equal(played.coordinator.sum(), played.expected())
    else:
        with pytest.raises(ParcelError, match="cannot be opened"):
            played.coordinator.sum()


def test_the_sparse_graph_is_sparse_and_survives_thirty_percent() -> None:
    terms = sparse("r", range(100), 0.67, 1)
    assert {len(beside) for beside in terms.neighbours.values()} == {len(terms.neighbours[0])}
    assert len(terms.neighbours[0]) < 60
    assert all(node in terms.neighbours[other] for node, beside in terms.neighbours.items() for other in beside)
    chance = random.Random(5)
    for _ in range(20):
        gone = set(chance.sample(range(100), 30))
        assert all(len(set(terms.holders(node)) - gone) >= terms.threshold for node in range(100))


@pytest.mark.parametrize("gone", [None, 3])
def test_what_the_coordinator_sees_does_not_depend_on_an_input_given_the_sum(
    gone: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parties' inputs trade content; the transcript stays, for a mask moves that nothing in it tells.

    The round is played twice with the same secrets. The second time the mask that the parties 0 and 1 share is
    another one, as likely as the first to whoever lacks its key: what arrives and what is revealed are the same.
    """
    leaves = {gone: "input"} if gone is not None else {}
    parties = {node: MaskingParty(node) for node in range(6)}
    secrets = {node: (party.seal, party.mask, party.own) for node, party in parties.items()}
    first = play(inputs(6), leaves, 0.67, thin=False, parties=parties)
    pair = agree(parties[0].mask, first.coordinator.keys[1].mask, purpose(first.coordinator.terms.tag))
    shift = np.random.default_rng(1).integers(0, 1 << 32, 33, dtype=np.uint32)

    def another(total: Ring, seed: bytes, sign: int) -> None:
        add_mask(total, seed, sign)
        if seed == pair:
            total -= shift if sign > 0 else -shift

    monkeypatch.setattr("mycel.guard.secagg.party.add_mask", another)
    moved = {**first.values, 0: first.values[0] + shift, 1: first.values[1] - shift}
    again = {node: MaskingParty(node, *secret) for node, secret in secrets.items()}
    second = play(moved, leaves, 0.67, thin=False, parties=again)
    assert first.hidden.keys() == second.hidden.keys()
    assert all(np.array_equal(content, second.hidden[node]) for node, content in first.hidden.items())
    assert np.array_equal(first.coordinator.sum(), second.coordinator.sum())
    opened = [_opened(played) for played in (first, second)]
    assert opened[0] == opened[1]
    assert opened[0] == {node: secret[1 if node == gone else 2] for node, secret in secrets.items()}
    assert not {secrets[node][1] for node in (0, 1)} & set(opened[0].values())  # the pair's key is in neither


def _opened(played: Played) -> dict[int, bytes]:
    """The secrets that the coordinator can rebuild from what was revealed to it."""
    coordinator = played.coordinator
    threshold = coordinator.terms.threshold
    return {node: join(shares, threshold, lambda found: True) for node, shares in sorted(coordinator.shares.items())}


def test_hidden_inputs_look_uniform_whatever_they_hide() -> None:
    """Bytes of what arrives are uniform (chi-square, 255 degrees of freedom) for inputs of zeros and of ones alike."""
    for fill in (0, 0xFFFFFFFF):
        values = {node: np.full(16384, fill, dtype=np.uint32) for node in range(3)}
        parties = {node: MaskingParty(node) for node in values}
        keys = {node: party.advertise() for node, party in parties.items()}
        terms = complete("r", range(3), 0.67)
        for party in parties.values():
            party.share(terms, keys)
        hidden = parties[1].hide(values[1], {0, 1, 2})
        counts = np.bincount(np.frombuffer(hidden.tobytes(), dtype=np.uint8), minlength=256)
        expected = counts.sum() / 256
        assert float(((counts - expected) ** 2 / expected).sum()) < 400  # odds of more: below 1e-7


@pytest.mark.parametrize("liars", [[0], [0, 1, 2], [0, 17, 39]])
def test_whoever_lies_about_shares_is_passed_over_in_a_large_cohort(liars: list[int]) -> None:
    played = play(inputs(40), {5: "input", 30: "reveal"}, 0.67, thin=False)
    for shares in played.coordinator.shares.values():
        shares.update({liar: split(new_secret(), [liar], 1)[liar] for liar in liars if liar in shares})
    assert np.array_equal(played.coordinator.sum(), played.expected())
    for shares in played.coordinator.shares.values():
        shares.update({holder: split(new_secret(), [holder], 1)[holder] for holder in list(shares)[:20]})
    with pytest.raises(ParcelError, match="contradict"):
        played.coordinator.sum()


def test_a_party_refuses_a_threshold_that_a_coordinator_makes_up() -> None:
    party = MaskParty(Fixed(16, 0.5))
    _, kept = party.answer(0, Parcel("guard.keys", {"tag": "r"}), {})
    keys = [public_key(new_secret()) for _ in range(6)]
    for threshold in (0, 1, 4, "2"):
        ask = Parcel(
            "guard.shares",
            {"tag": "r", "holders": [0, 1, 2], "threshold": threshold},
            {"shares/keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8)},
        )
        with pytest.raises(ParcelError, match="threshold"):
            party.answer(0, ask, kept)


def test_shares_that_are_replayed_truncated_or_not_ours_are_refused() -> None:
    parties = {node: MaskingParty(node) for node in range(3)}
    keys = {node: party.advertise() for node, party in parties.items()}
    sealed = {node: party.share(complete("r1", range(3), 0.67), keys)[0] for node, party in parties.items()}
    coordinator = MaskingCoordinator(complete("r1", range(3), 0.67), keys)
    with pytest.raises(ParcelError, match="bytes"):
        coordinator.take_shares(0, {**sealed[0], 1: sealed[0][1][:-1]}, bytes(32))
    with pytest.raises(ParcelError, match="neighbours"):
        coordinator.take_shares(0, {0: sealed[0][0]}, bytes(32))
    with pytest.raises(ParcelError, match="does not open"):
        parties[1].reveal({0: sealed[2][1]}, {0, 1, 2})  # another's, in its place
    with pytest.raises(ParcelError, match="does not open"):
        parties[1].reveal({0: sealed[0][1][:40]}, {0, 1, 2})
    later = MaskingParty(1, parties[1].seal, parties[1].mask, parties[1].own)
    later.share(complete("r2", range(3), 0.67), keys)
    with pytest.raises(ParcelError, match="does not open"):
        later.reveal({0: sealed[0][1]}, {0, 1, 2})  # of an earlier round
    parties[1].reveal({0: sealed[0][1]}, {0, 1, 2})
    with pytest.raises(ParcelError, match="before"):
        parties[1].reveal({0: sealed[0][1]}, {1, 2})


def test_a_party_that_hides_once_does_not_hide_again() -> None:
    played = play(inputs(3), {}, 0.67, thin=False)
    with pytest.raises(ParcelError, match="masks serve once"):
        played.parties[0].hide(played.values[0], {0, 1, 2})
    with pytest.raises(ParcelError, match="has sent one before"):
        played.coordinator.take_input(0, played.values[0])


def test_keys_of_the_wrong_kind_and_repeated_keys_are_refused() -> None:
    with pytest.raises(ParcelError, match="wrong kind"):
        agree(new_secret(), bytes(32), b"mask")  # a point of small order
    with pytest.raises(ParcelError, match="X25519"):
        agree(new_secret(), public_key(new_secret())[:-1], b"mask")
    parties = {node: MaskingParty(node) for node in range(3)}
    keys = {node: party.advertise() for node, party in parties.items()}
    with pytest.raises(ParcelError, match="one key"):
        parties[0].share(complete("r", range(3), 0.67), {**keys, 2: keys[1]})


@pytest.mark.parametrize(("parties", "staying"), [(1, 0.67), (5, 0.5), (5, 1.2), (5, 0.0)])
def test_thresholds_that_make_no_sense_are_refused(parties: int, staying: float) -> None:
    with pytest.raises(ValueError):
        complete("r", range(parties), staying)
    with pytest.raises(ValueError):
        split(bytes(32), range(3), 4)


@pytest.mark.parametrize("thin", [False, True])
def test_masks_obey_the_contract_of_guards(thin: bool) -> None:
    codec = Fixed(16, 0.5)
    check_guard(lambda shapes, weights: MaskGuard(codec, shapes, weights, 0.67, thin), MaskParty(codec), codec.step)
