"""Numbers flow in, drawings flow out: SVG text in the colours of the page that they stand on, and PNG files.

matplotlib draws an SVG with stand-in colours; each becomes a CSS variable, so one drawing serves a light and a dark
page. Text stays text: it can be selected, searched, and takes the page's font. A PNG has the colours of the light page.
"""

import io
import logging
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
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Palette:
    """Colours of text, of lines that are no data, and of the series."""

    ink: str
    faint: str
    series: tuple[str, ...]

    def of(self, number: int) -> str:
        """The colour of a series; after the last the first comes again."""
        return self.series[number % len(self.series)]


STAND_INS = Palette(ink="#0a0a01", faint="#0a0a02", series=tuple(f"#0b0b{number:02x}" for number in range(1, 9)))
VARIABLES = {STAND_INS.ink: "--ink", STAND_INS.faint: "--line"} | {
    colour: f"--series-{i}" for i, colour in enumerate(STAND_INS.series, 1)
}
LIGHT = Palette(  # as page.css has them
    ink="#1c2024",
    faint="#c9ced6",
    series=("#1f6fd6", "#c8640a", "#128a5c", "#a03bb8", "#c2304d", "#6b7280", "#0e8b99", "#8a6d00"),
)
STYLES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*"  # series are told apart by shape as well as by colour
_MARKS = 6  # on a line whose points are not marked each
_MOST_NAMED = 16  # more names would cover the lines
_WIDE, _HIGH = 4.7, 2.9  # inches of 72 units: at 340 pixels of a phone, text is as large as it is drawn
_DOTS = 200  # to the inch of a PNG
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans")  # those that exist
Draw = Callable[["Axes", Palette], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What draws itself into matplotlib's axes. Both methods raise UsageError without matplotlib."""

    draw: Draw
    high: float = _HIGH  # inches

    def svg(self) -> str:
        """The bare element for a page; the same numbers make the same text."""
        buffer = io.StringIO()
        settings = _settings(STAND_INS) | {"svg.fonttype": "none", "svg.hashsalt": "distill"}
        self._save(buffer, STAND_INS, settings, format="svg", transparent=True, metadata={"Date": None})
        return _on_page(buffer.getvalue())

    def png(self, title: str) -> bytes:
        """A file for slides and papers, with its title on it: 940 pixels wide."""
        buffer = io.BytesIO()
        settings = _settings(LIGHT) | {"font.family": _fonts()}
        self._save(buffer, LIGHT, settings, title=title, format="png", dpi=_DOTS)
        return buffer.getvalue()

    def _save(self, out: Any, palette: Palette, settings: dict[Any, Any], *, title: str = "", **options: Any) -> None:
        rc_context, figure_of = _matplotlib()
        with rc_context(settings), warnings.catch_warnings():
            # On a page the browser brings the glyphs; in a PNG a machine without such a font shows boxes.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure = figure_of(figsize=(_WIDE, self.high))
            axes = figure.subplots()
            self.draw(axes, palette)
            if title:
                figure.suptitle(title, fontsize=11, fontweight="bold")
            figure.savefig(out, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One drawing with its words: ``header`` and ``rows`` are its numbers as a table, for those who want them."""

    title: str
    caption: str
    drawing: Drawing
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
) -> Drawing:
    """A line chart. ``labels`` name the axes, ``boundaries`` are vertical lines, ``axes`` go to ``Axes.set``."""

    def draw(ax: "Axes", palette: Palette) -> None:
        for line in drawn:
            marker = MARKERS[line.colour % len(MARKERS)] if line.style == 0 else None  # dashes speak for themselves
            for number, (x, y) in enumerate(line.parts):
                ax.plot(
                    x,
                    y,
                    color=palette.of(line.colour),
                    linestyle=STYLES[line.style % len(STYLES)],
                    marker=marker if marked or len(drawn) > 1 or np.size(x) == 1 else None,
                    markevery=1 if marked else max(1, np.size(x) // _MARKS),
                    markersize=3.5,
                    label=line.label if number == 0 else None,
                )
        for boundary in boundaries:
            ax.axvline(boundary, color=palette.ink, linewidth=0.8, linestyle=":")
        ax.set(xlabel=labels[0], ylabel=labels[1], **axes)
        _plain_numbers(ax)
        if any(line.label for line in drawn) and len(drawn) <= _MOST_NAMED:
            ax.legend()

    return Drawing(draw=draw)


def histograms(values: Mapping[str, ArrayLike], *, labels: tuple[str, str], num_bins: int = 40) -> Drawing:
    """One outline for each name, as shares of its own values."""
    arrays = {name: np.asarray(array, np.float64) for name, array in values.items() if np.size(array)}

    def draw(ax: "Axes", palette: Palette) -> None:
        top = max((array.max() for array in arrays.values()), default=1.0)
        bottom = min((array.min() for array in arrays.values()), default=0.0)
        if top == bottom:
            bottom, top = bottom - 0.5, top + 0.5
        edges = np.linspace(bottom, top, num_bins + 1)
        for number, (name, array) in enumerate(arrays.items()):
            shares = np.histogram(array, edges)[0] / len(array)
            colour = palette.of(number)
            ax.stairs(shares, edges, color=colour, linewidth=1.6, linestyle=STYLES[number % len(STYLES)], label=name)
            ax.stairs(shares, edges, color=colour, fill=True, alpha=0.15)
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        ax.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, None))
        if len(arrays) <= _MOST_NAMED:
            ax.legend()

    return Drawing(draw=draw)


def grouped_bars(
    groups: Sequence[str], values: Mapping[str, Sequence[float | None]], *, labels: tuple[str, str]
) -> Drawing:
    """Bars side by side for each of ``groups``; None leaves a gap."""

    def draw(ax: "Axes", palette: Palette) -> None:
        width = 0.8 / max(len(values), 1)
        for number, (name, heights) in enumerate(values.items()):
            places = np.arange(len(groups)) - 0.4 + width * (number + 0.5)
            numbers = [0.0 if height is None else height for height in heights]
            bars = ax.bar(places, numbers, width * 0.92, color=palette.of(number), label=name)
            written = ["" if height is None else f"{height:.2f}" for height in heights]
            ax.bar_label(bars, written, fontsize=8, padding=1, color=palette.ink)
        ax.set_xticks(range(len(groups)), list(groups))
        ax.grid(visible=False, axis="x")
        ax.set(xlabel=labels[0], ylabel=labels[1], ylim=(0, 1.3))
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
        ax.legend(loc="upper center", ncols=len(values), columnspacing=1, handletextpad=0.4, handlelength=1)

    return Drawing(draw=draw)


def bars(values: Sequence[tuple[str, float]], *, label: str) -> Drawing:
    """Lying bars, the first on top, each with its number."""

    def draw(ax: "Axes", palette: Palette) -> None:
        names = [name if len(name) <= 34 else name[:33] + "…" for name, _ in values]
        places = np.arange(len(values))
        drawn = ax.barh(places, [value for _, value in values], color=palette.of(0), height=0.7)
        ax.bar_label(
            drawn, [f"{value:,.3g}" if value < 1000 else f"{value:,.0f}" for _, value in values], padding=3, fontsize=9
        )
        ax.set_yticks(places, names)
        ax.invert_yaxis()
        ax.grid(visible=False, axis="y")
        ax.margins(x=0.15)
        ax.set(xlabel=label)

    return Drawing(draw=draw, high=max(1.4, 0.27 * len(values) + 0.6))


def _plain_numbers(ax: "Axes") -> None:
    """0.2 and 50 on a logarithmic axis, where matplotlib writes formulas that a browser cannot read."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for axis, scale in ((ax.xaxis, ax.get_xscale()), (ax.yaxis, ax.get_yscale())):
        if scale == "log":
            if axis is ax.yaxis:
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_minor_formatter(NullFormatter())
            axis.set_major_formatter(lambda value, _: f"{value:g}")


def calibration(points: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Drawing:
    """For each name confidence (x) against accuracy (y), both within 0 and 1, and the line where they are equal."""

    def draw(ax: "Axes", palette: Palette) -> None:
        ax.plot([0, 1], [0, 1], color=palette.ink, linewidth=0.8, linestyle=":", label="calibrated")
        for number, (name, (x, y)) in enumerate(points.items()):
            style = STYLES[number // len(palette.series) % len(STYLES)]
            marker = MARKERS[number % len(MARKERS)]
            ax.plot(x, y, color=palette.of(number), linestyle=style, marker=marker, markersize=4, label=name)
        ax.set(xlabel="probability of its first choice", ylabel="share that came", xlim=(0, 1), ylim=(-0.02, 1.02))
        ax.legend()

    return Drawing(draw=draw, high=3.6)


def _matplotlib() -> "tuple[Any, type[Figure]]":
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a home it tells of its cache, on several lines
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "a report draws its charts with matplotlib, which is not installed. Run `pip install 'distill[report]'`."
        ) from error
    return rc_context, Figure


def _settings(palette: Palette) -> dict[Any, Any]:  # matplotlib types the keys from release to release differently
    return {
        "text.parse_math": False,  # a domain may be called "$x$"
        "font.size": 10,
        "axes.edgecolor": palette.faint,
        "axes.labelcolor": palette.ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.faint,
        "grid.linewidth": 0.5,
        "text.color": palette.ink,
        "xtick.color": palette.faint,
        "ytick.color": palette.faint,
        "xtick.labelcolor": palette.ink,
        "ytick.labelcolor": palette.ink,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.handlelength": 1.6,
        "lines.linewidth": 1.6,
        "figure.constrained_layout.use": True,
    }


def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    present = {font.name for font in fontManager.ttflist}
    return [name for name in _FONTS if name in present]


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
