"""A comparison as one HTML page that needs nothing but itself: no network, no server, no other file.

Its policy allows no address but ``data:`` and no script but its own, told by its hash, so that names and captions could
do no harm even if they were not escaped, which they are.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from string import Template

from lpl_lightning.evaluation.bootstrap import LEVEL, Interval
from lpl_lightning.evaluation.comparison_images import SameImages
from lpl_lightning.evaluation.comparison_plots import COLOURS, dots, spectra_charts
from lpl_lightning.evaluation.comparison_text import signed
from lpl_lightning.evaluation.differences import Cell, Comparison, Row
from lpl_lightning.evaluation.report import formatted
from lpl_lightning.metrics.spectrum import Spectra

__all__ = ["page"]

CAVEAT = (
    f"In brackets, {LEVEL:.0%} bootstrap intervals over images. They do not hold what another training run would "
    "change. Of many values, about one in twenty differs by chance alone."
)

CAPTION = 160
"""Letters of a caption that are shown under small images; under the large one all are."""


def page(
    comparison: Comparison,
    spectra: Mapping[str, Spectra],
    images: SameImages | None = None,
    addresses: Sequence[str] = (),
) -> str:
    """Write the page.

    Args:
        comparison: What it shows.
        spectra: By run, of those that have any.
        images: The same images of several runs, if there are any.
        addresses: Their ``data:`` addresses, all of the first run before those of the second.
    """
    style, script = _part("css"), _part("js")
    # What lies between the tags, line breaks included, is what browsers hash.
    digest = base64.b64encode(sha256(f"\n{script}\n".encode()).digest()).decode("ascii")
    others = [run for run in comparison.runs if run != comparison.baseline]
    title = f"{', '.join(others)} against {comparison.baseline}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{CAVEAT}</p>',
        _legend(comparison),
        _summary(comparison, others),
        "<h2>Values</h2>",
        _table(comparison),
    ]
    if comparison.rows:
        cards = "".join(dots(name, row, comparison) for name, row in comparison.rows.items())
        body += ["<h2>Intervals</h2>", f'<div class="cards">{cards}</div>']
    if spectra:
        body += [
            "<h2>Spectra</h2>",
            _legend(comparison),
            f'<div class="charts">{spectra_charts(spectra, comparison.runs)}</div>',
        ]
    if images is not None:
        body += [f"<h2>Images of the same {images.alike}</h2>", _images(comparison, images, addresses)]
    if comparison.made:
        body += ["<h2>What differs in how they were made</h2>", _made(comparison)]
    if comparison.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
        body += ["<h2>Notes</h2>", f'<ul class="notes">{notes}</ul>']
    return Template(_part("html")).substitute(
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        title=escape(title),
        style=style,
        script=script,
        body="\n".join(body),
    )


def _part(suffix: str) -> str:
    return files("lpl_lightning.evaluation").joinpath(f"comparison.{suffix}").read_text(encoding="utf-8").strip("\n")


def _who(comparison: Comparison, run: str) -> str:
    return f'<span class="who run-{comparison.runs.index(run) % COLOURS}">{escape(run)}</span>'


def _legend(comparison: Comparison) -> str:
    runs = [
        _who(comparison, run) + (" <small>baseline</small>" if run == comparison.baseline else "")
        for run in comparison.runs
    ]
    return '<ul class="legend">' + "".join(f"<li>{run}</li>" for run in runs) + "</ul>"


def _summary(comparison: Comparison, others: Sequence[str]) -> str:
    lines = []
    for run in others:
        found = comparison.verdicts(run)
        parts = [
            f'<span class="verdict {kind}">{len(found[kind])} {kind}</span> {escape(", ".join(found[kind]))}'
            for kind in ("better", "worse", "differs")
            if found[kind]
        ]
        if found["unclear"]:
            parts.append(f"{len(found['unclear'])} without a clear difference")
        lines.append(f"<li>{_who(comparison, run)}: {'; '.join(parts) or 'no differences with intervals'}</li>")
    return f'<ul class="summary">{"".join(lines)}</ul>'


def _table(comparison: Comparison) -> str:
    others = [run for run in comparison.runs if run != comparison.baseline]
    heads = "".join(f'<th scope="col">{_who(comparison, run)}</th>' for run in comparison.runs)
    heads += "".join(
        f'<th scope="col">{_who(comparison, run)}<small>less {escape(comparison.baseline)}</small></th>'
        for run in others
    )
    rows = "".join(_row(name, row, comparison.runs, others) for name, row in comparison.rows.items())
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Values"><table class="values"><thead><tr>'
        f'<th scope="col">value</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _row(name: str, row: Row, runs: Sequence[str], others: Sequence[str]) -> str:
    better = f"<small>{row.better} is better</small>" if row.better else ""
    cells = [_value(row.cells.get(run)) for run in runs] + [_difference(row.cells.get(run)) for run in others]
    breakable = escape(name).replace("_", "_<wbr>")
    return f'<tr><th scope="row">{breakable}{better}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _value(cell: Cell | None) -> str:
    if cell is None:
        return ""
    std = f" ± {formatted(cell.std)}" if cell.std is not None and cell.interval is None else ""
    return f"{formatted(cell.value)}{std}{_between(cell.interval)}"


def _difference(cell: Cell | None) -> str:
    if cell is None or cell.difference is None:
        return ""
    verdict = f'<span class="verdict {cell.verdict}">{cell.verdict}</span>' if cell.verdict else ""
    drawn = ""
    if cell.paired is not None:
        drawn = f"<small>{'paired' if cell.paired else 'unpaired'}</small>"
    return f"{signed(cell.difference)}{verdict}{_between(cell.difference_interval)}{drawn}"


def _between(spread: Interval | None) -> str:
    return "" if spread is None else f"<small>[{formatted(spread.low)}, {formatted(spread.high)}]</small>"


def _made(comparison: Comparison) -> str:
    heads = "".join(f'<th scope="col">{_who(comparison, run)}</th>' for run in comparison.runs)
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f"<td>{escape(values[run])}</td>" for run in comparison.runs)
        + "</tr>"
        for key, values in comparison.made.items()
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="What differs"><table class="made"><thead><tr>'
        f'<th scope="col"></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _images(comparison: Comparison, images: SameImages, addresses: Sequence[str]) -> str:
    colours = [comparison.runs.index(run) % COLOURS for run in images.runs]
    runs = "".join(
        f'<option value="{number}" class="who run-{colours[number]}">{escape(run)}</option>'
        for number, run in enumerate(images.runs)
        if number
    )
    choices = "".join(f'<option value="{number}">{escape(name)}</option>' for number, name in enumerate(images.names))
    figures = []
    for number, (name, caption) in enumerate(zip(images.names, images.captions, strict=True)):
        pictures = "".join(
            f'<img class="run-{colour}" src="{escape(address)}" title="{escape(run)}" alt="{escape(f"{name}, {run}")}">'
            for colour, address, run in zip(colours, addresses[number :: len(images.names)], images.runs, strict=True)
        )
        short = caption if len(caption) <= CAPTION else f"{caption[:CAPTION]}…"
        figures.append(
            f'<figure data-caption="{escape(caption)}"><div class="row">{pictures}</div>'
            f"<figcaption>{escape(name)}{'<br>' if short else ''}{escape(short)}</figcaption></figure>"
        )
    return f"""<div class="controls" id="controls" hidden>
<label>{escape(images.runs[0])} against<select id="run">{runs}</select></label>
<label>Image<select id="image">{choices}</select></label>
<button type="button" id="previous">Previous</button><button type="button" id="next">Next</button>
</div>
<figure class="viewer" id="viewer" hidden>
<div class="frame"><img class="lower" alt=""><img class="upper" alt=""><div class="handle"></div>
<input type="range" id="at" min="0" max="100" value="50" step="1" aria-label="Share of the baseline's image">
</div>
<div class="sides"><span class="who run-{colours[0]}" id="left">{escape(images.runs[0])}</span>
<span id="right"></span></div>
<figcaption><p class="caption" id="caption"></p></figcaption>
</figure>
<noscript><p class="soft">The slider needs JavaScript; the images below do not.</p></noscript>
<div class="same" style="--columns:{len(images.runs)}">{"".join(figures)}</div>"""
