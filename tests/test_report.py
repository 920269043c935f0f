"""The report shows what the run folder holds, whatever it holds, and refuses what is damaged."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mycel.errors import RunError
from mycel.recipe.schema import Recipe
from mycel.report import compare, compare_rows, summary_table, write_comparison, write_report
from mycel.report.source import Result, read_events
from mycel.report.timeline import read_timeline
from mycel.report.wording import verdict
from report_runs import HOSTILE, PARTIES, Page, read, save, synthetic, terminal


def test_the_page_shows_the_numbers_of_the_result(tmp_path: Path) -> None:
    result = synthetic()
    page = read(write_report(save(tmp_path, result)))
    order = ("base", "local_only", "federated", "personal", "centralised")
    for name, scores in result["final"]["per_party"].items():
        assert page.tables["losses"][name] == [scores[arm] for arm in order]
    own, mixture = result["final"]["own"], result["final"]["mixture"]
    assert page.tables["losses"]["mean of parties"] == [own[f"{arm}_mean"] for arm in order]
    assert page.tables["losses"]["mixture"] == [
        mixture[arm] for arm in ("base", "local_only_mean", "federated", "centralised")
    ]
    for name, sent in result["bytes"]["per_party"].items():
        assert page.tables["parties"][name] == [sent["up"], sent["down"]]
    for entry in result["rounds"]:
        assert page.tables["rounds"][str(entry["round"])] == [entry["loss"], entry["bytes_up"], entry["bytes_down"]]
    losses = [(value, shown) for value, shown in page.shown if re.fullmatch(r"\d\.\d{3}", shown)]
    assert len(losses) > 40
    assert all(abs(value - float(shown)) <= 0.00051 for value, shown in losses)
    text = "".join(page.texts)
    assert result["state_sha256"] in text
    assert result["recipe"]["sha256"] in text


def test_the_page_has_every_figure_and_the_recipe_reads_back(tmp_path: Path) -> None:
    result = synthetic()
    text = write_report(save(tmp_path, result)).read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("figure") == page.tags.count("figcaption") == page.tags.count("svg") == 6
    block = re.search(r'<pre id="recipe">(.*?)</pre>', text, re.DOTALL)
    assert block
    recipe = Recipe.model_validate(tomllib.loads("".join(Page(block[1]).texts)))
    assert recipe.sha256() == result["recipe"]["sha256"]


def test_the_same_run_makes_the_same_bytes(tmp_path: Path) -> None:
    first = write_report(save(tmp_path / "a", synthetic())).read_bytes()
    again = write_report(save(tmp_path / "b", synthetic())).read_bytes()
    assert first == again
    assert write_report(save(tmp_path / "c", synthetic(seed=8))).read_bytes() != first


def test_identifiers_are_unique_and_every_reference_is_within_the_page(tmp_path: Path) -> None:
    page = read(write_report(save(tmp_path, synthetic())))
    identifiers = [value for key, value in page.attributes if key == "id"]
    assert len(identifiers) == len(set(identifiers))
    references = [value or "" for key, value in page.attributes if key in ("href", "xlink:href", "src", "action")]
    assert references
    assert all(value.startswith("#") and value[1:] in identifiers for value in references)
    clips = [re.fullmatch(r"url\(#(.*)\)", value or "") for key, value in page.attributes if key == "clip-path"]
    assert clips
    assert all(clip and clip[1] in identifiers for clip in clips)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    plain, hostile = synthetic(), synthetic((HOSTILE, *PARTIES[1:]))
    for field in ("title", "system"):
        hostile[field] = HOSTILE
    hostile["recipe"]["model"]["base"] = "</pre><img src=x onerror=alert(1)>"
    hostile["bytes"]["by_purpose"] = {HOSTILE: {"up": 1, "down": 2}}
    calm = read(write_report(save(tmp_path / "plain", plain)))
    page = read(write_report(save(tmp_path / "hostile", hostile)))
    assert [tag for tag in page.tags if tag in ("script", "img", "pre")] == [
        tag for tag in calm.tags if tag in ("script", "img", "pre")
    ]
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert "\x1b" not in "".join(page.texts)
    assert any("<script>alert(1)" in text for text in page.texts)
    shown = terminal(summary_table(hostile))
    assert "<script>" in shown
    assert "\x1b" not in shown
    row = terminal(compare([tmp_path / "hostile"]))
    assert "<script>" in row
    write_comparison([tmp_path / "plain", tmp_path / "hostile"], tmp_path)
    assert "script" not in read(tmp_path / "comparison.html").tags


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is damaged at the top level"),
        ('{"system": "x"}', "is damaged at seed"),
    ],
)
def test_a_damaged_result_is_refused_with_a_sentence(tmp_path: Path, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(RunError, match=sentence):
        write_report(tmp_path)
    with pytest.raises(RunError, match=sentence):
        compare_rows([tmp_path])
    assert not (tmp_path / "report.html").exists()


def test_a_broken_event_is_refused_and_a_torn_last_line_is_not(tmp_path: Path) -> None:
    result = synthetic()
    save(tmp_path, result)
    whole = read_timeline(read_events(tmp_path))
    assert len(whole.spans) == 47
    assert [drop.node for drop in whole.drops] == [2]
    log = tmp_path / "events.jsonl"
    sound = log.read_text()
    log.write_text(sound + '{"event": "ans')
    assert read_timeline(read_events(tmp_path)) == whole
    log.write_text('{"event": "ans\n' + sound)
    with pytest.raises(RunError, match="line 1 is not JSON"):
        write_report(tmp_path)
    log.write_text('{"n": 0, "event": "ask", "arm": "system", "node": 0, "round": 0}\n')
    with pytest.raises(RunError, match=r"event 0 \(ask\) is damaged at at"):
        write_report(tmp_path)


def test_every_ask_is_paired_with_its_own_answer() -> None:
    def event(kind: str, round: int, at: float, **more: Any) -> dict[str, Any]:
        return {"event": kind, "arm": "system", "node": 0, "round": round, "at": at, **more}

    first = [
        event("ask", 0, 0.0),
        event("ask", 1, 10.0),
        event("drop", 1, 12.0, reason="late"),
        event("answer", 1, 19.0, started=11.0, computed=18.0),
    ]
    again = [event("ask", 1, 10.0), event("answer", 1, 19.0, started=11.0, computed=18.0)]
    other = [{**event("ask", 2, 20.0), "arm": "local"}, {"event": "finish", "arm": "system"}]
    found = read_timeline([*first, *again, *other])
    assert found.spans == [(0, 10.0, 11.0, 18.0, 19.0)]
    assert found.drops == [(0, 0.0, 12.0)]


def test_what_is_missing_is_left_out_with_its_reason(tmp_path: Path) -> None:
    result = synthetic()
    result["final"] |= {"mixture": {"federated": 3.0}, "own": {}, "per_party": {}}
    result["bytes"]["per_party"] = {}
    for entry in result["rounds"]:
        entry["loss"] = None
    (folder := save(tmp_path, result) / "events.jsonl").unlink()
    page = read(write_report(folder.parent))
    text = "".join(page.texts)
    assert page.tags.count("figure") == 0
    assert text.count("is left out:") == 6
    assert page.tables["losses"] == {"mixture": [3.0]}


def test_a_run_that_diverged_says_so(tmp_path: Path) -> None:
    result = synthetic()
    result["final"] |= {"loss": float("nan"), "perplexity": float("inf")}
    result["final"]["mixture"]["federated"] = float("nan")
    for entry in result["rounds"][3:]:
        entry["loss"] = float("inf")
    page = read(write_report(save(tmp_path, result)))
    assert "diverged" in verdict(Result.model_validate(result)).sentence
    assert "diverged" in "".join(page.texts)


def test_a_comparison_keeps_order_names_apart_and_shows_what_differs(tmp_path: Path) -> None:
    weak, strong = synthetic(pull=0.5), synthetic(pull=1.3)
    strong["recipe"]["training"]["learning_rate"] = 0.0123
    folders = [save(tmp_path / "one" / "run", weak), save(tmp_path / "two" / "run", strong)]
    rows = compare_rows(folders)
    assert [row["run"] for row in rows] == ["one/run", "two/run"]
    assert [row["loss"] for row in rows] == [weak["final"]["loss"], strong["final"]["loss"]]
    out = write_comparison(folders, tmp_path / "compared.html")
    page = read(out)
    assert out == tmp_path / "compared.html"
    assert page.tags.count("svg") == 3
    assert list(page.tables["differences"]) == []
    text = "".join(page.texts)
    assert "training.learning_rate" in text
    assert "0.0123" in text
    assert "rounds.count" not in text
    assert "two/run reached the lowest loss" in text
    assert len({row["run"] for row in compare_rows([folders[0], folders[0]])}) == 2
    with pytest.raises(RunError, match="at least one"):
        compare_rows([])


def test_a_crowd_of_parties_still_makes_a_page(tmp_path: Path) -> None:
    names = tuple(f"party-{index:03d}" for index in range(120))
    result = synthetic(names, rounds=3)
    page = read(write_report(save(tmp_path, result)))
    assert len(page.tables["losses"]) == 122
    assert "The first 40 of 120 nodes." in "".join(page.texts)
    assert summary_table(result).row_count == 42


def test_matplotlib_is_loaded_only_when_a_figure_is_drawn() -> None:
    code = "import sys, mycel.report.page, mycel.report.compare; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
