"""Every example in a docstring runs and prints what it says; the code of the README and of the guide's pages runs."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lorax_kit

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDE = ROOT / "lorax_kit" / "guide"
MODULES = [m.name for m in pkgutil.walk_packages(lorax_kit.__path__, "lorax_kit.") if not m.name.endswith("__main__")]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [file.stem for file in sorted(GUIDE.glob("*.md")) if BLOCK.search(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, standard_promotion):
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


@pytest.mark.parametrize("name", lorax_kit.__all__)
def test_public_names_are_documented(name):
    found = getattr(lorax_kit, name)
    assert isinstance(found, str) or len(found.__doc__ or "") > 20


def run_blocks(file, folder):
    """What the Python blocks of a page print, as a user would run them: one script, JAX's own defaults."""
    blocks = BLOCK.findall(file.read_text(encoding="utf-8"))
    script = folder / f"{file.stem.lower()}_page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    found = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_readme_code_runs(tmp_path):
    assert "trained of" in run_blocks(README, tmp_path)


def test_readme_is_short_and_its_code_stands_at_the_top():
    """A reader sees within a screen how the package is called; the rest is in the guide."""
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines, 1) if re.search(r"\blk\.\w+\(", line))
    assert first <= 40
    assert "```python" in lines[:first]


@cache
def printed(page, folder):
    return run_blocks(GUIDE / f"{page}.md", folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.mark.parametrize("page", PAGES)
def test_guide_code_runs(page, folder):
    printed(page, folder)


def test_the_calls_of_the_concepts_page_are_those_of_a_run(folder):
    text = (GUIDE / "concepts.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| (\d+) \| `([^`]+)` \| `([^`]+)` \|", text, re.MULTILINE)
    calls = ["Adapted.__call__", *(name for _, name, _ in table)]
    assert [int(number) for number, *_ in table] == list(range(1, 10))
    assert f"9 calls: {' -> '.join(calls)}\n" in printed("concepts", folder)
    assert "there are nine calls:" in text
    for _, name, file in table:
        source = (ROOT / "lorax_kit" / "transform" / file).read_text(encoding="utf-8")
        assert f"def {name.split('.')[-1]}(" in source, (name, file)
