"""The page of a comparison, in a browser."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from reports import write_run

from lpl_lightning.evaluation.comparison import compare
from lpl_lightning.evaluation.comparison_plots import ticks
from lpl_lightning.evaluation.report import Report, formatted

COLOURS = {"base": (200, 30, 30), "lpl": (30, 160, 30), "evil": (30, 30, 200)}
EVIL = """evil</script><script>window.harm = 1</script><img src=x onerror="window.harm=1"> ' " & <b>"""
CAPTIONS = ['a <b>bold</b> claim & "quotes" \'', "</figcaption><script>window.harm = 1</script>", "plain"]
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of three runs, one with names and captions that try to be markup."""
    root = tmp_path_factory.mktemp("runs")
    runs = []
    for quality, (name, colour) in zip((0.6, 0.1, 0.4), COLOURS.items(), strict=True):
        # Of three images the second is darker, the third darker still.
        pictures = [Image.new("RGB", (40, 40), tuple(c // dim for c in colour)) for dim in (1, 2, 3)]
        called = EVIL if name == "evil" else name
        runs.append(str(write_run(root / name, called, quality, pictures=pictures, captions=CAPTIONS, notes=[EVIL])))
    compare(runs, str(root / "out"), resamples=40)
    return root / "out"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium: playwright's own, or the system's."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = ("chromium", "chromium-browser", "google-chrome")
        found = own if Path(own).exists() else next(filter(None, map(shutil.which, names)), None)
        if found is None:
            pytest.skip("no browser: neither playwright's own chromium nor one of " + ", ".join(names))
        launched = playwright.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield launched
        launched.close()


class Opened:
    """The page as a browser shows it, and what the browser had to say."""

    def __init__(self, browser: Any, folder: Path, width: int = 1400, **settings: Any) -> None:
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, **settings)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto((folder / "index.html").as_uri())

    def pixel(self, share: float) -> tuple[int, int, int]:
        """The colour in the viewer at a share of its width, above the handle's knob."""
        shown = Image.open(io.BytesIO(self.page.locator(".frame").screenshot())).convert("RGB")
        colour: tuple[int, int, int] = shown.getpixel((int(share * shown.width), shown.height // 5))  # type: ignore[assignment]
        return colour


@pytest.fixture
def opened(browser: Any, folder: Path) -> Iterator[Opened]:
    found = Opened(browser, folder)
    yield found
    assert found.said == []
    found.page.close()


def near(colour: tuple[int, int, int], expected: tuple[int, ...]) -> bool:
    return all(abs(one - other) <= 4 for one, other in zip(colour, expected, strict=True))


def test_nothing_is_asked_of_the_network(opened: Opened, folder: Path) -> None:
    opened.page.wait_for_load_state("networkidle")
    assert opened.requests[0] == (folder / "index.html").as_uri()
    assert all(url.startswith("data:") for url in opened.requests[1:])
    assert "http" not in re.sub(r"http-equiv", "", (folder / "index.html").read_text())


def test_the_table_shows_the_numbers(opened: Opened, folder: Path) -> None:
    found = json.loads((folder / "comparison.json").read_text())
    rows = opened.page.locator("table.values tbody tr").all()
    assert len(rows) == len(found["rows"]) == 6
    for row, (name, values) in zip(rows, found["rows"].items(), strict=True):
        assert row.locator("th").inner_text().split("\n")[0] == name
        cells = [cell.inner_text() for cell in row.locator("td").all()]
        assert len(cells) == 3 + 2
        for text, cell in zip(cells[:3], values["cells"].values(), strict=True):
            assert text.startswith(formatted(cell["value"]))
            if cell["interval"]:
                assert f"[{formatted(cell['interval']['low'])}, {formatted(cell['interval']['high'])}]" in text
        for text, cell in zip(cells[3:], list(values["cells"].values())[1:], strict=True):
            assert text.lstrip("+").startswith(formatted(cell["difference"]))
            assert (cell["verdict"] or "") in text
            assert ("paired" in text) == (cell["difference_interval"] is not None)
    assert opened.page.locator("table.values .better").count() > 0
    report = Report.read(folder.parent / "base")
    assert formatted(report.values["fid"].value) in opened.page.locator("table.values").inner_text()


def test_the_slider_moves_the_border_between_two_images(opened: Opened) -> None:
    slider = opened.page.locator("#at")
    for value in (50, 20, 80):
        slider.fill(str(value))
        assert near(opened.pixel(value / 100 - 0.1), COLOURS["base"])
        assert near(opened.pixel(value / 100 + 0.1), COLOURS["lpl"])
    slider.fill("0")
    assert near(opened.pixel(0.05), COLOURS["lpl"])
    slider.fill("100")
    assert near(opened.pixel(0.95), COLOURS["base"])


def test_the_slider_goes_by_keyboard_and_by_mouse(opened: Opened) -> None:
    slider = opened.page.locator("#at")
    slider.focus()
    for _ in range(20):
        slider.press("ArrowLeft")
    assert slider.input_value() == "30"
    assert near(opened.pixel(0.25), COLOURS["base"])
    assert near(opened.pixel(0.35), COLOURS["lpl"])
    slider.press("End")
    assert near(opened.pixel(0.95), COLOURS["base"])
    box = opened.page.locator(".frame").bounding_box()
    opened.page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.3 * box["height"])
    opened.page.mouse.down()
    opened.page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.3 * box["height"])
    opened.page.mouse.up()
    assert near(opened.pixel(0.66), COLOURS["base"])
    assert near(opened.pixel(0.74), COLOURS["lpl"])


