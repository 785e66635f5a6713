"""What the pages are made of: one HTML document without network or script, its tables, and figures as inline SVG.

Texts come in from outside, such as names of datasets; every function here escapes what it is given as text.
"""

import html
import importlib
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

Cell = str | tuple[str, str]
"""Text of a cell; of a pair, the second text is below the first, in small print."""
COLORS = ("#3b82f6", "#d97706", "#16a34a", "#e11d8f", "#8b5cf6", "#0d9488", "#a16207", "#808080")
"""Colours of lines and bars, each with a contrast of at least 3 on the light and on the dark background."""
GLYPHS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
"""Markers of matplotlib that tell lines apart without their colour, and how a legend writes them."""
INK = "#010203"
"""Colour of axes and text while matplotlib draws; a page replaces it by the colour of its text."""
STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color"), INK
    ),
}
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --paper: #fff; --ink: #1b1d21; --soft: #f2f4f7; --line: #d3d7de; --link: #0b57d0;
  --faint: #5b626d }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #14161a; --ink: #e4e6ea; --soft: #1f232a; --line: #3a404a;
  --link: #8ab4f8; --faint: #a3aab5 }} }}
* {{ box-sizing: border-box }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere }}
main {{ max-width: 68rem; margin: 0 auto; padding: 1rem 1rem 4rem }}
h1 {{ font-size: 1.6rem; line-height: 1.25 }} h2 {{ font-size: 1.25rem; margin: 2.5rem 0 0.5rem }}
h3 {{ font-size: 0.95rem; margin: 0 0 0.25rem }} h3 small, th small {{ font-weight: 400 }}
a {{ color: var(--link) }} p {{ max-width: 46rem }} small, figcaption, .note {{ color: var(--faint) }}
figcaption, .note {{ font-size: 0.875rem; max-width: 46rem }}
.scroll {{ overflow-x: auto; margin: 1rem 0; overflow-wrap: normal }}
table {{ border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums }}
caption {{ text-align: left; padding-bottom: 0.5rem; color: var(--faint); caption-side: top }}
caption span {{ position: sticky; left: 0; display: inline-block; max-width: min(46rem, calc(100vw - 2rem)) }}
th, td {{ padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap }}
thead th {{ border-bottom-color: var(--faint); font-weight: 600 }}
th[scope=colgroup] {{ text-align: center; border-left: 1px solid var(--line) }}
th[scope=row] {{ white-space: normal; min-width: 6.5rem; max-width: 11rem; overflow-wrap: normal }}
@media (max-width: 36rem) {{ th[scope=row] {{ max-width: 6.5rem }} }}
th[scope=row], th.first {{ text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--paper) }}
figure {{ margin: 1rem 0 }}
.panels {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(19rem, 100%), 1fr)); gap: 1.25rem }}
.panel {{ max-width: 30rem; min-width: 0 }}
svg {{ display: block; width: 100%; height: auto }} svg * {{ stroke-linejoin: round; stroke-linecap: butt }}
svg text {{ font-family: system-ui, sans-serif !important }}
.legend {{ list-style: none; display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin: 0 0 0.75rem; padding: 0;
  font-size: 0.875rem }}
details {{ margin: 0.4rem 0 }} details > :not(summary) {{ margin-left: 1rem }} summary {{ cursor: pointer }}
pre {{ background: var(--soft); padding: 0.6rem; margin: 0.3rem 0; font-size: 0.8125rem; overflow-x: auto;
  overflow-wrap: normal }}
dl {{ display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.1rem 1rem; font-size: 0.875rem }}
dt {{ color: var(--faint) }} dd {{ margin: 0 }}
</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def document(title: str, body: Iterable[str]) -> str:
    """Return a whole page; its body is HTML made by the functions below."""
    return PAGE.format(title=html.escape(title), body="\n".join(body))


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with so many significant digits, or a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "-"
    size = math.floor(math.log10(abs(value))) if value else 0
    if not -5 <= size < 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - size)}f}"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph, of a class if one is named."""
    name = f' class="{kind}"' if kind else ""
    return f"<p{name}>{html.escape(text)}</p>"


def heading(text: Cell, level: int = 2) -> str:
    """Return a heading, of a pair with the second text below it in small print."""
    return f"<h{level}>{_cell(text)}</h{level}>"


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    return f"{html.escape(cell[0])}<br><small>{html.escape(cell[1])}</small>"


def _breakable(text: str) -> str:
    """Let a line of a narrow column end inside names such as atom_to_edge/forward."""
    return re.sub(r"(?<=\w)([_/])(?=\w)", r"\1<wbr>", text)


