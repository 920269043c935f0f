"""The report of a run: one page, complete in itself, that loads nothing and runs no script."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mycel.errors import RunError
from mycel.report.islands import ways, ways_plots
from mycel.report.plots import arm_bars, byte_bars, loss_plots
from mycel.report.source import Result, read_events, read_result
from mycel.report.style import palette_css
from mycel.report.tables import ARMS, bytes_line, shown_arms, summary_rows
from mycel.report.timeline import gantt, read_timeline
from mycel.report.wording import bytes_text, clean_name, details, loss_text, seconds_text, verdict


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder from its ``result.json`` and ``events.jsonl``.

    The same files make the same bytes.

    Parameters
    ----------
    folder
        A finished run.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    RunError
        The result is missing or damaged, the log is damaged, or the page cannot be written.
    """
    folder = Path(folder)
    result = read_result(folder)
    timeline = read_timeline(read_events(folder))
    rows = summary_rows(result)
    curves = ways_plots(result) or [*loss_plots(result), arm_bars(result)]
    text = render(
        "template.html",
        title=result.title or f"{result.system}, seed {result.seed}",
        result=result,
        verdict=verdict(result),
        details=details(result),
        rows=rows,
        arms=shown_arms(rows),
        headings={arm: heading.capitalize() for arm, heading in ARMS.items()},
        plots=[*curves, byte_bars(result), gantt(result, timeline)],
        ways=ways(result),
        wire=bytes_line(result),
        recipe=recipe_toml(result),
        recipe_sha256=str(result.recipe.get("sha256", "")),
        predicted=predicted_rows(result),
        guard=guard_rows(result),
        cleaning=result.cleaning,
    )
    return write_page(folder / "report.html", text)


def render(template: str, **content: Any) -> str:
    """Fill one of this room's templates; every value is escaped."""
    places = Environment(
        loader=PackageLoader("mycel", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    places.filters.update(loss=loss_text, bytes=bytes_text, seconds=seconds_text, name=_name)
    style = Markup((Path(__file__).parent / "style.css").read_text(encoding="utf-8"))
    return places.get_template(template).render(palette=palette_css(), style=style, **content)


def _name(value: object) -> str:
    return clean_name(str(value))


def write_page(path: Path, text: str) -> Path:
    """Write a page so that a reader sees the old one or the new one, never half of one."""
    partial = path.with_name(f".{path.name}.{hashlib.sha256(text.encode()).hexdigest()[:8]}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error.strerror}); choose a folder you may write to") from error
    return path


def predicted_rows(result: Result) -> list[tuple[str, Any, Any]]:
    """Set what was predicted before the run beside what was measured under the same name, if anything was."""
    measured = flatten(result.model_dump(exclude={"recipe", "predicted"}))
    return [(key, value, measured.get(key, "–")) for key, value in flatten(result.predicted or {}).items()]


def guard_rows(result: Result) -> list[tuple[str, str]]:
    """What the guards promise and spent, and what the audit saw; nothing where there was no guard and no frame kept."""
    receipt = {key: value for key, value in result.guard.items() if value not in ("", "plain", {}, [])}
    shown = ("looked", "frames", "kinds", "findings", "clean") if receipt or "clean" in result.audit else ()
    audit = {key: result.audit[key] for key in shown if key in result.audit}
    return [(key, str(value)) for key, value in flatten(receipt | ({"audit": audit} if audit else {})).items()]


def recipe_toml(result: Result) -> str:
    """Print the recipe of a run as TOML, as ``mycel run`` takes it."""
    return tomli_w.dumps(_without_none({key: value for key, value in result.recipe.items() if key != "sha256"}))


def _without_none(content: Mapping[str, Any]) -> dict[str, Any]:
    # TOML has no null; a key that is absent means the same.
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in content.items()
        if value is not None
    }


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested sections into dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
