"""Bad input is refused with a sentence that names what is wrong, what was found and what would do; nothing is left."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mycel.catalog import ENTRIES
from mycel.cli import main
from mycel.errors import RecipeError
from mycel.fleet import load_fleet
from mycel.run.execute import run_recipe
from small_runs import environment, small_recipe, write_recipe

Sentence = Callable[..., str]


@pytest.fixture
def sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sentence:
    """Run the command line in this process and return the one sentence that it ends with."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["mycel", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        found = captured.err.partition("mycel: ")[2]
        assert found, captured.err
        return re.sub(r"\s+", " ", found).strip()

    return run


# One override each, and what the sentence must say: the field, what was found, what would do.
OVERRIDES: list[tuple[str, list[str]]] = [
    ("rounds.cout=3", ["'rounds.cout'", "did you mean 'rounds.count'?"]),
    ("sytem=fedavg", ["'sytem'", "did you mean 'system'?"]),
    ("wire.zzz=1", ["'wire.zzz'", "known here are codec"]),
    ("guard.zzzz.strength=1", ["'guard.zzzz'", "known here are"]),
    ("rounds.count=many", ["rounds.count is 'many'", "valid integer"]),
    ("rounds.count=2.5", ["rounds.count is 2.5", "integer"]),
    ("rounds.count=true", ["rounds.count is True", "integer"]),
    ("rounds.count=0", ["rounds.count is 0", "greater than or equal to 1"]),
    ("rounds.local_steps=-4", ["rounds.local_steps is -4", "greater than or equal to 1"]),
    ("rounds.cohort=2.0", ["rounds.cohort is 2.0", "less than or equal to 1"]),
    ("rounds.quorum=0", ["rounds.quorum is 0", "greater than 0"]),
    ("rounds=5", ["rounds is 5", "it is a section"]),
    ("trainable.rank=0", ["trainable.rank is 0", "greater than or equal to 1"]),
    ("trainable.rank=[4,0,4]", ["trainable.rank is", "integer"]),
    ("trainable.kind=lroa", ["trainable.kind is 'lroa'", "'lora'", "'full'"]),
    ("training.learning_rate=-1e-3", ["training.learning_rate is -0.001", "greater than 0"]),
    ("training.learning_rate=nan", ["training.learning_rate is nan", "finite number"]),
    ("training.momentum=1.0", ["training.momentum is 1.0", "less than 1"]),
    ("data.max_length=2", ["data.max_length is 2", "greater than or equal to 8"]),
    ("seed=-1", ["seed is -1", "greater than or equal to 0"]),
    ("seed=99999999999999999999", ["seed is 99999999999999999999", "less than"]),
    ("title=5", ["title is 5", "valid string"]),
    ("wire.error_feedback=1", ["wire.error_feedback is 1", "valid boolean"]),
    ('compare=["alone"]', ["compare.0 is 'alone'", "'local'"]),
    ("engine.kind=slurm", ["engine.kind is 'slurm'", "'inprocess'"]),
    ("seed.of=1", ["'seed.of=1'", "'seed'", "a value and not a section"]),
    ("rounds.count", ["'rounds.count'", "key=value", "rounds.count=3"]),
    ("=3", ["'=3'", "key=value"]),
    ("system=fedavgg", ["system is 'fedavgg'", "did you mean 'fedavg'?"]),
    ("system=zzz", ["system is 'zzz'", "`mycel systems` lists them"]),
    ("rounds.pace=async", ["rounds.pace is 'async'", "'synchronous'"]),
    ("rounds.pace=buffered(0)", ["rounds.pace is 'buffered(0)'", "K of 1 or more"]),
    ("wire.codec=int7", ["wire.codec 'int7'", "did you mean 'int8'?"]),
    ("wire.codec=topk(2)", ["topk takes a fraction above 0 and at most 1"]),
    ("wire.brief_codec=zstd+int8", ["'zstd'", "stands once, at the end"]),
    ("fleet.devices=six-laptop", ["fleet.devices is 'six-laptop'", "did you mean 'six-laptops'?"]),
    ("fleet.devices=nowhere.toml", ["fleet.devices names the file 'nowhere.toml'", "does not exist"]),
    ("data.parties=by-domian", ["data.parties", "by-domian", "by-domain"]),
    ("data.parties=dirichlet(-1)", ["data.parties", "dirichlet(-1)"]),
    ("knobs.server_rat=1", ["knobs of the system 'fedavg'", "'server_rat'", "did you mean 'server_rate'?"]),
    ("knobs.server_rate=-1.0", ["server_rate is -1.0", "greater than 0"]),
    ("trainable.rank=[4,4]", ["trainable.rank lists 2 ranks for 3 parties", "one for each"]),
]


