"""What a party is willing to do, as its administrator wrote it: a small TOML file that no message can change.

systems    = ["fedavg", "fedprox"]     # or stages = ["finetune"]; empty: any
rows       = 5000                      # training examples that may be used, at most
memory_gib = 8.0
threads    = 2
trainables = ["lora", "prompt"]        # what may be trained here and leave as an update
clip_norm  = 1.0                       # updates must be clipped to this norm, or a smaller one
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mycel.catalog import entry
from mycel.errors import RecipeError
from mycel.recipe.load import explain
from mycel.recipe.schema import Recipe
from mycel.rounds.sealing import clips_at_home


class Consent(BaseModel):
    """A party's own limits; by default everything that stays within a machine's means is allowed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    systems: list[str] = Field(default=[], description="systems that may be run here; empty: any")
    stages: list[str] = Field(default=[], description="stages whose systems may be run here; empty: any")
    recipes: list[str] = Field(default=[], description="beginnings of recipes' hashes that may be run; empty: any")
    rows: Annotated[int, Field(ge=1)] = Field(1_000_000, description="training examples used, at most")
    memory_gib: Annotated[float, Field(gt=0)] = Field(1024.0, description="memory of the work, at most, in GiB")
    threads: Annotated[int, Field(ge=1)] = Field(1, description="threads of the work")
    trainables: list[str] = Field(
        default=["lora", "prompt", "blocks", "full"], description="kinds of trainable whose updates may leave"
    )
    clip_norm: Annotated[float, Field(ge=0)] = Field(
        0.0, description="the least privacy: updates must be clipped to this norm or a smaller one; 0: not asked for"
    )

    masked: bool = Field(False, description="the least privacy: answers must be added up under masks")
    private: list[str] = Field(default=[], description="the least privacy: one of these kinds must be on; empty: none")
    epsilon: Annotated[float, Field(ge=0)] = Field(0.0, description="what a run may cost of it; 0: not asked for")

    def check(self, recipe: Recipe) -> None:
        """Refuse a recipe that goes beyond what is allowed here, before anything is read or computed."""
        stage = entry(recipe.system).stage
        if self.systems and recipe.system not in self.systems:
            raise _beyond(f"runs the system {recipe.system!r}", f"systems allows {', '.join(self.systems)}")
        if self.stages and stage not in self.stages:
            raise _beyond(f"belongs to the stage {stage!r}", f"stages allows {', '.join(self.stages)}")
        if self.recipes and not any(recipe.sha256().startswith(start) for start in self.recipes):
            raise _beyond(f"has the hash {recipe.sha256()[:12]}", "recipes does not list it")
        if recipe.data.examples > self.rows:
            raise _beyond(f"uses up to {recipe.data.examples} rows (data.examples)", f"rows allows {self.rows}")
        if recipe.trainable.kind not in self.trainables:
            kinds = ", ".join(self.trainables)
            raise _beyond(f"sends updates of the trainable {recipe.trainable.kind!r}", f"trainables allows {kinds}")
        if self.clip_norm and not 0 < recipe.guard.clip_norm <= self.clip_norm:
            found = recipe.guard.clip_norm or "none"
            raise _beyond(f"clips updates to the norm {found}", f"clip_norm asks for {self.clip_norm:g} or less")
        self._check_guard(recipe)

    def _check_guard(self, recipe: Recipe) -> None:
        guard = recipe.guard
        if recipe.threat.attack:
            raise _beyond(f"is a drill in which parties lie ({recipe.threat.attack!r})", "data is real: use simulation")
        if self.masked and guard.sums not in {"masked", "sparsely-masked"}:
            how = "in the open" if guard.sums == "plain" else f"by {guard.sums!r}"
            raise _beyond(f"adds answers up {how} (guard.sums)", "masked asks for masks")
        if self.private and guard.private not in self.private:
            found = f"the differential privacy {guard.private!r}" if guard.private else "no differential privacy"
            raise _beyond(f"has {found}", f"private asks for {' or '.join(self.private)}")
        if (self.private or self.epsilon) and guard.replayable:
            raise _beyond("takes its noise from the recipe's seed (guard.replayable)", "noise has to be its own")
        if self.epsilon and not 0 < guard.epsilon <= self.epsilon:
            raise _beyond(f"states the epsilon {guard.epsilon:g}", f"epsilon allows {self.epsilon:g} at most, stated")
        if self.clip_norm and (recipe.guard.within or not clips_at_home(recipe)):
            raise _beyond(
                "leaves the bound on updates to the coordinator", f"clip_norm asks for {self.clip_norm:g} here"
            )
        if recipe.threat.attack:
            raise _beyond(f"has parties lie (threat.attack = {recipe.threat.attack!r})", "drills are for simulations")

    def check_memory(self, needed: int) -> None:
        """Refuse work whose estimated peak is beyond what may be used."""
        if needed > self.memory_gib * 2**30:
            raise _beyond(f"needs about {needed / 2**30:.2f} GiB", f"memory_gib allows {self.memory_gib:g}")


def _beyond(found: str, allowed: str) -> RecipeError:
    return RecipeError(f"the recipe {found}, and this party's {allowed}")


def read_consent(path: Path | None) -> Consent:
    """Read a party's file; without one, the defaults hold."""
    if path is None:
        return Consent()
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"the consent file {str(path)!r} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"the consent file {str(path)!r} is not TOML: {error}") from error
    try:
        return Consent.model_validate(content)
    except ValidationError as error:
        raise explain(error, Consent, f"the consent file {str(path)!r}") from error
