"""Laws that every trainable keeps, ours or a stranger's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from mycel.errors import ModelError
from mycel.models.trainable import State, Trainable
from mycel.wire.parcel import check_name

TOLERANCE = 1e-5
KINDS_WITHOUT_WEIGHTS = ("prompt",)


def check_trainable(build: Callable[[], Trainable]) -> None:
    """Check the laws of a trainable.

    Parameters
    ----------
    build : callable
        Returns a new trainable over a new base, alike at every call.

    Raises
    ------
    AssertionError
        Naming the law that does not hold.
    """
    for law in (
        _state_round_trip,
        _initial_is_seeded,
        _active_leaves_base_alone,
        _only_own_gradients,
        _delta_weight_is_affine,
        _merge_equals_active,
        _mask_freezes,
        _unsound_states_refused,
    ):
        law(build())


def random_state(trainable: Trainable, seed: int, spread: float = 0.05) -> State:
    """Return the initial state moved at random, so that no part of it is zero."""
    generator = torch.Generator().manual_seed(seed)
    start = trainable.initial(seed)
    return {name: value + spread * torch.randn(value.shape, generator=generator) for name, value in start.items()}


def logits(trainable: Trainable) -> Tensor:
    """Return the base model's logits on a fixed small batch, for an encoder-decoder those of its decoder."""
    model = trainable.base.model
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["labels"] = ids
    with torch.no_grad():
        found: Tensor = model(**inputs).logits
    return found


def _state_round_trip(trainable: Trainable) -> None:
    state = random_state(trainable, 1)
    for name in state:
        check_name(name)
    trainable.load(state)
    _same(trainable.state(), state, "state() is what load() got")
    assert trainable.size() == sum(value.numel() for value in state.values()), "size() counts every element"
    taken = trainable.state()
    with torch.no_grad():
        for parameter in trainable.parameters().values():
            parameter.add_(1.0)
    _same(taken, state, "state() returns copies")


def _initial_is_seeded(trainable: Trainable) -> None:
    before = trainable.state()
    _same(trainable.initial(3), trainable.initial(3), "initial() follows from its seed")
    _same(trainable.state(), before, "initial() loads nothing")
    plain = logits(trainable)
    if trainable.kind not in KINDS_WITHOUT_WEIGHTS:
        trainable.load(trainable.initial(3))
        with trainable.active():
            assert torch.equal(logits(trainable), plain), "the initial state computes as the base"
        for name, delta in trainable.delta_weight(trainable.initial(3)).items():
            assert not delta.any(), f"the initial state changes no weight, but {name}"


def _active_leaves_base_alone(trainable: Trainable) -> None:
    model = trainable.base.model
    weights = {name: (value, value.data_ptr(), value.clone()) for name, value in model.named_parameters()}
    plain = logits(trainable)
    trainable.load(random_state(trainable, 2))
    # Leaving by an error must put the base back too.
    with suppress(KeyError), trainable.active():
        assert not torch.equal(logits(trainable), plain), "the model computes with the trainable while it is active"
        raise KeyError
    found = dict(model.named_parameters())
    assert list(found) == list(weights), "the base has the weights it had"
    for name, (parameter, pointer, copy) in weights.items():
        assert found[name] is parameter, f"{name} is the same parameter"
        assert parameter.data_ptr() == pointer, f"{name} has the same storage"
        assert torch.equal(parameter, copy), f"{name} is unchanged to the bit"
    assert torch.equal(logits(trainable), plain), "the base computes as before, to the bit"


def _only_own_gradients(trainable: Trainable) -> None:
    own = trainable.parameters()
    trainable.load(random_state(trainable, 3))
    with trainable.active():
        _loss(trainable).backward()  # type: ignore[no-untyped-call]
        wanted = {id(parameter) for parameter in own.values()}
        others = [name for name, value in trainable.base.model.named_parameters() if id(value) not in wanted]
        frozen = dict(trainable.base.model.named_parameters())
        assert not any(frozen[name].requires_grad or frozen[name].grad is not None for name in others)
    assert any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in own.values())
    assert not any(parameter.requires_grad for parameter in trainable.base.model.parameters())


def _delta_weight_is_affine(trainable: Trainable) -> None:
    """Check linearity: of LoRA in B with A held, elsewhere in the whole state."""
    first, second = random_state(trainable, 4), random_state(trainable, 5)
    if trainable.kind == "lora":
        second = {name: value if name.endswith("lora_B") else first[name] for name, value in second.items()}
    middle = {name: (value + second[name]) / 2 for name, value in first.items()}
    left, right = trainable.delta_weight(first), trainable.delta_weight(second)
    for name, delta in trainable.delta_weight(middle).items():
        assert torch.allclose(delta, (left[name] + right[name]) / 2, atol=TOLERANCE), f"delta of {name} is linear"
        assert bool(delta.any()), f"a moved state changes {name}"


def _merge_equals_active(trainable: Trainable) -> None:
    state = random_state(trainable, 6, spread=0.02)
    if trainable.kind in KINDS_WITHOUT_WEIGHTS:
        _refused("merging what is no weight", lambda: trainable.merge(state))
        return
    trainable.load(state)
    with trainable.active():
        expected = logits(trainable)
    trainable.merge(state)
    assert torch.allclose(logits(trainable), expected, atol=TOLERANCE), "merge() computes as active() did"


def _mask_freezes(trainable: Trainable) -> None:
    trainable.load(random_state(trainable, 7))
    generator = torch.Generator().manual_seed(7)
    before = trainable.state()
    masks = {name: (torch.rand(value.shape, generator=generator) < 0.5).float() for name, value in before.items()}
    for given in (masks, None):
        trainable.mask(given)
        optimizer = torch.optim.SGD(trainable.parameters().values(), lr=1.0)
        with trainable.active():
            optimizer.zero_grad()
            _loss(trainable).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        after = trainable.state()
        moved_outside = any(bool(((after[name] != before[name]) & (masks[name] == 0)).any()) for name in before)
        assert moved_outside == (given is None), "exactly the masked elements stand still, until the mask is cleared"
        assert any(bool((after[name] != before[name]).any()) for name in before), "free elements move"
    _refused("a mask of halves", lambda: trainable.mask({name: mask * 0.5 for name, mask in masks.items()}))
    _refused("a mask of no parameter", lambda: trainable.mask({"no.such.name": torch.ones(1)}))


def _unsound_states_refused(trainable: Trainable) -> None:
    state = random_state(trainable, 8)
    trainable.load(state)
    name = next(iter(state))
    without = {other: value for other, value in state.items() if other != name}
    unsound: dict[str, Mapping[str, Tensor]] = {
        "a missing tensor": without,
        "an unknown tensor": {**state, "no.such.name": torch.zeros(1)},
        "another shape": {**state, name: state[name][..., :-1]},
        "whole numbers": {**state, name: state[name].long()},
        "a NaN": {**state, name: torch.full_like(state[name], math.nan)},
        "an infinity": {**state, name: torch.full_like(state[name], -math.inf)},
    }
    for fault, wrong in unsound.items():
        _refused(f"loading a state with {fault}", partial(trainable.load, wrong))
        _refused(f"the delta of a state with {fault}", partial(trainable.delta_weight, wrong))
    _same(trainable.state(), state, "a refused state leaves the live parameters untouched")


def _refused(what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except ModelError:
        return
    raise AssertionError(f"{what} is refused with a ModelError")


def _loss(trainable: Trainable) -> Tensor:
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    loss: Tensor = trainable.base.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    return loss


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], law: str) -> None:
    assert found.keys() == expected.keys(), law
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{law}: {name}"