@pytest.mark.parametrize(("override", "parts"), OVERRIDES)
def test_an_override_that_cannot_be_is_refused(
    sentence: Sentence, tmp_path: Path, override: str, parts: list[str]
) -> None:
    found = sentence("run", write_recipe(tmp_path), override, "--out", "run")
    for part in parts:
        assert part in found, found
    assert not (tmp_path / "run").exists()


# Overrides that only the model or the data can tell to be wrong: the folder is taken back.
LATER: list[tuple[str, list[str]]] = [
    ("model.base=tinny", ["model.base is 'tinny'", "tiny"]),
    ("model.base=/nowhere/at/all", ["/nowhere/at/all"]),
    ("trainable.rank=4096", ["trainable.rank is 4096", "choose 1 to"]),
    ("trainable.rank=[2,2,4096]", ["trainable.rank is 4096", "choose 1 to"]),
    ('trainable.targets=["no_such"]', ["no_such"]),
    ("training.objective=seq2seq", ["training.objective is 'seq2seq'", "decoder alone", "'causal'"]),
    ("data.held_out=9999", ["party 'party-0' has", "needs 10000", "data.held_out"]),
    ('data.parties=["gone.jsonl"]', ["gone.jsonl", "data.source"]),
]


@pytest.mark.parametrize(("override", "parts"), LATER)
def test_what_only_data_or_model_can_tell_leaves_no_folder(
    sentence: Sentence, tmp_path: Path, override: str, parts: list[str]
) -> None:
    recipe = write_recipe(tmp_path)
    found = sentence("run", recipe, override, "--out", "run")
    for part in parts:
        assert part in found, found
    assert not (tmp_path / "run").exists()


def test_blocks_beyond_the_model_are_refused(sentence: Sentence, tmp_path: Path) -> None:
    found = sentence("run", write_recipe(tmp_path), "trainable.kind=blocks", "trainable.blocks=[99]", "--out", "run")
    assert "99" in found
    assert "trainable.blocks" in found
    assert not (tmp_path / "run").exists()


PARTIES: dict[str, tuple[bytes, list[str]]] = {
    "not JSON": (b'{"prompt": "a", "response": "b"}\n{oops\n', ["line 2", "not JSON"]),
    "not UTF-8": (b'{"prompt": "a", "response": "\xff\xfe"}\n', ["line 1", "0xff is not UTF-8", "save the file as"]),
    "empty": (b"", ["is empty", "no example"]),
    "blank": (b"\n\n   \n", ["is empty", "no example"]),
    "other columns": (b'{"x": 1, "y": 2}\n', ["line 1", "x"]),
}


@pytest.mark.parametrize("fault", PARTIES)
def test_a_party_whose_file_is_unsound_is_named(sentence: Sentence, tmp_path: Path, fault: str) -> None:
    content, parts = PARTIES[fault]
    recipe = write_recipe(tmp_path)
    (tmp_path / "data" / "party-1.jsonl").write_bytes(content)
    found = sentence("run", recipe, "--out", "run")
    for part in ["party-1.jsonl", *parts]:
        assert part in found, found
    assert not (tmp_path / "run").exists()


