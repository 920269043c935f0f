"""What a party's own file allows, and what its process refuses without being told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mycel.data.examples import Example
from mycel.errors import MycelError, RecipeError
from mycel.federation.consent import Consent, read_consent
from mycel.federation.demo import write_examples
from mycel.federation.member import Membership, Task, base_sha256
from mycel.models.base import find_base
from mycel.recipe.schema import Recipe
from mycel.wire.parcel import Parcel

PLAIN: dict[str, Any] = {"model.base": "micro", "data.examples": 8, "data.held_out": 2, "trainable.rank": 2}


def recipe(**changes: Any) -> Recipe:
    return Recipe().replace({**PLAIN, **{key.replace("__", "."): value for key, value in changes.items()}})


@pytest.mark.parametrize(
    ("consent", "changes", "said"),
    [
        ({"systems": ["fedprox"]}, {}, "runs the system 'fedavg'"),
        ({"stages": ["align"]}, {}, "belongs to the stage 'finetune'"),
        ({"recipes": ["0000"]}, {}, "recipes does not list it"),
        ({"rows": 7}, {}, "uses up to 8 rows"),
        ({"trainables": ["prompt"]}, {}, "updates of the trainable 'lora'"),
        ({"clip_norm": 1.0}, {}, "clips updates to the norm none"),
        ({"clip_norm": 1.0}, {"guard__clip_norm": 2.0}, "clips updates to the norm 2"),
        ({"masked": True}, {}, "adds answers up in the open"),
        ({"private": ["local"]}, {}, "has no differential privacy"),
        ({"private": ["local"]}, {"guard__private": "user"}, "the differential privacy 'user'"),
        ({"epsilon": 4.0}, {"guard__epsilon": 8.0}, "states the epsilon 8"),
        ({"epsilon": 4.0}, {"guard__epsilon": 4.0, "guard__replayable": True}, "noise from the recipe's seed"),
        ({}, {"threat__attack": "sign_flip"}, "a drill in which parties lie"),
    ],
)
def test_a_recipe_beyond_what_is_allowed_is_refused(
    consent: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match="this party's") as raised:
        Consent.model_validate(consent).check(recipe(**changes))
    assert said in str(raised.value)


def test_what_lies_within_is_allowed() -> None:
    Consent().check(recipe())
    allowed = {"systems": ["fedavg"], "stages": ["finetune"], "rows": 8, "trainables": ["lora"], "clip_norm": 1.0}
    Consent.model_validate({**allowed, "recipes": [recipe(guard__clip_norm=0.5).sha256()[:8]]}).check(
        recipe(guard__clip_norm=0.5)
    )


def test_a_faulty_file_is_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "consent.toml"
    path.write_text("row = 3\n")
    with pytest.raises(RecipeError, match="did you mean 'rows'"):
        read_consent(path)
    path.write_text("rows = ")
    with pytest.raises(RecipeError, match="is not TOML"):
        read_consent(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_consent(tmp_path / "nowhere.toml")


def _party(folder: Path, consent: Consent | None = None) -> Membership:
    examples = [Example(f"question {number}", f"answer {number}") for number in range(12)]
    write_examples(folder / "train.jsonl", examples[:10])
    write_examples(folder / "held_out.jsonl", examples[10:])
    return Membership("clinic", folder, folder, consent or Consent())


def _task(changed: Recipe | None = None, base: str = "") -> str:
    return Task(changed or recipe(), "run", base or base_sha256(find_base("micro"))).to_json()


def test_a_party_tells_counts_and_nothing_else(tmp_path: Path) -> None:
    about = _party(tmp_path).describe("arm", _task(), 2)
    assert about.keys() == {"name", "rank", "samples", "mean_tokens", "held_out"}
    assert (about["name"], about["samples"], about["rank"]) == ("clinic", 8, 2)


def test_a_party_with_another_base_takes_no_part(tmp_path: Path) -> None:
    with pytest.raises(MycelError, match="is another here"):
        _party(tmp_path).describe("arm", _task(base="0" * 64), 0)


def test_work_that_needs_too_much_memory_is_refused(tmp_path: Path) -> None:
    party = _party(tmp_path, Consent(memory_gib=1e-3))
    with pytest.raises(RecipeError, match=r"memory_gib allows 0\.001"):
        party.describe("arm", _task(), 0)


def test_a_task_that_is_no_task_is_refused(tmp_path: Path) -> None:
    party = _party(tmp_path)
    for text in ("", "[]", "{}", '{"version": 2, "run": "", "base": "", "recipe": {}}', '{"version":1,"run":1'):
        with pytest.raises(RecipeError):
            party.describe("arm", text, 0)


def test_a_brief_for_another_partys_examples_is_refused(tmp_path: Path) -> None:
    party = _party(tmp_path)
    party.describe("arm", _task(), 1)
    brief = Parcel("deliver", {"version": 0, "holders": [0]}).to_bytes()
    with pytest.raises(MycelError, match="asks for the examples of party 0, and this is party 1"):
        party.handle("arm", 1, brief, b"")
