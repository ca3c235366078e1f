"""What pages for users quote is said by the code, their links lead somewhere, and their options are ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from lpl_lightning.cli import main

PAGE = ROOT / "configs" / "troubleshooting.md"
PAGES = sorted(path for folder in ("configs", "lpl_lightning") for path in (ROOT / folder).rglob("*.md"))
PAGES += sorted(ROOT.glob("*.md"))


def said_by_the_code() -> str:
    """All strings of the package with what joins them left out."""
    text = "\n".join(path.read_text() for path in sorted((ROOT / "lpl_lightning").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_quoted_messages_are_those_of_the_code() -> None:
    said = said_by_the_code()
    quoted = re.findall(r'"([^"]+)"', PAGE.read_text())
    assert len(quoted) > 12
    for message in quoted:
        for part in message.split("..."):
            assert part.strip() in said, part


def links(page: Path) -> set[tuple[Path, str]]:
    """Files of the project that a page links to, each with its heading; without what stands in code."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    found = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    parted = [target.partition("#") for target in found]
    return {((page.parent / name).resolve() if name else page, heading) for name, _, heading in parted}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_headings(page: Path) -> None:
    for path, heading in links(page):
        assert path.exists(), path
        headings = {
            re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in (path.read_text().splitlines() if heading else [])
            if line.startswith("#")
        }
        assert not heading or heading in headings, (path, heading)


def test_every_page_is_reached_from_the_readme() -> None:
    found: set[Path] = set()
    ahead = {ROOT / "README.md"}
    while ahead:
        found |= ahead
        ahead = {path for page in ahead for path, _ in links(page) if path.suffix == ".md"} - found
    assert not set(PAGES) - found


def test_options_for_flags_of_the_public_example(capsys: pytest.CaptureFixture[str]) -> None:
    """All at once, as far as they have a value; those that name a part alone are in other tests."""
    page = (ROOT / "configs" / "README.md").read_text()
    _, _, table = page.partition("| flag of the example | here | |\n")
    rows = [row.split(" | ")[1] for row in table.split("\n\n")[0].splitlines()[1:]]
    options = [span for row in rows for span in re.findall(r"`((?:--|LOSS|CALLBACK)\S+ [^`]+)`", row)]
    assert len(options) > 25
    arguments = [str(ROOT / "configs" / "sdxl_lora_lpl.yaml")]
    for option in options:
        key, _, value = option.partition(" ")
        key = key.replace("LOSS", "--trainer.callbacks.loss.init_args").replace("CALLBACK", "--trainer.callbacks")
        arguments += [key, value]
    with pytest.raises(SystemExit) as ended:
        main(["fit", "-c", *arguments, "--print_config"])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    config = yaml.safe_load(said.out)
    (lpl,) = (each["init_args"] for each in config["trainer"]["callbacks"] if "LPLCallback" in each["class_path"])
    loss = lpl["loss"]["init_args"]
    assert (lpl["weight"], lpl["start_step"]) == (1.0, 1000)
    assert (loss["preset"], loss["threshold"]["ddpm_timestep"], loss["depth"]) == ("diffusers", 199, 5)
    assert (loss["reference_side"], loss["reduction"]) == (0, "mean_passed"), "not scaled to latents of side 128"
    assert config["model"]["init_args"]["lr_scheduler"]["init_args"]["total_iters"] == 500
    assert config["ckpt_path"] == "last"
