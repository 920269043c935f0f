"""Plans: exact on every small case, sound on large ones, refused in a sentence when nothing fits."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.decisions.cost import NOMINAL, Coefficients, Work, computing, memory_of, predict
from mycel.decisions.graph import graph_of
from mycel.decisions.partition import Chain, Partition, Proportional, StageCost, by_integer_programme, every_split
from mycel.decisions.planner import Plans, Task, left_out, placements
from mycel.errors import EngineError, RecipeError
from mycel.fleet.device import Device, Link
from mycel.fleet.probe import probe, refuse_existing, write_probe
from mycel.fleet.profiles import load_fleet
from mycel.models.sizes import SIZES
from mycel.recipe import load_recipe
from mycel.recipe.schema import Layout
from mycel.run.calibrating import between_ranks
from mycel.run.placing import plan_island
from mycel.testing.decisions import check_decision
from small_runs import mycel

CONFIG = SIZES["tiny"].config()
WORK = Work(graph_of(CONFIG, 64), 8)
FAST = Link(up_mbps=1e5, down_mbps=1e5, latency_ms=0.01)


def chains(count: int, blocks: int = 8, stages: int = 4) -> list[Chain]:
    chance = random.Random(3)
    made = []
    for _ in range(count):
        number = chance.randint(1, stages)
        held = tuple(
            StageCost(chance.uniform(0.1, 3), chance.uniform(0, 2), chance.randint(2, 6)) for _ in range(number)
        )
        length = chance.randint(number, min(blocks, sum(stage.room for stage in held)))
        made.append(Chain(length, held, chance.randint(1, 8)))
    return made


def least(chain: Chain) -> float:
    plans = Partition()
    splits = every_split(chain.blocks, len(chain.stages))
    return min(plans.cost(chain, split) for split in splits if not plans.fault(chain, split))


def test_the_partition_equals_enumeration_on_every_small_case() -> None:
    ratios = check_decision(Partition(), chains(200), exact=least)
    assert len(ratios) == 200


def test_the_partition_equals_integer_programming_on_larger_cases() -> None:
    for chain in chains(10, blocks=40, stages=6):
        wide = Chain(
            30, tuple(StageCost(stage.each, stage.extra, 20) for stage in chain.stages * 2), chain.micro_batches
        )
        split, seconds = by_integer_programme(wide)
        assert Partition().cost(wide, Partition().decide(wide)) == pytest.approx(seconds, rel=1e-6)
        assert not Partition().fault(wide, split)


def test_the_heuristic_stays_near_the_exact_partition() -> None:
    ratios = check_decision(Proportional(), chains(100), exact=least, slack=0.5)
    assert sorted(ratios)[len(ratios) // 2] < 1.02


def test_unequal_devices_get_blocks_in_proportion_and_come_near_the_sum_of_speeds() -> None:
    stages = tuple(StageCost(1 / speed) for speed in (1.0, 3.0))
    chain = Chain(32, stages, 64)
    split = Partition().decide(chain)
    bound = 64 * 32 / 4.0  # all speeds together, never idle
    assert bound / Partition().cost(chain, split) >= 0.95
    assert bound / Partition().cost(chain, (16, 16)) <= 0.7


def test_a_plan_is_the_best_of_all_that_can_be_tried() -> None:
    devices = (Device("a", 50, 8, link=FAST), Device("b", 20, 8, link=FAST), Device("c", 35, 8, link=FAST))
    task = Task(WORK, CONFIG, devices)
    plan = Plans().decide(task)
    check_decision(Plans(), [task])
    for subset in ([0], [1], [2], [0, 1], [1, 0], [0, 2], [2, 0], [1, 2], [0, 1, 2], [2, 1, 0], [0, 2, 1]):
        for other in placements(task, tuple(devices[index] for index in subset)):
            assert plan.predicted.seconds <= other.predicted.seconds * (1 + 1e-12)


def test_a_pipeline_hides_what_fsdp_sends_over_a_thin_link() -> None:
    thin = Link(up_mbps=20, down_mbps=20, latency_ms=1)
    devices = (Device("a", 0.5, 8, link=thin), Device("b", 0.5, 8, link=thin))
    plan = Plans().decide(Task(WORK, CONFIG, devices))
    assert plan.layout.pipeline == 2
    wide = tuple(Device(device.name, 0.5, 8, link=FAST) for device in devices)
    assert Plans().decide(Task(WORK, CONFIG, wide)).predicted.seconds < plan.predicted.seconds


def test_memory_decides_for_recomputation_and_says_so_when_nothing_fits() -> None:
    full = memory_of(WORK, Layout(), (4,), 0, Task(WORK, CONFIG, ()).coefficients) / (1 << 30)
    again = memory_of(WORK, Layout(recompute=True), (4,), 0, Task(WORK, CONFIG, ()).coefficients) / (1 << 30)
    assert again < full
    tight = Task(WORK, CONFIG, (Device("b", 50, (full + again) / 2),))
    assert Plans().decide(tight).layout.recompute
    with pytest.raises(RecipeError, match="GiB on device b, has"):
        Plans().decide(Task(WORK, CONFIG, (Device("b", 50, again / 4),)))


def test_who_stays_out_is_told_why() -> None:
    devices = (Device("fast", 400, 8, link=FAST), Device("slow", 1, 8), Device("tiny", 50, 1e-6))
    task = Task(WORK, CONFIG, devices)
    reasons = left_out(task, Plans().decide(task))
    assert "this one" in reasons["slow"]
    assert "nothing fits" in reasons["tiny"]


def test_money_and_energy_follow_from_seconds_prices_and_watts() -> None:
    device = Device("a", 50, 8, watts=100, price_per_hour=3.6, link=FAST)
    cost = predict(WORK, Layout(), (4,), (device,), Task(WORK, CONFIG, ()).coefficients)
    assert cost.joules == pytest.approx(100 * cost.seconds)
    assert cost.money == pytest.approx(cost.seconds * 1e-3)
    cheap = Device("b", 25, 8, price_per_hour=0.1, link=FAST)
    assert Plans().decide(Task(WORK, CONFIG, (device, cheap), objective="money")).devices == (cheap,)


def test_a_probe_makes_a_fleet_that_can_be_planned_with(tmp_path: Path) -> None:
    path = tmp_path / "fleet.toml"
    write_probe(path, probe(50.0, {"cores": 2.0}, 0.05))
    fleet = load_fleet(str(path))
    assert fleet[0].gflops == 50.0
    assert fleet.calibration == {"cores": 2.0}
    assert fleet[0].link.latency_ms > 0
    with pytest.raises(EngineError, match="exists"):
        refuse_existing(path)
    found = plan_island(load_recipe("island", []).replace({"fleet.devices": str(path)}))
    assert found.placements[0].devices == (fleet[0],)
    text = '[calibration]\ncall = 1e-4\n[[device]]\nname = "a"\nunreachable = ["b"]\n[[device]]\nname = "b"\n'
    path.write_text(text, encoding="utf-8")
    fleet = load_fleet(str(path))
    assert not fleet[0].reaches(fleet[1])
    assert not fleet[1].reaches(fleet[0])
    assert load_fleet(str(path)).calibration == {"call": 1e-4}


RING = ("a", "b", "c")


def test_devices_without_links_between_them_share_no_stage_and_are_named() -> None:
    apart = tuple(
        Device(name, 50, 8, link=FAST, unreachable=tuple(other for other in RING if other != name)) for name in RING
    )
    task = Task(WORK, CONFIG, apart)
    plan = Plans().decide(task)
    assert len(plan.devices) == 1
    assert all("no link to" in reason for reason in left_out(task, plan).values())
    small = tuple(replace(device, memory_gib=1e-4) for device in apart)
    with pytest.raises(RecipeError, match="a link between a and b, a and c, b and c"):
        Plans().decide(Task(WORK, CONFIG, small))
    # Where only the ends of a line miss a link, the one between them joins a pipeline, wherever the fleet lists it.
    ends = (Device("a", 0.5, 8, link=FAST, unreachable=("c",)), Device("c", 0.5, 8, link=FAST))
    piped = Plans().decide(Task(WORK, CONFIG, (*ends, Device("b", 0.5, 8, link=FAST))))
    assert piped.layout.pipeline == 3
    assert piped.devices[1].name == "b"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[[device]]\nname = "a"\nunreachable = ["bb"]\n[[device]]\nname = "b"\n', "did you mean 'b'"),
        ('[[device]]\nname = "a"\nunreachable = "b"\n', "a list of devices' names"),
        ('[[device]]\nname = "a"\n[[device]]\nname = "a"\n', "'a' twice"),
        ('[[device]]\nname = "a"\nlink = { price_per_gib = -0.1 }\n', "price_per_gib"),
        ('[[device]]\nname = "a"\nprice_per_hour = -1.0\n', "price_per_hour"),
        ('[calibration]\nspeed = 1\n[[device]]\nname = "a"\n', "unknown key 'speed'"),
        ('[calibration]\ncall = -1.0\n[[device]]\nname = "a"\n', "0 or more"),
        ('calibration = 3\n[[device]]\nname = "a"\n', "a table is needed"),
    ],
)
def test_fleet_files_that_cannot_be_are_refused_with_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "fleet.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=sentence):
        load_fleet(str(path))


def test_slower_devices_take_longer_for_overheads_too_and_wait_for_what_they_are_sent() -> None:
    known = Coefficients(operation=1e-3, reference=50.0)
    quick, slow = (
        predict(WORK, Layout(), (4,), (Device("a", speed, 8, link=FAST),), known).seconds for speed in (50.0, 25.0)
    )
    assert slow == pytest.approx(2 * quick)
    thin = Device("b", 50, 8, link=Link(10, 10, 0))
    found = predict(WORK, Layout(pipeline=2), (2, 2), (Device("a", 50, 8, link=FAST), thin), NOMINAL)
    message = 8 * 64 * CONFIG.hidden_size * 4
    assert found.parts["exchange"] == pytest.approx(2 * 8e-6 * message / 10, rel=0.01)


@given(st.lists(st.floats(0.1, 3), min_size=1, max_size=4), st.integers(1, 6), st.integers(1, 3))
def test_shared_cores_undercut_neither_the_longest_way_nor_the_whole_work(
    micro: list[float], pieces: int, inside: int
) -> None:
    alone = computing(micro, pieces, inside, NOMINAL)
    assert alone == pytest.approx(sum(micro) + (pieces - 1) * max(micro))
    one = computing(micro, pieces, inside, Coefficients(cores=1, contention=0.5))
    assert one == pytest.approx(sum(micro) * pieces * inside)
    many = computing(micro, pieces, inside, Coefficients(cores=64))
    assert many == pytest.approx(alone)
    assert alone <= computing(micro, pieces, inside, Coefficients(cores=64, contention=0.5)) <= 1.5 * alone + 1e-9


def test_a_probe_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="could not measure their link"):
        between_ranks()


@pytest.mark.slow
def test_a_probed_machine_is_calibrated_and_its_plan_uses_that(tmp_path: Path) -> None:
    mycel("fleet", "probe", "--seconds", "2", "--out", "fleet.toml", "--json", folder=tmp_path)
    fleet = load_fleet(str(tmp_path / "fleet.toml"))
    assert fleet.calibration["call"] > 0
    assert fleet.calibration["reference"] == fleet[0].gflops
    plan = json.loads(mycel("plan", "island", "--fleet", "fleet.toml", "--json", folder=tmp_path).stdout)
    assert plan["plans"][0]["step"]["seconds"] > 0
