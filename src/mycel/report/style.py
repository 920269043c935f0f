"""One look for every figure: the palette, matplotlib's settings, and clean inline SVG.

Figures are drawn in the light palette; in the SVG each colour becomes a CSS variable, so that one drawing
serves light and dark. Hues follow Okabe and Ito (2008), darkened or lightened until text in them can be read.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#fdfdfb", "#14181d"),
    "panel": ("#f4f4ef", "#1b2026"),
    "ink": ("#1d232b", "#e4e8ec"),
    "quiet": ("#5c6670", "#9ca6b0"),
    "line": ("#dcddd6", "#323a43"),
    "base": ("#737c86", "#919ba6"),
    "federated": ("#0065a3", "#5db4ea"),
    "local_only": ("#b94c00", "#f0954a"),
    "centralised": ("#00755a", "#36c49b"),
    "personal": ("#a3477a", "#e596c3"),
    "download": ("#8fb8d4", "#3f6e8f"),
    "upload": ("#d99a1c", "#e3b04f"),
    "run_7": ("#6b5b00", "#d6c54a"),
    "run_8": ("#5a4fa8", "#a9a0f0"),
}
"""Colours by meaning, as (light, dark)."""
RUNS = ("federated", "local_only", "centralised", "personal", "upload", "base", "run_7", "run_8")
"""Colours of overlaid runs, in the order they are given."""

SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mycel",
    "font.family": "DejaVu Sans",
    "font.size": 11.0,
    # Party names are plain text: a dollar sign in one is no mathematics.
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "path.simplify": False,
}


class Plot(NamedTuple):
    """A figure of a page, or the reason why it is left out.

    Attributes
    ----------
    name
        Identifier within the page.
    title, caption
        What it shows; how to read it.
    width
        Its share of a wide page: ``"third"``, ``"half"`` or ``"full"``.
    svg
        The drawing; empty if it is left out.
    reason
        Why it is left out; empty if it is there.
    """

    name: str
    title: str
    caption: str
    width: str
    svg: Markup = Markup()
    reason: str = ""


def light(name: str) -> str:
    """Give a colour of the palette for matplotlib, as ``#rrggbb``."""
    return PALETTE[name][0]


def palette_css() -> Markup:
    """Write the palette as CSS variables for light and dark."""
    day, night = (
        "".join(f"--{name.replace('_', '-')}:{shades[index]};" for name, shades in PALETTE.items()) for index in (0, 1)
    )
    return Markup(f":root{{{day}}}@media (prefers-color-scheme:dark){{:root{{{night}}}}}")


def draw(name: str, label: str, size: tuple[float, float], paint: Callable[[Figure], None]) -> Markup:
    """Draw one figure as inline SVG; the same input gives the same bytes.

    Parameters
    ----------
    name
        Prefix of every identifier inside, so that figures on one page do not clash.
    label
        What a screen reader says.
    size
        Width and height in CSS pixels.
    paint
        Draws onto the empty figure.
    """
    import matplotlib
    from matplotlib.figure import Figure

    target = io.StringIO()
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # The browser draws the text in its own fonts; those that matplotlib lacks do not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, facecolor="none")
        paint(figure)
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return _inline(target.getvalue(), name, label)


def axes(figure: Figure, left: float, right: float, top: float, bottom: float) -> Axes:
    """Add calm axes with margins in pixels: a hairline below, no box, no tick marks."""
    width, height = figure.get_size_inches() * 72
    frame = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    made: Axes = figure.add_axes(frame)
    made.set_facecolor("none")
    for side in ("top", "right", "left"):
        made.spines[side].set_visible(False)
    made.spines["bottom"].set_color(light("line"))
    made.tick_params(length=0, labelsize=10.5, labelcolor=light("quiet"), pad=5)
    made.set_axisbelow(True)
    made.xaxis.label.set_color(light("quiet"))
    made.xaxis.label.set_fontsize(10.5)
    return made


def _inline(text: str, name: str, label: str) -> Markup:
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's own style sheet would apply to the whole page.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _attribute(key, value, name) for key, value in attributes.items()})
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib.update({"role": "img", "aria-label": label})
    return Markup(ElementTree.tostring(root, encoding="unicode"))


_VARIABLE = {shades[0]: f"var(--{name.replace('_', '-')})" for name, shades in PALETTE.items()}


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return value.replace("#", f"#{name}-", 1)
    if key == "clip-path":
        return value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLE.get(match[0], match[0]), value)
        # The family is the page's own.
        return re.sub(r"font: (bold |\d{3} )?([\d.]+)px [^;]*", _font, value)
    return value


def _font(match: re.Match[str]) -> str:
    weight = f"; font-weight: {match[1].strip()}" if match[1] else ""
    return f"font-size: {match[2]}px{weight}"
