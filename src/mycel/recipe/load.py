"""Recipes from TOML files, Python functions and built-in names, with overrides checked before work starts."""

from __future__ import annotations

import importlib.util
import tomllib
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mycel.errors import MycelError, RecipeError
from mycel.recipe.schema import Recipe


def built_in() -> list[str]:
    """Names of the recipes that come with Mycel."""
    folder = resources.files("mycel.recipe") / "builtin"
    return sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe called ``name`` with ``key=value`` overrides applied.

    Parameters
    ----------
    name : str
        A built-in name, a TOML file, or ``file.py:function`` whose function returns a ``Recipe``.
    overrides : sequence of str
        Dotted keys, e.g. ``"rounds.count=3"``; values are read as TOML, else as text.
    """
    content = _content(name)
    for override in overrides:
        _apply(content, override)
    return check(content, where=f"recipe {name!r}")


def check(content: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe's content; the first fault becomes a sentence."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise explain(error, Recipe, where) from error


def explain(error: ValidationError, model: type[BaseModel], where: str) -> RecipeError:
    """Turn a validation error into a sentence that names the key, what was found and what would do."""
    fault = error.errors()[0]
    keys = [str(key) for key in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        known = _known(model, keys[:-1])
        near = get_close_matches(keys[-1], known, 1, 0.5)
        hint = (
            f"did you mean {'.'.join([*keys[:-1], near[0]])!r}?"
            if near
            else f"known here are {', '.join(known) or 'none'}"
        )
        return RecipeError(f"{where} has the unknown key {'.'.join(keys)!r}: {hint}")
    found = fault.get("input")
    shown = keys[:2] if len(keys) > 2 else keys
    wanted = "it is a section, with keys of its own" if fault["type"] == "model_type" else fault["msg"]
    return RecipeError(f"{where}: {'.'.join(shown)} is {repr(found)[:60]}; {wanted[0].lower()}{wanted[1:]}")


def _known(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for key in path:
        field = model.model_fields.get(key)
        annotation: Any = field.annotation if field else None
        options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
        inner = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _content(name: str) -> dict[str, Any]:
    path, _, function = name.partition(":")
    if path.endswith(".py"):
        return _from_function(Path(path), function or "recipe")
    source = Path(name) if name.endswith(".toml") else None
    if source is None:
        if name not in built_in():
            near = get_close_matches(name, built_in(), 1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"built in are {', '.join(built_in())}; or name a .toml or .py file"
            )
            raise RecipeError(f"there is no recipe {name!r}: {hint}")
        text = (resources.files("mycel.recipe") / "builtin" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = source.read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"the recipe file {name!r} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise RecipeError(f"the recipe file {name!r} is not UTF-8 text: save it as UTF-8") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"the recipe {name!r} is not TOML: {error}") from error


def _from_function(path: Path, function: str) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"the recipe file {str(path)!r} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"the recipe file {str(path)!r} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        build = getattr(module, function, None)
        if not callable(build):
            raise RecipeError(f"{path} has no function {function!r}: name one that returns a Recipe, {path}:FUNCTION")
        recipe = build()
    except MycelError:
        raise
    except Exception as error:  # the file is the user's own program
        trace = "".join(traceback.format_exception(error)[-3:]).rstrip()
        raise RecipeError(f"the recipe {path}:{function} failed; mend it and try again\n{trace}") from error
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{path}:{function} gives {type(recipe).__name__}; a function that returns a Recipe is needed"
        )
    return recipe.model_dump()


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"the override {override!r} is not of the form key=value, e.g. rounds.count=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, leaf = key.split(".")
    place = content
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise RecipeError(f"the override {override!r} goes into {section!r}, which is a value and not a section")
    place[leaf] = value
