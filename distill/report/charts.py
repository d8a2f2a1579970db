"""Numbers flow in, charts as SVG text flow out, in the colours of the page that they stand on.

matplotlib draws with stand-in colours; each becomes a CSS variable, so one drawing serves a light and a dark page. Text
stays text: it can be selected, searched, and takes the page's font.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from distill.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT = "#0a0a01", "#0a0a02"
SERIES = tuple(f"#0b0b{number:02x}" for number in range(1, 9))
VARIABLES = {INK: "--ink", FAINT: "--line"} | {colour: f"--series-{i}" for i, colour in enumerate(SERIES, 1)}
STYLES = ("-", "--", ":", "-.")
_MOST_NAMED = 16  # more names would cover the lines
_WIDE, _HIGH = 4.7, 2.9  # inches of 72 units: at 340 pixels of a phone, text is as large as it is drawn
_SETTINGS: dict[Any, Any] = {  # matplotlib types the keys from release to release differently
    "svg.fonttype": "none",
    "svg.hashsalt": "distill",  # the same numbers make the same bytes
    "text.parse_math": False,  # a domain may be called "$x$"
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.6,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One drawing with its words: ``header`` and ``rows`` are its numbers as a table, for those who want them."""

    title: str
    caption: str
    svg: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line: a part is drawn without joining it to the next. ``colour`` and ``style`` count through the palettes."""

    label: str
    parts: Sequence[tuple[ArrayLike, ArrayLike]]  # (x, y)
    colour: int
    style: int = 0


def lines(
    drawn: Sequence[Line],
    *,
    labels: tuple[str, str],
    marked: bool = False,
    boundaries: Sequence[float] = (),
    **axes: Any,
) -> str:
    """A line chart. ``labels`` name the axes, ``boundaries`` are vertical lines, ``axes`` go to ``Axes.set``."""

    def draw(ax: "Axes") -> None:
        for line in drawn:
            for number, (x, y) in enumerate(line.parts):
                ax.plot(
                    x,
                    y,
                    color=SERIES[line.colour % len(SERIES)],
                    linestyle=STYLES[line.style % len(STYLES)],
                    marker="o" if marked or np.size(x) == 1 else None,
                    markersize=3.5,
                    label=line.label if number == 0 else None,
                )
        for boundary in boundaries:
            ax.axvline(boundary, color=INK, linewidth=0.8, linestyle=":")
        ax.set(xlabel=labels[0], ylabel=labels[1], **axes)
        _plain_numbers(ax)
        if any(line.label for line in drawn) and len(drawn) <= _MOST_NAMED:
            ax.legend()

    return _svg(draw)


def histograms(values: Mapping[str, ArrayLike], *, labels: tuple[str, str], num_bins: int = 40) -> str:
    """One outline for each name, as shares of its own values."""
    arrays = {name: np.asarray(array, np.float64) for name, array in values.items() if np.size(array)}

    def draw(ax: "Axes") -> None:
        top = max((array.max() for array in arrays.values()), default=1.0)
        bottom = min((array.min() for array in arrays.values()), default=0.0)
        edges = np.linspace(bottom, max(top, bottom + 1e-6), num_bins + 1)
        for number, (name, array) in enumerate(arrays.items()):
            shares = np.histogram(array, edges)[0] / len(array)
            colour = SERIES[number % len(SERIES)]
            ax.stairs(shares, edges, color=colour, linewidth=1.6, label=name)
            ax.stairs(shares, edges, color=colour, fill=True, alpha=0.15)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        ax.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, None))
        if len(arrays) <= _MOST_NAMED:
            ax.legend()

    return _svg(draw)


def grouped_bars(
    groups: Sequence[str], values: Mapping[str, Sequence[float | None]], *, labels: tuple[str, str]
) -> str:
    """Bars side by side for each of ``groups``; None leaves a gap."""

    def draw(ax: "Axes") -> None:
        width = 0.8 / max(len(values), 1)
        for number, (name, heights) in enumerate(values.items()):
            places = np.arange(len(groups)) - 0.4 + width * (number + 0.5)
            numbers = [0.0 if height is None else height for height in heights]
            bars = ax.bar(places, numbers, width * 0.92, color=SERIES[number % len(SERIES)], label=name)
            written = ["" if height is None else f"{height:.2f}" for height in heights]
            ax.bar_label(bars, written, fontsize=8, padding=1, color=INK)
        ax.set_xticks(range(len(groups)), list(groups))
        ax.grid(visible=False, axis="x")
        ax.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, 1.3))
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
        ax.legend(loc="upper center", ncols=len(values), columnspacing=1, handletextpad=0.4, handlelength=1)

    return _svg(draw)


def bars(values: Sequence[tuple[str, float]], *, label: str) -> str:
    """Lying bars, the first on top, each with its number."""

    def draw(ax: "Axes") -> None:
        names = [name if len(name) <= 34 else name[:33] + "…" for name, _ in values]
        places = np.arange(len(values))
        drawn = ax.barh(places, [value for _, value in values], color=SERIES[0], height=0.7)
        ax.bar_label(
            drawn, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for _, value in values], padding=3, fontsize=9
        )
        ax.set_yticks(places, names)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.margins(x=0.15)
        ax.set(xlabel=label)

    return _svg(draw, high=max(1.4, 0.27 * len(values) + 0.6))


def _plain_numbers(ax: "Axes") -> None:
    """0.2 and 50 on a logarithmic axis, where matplotlib writes formulas that a browser cannot read."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis, scale in ((ax.xaxis, ax.get_xscale()), (ax.yaxis, ax.get_yscale())):
        if scale == "log":
            if axis is ax.yaxis:
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_minor_formatter(NullFormatter())
            axis.set_major_formatter(lambda value, _: f"{value:g}")


def _svg(draw: Callable[["Axes"], None], *, high: float = _HIGH) -> str:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "a report draws its charts with matplotlib, which is not installed. Run `pip install 'distill[report]'`."
        ) from error
    buffer = io.StringIO()
    with rc_context(_SETTINGS), warnings.catch_warnings():
        # The browser brings the glyphs; matplotlib only misses them when it measures.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(_WIDE, high))
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _on_page(buffer.getvalue())


def _on_page(text: str) -> str:
    """The bare element, without a size of its own, with the page's colours, and with ids that no other chart has."""
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;]*; ", "", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r"[ \t]+\n", "\n", text).strip()