def table(
    caption: str, titles: Sequence[str], rows: Iterable[Sequence[Cell]], *, groups: Sequence[tuple[str, int]] = ()
) -> str:
    """Return a table that scrolls inside its own box.

    Args:
        caption: what the table shows; also the box's name for screen readers.
        titles: titles of the columns.
        rows: cells; the first of a row is its heading, and stays where it is while the others scroll.
        groups: titles above the columns after the first one, each with the number of columns it is above.
    """
    first, *others = (html.escape(title) for title in titles)
    head = "".join(f'<th scope="col">{title}</th>' for title in others)
    if groups:
        spans = "".join(f'<th scope="colgroup" colspan="{n}">{html.escape(title)}</th>' for title, n in groups)
        head = f'<tr><th scope="col" rowspan="2" class="first">{first}</th>{spans}</tr><tr>{head}</tr>'
    else:
        head = f'<tr><th scope="col" class="first">{first}</th>{head}</tr>'
    body = "\n".join(
        f'<tr><th scope="row">{_breakable(_cell(name))}</th>'
        + "".join(f"<td>{_cell(cell)}</td>" for cell in cells)
        + "</tr>"
        for name, *cells in rows
    )
    name = html.escape(caption)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{name}"><table><caption><span>{name}</span>'
        f"</caption><thead>{head}</thead>\n<tbody>{body}</tbody></table></div>"
    )


def folded(summary: str, *inside: str) -> str:
    """Return HTML that is shown when its summary is pressed."""
    return f"<details><summary>{html.escape(summary)}</summary>{''.join(inside)}</details>"


def facts(pairs: Mapping[str, Any]) -> str:
    """Return names and values as a list."""
    items = (f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in pairs.items())
    return f"<dl>{''.join(items)}</dl>"


def code(text: str) -> str:
    """Return text as it is, in the type of a terminal, in a box that scrolls."""
    return f'<pre tabindex="0">{html.escape(text)}</pre>'


def legend(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return a legend of the panels of a figure, from triples of a label, a colour and a marker of `GLYPHS`."""
    items = (
        f'<li><span aria-hidden="true" style="color:{color}">{GLYPHS[marker]}</span> {html.escape(label)}</li>'
        for label, color, marker in entries
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def figure(panels: Iterable[tuple[Cell, str]], caption: str, key: str = "") -> str:
    """Return panels side by side where there is room.

    Args:
        panels: title, or an empty text, and SVG of each.
        caption: what the figure shows.
        key: legend that stands above the panels.
    """
    inside = "\n".join(f'<div class="panel">{heading(title, 3) if title else ""}{svg}</div>' for title, svg in panels)
    return f'<figure>{key}<div class="panels">{inside}</div><figcaption>{html.escape(caption)}</figcaption></figure>'


def need_matplotlib() -> None:
    """Raise before the work that a page takes, not after it, if its figures cannot be drawn.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed; it says what brings it.
    """
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install ejmp[bench] brings it", name=error.name) from error


def draw(name: str, alt: str, plot: Callable[[Any], None], *, size: tuple[float, float] = (3.7, 2.7)) -> str:
    """Return a drawing of matplotlib as inline SVG, which has the colour of the text around it.

    Args:
        name: name of the drawing, unlike those of all others on the page; letters, digits and "-".
        alt: what the drawing shows, for those who do not see it.
        plot: draws on the axes it is given.
        size: width and height, inches.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
    """
    need_matplotlib()
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": name}
    with mpl.rc_context(style):
        drawing = Figure(figsize=size, layout="constrained")
        plot(drawing.subplots())
        written = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.savefig(written, format="svg", transparent=True, dpi=160, metadata=nothing)
    return _inline(written.getvalue(), name, alt)


def _inline(text: str, name: str, alt: str) -> str:
    """Return an SVG file as part of a page: without what only a file needs, and with ids that no other one has."""
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    begin = f'<svg {box[0]} role="img" aria-label="{html.escape(alt)}">'

    def own(tag: re.Match[str]) -> str:
        found = tag[0].replace("xlink:href=", "href=").replace(INK, "currentColor")
        return re.sub(r'( id="| href="#|url\(#)', rf"\g<1>{name}-", found)

    return begin + re.sub(r"<[^>]*>", own, text[text.index(">") + 1 :]).strip()


def log_axis(axes: Any, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Make an axis logarithmic, with plain numbers at it, if the values are positive and span a factor of 8 or more."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: PLC0415

    known = [value for value in values if math.isfinite(value)]
    if not known or min(known) <= 0 or max(known) < 8 * min(known):
        return
    axis, set_scale = (axes.xaxis, axes.set_xscale) if which == "x" else (axes.yaxis, axes.set_yscale)
    set_scale("log", nonpositive="mask")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(known) < 300 * min(known) else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
