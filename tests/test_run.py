"""The command line from end to end, in processes of their own: what a run leaves, prints and counts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mycel.catalog import ENTRIES
from mycel.recipe.load import load_recipe
from small_runs import environment, events_of, mycel, without_seconds, write_recipe

pytestmark = pytest.mark.slow
ARMS = {"compare": ["local", "centralised", "personal"], "personal_steps": 3, "title": "Käse & <b>bold</b>"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run by two worker processes, and what it printed."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = write_recipe(folder, ARMS)
    done = mycel("run", recipe, "engine.workers=2", "--out", "run", "--json", folder=folder)
    (folder / "stdout.json").write_text(done.stdout, encoding="utf-8")
    (folder / "stderr.txt").write_text(done.stderr, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def result(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "run" / "result.json").read_text(encoding="utf-8"))
    return found


def test_the_folder_holds_what_it_says(place: Path) -> None:
    found = {path.name for path in (place / "run").iterdir()}
    assert found == {"events.jsonl", "model", "recipe.json", "report.html", "result.json", "work"}
    assert {path.name for path in (place / "run" / "model").iterdir()} == {"adapter", "base"}
    assert not [path for path in (place / "run").rglob("*") if path.name.startswith(".")]


def test_json_on_standard_output_is_one_document_and_the_result(place: Path, result: dict[str, Any]) -> None:
    assert json.loads((place / "stdout.json").read_text(encoding="utf-8")) == result
    assert "Traceback" not in (place / "stderr.txt").read_text(encoding="utf-8")


def test_the_result_has_every_field(place: Path, result: dict[str, Any]) -> None:
    recipe = load_recipe(str(place / "small.toml"))
    assert result["recipe"].pop("sha256") == recipe.sha256()
    assert {**result["recipe"], "engine": None} == {**recipe.model_dump(mode="json"), "engine": None}
    result["recipe"]["sha256"] = recipe.sha256()
    assert result["seed"] == recipe.seed
    assert set(result["final"]["mixture"]) >= {"base", "local_only_mean", "federated", "centralised"}
    assert set(result["final"]["own"]) >= {"local_only_mean", "federated_mean", "personal_mean"}
    numbers = [*result["final"]["mixture"].values(), *result["final"]["own"].values(), result["final"]["loss"]]
    assert all(isinstance(number, float) and 0 < number < 20 for number in numbers)
    assert set(result["final"]["per_party"]) == {"party-0", "party-1", "party-2"}
    assert len(result["state_sha256"]) == 64
    assert result["seconds"] > 0
    assert result["final"]["loss"] == result["final"]["mixture"]["federated"]
    assert result["final"]["perplexity"] == pytest.approx(math.exp(result["final"]["loss"]))
    own = [scores["federated"] for scores in result["final"]["per_party"].values()]
    assert result["final"]["own"]["federated_mean"] == pytest.approx(sum(own) / len(own))


def test_the_rounds_are_all_there_and_the_last_one_is_the_final(result: dict[str, Any]) -> None:
    rounds = result["rounds"]
    assert [entry["round"] for entry in rounds] == [1, 2, 3]
    assert all(set(entry) >= {"loss", "bytes_up", "bytes_down", "virtual_seconds"} for entry in rounds)
    moments = [entry["virtual_seconds"] for entry in rounds]
    assert 0 < moments[0] < moments[1] < moments[2] < result["virtual_seconds"]
    assert rounds[-1]["loss"] == pytest.approx(result["final"]["loss"])


def test_the_meter_and_the_log_agree_to_the_byte(place: Path, result: dict[str, Any]) -> None:
    events = [event for event in events_of(place / "run") if event["arm"] == "system"]
    names = next(event for event in events if event["event"] == "start")["nodes"]
    for way, kind in (("down", "ask"), ("up", "answer")):
        sizes = [(names[event["node"]], event["bytes"]) for event in events if event["event"] == kind]
        assert result["bytes"][way] == sum(size for _, size in sizes) > 0
        for name in names:
            assert result["bytes"]["per_party"][name][way] == sum(size for own, size in sizes if own == name)
    purposes = result["bytes"]["by_purpose"].values()
    assert result["bytes"]["up"] == sum(traffic["up"] for traffic in purposes)
    delivered = result["bytes"]["by_purpose"]["deliver"]
    assert result["bytes"]["down"] == sum(entry["bytes_down"] for entry in result["rounds"]) + delivered["down"]
    assert result["bytes"]["up"] == sum(entry["bytes_up"] for entry in result["rounds"]) + delivered["up"]


def test_the_log_is_numbered_and_its_rounds_are_those_of_the_result(place: Path, result: dict[str, Any]) -> None:
    events = events_of(place / "run")
    assert [event["n"] for event in events] == list(range(len(events)))
    logged = [event for event in events if event["event"] == "round" and event["arm"] == "system"]
    for event, entry in zip(logged, result["rounds"], strict=True):
        assert {key: event[key] for key in ("round", "bytes_up", "bytes_down", "virtual_seconds", "answers")} == {
            key: entry[key] for key in ("round", "bytes_up", "bytes_down", "virtual_seconds", "answers")
        }
    assert events[-1]["event"] == "finish"
    assert events[-1]["state_sha256"] == result["state_sha256"]


def test_the_recipe_again_in_one_process_gives_the_same_to_the_bit(place: Path, result: dict[str, Any]) -> None:
    done = mycel("run", "small.toml", "--out", "again", folder=place)
    again = json.loads((place / "again" / "result.json").read_text(encoding="utf-8"))
    assert again["recipe"].pop("engine") != result["recipe"]["engine"]
    expected = {**result, "recipe": {key: value for key, value in result["recipe"].items() if key != "engine"}}
    assert without_seconds(again) == without_seconds(expected)
    assert "Käse & <b>bold</b>" in done.stderr
    assert "again/report.html" in done.stdout.replace("\n", "")


LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained("run/model/base")
tokenizer = AutoTokenizer.from_pretrained("run/model/base")
tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("run/model/base"), "run/model/adapter")
ids = tokenizer("the party keeps its text", return_tensors="pt")
with torch.no_grad():
    one, other = base(**ids).logits, tuned(**ids).logits
assert one.shape == other.shape and bool(torch.isfinite(other).all())
assert not torch.equal(one, other), "the adapter says nothing"
tuned.generate(**ids, max_new_tokens=3)
assert not [name for name in sys.modules if name.split(".")[0] == "mycel"]
"""


