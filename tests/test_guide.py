"""What README and guide name exists: commands with their options, targets, links, pages, and every public name."""

import pkgutil
import re
from pathlib import Path

import pytest

import lorax_kit
from lorax_kit.cli import cli

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "lorax_kit" / "guide"
PAGES = [ROOT / "README.md", *sorted(GUIDE.rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
IDENTIFIERS = re.compile(r"^::: (lorax_kit[\w.]*)$", re.MULTILINE)


def read(page):
    return page.read_text(encoding="utf-8")


def spans(page):
    """What stands as code: lines of console blocks, and code within the text, cells of tables among it."""
    blocks = re.findall(r"^```console\n(.*?)^```", read(page), re.DOTALL | re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", text)


@each_page
def test_commands_and_their_options_exist(page):
    for span in spans(page):
        for call in re.findall(r"lorax-kit ([a-z]+[^#\"&]*)", span):
            words = call.replace("[", " ").replace("]", " ").split()
            assert words[0] in cli.commands, span
            command = cli.commands[words[0]]
            if hasattr(command, "commands") and len(words) > 1:
                assert words[1] in command.commands, span
                command = command.commands[words[1]]
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            given = {word.rstrip(",;:").partition("=")[0] for word in words if word.startswith("--")}
            assert given <= known, (span, given - known)


def test_the_readme_names_the_two_commands():
    named = {span.split()[0] + " " + span.split()[1] for span in spans(ROOT / "README.md") if " " in span}
    assert {"make demo", ".venv/bin/lorax-kit train"} <= named


@each_page
def test_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for span in spans(page):
        for target in re.findall(r"^make ([a-z-]+)", span):
            assert f"\n{target}:" in makefile, target


def slug(heading):
    """The anchor of a heading, as Markdown's table of contents makes it."""
    text = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


@each_page
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), target
        if anchor:
            assert anchor in {slug(h) for h in re.findall(r"^#+ (.+)$", read(there), re.MULTILINE)}, target


def test_every_page_has_a_place_in_the_site():
    named = re.findall(r"[\w/-]+\.md\b", (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1])
    assert sorted(named) == sorted(str(page.relative_to(GUIDE)) for page in GUIDE.rglob("*.md"))


def test_every_public_name_is_in_the_reference_once():
    named = [name for page in (GUIDE / "reference").glob("*.md") for name in IDENTIFIERS.findall(read(page))]
    assert len(named) == len(set(named))
    assert {f"lorax_kit.{name}" for name in lorax_kit.__all__} <= set(named)


@pytest.mark.parametrize("page", sorted((GUIDE / "reference").glob("*.md")), ids=lambda page: page.stem)
def test_what_the_reference_names_has_a_docstring(page):
    for name in IDENTIFIERS.findall(read(page)):
        found = pkgutil.resolve_name(name)
        assert isinstance(found, str) or len(found.__doc__ or "") > 20, name


def test_every_experiment_that_is_named_exists():
    for page in PAGES:
        for name in re.findall(r"experiments/[\w/]+(?:\.\w+)?", read(page)):
            assert (ROOT / name).exists(), (page.name, name)
