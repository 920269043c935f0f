"""Plans: exact on every small case, sound on large ones, refused in a sentence when nothing fits."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from mycel.decisions.cost import Work, memory_of, predict
from mycel.decisions.graph import graph_of
from mycel.decisions.partition import Chain, Partition, Proportional, StageCost, by_integer_programme, every_split
from mycel.decisions.planner import Plans, Task, left_out, placements
from mycel.errors import EngineError, RecipeError
from mycel.fleet.device import Device, Link
from mycel.fleet.probe import probe, refuse_existing, write_probe
from mycel.fleet.profiles import load_fleet
from mycel.models.sizes import SIZES
from mycel.recipe.schema import Layout
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
    write_probe(path, probe(0.3))
    fleet = load_fleet(str(path))
    assert fleet[0].gflops > 0
    assert fleet[0].link.latency_ms > 0
    with pytest.raises(EngineError, match="exists"):
        refuse_existing(path)
    found = json.loads(mycel("plan", "island", "--fleet", path, "--json", folder=tmp_path).stdout)
    assert found["plans"][0]["devices"] == [fleet[0].name]
    path.write_text('[[device]]\nname = "a"\nprice_per_hour = -1.0\n', encoding="utf-8")
    assert "price_per_hour" in mycel("plan", "island", "--fleet", path, folder=tmp_path, expect=1).stderr
