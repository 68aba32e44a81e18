"""Every example in a docstring runs and prints what it says; so does the README's code."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorax_kit

README = Path(__file__).parent.parent / "README.md"
MODULES = [m.name for m in pkgutil.walk_packages(lorax_kit.__path__, "lorax_kit.") if not m.name.endswith("__main__")]
PUBLIC = [name for name in lorax_kit.__all__ if callable(getattr(lorax_kit, name)) and name[0].islower()]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, standard_promotion):
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


@pytest.mark.parametrize("name", lorax_kit.__all__)
def test_public_names_are_documented(name):
    found = getattr(lorax_kit, name)
    assert isinstance(found, str) or len(found.__doc__ or "") > 20


def test_readme_code_runs(tmp_path):
    """As a user would run it: one script, JAX's own defaults."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    found = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert "trained of" in found.stdout


def test_readme_commands_exist():
    """Every `lorax-kit X` and `make X` of the README is a command or a target."""
    from lorax_kit.cli import cli

    text = README.read_text(encoding="utf-8")
    commands = set(re.findall(r"lorax-kit ([a-z]+)", text))
    assert commands
    assert commands <= set(cli.commands)
    makefile = (README.parent / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)`|^make ([a-z-]+)", text, re.MULTILINE))
    for target in {a or b for a, b in targets}:
        assert f"\n{target}:" in makefile, target
