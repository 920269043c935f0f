"""Finding, opening, saving and caching a base."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mycel.data.examples import Example
from mycel.errors import ModelError
from mycel.models import cache
from mycel.models.base import find_base, open_base, save_model, shifted
from mycel.models.pretrain import Corpus, train_base
from mycel.models.save import save_run_model
from mycel.models.sizes import SIZES, VOCABULARY, Size
from mycel.models.trainable import build_trainable
from mycel.recipe.schema import TrainableSpec
from mycel.testing.bases import FAMILIES, random_base
from mycel.testing.trainables import logits, random_state

CORPUS = Corpus(
    [f"def add_{index}(left, right):\n    return left + right + {index}\n" for index in range(200)],
    [Example(f"What does add_{index} do?\n", f"It adds {index} to a sum.") for index in range(40)],
)
SHAPE: dict[str, Any] = {"hidden": 16, "layers": 1, "heads": 2, "intermediate": 24, "steps": 12}
SHORT = Size("short", "llama", learning_rate=4e-3, batch_size=8, window=32, **SHAPE)
SHORT_T5 = Size("short-t5", "t5", learning_rate=4e-3, batch_size=8, window=32, **SHAPE)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def ignore(phase: str, done: int, total: int) -> None:
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_open_base_equals_plain_transformers_and_is_frozen(tmp_path: Path, family: str) -> None:
    base = random_base(tmp_path / family, family)
    plain = type(base.model).from_pretrained(tmp_path / family)
    expected = dict(plain.named_parameters())
    found = dict(base.model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
    assert not base.model.training
    assert find_base(str(tmp_path / family)) == tmp_path / family


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_weights_stay_mapped_from_the_file(tmp_path: Path) -> None:
    base = random_base(tmp_path / "model")
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tmp_path / "model") in line:
            low, high = line.split()[0].split("-")
            mapped.append(range(int(low, 16), int(high, 16)))
    assert mapped
    for name, parameter in base.model.named_parameters():
        assert any(parameter.data_ptr() in place for place in mapped), name


def test_merging_leaves_the_file_alone(tmp_path: Path) -> None:
    base = random_base(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    trainable = build_trainable(TrainableSpec(rank=2), base)
    trainable.merge(random_state(trainable, 1))
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    with pytest.raises(ModelError, match="holds the base that is open"):
        save_model(base, tmp_path / "model")


FRESH = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))
found = {}
for run in Path(sys.argv[1]).iterdir():
    model = AutoModelForCausalLM.from_pretrained(run / "base")
    assert AutoTokenizer.from_pretrained(run / "base").pad_token == "<pad>"
    if (run / "adapter").exists():
        model = PeftModel.from_pretrained(model, str(run / "adapter"))
    with torch.no_grad():
        found[run.name] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -7:].contiguous()
assert "mycel" not in sys.modules
save_file(found, sys.argv[2])
"""


