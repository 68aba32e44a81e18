"""Designs of studies and settings of problems, as a JSON file of `lorax-kit study` gives them."""

import json

from hypothesis import strategies as st

from lorax_kit.cli.studies import _config
from lorax_kit.problems import problem_from
from lorax_kit.problems.load import settings_from
from lorax_kit.study import Study
from tests import tiny
from tests.fuzz.inputs import changed, json_text, mutated
from tests.fuzz.verdict import NOTHING, run, taken

HALVING = {"kind": "halving", "first": 5, "every": 5, "keep": 0.5}
DESIGNS = [
    tiny.study().to_dict(),
    tiny.study(hyper={"b2": [0.99, 0.999]}, batch_size=[4, None], settings={"lora": {}}).to_dict(),
    tiny.study(grids=[{"variant": ["ia3"], "rank": [1], "alpha": [None]}, {"rank": [2, 4]}]).to_dict(),
    {**tiny.study().to_dict(), "sample": {"n": 3, "ranges": {"lr": {"low": 1e-4, "high": 1e-2}}, "seed": 1}},
    {**tiny.study().to_dict(), "stop": HALVING},
]
PROBLEMS = [
    {"name": "sentiment", "source": "imdb"},
    {"task": "classify", "model": "minilm", "data": "rows.csv", "text": "text", "label": "label", "length": 16},
    {"task": "lm", "model": "smollm2", "data": "rows.txt", "length": 16, "val": 0.1},
    {"task": "qa", "model": "minilm", "data": "rows.jsonl", "question": "q", "context": "c"},
]


def test_designs_of_studies(tried):
    def check(draw, said):
        tree = changed(draw, draw(st.sampled_from(DESIGNS)))
        said += [tree]
        found = taken(lambda: Study.from_dict(tree))
        if found is not NOTHING:
            again = Study.from_dict(json.loads(json.dumps(found.to_dict())))
            assert [t.name for t in again.trials()] == [t.name for t in found.trials()]

    run(check, 1000, tried, "designs of studies")


def test_settings_of_problems(tried, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def check(draw, said):
        tree = changed(draw, draw(st.sampled_from(PROBLEMS)))
        said += [tree]
        taken(lambda: settings_from(tree) if isinstance(tree, dict) else problem_from(tree), tmp_path)

    run(check, 1000, tried, "settings of problems")


def test_addresses_of_problems(tried, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [
        "tests.tiny",
        "tests.tiny:built",
        ":",
        "built",
        "unmarked",
        ".",
        "..",
        "/",
        "\0",
        "os:system",
        "a b",
        "",
        "é",
    ]

    def check(draw, said):
        address = "".join(draw(st.lists(st.sampled_from(parts), max_size=3)))
        said += [address]
        taken(lambda: problem_from(address), tmp_path)
        taken(lambda: problem_from({"address": address, "rows": 8}), tmp_path)

    run(check, 300, tried, "addresses of problems")


def test_files_of_studies(tried, tmp_path):
    file = tmp_path / "study.json"
    whole = {"problem": PROBLEMS[0], "study": DESIGNS[0]}

    def check(draw, said):
        text = json_text(whole).encode()
        text = mutated(draw, text) if draw(st.booleans()) else json_text(changed(draw, whole)).encode()
        said += [text]
        file.write_bytes(text)
        taken(lambda: _config(str(file)), tmp_path)

    run(check, 1000, tried, "files of studies")