def test_a_mended_recipe_may_run_where_a_refused_one_was(sentence: Sentence, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert "4096" in sentence("run", recipe, "trainable.rank=4096", "--out", "run")
    result = run_recipe(small_recipe(tmp_path / "data", {"rounds.count": 1}), tmp_path / "run")
    assert result["rounds"][0]["round"] == 1


RECIPES: dict[str, tuple[str, bytes | None, list[str]]] = {
    "a name": ("quikstart", None, ["no recipe 'quikstart'", "did you mean 'quickstart'?"]),
    "another name": ("zzz", None, ["no recipe 'zzz'", "built in are", ".toml or .py file"]),
    "no file": ("gone.toml", None, ["recipe file 'gone.toml' cannot be read", "No such file"]),
    "a folder": (".toml", None, ["'.toml' cannot be read"]),
    "not TOML": ("bad.toml", b"title = \n", ["'bad.toml' is not TOML", "line 1"]),
    "not UTF-8": ("latin.toml", b'title = "\xe9"\n', ["'latin.toml' is not UTF-8", "save it as UTF-8"]),
    "a key twice": ("twice.toml", b"seed = 1\nseed = 2\n", ["'twice.toml' is not TOML"]),
    "no program": ("gone.py:make", None, ["'gone.py' does not exist"]),
    "no function": ("none.py:make", b"x = 1\n", ["none.py has no function 'make'", "returns a Recipe"]),
    "another type": ("dict.py", b"def recipe():\n    return {}\n", ["dict.py:recipe gives dict", "returns a Recipe"]),
    "a fault": ("fault.py:make", b"def make():\n    return 1 / 0\n", ["fault.py:make failed", "ZeroDivisionError"]),
    "bad syntax": ("syntax.py:make", b"def make(:\n", ["syntax.py:make failed", "SyntaxError"]),
    "bad values": (
        "values.py:make",
        b"from mycel.recipe import Recipe\ndef make():\n    return Recipe().replace({'rounds.count': 0})\n",
        ["values.py:make failed", "rounds.count"],
    ),
}


@pytest.mark.parametrize("fault", RECIPES)
def test_a_recipe_that_is_none_is_refused(sentence: Sentence, tmp_path: Path, fault: str) -> None:
    name, content, parts = RECIPES[fault]
    if content is not None:
        (tmp_path / name.partition(":")[0]).write_bytes(content)
    if name == ".toml":
        (tmp_path / name).mkdir()
    for verb in ("run", "plan"):
        found = sentence(verb, name)
        for part in parts:
            assert part in found, found
    assert not (tmp_path / "runs").exists()


FLEETS: dict[str, tuple[bytes, list[str]]] = {
    "not TOML": (b"[[device]\n", ["is not TOML"]),
    "not UTF-8": (b'[[device]]\nname = "\xff"\n', ["is not TOML"]),
    "no table": (b"[[devices]]\ngflops = 5\n", ["no [[device]] table", "one per machine"]),
    "numbers": (b"device = [1, 2]\n", ["no [[device]] table"]),
    "unknown key": (b"[[device]]\ngflop = 5\n", ["device 1", "'gflop'", "did you mean 'gflops'?"]),
    "unknown link key": (b"[[device]]\nlink = { up = 5 }\n", ["link of device 1", "'up'", "up_mbps"]),
    "a link of text": (b'[[device]]\nlink = "fast"\n', ["link of device 1", "'fast'", "up_mbps = 20"]),
    "text": (b'[[device]]\ngflops = "many"\n', ["gflops of device 1", "'many'", "above zero"]),
    "zero": (b"[[device]]\n[[device]]\ngflops = 0\n", ["gflops of device 2", "0;", "above zero"]),
    "nan": (b"[[device]]\nlink = { up_mbps = nan }\n", ["up_mbps of link of device 1", "nan", "finite"]),
    "reliability": (b"[[device]]\nreliability = 1.5\n", ["reliability of device 1", "1.5", "at most 1"]),
}


@pytest.mark.parametrize("fault", FLEETS)
def test_a_fleet_file_that_is_unsound_is_refused(tmp_path: Path, fault: str) -> None:
    content, parts = FLEETS[fault]
    path = tmp_path / "fleet.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as refused:
        load_fleet(str(path))
    for part in ["fleet.toml", *parts]:
        assert part in str(refused.value)


def test_a_pace_that_is_unsound_for_a_system_is_refused(sentence: Sentence, tmp_path: Path) -> None:
    assert any(entry.name == "fedbuff" for entry in ENTRIES)
    found = sentence("run", write_recipe(tmp_path), "system=fedbuff", "rounds.pace=sequential", "--out", "run")
    assert "rounds.pace is 'sequential', which is unsound for the system 'fedbuff'" in found
    assert "buffered or synchronous" in found
    assert not (tmp_path / "run").exists()


def test_refusing_a_recipe_loads_no_torch(tmp_path: Path) -> None:
    program = """
import sys
from mycel.cli import main
for words in (["quikstart"], ["quickstart", "rounds.cout=1"], ["quickstart", "rounds.count=0"], ["gone.toml"]):
    sys.argv = ["mycel", "run", *words]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 1
heavy = {"torch", "transformers", "datasets", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("mycel: ") == 4
    assert not list(tmp_path.iterdir())


def test_folders_that_do_not_fit_are_refused(sentence: Sentence, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, {"rounds.count": 1})
    assert "holds no run to resume" in sentence("run", recipe, "--out", "run", "--resume")
    assert not (tmp_path / "run").exists()
    run_recipe(small_recipe(tmp_path / "data", {"rounds.count": 1}), tmp_path / "run")
    before = (tmp_path / "run" / "result.json").read_bytes()
    assert "already holds a run: add --resume" in sentence("run", recipe, "--out", "run")
    other = sentence("run", recipe, "seed=2", "--out", "run", "--resume")
    assert "holds a run of another recipe" in other
    assert "same recipe and overrides" in other
    (tmp_path / "file").touch()
    assert "cannot be written: not a directory" in sentence("run", recipe, "--out", "file")
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    checkpoint = tmp_path / "run" / "work" / "system.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    assert "system.safetensors' is damaged" in sentence("run", recipe, "--out", "run", "--resume")
    (tmp_path / "run" / "recipe.json").write_text("{")
    assert "no readable recipe.json" in sentence("run", recipe, "--out", "run", "--resume")


RESULTS: dict[str, tuple[str | None, list[str]]] = {
    "missing": (None, ["result.json does not exist", "resume it"]),
    "not JSON": ("{", ["result.json is not JSON", "damaged"]),
    "a list": ("[]", ["damaged at the top level"]),
    "no system": ('{"seed": 1}', ["damaged at system", "required"]),
    "text for bytes": (json.dumps({"system": "x", "seed": 1, "parties": [], "final": {}, "bytes": 3}), ["at bytes"]),
}


@pytest.mark.parametrize("fault", RESULTS)
def test_a_result_that_is_unsound_is_named(sentence: Sentence, tmp_path: Path, fault: str) -> None:
    content, parts = RESULTS[fault]
    folder = tmp_path / "run"
    folder.mkdir()
    if content is not None:
        (folder / "result.json").write_text(content)
    for words in (["report", folder], ["compare", folder, folder]):
        found = sentence(*words)
        for part in parts:
            assert part in found, found
    assert not (folder / "report.html").exists()
    assert not (tmp_path / "comparison.html").exists()


def test_an_unknown_claim_is_refused_before_anything_is_loaded(sentence: Sentence) -> None:
    assert "did you mean 'fedavg'?" in sentence("claims", "fedavgg")
