"""The simulated enclave's interface, and pads that are exact and tell nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mycel.errors import ParcelError
from mycel.guard.enclave import Enclave, Platform, Program, Visitor, seal, unseal
from mycel.guard.pad import PaddedLinear, Whole, product, to_ring
from mycel.wire.parcel import Parcel


def put(memory: dict[str, Any], argument: Parcel) -> Parcel:
    total = memory.get("total", torch.zeros(3))
    memory["total"] = total + argument.tensors["values"]
    return Parcel("done")


def get(memory: dict[str, Any], argument: Parcel) -> Parcel:
    return Parcel("total", {}, {"total": memory["total"]})


def store(memory: dict[str, Any], argument: Parcel) -> Parcel:
    sealed = seal(memory, Parcel("memory", {}, {"total": memory["total"]}))
    return Parcel("sealed", {}, {"sealed": torch.frombuffer(bytearray(sealed), dtype=torch.uint8)})


def load(memory: dict[str, Any], argument: Parcel) -> Parcel:
    memory["total"] = unseal(memory, argument.tensors["sealed"].numpy().tobytes()).tensors["total"]
    return Parcel("done")


PROGRAM = Program({"put": put, "get": get, "store": store, "load": load}, {"parties": 2})
OTHER = Program({"put": put, "get": get, "store": store, "load": load}, {"parties": 3})


def overhearing(seen: list[Whole], ring: Whole) -> Callable[[Whole], Whole]:
    """Return the product with ``ring``, which takes down what it is given."""

    def multiply(rows: Whole) -> Whole:
        seen.append(rows)
        return product(rows, ring)

    return multiply


@pytest.fixture
def platform() -> Platform:
    return Platform()


@pytest.fixture
def enclave(platform: Platform) -> Iterator[Enclave]:
    started = platform.start(PROGRAM)
    try:
        yield started
    finally:
        started.close()


def test_visitors_add_up_inside_and_memory_outlives_sealed(platform: Platform, enclave: Enclave) -> None:
    one, other = (Visitor(enclave, platform.public, [PROGRAM.measurement()]) for _ in range(2))
    one.call("put", Parcel("call", {}, {"values": torch.tensor([1.0, 2.0, 3.0])}))
    other.call("put", Parcel("call", {}, {"values": torch.tensor([4.0, 0.0, 1.0])}))
    assert one.call("get").tensors["total"].tolist() == [5.0, 2.0, 4.0]
    sealed = one.call("store")
    again, strange = platform.start(PROGRAM), platform.start(OTHER)
    try:
        visitor = Visitor(again, platform.public, [PROGRAM.measurement()])
        visitor.call("load", sealed)
        assert visitor.call("get").tensors["total"].tolist() == [5.0, 2.0, 4.0]
        with pytest.raises(ParcelError, match="does not open"):
            Visitor(strange, platform.public, [OTHER.measurement()]).call("load", sealed)
    finally:
        again.close()
        strange.close()


def test_wrong_measurements_platforms_calls_and_replays_are_refused(platform: Platform, enclave: Enclave) -> None:
    with pytest.raises(ParcelError, match="none of the programs"):
        Visitor(enclave, platform.public, [OTHER.measurement()])
    with pytest.raises(ParcelError, match="not signed"):
        Visitor(enclave, Platform().public, [PROGRAM.measurement()])
    visitor = Visitor(enclave, platform.public, [PROGRAM.measurement()])
    with pytest.raises(ParcelError, match="no call"):
        visitor.call("read_memory")
    carried: list[tuple[bytes, bytes]] = []
    carry = enclave.carry
    visitor = Visitor(enclave, platform.public, [PROGRAM.measurement()])

    def overheard(hello: bytes, sealed: bytes) -> bytes:
        carried.append((hello, sealed))
        return carry(hello, sealed)

    enclave.carry = overheard  # type: ignore[method-assign]
    secret = torch.full((3,), 123456.0)
    visitor.call("put", Parcel("call", {}, {"values": secret}))
    assert secret.numpy().tobytes() not in carried[0][1]
    with pytest.raises(ParcelError, match="does not open"):
        carry(*carried[0])


def test_a_damaged_argument_ends_its_call_and_not_the_enclave(platform: Platform, enclave: Enclave) -> None:
    visitor = Visitor(enclave, platform.public, [PROGRAM.measurement()])
    visitor.call("put", Parcel("call", {}, {"values": torch.ones(3)}))
    for argument in (Parcel("call"), Parcel("call", {}, {"values": torch.ones(2)})):
        with pytest.raises(ParcelError, match="the call is damaged"):
            visitor.call("put", argument)
    with pytest.raises(ParcelError, match="the call is damaged"):
        enclave._exchange(b"call")
    assert visitor.call("get").tensors["total"].tolist() == [1.0, 1.0, 1.0]


def test_padded_layers_are_exact_in_fixed_point_and_pads_serve_once() -> None:
    source = np.random.default_rng(1)
    weight = source.normal(size=(24, 40)).astype(np.float32)
    inputs = source.normal(size=(7, 40)).astype(np.float32)
    seen: list[Whole] = []
    ring = to_ring(weight)
    layer = PaddedLinear(weight, overhearing(seen, ring), check=True)
    layer.prepare(7)
    found = layer(inputs)
    exact = product(to_ring(inputs), ring).view(np.int64) / 2.0**32
    assert np.array_equal(found, exact.astype(np.float32))
    np.testing.assert_allclose(found, inputs @ weight.T, rtol=0, atol=2e-3)
    with pytest.raises(ParcelError, match="no pad"):
        layer(inputs)
    layer.prepare(7)
    layer(inputs)
    assert not np.array_equal(seen[0], seen[1])
    assert layer.used == layer.made == 2


def test_wrong_results_are_caught_and_values_out_of_range_refused() -> None:
    weight = np.ones((4, 4), dtype=np.float32)
    layer = PaddedLinear(weight, lambda rows: rows + np.uint64(1), check=True)
    layer.prepare(2, 2)
    with pytest.raises(ParcelError, match="wrong product"):
        layer(np.ones((2, 4), dtype=np.float32))
    with pytest.raises(ParcelError, match="finite"):
        layer(np.full((2, 4), np.inf, dtype=np.float32))


def test_what_the_other_process_sees_says_nothing_of_the_input() -> None:
    """A linear probe tells two kinds of inputs apart in the open, and guesses on what is padded."""
    source = np.random.default_rng(2)
    labels = np.arange(400) % 2
    inputs = (source.normal(size=(400, 16)) + 2.0 * labels[:, None]).astype(np.float32)
    weight = source.normal(size=(8, 16)).astype(np.float32)
    seen: list[Whole] = []
    ring = to_ring(weight)
    layer = PaddedLinear(weight, overhearing(seen, ring))
    layer.prepare(400)
    layer(inputs)
    padded = seen[0].view(np.int64) / 2.0**63
    # Pads are drawn anew each time: these bounds lie six standard deviations away.
    assert abs(float(np.corrcoef(padded.ravel(), inputs.ravel())[0, 1])) < 0.08
    hits = {}
    for name, rows in (("open", inputs), ("padded", padded)):
        fit, *_ = np.linalg.lstsq(np.c_[rows[:200], np.ones(200)], 2.0 * labels[:200] - 1, rcond=None)
        hits[name] = float(((np.c_[rows[200:], np.ones(200)] @ fit > 0) == labels[200:]).mean())
    assert hits["open"] > 0.95
    assert abs(hits["padded"] - 0.5) < 0.22