def test_another_run_and_another_image_are_chosen(opened: Opened) -> None:
    page = opened.page
    assert page.locator("#caption").inner_text() == CAPTIONS[0]
    page.locator("#run").select_option("2")
    assert near(opened.pixel(0.25), COLOURS["base"])
    assert near(opened.pixel(0.75), COLOURS["evil"])
    assert page.locator("#right").inner_text() == " ".join(EVIL.split())
    page.locator("#run").select_option("1")
    assert near(opened.pixel(0.75), COLOURS["lpl"])
    page.locator("#image").select_option("1")
    assert near(opened.pixel(0.75), tuple(c // 2 for c in COLOURS["lpl"]))
    assert page.locator("#caption").inner_text() == CAPTIONS[1]
    page.locator("#next").click()
    assert near(opened.pixel(0.25), tuple(c // 3 for c in COLOURS["base"]))
    page.locator("#next").click()  # round
    assert near(opened.pixel(0.25), COLOURS["base"])
    page.locator("#previous").click()
    assert page.locator("#image").input_value() == "2"
    page.locator(".same .row").nth(1).click()
    assert page.locator("#image").input_value() == "1"
    assert near(opened.pixel(0.25), tuple(c // 2 for c in COLOURS["base"]))


def test_same_seeds_stand_together(opened: Opened) -> None:
    figures = opened.page.locator(".same figure").all()
    assert len(figures) == 3
    for figure, caption, dim in zip(figures, CAPTIONS, (1, 2, 3), strict=True):
        assert caption in figure.inner_text()
        shown = Image.open(io.BytesIO(figure.locator(".row").screenshot())).convert("RGB")
        for place, colour in enumerate(COLOURS.values()):
            pixel = shown.getpixel((int((place + 0.5) / 3 * shown.width), shown.height // 2))
            assert near(pixel, tuple(c // dim for c in colour))  # type: ignore[arg-type]


def test_names_and_captions_are_text(opened: Opened) -> None:
    opened.page.wait_for_load_state("networkidle")
    assert opened.page.evaluate("window.harm") is None
    assert opened.page.locator("script").count() == 1
    assert opened.page.locator("main b").count() == 0
    assert opened.page.locator(".legend .who").nth(2).text_content() == EVIL
    assert opened.page.locator(".notes li").last.text_content() == f"{EVIL}: {EVIL}"
    # Were something not escaped, the page's policy would still not let it run.
    opened.page.evaluate("document.body.appendChild(document.createElement('script')).textContent = 'window.harm = 1'")
    assert opened.page.evaluate("window.harm") is None
    assert "Content Security Policy" in opened.said.pop()


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_narrow_and_wide_screens(browser: Any, folder: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, folder, width, color_scheme=scheme)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    assert opened.page.evaluate("document.body.scrollWidth") == width
    outside = """[...document.querySelectorAll("main *")].filter(
        (part) => !part.closest(".scroll, svg, option") && part.getBoundingClientRect().right > innerWidth).length"""
    assert opened.page.evaluate(outside) == 0
    background = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 150) == (scheme == "dark")
    box = opened.page.locator(".frame").bounding_box()
    assert box["width"] == pytest.approx(box["height"], abs=2)  # the images are squares
    assert near(opened.pixel(0.25), COLOURS["base"])
    assert opened.said == []
    opened.page.close()


def test_without_scripts_all_but_the_slider_is_there(browser: Any, folder: Path) -> None:
    opened = Opened(browser, folder, java_script_enabled=False)
    assert opened.page.locator("table.values").is_visible()
    assert opened.page.locator(".same img").count() == 9
    assert not opened.page.locator(".viewer").is_visible()
    assert not opened.page.locator("#run").is_visible()
    assert opened.page.locator("noscript").is_visible()
    opened.page.close()


def test_dots_and_whiskers_are_where_the_values_are(opened: Opened, folder: Path) -> None:
    """The centres of three dots of one axis, and the ends of their whiskers, are a linear map of the numbers."""
    cells = json.loads((folder / "comparison.json").read_text())["rows"]["fid"]["cells"].values()
    card = opened.page.locator(".card").first
    places, numbers = [], []
    for line, cell in zip(card.locator(".dot").all(), cells, strict=True):
        places += [float(line.locator("circle").get_attribute("cx").rstrip("%"))]
        places += [float(line.locator(".whisker").get_attribute(end).rstrip("%")) for end in ("x1", "x2")]
        numbers += [cell["value"], cell["interval"]["low"], cell["interval"]["high"]]
        dashed = line.locator(".base").get_attribute("x1")
        assert float(dashed.rstrip("%")) == places[0]
    slope = (places[1] - places[0]) / (numbers[1] - numbers[0])
    assert slope > 0
    assert places == pytest.approx([places[0] + slope * (number - numbers[0]) for number in numbers], abs=0.05)
    assert 0 < min(places) < max(places) < 100


def test_lines_of_spectra_are_where_the_numbers_are(opened: Opened, folder: Path) -> None:
    chart = opened.page.locator(".chart").first
    assert chart.locator("polyline").count() == 3
    table = [line.split(",") for line in (folder / "spectra.csv").read_text().splitlines()]
    column = table[0].index("log_difference")
    values = [float(row[column]) for row in table[1:] if row[0] == "base"][1:]
    points = chart.locator("polyline").first.get_attribute("points").split()
    heights = [float(point.split(",")[1]) for point in points]
    zero = float(chart.locator(".zero").get_attribute("y1"))
    slope = (heights[0] - zero) / values[0]
    assert slope < 0  # downwards on a screen
    assert heights == pytest.approx([zero + slope * value for value in values], abs=0.05)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (-0.65, 0.05, [-0.6, -0.4, -0.2, 0]), (1, 8, [2, 4, 6, 8]), (0, 1e-5, None)],
)
def test_ticks_are_round(low: float, high: float, expected: list[float] | None) -> None:
    found = ticks(low, high, 5)
    assert expected is None or found == pytest.approx(expected)
    assert 3 <= len(found) <= 8
    assert low <= found[0] < found[-1] <= high


class Tags(HTMLParser):
    """Sees that elements are closed in the order in which they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # Of SVG, these close themselves.
        if tag not in {"meta", "img", "input", "br", "wbr", "line", "circle", "polyline"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_elements_are_closed(folder: Path) -> None:
    tags = Tags()
    tags.feed((folder / "index.html").read_text())
    assert tags.open == []


def test_a_page_without_images_and_spectra(browser: Any, tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, name)) for name in ("a", "b")]
    for run in runs:
        shutil.rmtree(Path(run) / "images")
        (Path(run) / "spectra.csv").unlink()
    compare(runs, str(tmp_path / "out"), resamples=40)
    opened = Opened(browser, tmp_path / "out")
    assert opened.page.locator("h2").all_inner_texts() == ["Values", "Intervals", "Notes"]
    assert opened.said == []
    opened.page.close()
