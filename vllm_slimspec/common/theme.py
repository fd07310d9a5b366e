"""Colors and fonts of the figures. One drawing serves light pages, dark pages and PNG files."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# name -> (color on a light page, color on a dark page). A family of heads has the same color in every figure. The
# families also differ in lightness, so that they can be told apart without color.
COLORS = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#5b6470", "#a3abb5"),
    "grid": ("#dfe3e8", "#333a43"),
    "ground": ("#ffffff", "#14171b"),
    "none": ("#9aa3ad", "#717a85"),
    "full": ("#59626c", "#aab2bc"),
    "trim": ("#b8650a", "#e79a3c"),
    "spec-vocab": ("#8b4bb3", "#c192e0"),
    "low-rank": ("#0b63a8", "#5cb0f2"),
    "body": ("#c3cad2", "#48515b"),
    "verify": ("#dfe4e9", "#2c333b"),
    "gain": ("#2e8b57", "#5fc490"),
    "loss": ("#b3261e", "#f2857d"),
}
_FAMILIES = ("low-rank", "trim", "spec-vocab", "none")
# Placeholder colors with which the SVG is drawn. Each is then replaced by the CSS variable of the same name.
_STAND_INS = {name: f"#fe{i:02x}0d" for i, name in enumerate(COLORS)}
_SIZE = 9.5


class Theme:
    """The colors of a figure, by name."""

    def __init__(self, colors: dict[str, str]) -> None:
        self._colors = colors

    def __getitem__(self, name: str) -> str:
        return self._colors[name]

    def head(self, name: str) -> str:
        """Return the color of the family that a head belongs to."""
        return self[next((family for family in _FAMILIES if name.startswith(family)), "full")]


LIGHT = Theme({name: light for name, (light, _) in COLORS.items()})
INLINE = Theme(_STAND_INS)


def css(dark: bool) -> str:
    """Return the colors as CSS declarations."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLORS.items())


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Draw figures with the theme's fonts, lines and colors while the context is open."""
    from matplotlib import rc_context

    settings: Any = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "slimspec",  # the same figure always gives the same file
        "font.size": _SIZE,
        "axes.labelsize": _SIZE,
        "xtick.labelsize": _SIZE - 0.5,
        "ytick.labelsize": _SIZE,
        "legend.fontsize": _SIZE - 0.5,
        "legend.frameon": False,
        "text.color": theme["ink"],
        "axes.labelcolor": theme["muted"],
        "axes.edgecolor": theme["grid"],
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme["grid"],
        "grid.linewidth": 0.8,
        "xtick.color": theme["muted"],
        "ytick.color": theme["ink"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "figure.facecolor": "none",
    }
    with rc_context(settings):
        yield


def inline_svg(figure: "Figure", name: str, text: str) -> str:
    """Return a figure as an SVG element for an HTML page.

    Args:
        figure: the figure.
        name: a prefix that makes the ids in the SVG unique on the page.
        text: the text alternative.
    """
    from html import escape

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg role="img" aria-label="{escape(text)}" \1>', svg, count=1
    )
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg).replace("url(#", f"url(#{name}-")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for color, stand_in in _STAND_INS.items():
        svg = svg.replace(stand_in, f"var(--{color})")
    return svg.strip()


def save_png(figure: "Figure", path: Path) -> None:
    """Save a figure as PNG on a white ground."""
    figure.savefig(path, dpi=160, facecolor=LIGHT["ground"], metadata={"Software": None})
