"""Every kind of trainable over every family of model, held to the same laws; and what is particular to each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from mycel.errors import ModelError
from mycel.models.base import Base, open_base, shifted
from mycel.models.lora import Lora
from mycel.models.trainable import Trainable, build_trainable
from mycel.recipe.schema import TrainableSpec
from mycel.testing.bases import FAMILIES, random_base
from mycel.testing.trainables import check_trainable, logits, random_state

KINDS = {
    "lora": TrainableSpec(kind="lora", rank=3),
    "full": TrainableSpec(kind="full"),
    "prompt": TrainableSpec(kind="prompt", length=5),
    "blocks": TrainableSpec(kind="blocks", blocks=[1]),
    "outside": TrainableSpec(kind="blocks", blocks=[2]),
}


# Plain PeftModel warns by itself; our own use of PEFT must not.
plain_peft = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",
    "ignore:Position ids are not supported:UserWarning",
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bases")
    return {family: random_base(root / family, family).folder for family in FAMILIES}


@pytest.fixture
def base(folders: dict[str, Path]) -> Base:
    return open_base(folders["llama"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_laws(folders: dict[str, Path], family: str, kind: str) -> None:
    spec = KINDS[kind]
    if (kind, family) == ("outside", "t5"):
        spec = TrainableSpec(kind="blocks", blocks=[4])
    check_trainable(lambda: build_trainable(spec, open_base(folders[family])))


@plain_peft
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_saved_adapter_computes_the_same_in_plain_peft(
    folders: dict[str, Path], tmp_path: Path, family: str, kind: str
) -> None:
    trainable = build_trainable(KINDS[kind], open_base(folders[family]))
    trainable.load(random_state(trainable, 1))
    trainable.save(tmp_path)
    with trainable.active():
        expected = logits(trainable)
    plain = PeftModel.from_pretrained(open_base(folders[family]).model, str(tmp_path))
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "t5":
        inputs["labels"] = ids
    with torch.no_grad():
        found = plain(**inputs).logits[:, -7:]
    assert torch.allclose(found, expected, atol=1e-5)


@plain_peft
@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_generates_as_in_plain_peft(folders: dict[str, Path], tmp_path: Path, family: str) -> None:
    trainable = build_trainable(KINDS["prompt"], open_base(folders[family]))
    trainable.load(random_state(trainable, 2, spread=1.0))
    trainable.save(tmp_path)
    ids = torch.randint(3, 300, (3, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = trainable.base.model
    without = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with trainable.active():
        cached = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        recomputed = model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=False)
    assert not torch.equal(cached, without)
    assert torch.equal(cached, recomputed)
    plain = PeftModel.from_pretrained(open_base(folders[family]).model, str(tmp_path))
    assert torch.equal(plain.generate(**inputs, max_new_tokens=8, do_sample=False), cached)


def test_prompt_reads_left_padding_as_no_padding(base: Base) -> None:
    prompt = build_trainable(KINDS["prompt"], base)
    prompt.load(random_state(prompt, 3, spread=1.0))
    ids = torch.tensor([[5, 9, 7]])
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    with prompt.active():
        short = base.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        long = base.model.generate(
            input_ids=padded, attention_mask=(padded != 0).long(), max_new_tokens=6, do_sample=False
        )
    assert torch.equal(short[:, 3:], long[:, 7:])


@plain_peft
def test_training_equals_bare_peft_step_by_step(folders: dict[str, Path]) -> None:
    ours = build_trainable(TrainableSpec(rank=4, scaling=2.0), open_base(folders["llama"]))
    start = random_state(ours, 4)
    ours.load(start)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(open_base(folders["llama"]).model, config)
    live = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            live[f"base_model.model.{name}.default.weight"].copy_(value)
    ids = torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(2))
    for model, parameters in (
        (ours.base.model, list(ours.parameters().values())),
        (theirs, [value for value in live.values() if value.requires_grad]),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(3):
            with ours.active():
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
    for name, value in ours.state().items():
        assert torch.equal(value, live[f"base_model.model.{name}.default.weight"]), name


def test_several_ranks_over_one_base_do_not_touch_each_other(base: Base) -> None:
    parties = [build_trainable(TrainableSpec(rank=[2, 4, 8]), base, rank) for rank in (2, 4, 8)]
    assert [party.size() for party in parties] == [parties[0].size() * factor for factor in (1, 2, 4)]
    for seed, party in enumerate(parties):
        party.load(random_state(party, seed))
    before = [party.state() for party in parties]
    with parties[1].active():
        loss = base.model(input_ids=torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss
        loss.backward()
        torch.optim.SGD(parties[1].parameters().values(), lr=1.0).step()
        with pytest.raises(ModelError, match="another LoRA is active"), parties[0].active():
            pass
    for index in (0, 2):
        assert all(torch.equal(value, before[index][name]) for name, value in parties[index].state().items())
        assert not any(value.grad is not None for value in parties[index].parameters().values())
    assert any(not torch.equal(value, before[1][name]) for name, value in parties[1].state().items())


def test_stacked_adapters_change_the_base_by_the_sum_of_their_changes(base: Base) -> None:
    low, high = Lora(base, 2, 2.0), Lora(base, 5, 2.0)
    first, second = random_state(low, 1), random_state(high, 2)
    stacked = {
        name: torch.cat([value, second[name]], dim=int(name.endswith("lora_B"))) for name, value in first.items()
    }
    one, two = low.delta_weight(first), high.delta_weight(second)
    for name, delta in low.delta_weight(stacked).items():
        assert torch.allclose(delta, one[name] + two[name], atol=1e-6)


def test_shifting_by_the_change_equals_the_adapter_and_leaves_no_trace(base: Base) -> None:
    lora, other = Lora(base, 4, 2.0), Lora(base, 2, 2.0)
    state = random_state(lora, 5)
    lora.load(state)
    other.load(random_state(other, 6))
    with lora.active():
        expected = logits(lora)
    pointers = {name: (id(value), value.data_ptr()) for name, value in base.model.named_parameters()}
    plain = logits(lora)
    with shifted(base, lora.delta_weight(state)):
        assert torch.allclose(logits(lora), expected, atol=1e-5)
        with other.active():
            over_shifted = logits(other)
    assert {name: (id(value), value.data_ptr()) for name, value in base.model.named_parameters()} == pointers
    assert torch.equal(logits(lora), plain)
    lora.merge(state)
    with other.active():
        assert torch.allclose(logits(other), over_shifted, atol=1e-5)


def test_shift_of_a_tied_weight_reaches_every_place(base: Base) -> None:
    plain = base.model.get_output_embeddings().weight
    with shifted(base, {"model.embed_tokens.weight": torch.ones_like(plain)}):
        assert base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
        assert torch.equal(base.model.get_output_embeddings().weight, plain + 1)
    assert base.model.get_output_embeddings().weight is plain


def test_training_continues_from_a_saved_adapter_at_its_rank_and_above(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    first = build_trainable(TrainableSpec(rank=3, scaling=4.0), open_base(folders["llama"]))
    state = random_state(first, 7)
    first.load(state)
    first.save(tmp_path / "adapter")
    expected = first.delta_weight(state)
    base = open_base(folders["llama"], str(tmp_path))
    for rank in (3, 6):
        again = build_trainable(TrainableSpec(rank=rank, scaling=2.0), base)
        found = again.delta_weight(again.initial(0))
        assert all(torch.allclose(found[name], delta, atol=1e-6) for name, delta in expected.items())
    with pytest.raises(ModelError, match="rank of at least 3"):
        build_trainable(TrainableSpec(rank=2), base)
    with pytest.raises(ModelError, match="merge it into the base first"):
        build_trainable(TrainableSpec(kind="full"), base).initial(0)
    with pytest.raises(ModelError, match=r"trainable.kind needs PROMPT_TUNING"):
        build_trainable(TrainableSpec(kind="prompt"), base)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (TrainableSpec(rank=33), "trainable.rank is 33.*choose 1 to 32"),
        (TrainableSpec(targets=["q_porj"]), "did you mean q_proj"),
        (TrainableSpec(targets=["embed_tokens"]), "which no linear layer is called"),
        (
            TrainableSpec(kind="blocks", blocks=[0, 3]),
            "names block 3, and 'llama' has 2 blocks: choose from 0 to 1, or 2",
        ),
        (TrainableSpec(kind="prompt", length=64), "trainable.length is 64, and 'llama' sees 64 tokens"),
    ],
)
def test_what_does_not_fit_is_refused(base: Base, spec: TrainableSpec, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        build_trainable(spec, base)


def test_lora_adapts_every_linear_layer_of_the_blocks_and_no_other(base: Base) -> None:
    paths = {name.rpartition(".")[0] for name in build_trainable(TrainableSpec(), base).parameters()}
    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    expected = {f"model.layers.{index}.{part}.{leaf}" for index in (0, 1) for leaf in leaves
                for part in (["self_attn"] if leaf[0] in "qkvo" else ["mlp"])}  # fmt: skip
    assert paths == expected
    chosen = build_trainable(TrainableSpec(targets=["q_proj", "model.layers.0.mlp.up_proj"]), base)
    assert {name.rpartition(".")[0] for name in chosen.parameters()} == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
    }


def test_blocks_and_outside_together_are_the_whole_model(base: Base) -> None:
    def names(trainable: Trainable) -> set[str]:
        return set(trainable.parameters())

    parts = [names(build_trainable(TrainableSpec(kind="blocks", blocks=[index]), base)) for index in range(3)]
    whole = names(build_trainable(TrainableSpec(kind="full"), base))
    assert set().union(*parts) == whole == names(build_trainable(TrainableSpec(kind="blocks"), base))
    assert sum(map(len, parts)) == len(whole)
    assert "model.embed_tokens.weight" in parts[2]


def test_building_leaves_the_global_generator_alone(base: Base) -> None:
    torch.manual_seed(9)
    before = torch.get_rng_state()
    for spec in KINDS.values():
        build_trainable(spec, base).initial(1)
    assert torch.equal(torch.get_rng_state(), before)
