"""The parts of a cut model compute what the whole computes, for every family of decoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from decoders import FAMILIES, decoder
from mycel.errors import ModelError
from mycel.models.cut import Cut

PROMPT = torch.tensor([[5, 17, 9, 44, 3, 80, 61], [7, 7, 30, 12, 90, 4, 25]])


def _greedy_whole(model: PreTrainedModel, ids: torch.Tensor, steps: int) -> list[list[int]]:
    cache = DynamicCache(config=model.config)
    chosen = []
    for _ in range(steps):
        ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(ids)
    return torch.cat(chosen, 1).tolist()


def _greedy_cut(client: Cut, hosts: list[Cut], ids: torch.Tensor, steps: int) -> list[list[int]]:
    caches = [host.new_cache() for host in hosts]
    chosen, past = [], 0
    for _ in range(steps):
        hidden = client.embed(ids, torch.arange(past, past + ids.shape[1])[None])
        past += ids.shape[1]
        for host, cache in zip(hosts, caches, strict=True):
            hidden = host.run(hidden, cache=cache)
        ids = client.head(hidden[:, -1:])[:, -1].argmax(-1, keepdim=True)
        chosen.append(ids)
    return torch.cat(chosen, 1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_three_hosts_equals_the_whole(family: str, tmp_path: Path) -> None:
    model = decoder(family)
    model.save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    client = Cut.open(tmp_path, 0, 0)
    for place in range(client.depth + 1):
        hosts = [Cut.open(tmp_path, 0, place, embed=False, head=False)]
        hosts += [Cut.open(tmp_path, place, 4, embed=False, head=False)]
        with torch.no_grad():
            hidden = client.embed(PROMPT)
            for host in hosts:
                hidden = host.run(hidden)
            assert torch.equal(client.head(hidden), whole(PROMPT).logits)
            if place in (1, 3):
                assert _greedy_cut(client, hosts, PROMPT, 8) == _greedy_whole(whole, PROMPT, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_cross_the_cut(family: str) -> None:
    model = decoder(family).requires_grad_(True)
    names = [name for name, _ in model.named_parameters()]
    model(PROMPT, labels=PROMPT).loss.backward()
    expected = [parameter.grad for _, parameter in model.named_parameters()]
    model.zero_grad()
    cut = Cut.of(model)
    hidden = cut.embed(PROMPT)
    crossed = []
    for block in range(cut.depth):
        arrived = hidden.detach().requires_grad_()
        crossed.append((hidden, arrived))
        hidden = cut.run(arrived, block, block + 1)
    logits = cut.head(hidden)
    model.loss_function(logits=logits, labels=PROMPT, vocab_size=model.config.vocab_size).backward()
    for left, arrived in reversed(crossed):
        left.backward(arrived.grad)  # type: ignore[no-untyped-call]
    for name, parameter, gradient in zip(names, model.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None and parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_host_holds_only_what_it_was_asked_to_hold(tmp_path: Path) -> None:
    model = decoder("llama")
    model.save_pretrained(tmp_path)
    per_block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    host = Cut.open(tmp_path, 1, 3, embed=False, head=False)
    assert sum(parameter.numel() for parameter in host.parameters()) == 2 * per_block
    client = Cut.open(tmp_path, 0, 0)
    ends = sum(parameter.numel() for parameter in model.parameters()) - 4 * per_block
    assert sum(parameter.numel() for parameter in client.parameters()) == ends


def test_padded_rows_are_as_if_alone() -> None:
    model = decoder("gpt2")
    cut = Cut.of(model)
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        hidden = cut.run(cut.embed(ids, positions), positions_BT=positions, mask_BS=mask)
        alone = model(ids[:1, 2:]).logits
    torch.testing.assert_close(cut.head(hidden)[:1, 2:], alone, rtol=1e-4, atol=1e-5)


def test_impossible_cuts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        Cut.open(tmp_path)
    decoder("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="blocks 3 to 9 are asked for"):
        Cut.open(tmp_path, 3, 9)
    host = Cut.open(tmp_path, 1, 3, embed=False, head=False)
    with pytest.raises(ModelError, match="the embedding lives elsewhere"):
        host.embed(PROMPT)
    with pytest.raises(ModelError, match="1 to 3 are held here"):
        host.run(torch.zeros(1, 1, 32), 0, 2)