def test_the_model_loads_in_a_fresh_process_without_mycel(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOAD], cwd=place, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_plan_foretells_what_the_run_then_measures(place: Path, result: dict[str, Any]) -> None:
    plan = json.loads(mycel("plan", "small.toml", "--json", folder=place).stdout)
    assert plan["recipe_sha256"] == result["recipe"]["sha256"]
    assert [party["name"] for party in plan["parties"]] == [party["name"] for party in result["parties"]]
    assert plan["bytes_down"] == pytest.approx(result["bytes"]["down"], rel=0.02)
    assert plan["bytes_up"] == pytest.approx(result["bytes"]["up"], rel=0.02)
    assert plan["virtual_seconds"] == pytest.approx(result["rounds"][-1]["virtual_seconds"], rel=0.2)


def test_report_and_compare_read_the_folders(place: Path, result: dict[str, Any]) -> None:
    (place / "run" / "report.html").unlink()
    done = mycel("report", "run", folder=place)
    assert Path(done.stdout.strip()) == Path("run/report.html")
    page = (place / "run" / "report.html").read_text(encoding="utf-8")
    assert "<b>bold</b>" not in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    rows = json.loads(mycel("compare", "run", "run", "--json", folder=place).stdout)
    assert len(rows) == 2
    names = {row.pop("run") for row in rows}
    assert len(names) == 2  # told apart
    assert rows[0] == rows[1]
    assert str(result["seed"]) in json.dumps(rows[0])
    done = mycel("compare", "run", "run", "--out", "page.html", folder=place)
    assert (place / "page.html").is_file()
    assert "page.html" in done.stdout


def test_systems_and_help_load_nothing_heavy(tmp_path: Path) -> None:
    program = """
import sys
from mycel.cli import main
sys.argv = ["mycel", *{words!r}]
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
heavy = {{"torch", "transformers", "datasets", "peft", "matplotlib", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    for words in (["--help"], ["systems"], ["systems", "--json"], ["run", "--help"]):
        done = subprocess.run(
            [sys.executable, "-c", program.format(words=words)],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if words == ["systems", "--json"]:
            listed = json.loads(done.stdout)
            assert [row["name"] for row in listed] == [entry.name for entry in ENTRIES]
            assert all({"name", "number", "paper", "stage", "way", "claim"} <= set(row) for row in listed)
    assert not list(tmp_path.iterdir())


def test_doctor_finds_what_is_here(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mycel", "doctor", "--json"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert {"python", "torch", "transformers", "cores", "memory", "disk", "cache", "model hub"} <= set(findings)
    assert findings["torch"]["well"]
    unwell = [finding for finding in findings.values() if not finding["well"]]
    assert all(finding["mend"] for finding in unwell)
    needed = [finding for finding in unwell if finding["name"] != "model hub"]
    assert done.returncode == (1 if needed else 0)


def test_a_claim_is_measured_and_printed_as_one_document(tmp_path: Path) -> None:
    (row,) = json.loads(mycel("claims", "local", "--json", folder=tmp_path).stdout)
    assert set(row) == {"name", "number", "claim", "measured", "holds", "figures", "seconds"}
    assert row["name"] == "local"
    assert row["holds"] is True
    assert row["measured"]