def test_run_models_load_in_a_fresh_process_without_mycel(tmp_path: Path) -> None:
    specs = [
        TrainableSpec(kind="lora", rank=3),
        TrainableSpec(kind="prompt", length=4),
        TrainableSpec(kind="full"),
        TrainableSpec(kind="blocks", blocks=[0]),
    ]
    expected: dict[str, torch.Tensor] = {}
    random_base(tmp_path / "model")
    for spec in specs:
        base = open_base(tmp_path / "model")
        earlier = build_trainable(TrainableSpec(rank=2), base)
        earlier.merge(random_state(earlier, 1))
        trainable = build_trainable(spec, base)
        trainable.load(random_state(trainable, 2))
        with trainable.active():
            expected[spec.kind] = logits(trainable)
        run = tmp_path / "runs" / spec.kind
        save_run_model(base, trainable, run)
        assert (run / "adapter").exists() == (spec.kind in ("lora", "prompt"))
    arguments = [sys.executable, "-c", FRESH, str(tmp_path / "runs"), str(tmp_path / "logits")]
    subprocess.run(arguments, check=True, capture_output=True)
    found = load_file(tmp_path / "logits")
    assert found.keys() == expected.keys()
    for kind, value in expected.items():
        assert torch.allclose(found[kind], value, atol=1e-5), kind


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("huge", "neither a built-in size"),
        ("/no/such/folder", "neither a built-in size"),
        ("../model", "neither a built-in size"),
        ("bad org/bad..name", "not a Hugging Face id"),
    ],
)
def test_a_name_that_is_no_base_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        find_base(name)


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="hub cannot be reached and no copy is cached here") as caught:
        find_base("no-such-organisation/no-such-model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", r"no \*.safetensors weights"),
        ("tokenizer.json tokenizer_config.json", "no tokenizer.json"),
    ],
)
def test_an_incomplete_folder_is_refused(tmp_path: Path, missing: str, sentence: str) -> None:
    random_base(tmp_path)
    for name in missing.split():
        (tmp_path / name).unlink()
    for door in (lambda: find_base(str(tmp_path)), lambda: open_base(tmp_path)):
        with pytest.raises(ModelError, match=sentence):
            door()


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    random_base(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be opened"):
        open_base(tmp_path)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    random_base(tmp_path / "llama")
    random_base(tmp_path / "gpt2", "gpt2")
    shutil.copy(tmp_path / "gpt2" / "model.safetensors", tmp_path / "llama" / "model.safetensors")
    with pytest.raises(ModelError, match="lacks fitting weights"):
        open_base(tmp_path / "llama")


def test_a_tokeniser_with_more_ids_than_the_embedding_is_refused(tmp_path: Path) -> None:
    base = random_base(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens([f"<extra {index}>" for index in range(100)])
    tokenizer.save_pretrained(tmp_path)
    rows = base.model.get_input_embeddings().weight.shape[0]
    with pytest.raises(ModelError, match=f"ids up to {len(tokenizer) - 1} and the model's embedding {rows} rows"):
        open_base(tmp_path)


def test_an_adapter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    random_base(tmp_path)
    with pytest.raises(ModelError, match=r"model.adapter is 'nowhere'"):
        open_base(tmp_path, "nowhere")


def test_a_delta_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = random_base(tmp_path)
    for deltas in ({"no.such.weight": torch.zeros(1)}, {"model.norm.weight": torch.zeros(3)}):
        with pytest.raises(ModelError, match="delta"), shifted(base, deltas):
            pass


@pytest.mark.parametrize("size", [SHORT, SHORT_T5], ids=lambda size: size.name)
def test_training_a_base_is_reproducible_and_learns(tmp_path: Path, size: Size) -> None:
    phases: list[tuple[str, int, int]] = []
    state = torch.get_rng_state()
    train_base(size, tmp_path / "one", lambda *report: phases.append(report), CORPUS)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    train_base(size, tmp_path / "two", ignore, CORPUS)
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert [done for phase, done, _ in phases if phase == "training the base"] == list(range(size.steps + 1))
    base = open_base(tmp_path / "one")
    ids = base.tokenizer("def add_7(left, right):\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = float(base.model(input_ids=ids, labels=ids).loss)
    assert loss < 7.4  # a model that learnt nothing has ln(2048) = 7.6


def test_the_tokeniser_gives_back_any_text(tmp_path: Path) -> None:
    train_base(SHORT, tmp_path, ignore, CORPUS)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("def f(x):\n\treturn  x", "naïve — 你好 🍄 \u200b", "  leading, trailing  "):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>"]) == [0, 1, 2]
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<bos>", "<eos>")


def test_two_callers_train_a_base_once_and_a_killed_training_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Path] = []

    def train(size: Size, folder: Path, report: object) -> None:
        trained.append(folder)
        train_base(size, folder, ignore, CORPUS)

    monkeypatch.setenv("MYCEL_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "train_base", train)
    half = tmp_path / "bases" / f"{SHORT.name}-{cache.base_key(SHORT)}.partial"
    half.mkdir(parents=True)
    (half / "left-by-a-killed-process").touch()
    found: list[Path] = []
    callers = [threading.Thread(target=lambda: found.append(cache.cached_base(SHORT))) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(trained) == 1
    assert found[0] == found[1]
    assert not half.exists()
    assert not (found[0] / "left-by-a-killed-process").exists()
    assert open_base(found[0]).name.startswith("short-")


def test_the_key_follows_from_size_and_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    key = cache.base_key(SHORT)
    assert key == cache.base_key(SHORT) != cache.base_key(SHORT_T5)
    monkeypatch.setattr(cache, "RECIPE_VERSION", -1)
    assert cache.base_key(SHORT) != key


def test_an_unwritable_cache_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("MYCEL_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="set MYCEL_CACHE"):
        find_base("tiny")


def test_sizes_are_what_they_are_called() -> None:
    counts = {}
    for name, size in SIZES.items():
        config = size.config()
        assert config.vocab_size == VOCABULARY
        if size.family == "llama":
            with torch.device("meta"):
                counts[name] = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    assert counts["micro"] < 300_000 < 900_000 < counts["tiny"] < 1_200_000 < 2_000_000 < counts["small"] < 3_500_000
