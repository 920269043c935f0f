"""Laws of the systems of generation: exact guesses, fair queues, sound checkpoints, answers that move unbroken."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mycel.errors import GenerationError, ModelError, ParcelError
from mycel.generation.checkpoint import INDEX, WEIGHTS, Loader, write_checkpoint
from mycel.generation.engine import Engine, Limits, greedy
from mycel.generation.executor import Whole
from mycel.generation.pages import PagePool
from mycel.generation.request import Request, Sampling, Token
from mycel.generation.sampling import Sampler, pick
from mycel.generation.scheduler import FirstComeFirstServed, Job, Policy, Step, View
from mycel.generation.simulator import Clock, Costs, Imagined, at_rate, fit, heavy_tailed, load_of, replay
from mycel.generation.speculation import Proposal, keep_probability, residual, verify
from mycel.serve.draft_model import DraftModel
from mycel.serve.edge_draft import EdgeDraft, Verifier
from mycel.serve.fastserve import FastServe, Notes, Standing, imagined, mean_completion
from mycel.serve.prompt_lookup import PromptLookup
from mycel.serve.scalellm import Blueprint, StaticBatching, least_loaded
from mycel.serve.serverlessllm import Server, choose_server, migrate
from mycel.testing import check_policy
from mycel.wire.parcel import Parcel
from test_generation import MOST, PROMPTS, VOCABULARY, made, plain


def distribution(seed: int, size: int = 5) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    found = torch.rand(size, generator=source, dtype=torch.float64)
    found[int(torch.randint(size, (), generator=source))] = 0.0
    return found / found.sum()


@pytest.mark.parametrize("seed", range(20))
def test_the_acceptance_law_gives_the_targets_distribution(seed: int) -> None:
    target, draft = distribution(seed), distribution(1000 + seed)
    out = torch.zeros_like(target)
    for guess, chance in enumerate(draft.tolist()):
        kept = keep_probability(target, draft, guess)
        out[guess] += chance * kept
        out += chance * (1 - kept) * residual(target, draft)
    assert torch.allclose(out, target, atol=1e-12)


class Scripted(Sampler):
    """A sampler whose uniform numbers are given."""

    def __init__(self, numbers: list[float]) -> None:
        super().__init__(Sampling(1.0, seed=0))
        self.numbers = list(numbers)

    def uniform(self) -> float:
        return self.numbers.pop(0)


def test_verify_follows_the_law_for_two_guesses_by_enumeration() -> None:
    size, grid = 3, [(index + 0.5) / 24 for index in range(24)]
    first, second = distribution(1, size), [distribution(2 + index, size) for index in range(size)]
    after = distribution(9, size)
    drafts = torch.stack([distribution(20, size), distribution(21, size)])
    joint = torch.zeros(size, size, dtype=torch.float64)
    for a, b in product(range(size), repeat=2):
        chance = float(drafts[0][a] * drafts[1][b])
        if chance == 0:
            continue
        for numbers in product(grid, repeat=3):
            kept = verify(Proposal((a, b), drafts), [first, second[a], after], Scripted(list(numbers)))
            weight = chance / len(grid) ** 3
            if len(kept) == 1:  # the next is the target's own, whatever it is
                joint[kept[0]] += weight * second[kept[0]]
            else:
                joint[kept[0], kept[1]] += weight
    wanted = first[:, None] * torch.stack(second)
    assert torch.allclose(joint, wanted, atol=0.02)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_cuts_keep_what_they_say_and_draws_follow_the_distribution(temperature: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(3))
    cut = Sampler(Sampling(temperature, top_k=4, seed=0)).distribution(logits)
    assert int((cut > 0).sum()) == 4
    nucleus = Sampler(Sampling(temperature, top_p=0.6, seed=0)).distribution(logits)
    full = torch.softmax(logits.double() / temperature, -1)
    kept = nucleus > 0
    assert float(full[kept].sum()) >= 0.6 > float(full[kept].sum() - full[kept].min())
    shares = torch.bincount(torch.tensor([pick(full, (index + 0.5) / 5000) for index in range(5000)]), minlength=12)
    assert torch.allclose(shares / 5000.0, full.float(), atol=2e-3)


@pytest.mark.parametrize("memory", [200, 16])
@pytest.mark.parametrize("kind", ["lookup", "twin", "stranger"])
def test_guessing_changes_no_greedy_token(kind: str, memory: int) -> None:
    model = made("Llama", seed=1)
    wanted = plain(model, PROMPTS, 20)
    executor = Whole(model)
    twin = Whole(made("Llama", seed=1 if kind == "twin" else 5))
    drafter = PromptLookup() if kind == "lookup" else DraftModel(twin, VOCABULARY)
    limits = Limits(page=4, memory=memory * 4 * executor.position_bytes, tokens=24)
    engine = Engine(executor, limits=limits, drafter=drafter)
    assert greedy(engine, PROMPTS, 20) == wanted
    assert engine.pool.held == 0
    assert engine.counts.guessed > 0
    if kind == "twin":
        assert engine.counts.kept == engine.counts.guessed, "a draft equal to the target is always right"


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_edge_drafts_reproduce_the_far_model(temperature: float) -> None:
    sampling = Sampling(temperature, seed=5)
    far = Verifier(Engine(Whole(made("Llama", seed=1)), limits=Limits(page=4)))
    edge = EdgeDraft(DraftModel(Whole(made("Llama", seed=1)), VOCABULARY), far.answer, sampling, VOCABULARY)
    found = edge.generate(PROMPTS[1], 20)
    assert len(found) == 20
    assert edge.exchanges == far.engine.counts.steps < 8, "guesses of the same model were refused"
    assert far.engine.counts.shared > 20, "what was computed before was not found among the pages"
    assert far.engine.pool.held == far.engine.waiting == 0
    if temperature == 0:
        assert found == plain(made("Llama", seed=1), [PROMPTS[1]], 20)[0]


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_a_verifier_survives_any_frame(frame: bytes) -> None:
    with pytest.raises((ParcelError, GenerationError)):
        FAR.answer(frame)


FAR = Verifier(Engine(Whole(made("Llama", seed=1))))


NO_IDS = [torch.tensor([-1]), torch.tensor([VOCABULARY]), torch.tensor([0.5]), torch.ones(2, 2)]


@pytest.mark.parametrize("tokens", NO_IDS)
def test_a_verifier_refuses_ids_that_are_none(tokens: Tensor) -> None:
    header = {"model": "", "temperature": 0, "top_p": 1, "top_k": 0, "seed": None}
    frame = Parcel("guesses", header, {"tokens": tokens, "guessed": torch.tensor([1])}).to_bytes()
    with pytest.raises(ParcelError):
        FAR.answer(frame)


COSTS = Costs(1e-3, 1e-4, 1e-5)


def view(*jobs: Job, now: float = 0.0, most: int = 1, memory: Notes | None = None) -> View:
    return View(now, jobs, 100, 16, 64, most, memory)


@given(st.integers(0, 2**16), st.integers(1, 3))
def test_fitted_costs_foretell_the_time_that_was_watched_the_slowest_included(seed: int, slow: int) -> None:
    source, true = random.Random(seed), Costs(1e-3, 5e-4, 2e-5)
    sizes = [(rows := source.randrange(1, 9), rows + source.choice([0, 0, 40])) for _ in range(300)]
    steps = [(true.seconds(*size), *size) for size in sizes]
    found = fit(steps)
    assert (found.step, found.row, found.token) == pytest.approx((1e-3, 5e-4, 2e-5), rel=1e-6)
    steps[:slow] = [(50 * seconds, rows, tokens) for seconds, rows, tokens in steps[:slow]]
    found = fit(steps)
    assert sum(found.seconds(*size) for size in sizes) == pytest.approx(sum(seconds for seconds, *_ in steps))
    assert found.row / found.step == pytest.approx(0.5, rel=1e-6)


def test_a_long_prompt_skips_the_queues_that_it_would_not_fit() -> None:
    policy = FastServe(Costs(1e-3, 0.0, 1e-4), quantum=1e-3)
    assert policy.first_level(1) == 0
    assert policy.first_level(100) == 4  # 10.9 ms: the first quantum to cover it is 16 ms
    assert FastServe(COSTS, skip_join=False).standings(view(Job(1, 0.0, 500, 500)))[1].level == 0


def test_expected_next_time_is_the_quanta_still_to_be_used_above() -> None:
    policy = FastServe(COSTS, quantum=1.0, alpha=1e9)
    jobs = (Job(1, 0.0, 1, 1), Job(2, 0.0, 1, 1))
    standing = {1: Standing(0, 0.0, 0.0, 0.0), 2: Standing(2, 0.0, 0.0, 0.0)}
    assert policy.next_times(view(*jobs), jobs, standing)[2] == 1.0 + 2.0


def test_a_job_that_waited_alpha_rises_to_the_first_queue() -> None:
    policy = FastServe(COSTS, quantum=1.0, alpha=0.3)
    notes = Notes(0.0, frozenset({1}), ((1, Standing(0, 0.0, 0.0, 0.0)), (2, Standing(5, 0.0, 0.0, 0.0))))
    after = policy.standings(view(Job(1, 0.0, 1, 1), Job(2, 0.0, 1, 1), now=0.31, memory=notes))
    assert after[2].level == 0
    assert after[1].used == pytest.approx(0.31)


class _Same:
    context, position_bytes = 1024, 1024


def test_one_endless_queue_is_first_come_first_served() -> None:
    trace = at_rate(heavy_tailed(60, seed=4), 40.0)
    limits = Limits(jobs=2, tokens=64, share=False, memory=1024 * 16 * 400)
    executor = _Same()
    one = imagined(COSTS, executor, limits, FastServe(COSTS, quantum=1e12, alpha=1e12), trace)  # type: ignore[arg-type]
    other = imagined(COSTS, executor, limits, FirstComeFirstServed(), trace)  # type: ignore[arg-type]
    assert [outcome.done for outcome in one] == [outcome.done for outcome in other]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_heavy_tails_are_served_in_half_the_time_and_nobody_starves(seed: int) -> None:
    limits = Limits(jobs=2, tokens=64, share=False, memory=1024 * 16 * 400)
    trace = heavy_tailed(400, seed=seed)
    trace = at_rate(trace, 0.9 / load_of(trace, COSTS, 2))
    means = []
    for policy in (FirstComeFirstServed(), FastServe(COSTS)):
        found = imagined(COSTS, _Same(), limits, policy, trace)  # type: ignore[arg-type]
        assert all(outcome.done > 0 for outcome in found)
        means.append(mean_completion(found))
    assert means[1] <= 0.5 * means[0]


@pytest.mark.parametrize("pages", [14, 60])
def test_fair_queues_change_no_token_even_when_pages_are_short(pages: int) -> None:
    model = made("Llama", seed=1)
    wanted = plain(model, PROMPTS)
    executor = Whole(model)
    clock = Clock()

    class Ticking(FastServe):
        def decide(self, view: View):  # type: ignore[no-untyped-def]
            clock.wait(1e-3)
            return super().decide(view)

    limits = Limits(page=4, memory=pages * 4 * executor.position_bytes, jobs=2, share=False)
    engine = Engine(executor, limits=limits, policy=Ticking(COSTS, alpha=0.02), clock=clock)
    assert greedy(engine, PROMPTS, MOST) == wanted
    assert engine.pool.held == 0


def test_the_layout_does_not_flutter_and_the_free_replica_is_chosen() -> None:
    blueprint, layout, seen = Blueprint(), "wide", []
    for under_way in (10, 64, 63, 50, 48, 47, 60):
        layout = blueprint.decide(under_way, layout)  # type: ignore[arg-type]
        seen.append(layout)
    assert seen == ["wide", "narrow", "narrow", "narrow", "narrow", "wide", "wide"]
    assert least_loaded([3.0, 4.0, 1.0], [1.0, 2.0, 0.1]) == 1


def test_the_server_that_starts_soonest_is_chosen() -> None:
    near = Server(0.0, False, {"a": 2e10}, running=100)
    far = Server(0.0, True, {"a": 2e9})
    assert choose_server([near, far], "a", 10**9) == 1  # half a second from disk, before 1.15 s from memory and moving
    assert choose_server([near, far], "a", 10**10) == 0
    with pytest.raises(GenerationError, match="no server holds"):
        choose_server([near, far], "b", 1)


@pytest.mark.parametrize("after", [1, 7, 15])
def test_an_answer_moves_unbroken_at_the_price_of_its_tokens(after: int) -> None:
    request = Request(tuple(PROMPTS[1]), 16)
    wanted = plain(made("Llama", seed=1), [PROMPTS[1]], 16)[0]
    source, target = (Engine(Whole(made("Llama", seed=1)), limits=Limits(page=4)) for _ in range(2))
    seen: list[Token] = []
    report = migrate(source, target, request, seen.append, after)
    assert [token.id for token in seen] == wanted
    assert source.pool.held == target.pool.held == 0
    assert report["sent"] <= 2 * (len(PROMPTS[1]) + 16)


def test_a_checkpoint_loads_equal_to_the_bit_and_writes_shared_weights_once(tmp_path: Path) -> None:
    shared = torch.randn(300, 7)
    state = {
        "a": shared,
        "b": shared,
        "half": torch.randn(5000).half(),
        "ids": torch.arange(9),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "bf": torch.randn(3, 4, 5).bfloat16(),
        "square": (square := torch.randn(5, 5)),
        "turned": square.t(),  # the same memory, and other numbers in it
    }
    write_checkpoint(state, tmp_path)
    for loader in (Loader(), Loader(1, direct=True)):
        for reuse in (False, True):
            found = loader.load(tmp_path, reuse)
            assert found.keys() == state.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert (tmp_path / WEIGHTS).stat().st_size < 2 * shared.nbytes + 6 * 4096 + 10_000


LIES = [
    "{",
    "[]",
    '{"bytes": 4096, "tensors": {"x": [0, "F32", [9999]]}}',
    '{"bytes": 4096, "tensors": {"x": [-4096, "F32", [1]]}}',
    '{"bytes": 4096, "tensors": {"x": [0, "F99", [1]]}}',
    '{"bytes": 99999999999, "tensors": {}}',
    '{"bytes": 4096, "tensors": {"x": 3}}',
]


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_index_is_refused(tmp_path: Path, lie: str) -> None:
    write_checkpoint({"x": torch.ones(4)}, tmp_path)
    (tmp_path / INDEX).write_text(lie)
    with pytest.raises(ModelError, match="cannot be read"):
        Loader().load(tmp_path)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), max_size=60), st.integers(2, 12))
@settings(max_examples=80, deadline=None)
def test_pages_are_never_lost_nor_held_twice(moves: list[tuple[int, int]], count: int) -> None:
    pool, held = PagePool(count, 4), list[list[int]]()
    for kind, number in moves:
        tokens = [number % 3] * number
        if kind == 0 and pool.pages_for(number) <= pool.available:
            found = pool.find(tokens, "")
            if pool.pages_for(number) - len(found) <= pool.available:
                table = found + pool.take(pool.pages_for(number) - len(found))
                held.append(table)
                pool.publish(table, tokens, "", 0)
            else:
                pool.release(found)
        elif held:
            pool.release(held.pop(number % len(held)))
        assert pool.held == len({page for table in held for page in table})
    for table in held:
        pool.release(table)
    assert pool.available == count


def test_memory_after_many_requests_is_the_memory_after_few() -> None:
    import gc

    engine = Engine(Imagined(COSTS, Clock(), 64, 64), limits=Limits(page=4, memory=64 * 4 * 100, tokens=64))
    source = np.random.default_rng(0)

    def send(count: int) -> int:
        for _ in range(count):
            prompt = tuple(source.integers(3, 8, 6).tolist())
            engine.submit(Request(prompt, 1), lambda token: None)
            engine.run()
        gc.collect()
        return len(gc.get_objects())

    few = send(1000)
    assert abs(send(9000) - few) < 200
    assert engine.pool.held == engine.aside.bytes == 0


def test_a_replay_sends_every_request_when_it_is_due() -> None:
    clock = Clock()
    engine = Engine(Imagined(COSTS, clock, 1024, 64), limits=Limits(jobs=1), clock=clock)
    trace = at_rate(heavy_tailed(5, seed=1, longest=6), 0.001)
    outcomes, _ = replay(engine, trace, clock.wait)
    assert [outcome.done for outcome in outcomes] == pytest.approx(
        [COSTS.seconds(1, arrival.prompt) + (arrival.most - 1) * COSTS.seconds(1, 1) for arrival in trace]
    )


POLICIES: dict[str, Callable[[], Policy]] = {
    "first come": FirstComeFirstServed,
    "fair queues": lambda: FastServe(COSTS),
    "fair queues, no skipping": lambda: FastServe(COSTS, skip_join=False),
    "static": StaticBatching,
}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_keep_the_laws(name: str) -> None:
    check_policy(POLICIES[name])


def test_the_suite_notices_a_policy_that_breaks_a_law() -> None:
    class Greedy(FirstComeFirstServed):
        def decide(self, view: View) -> Step:
            return Step(tuple((job.id, job.left) for job in view.jobs))

    with pytest.raises(AssertionError, match="limit"):
        check_policy(Greedy)
