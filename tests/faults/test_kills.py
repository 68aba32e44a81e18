"""Kills before random operations on files: what was there stays, the same call goes on or begins anew."""

import random
import shutil

import jax
import pytest

import lorax_kit as lk
from lorax_kit.commands import subject_of
from lorax_kit.commands.compress.comparison import compare
from lorax_kit.files.lines import read_lines
from lorax_kit.report.pages.compression import read_rows
from tests import tiny
from tests.faults import made
from tests.faults.processes import Process, command
from tests.faults.verdict import left_over

KILLS = 7
PASSING = ("train_seconds", "compiles", "adapter_bytes", "latency_ms", "latency_ratio", "seconds")


def lasting(row):
    return {k: v for k, v in row.items() if k not in PASSING and not k.startswith("latency")}


def save(folder):
    made.save_adapter(folder / "a", made.OTHERS, overwrite=True)


def study(folder):
    lk.run(made.STUDY, tiny.problem(), out=folder / "run", progress=False)


def comparison(folder, trained):
    compare(subject_of(trained), folder / "c", made.COMPARISON, **made.QUIET)


def again(call, done):
    """A call in this process; it may say that the killed one was done."""
    try:
        call()
    except (lk.LoraxError, SystemExit) as e:
        assert done.exists(), e


def prepared(name, folder, things, model):
    """(call in a process, its arguments, what reads its result) of a command that writes into `folder`."""
    trained, train = things["trained"], [*made.TRAIN, str(folder / "t")]
    compress = (
        "compress",
        str(trained),
        "--method",
        "svd",
        "--keep",
        "0.6",
        "--rounds",
        "0",
        "--batches",
        "2",
        "--out",
    )
    export = ("export", str(trained), "--format", "safetensors", "--rounds", "0", "--out")
    convert = ("convert", "--from", "orbax", str(model / "a"), "--base", str(model / "bert"), "--to", "peft")
    return {
        "save": (save, (folder,), lambda: made.read_adapter(folder / "a")),
        "study": (study, (folder,), lambda: [lasting(row) for row in made.read_folder(folder / "run")[0]]),
        "train": (command, train, lambda: trained_as(folder / "t")),
        "compress": (command, (*compress, str(folder / "small")), lambda: bytes_of(folder / "small/model.safetensors")),
        "compare": (comparison, (folder, trained), lambda: [lasting(row) for row in read_rows(folder / "c")[0]]),
        "export": (command, (*export, str(folder / "x")), lambda: bytes_of(folder / "x/model.safetensors")),
        "convert": (command, (*convert, str(folder / "p")), lambda: bytes_of(folder / "p/adapter_model.safetensors")),
    }[name]


def bytes_of(file):
    return file.read_bytes()


def trained_as(folder):
    rows = read_lines(folder / "metrics.jsonl")
    problem = tiny.problem()
    found = lk.load_adapter(folder / "adapter", base=problem.params(jax.random.fold_in(jax.random.key(0), 0)))
    return made.comparable(found.factors), [lasting(row) for row in rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small BERT, and an adapter of it."""
    from tests.commands.test_exchange import saved
    from tests.models.test_pretrained import write_folder

    folder = tmp_path_factory.mktemp("model")
    write_folder(folder / "bert")
    with jax.numpy_dtype_promotion("standard"):
        saved(folder / "bert", folder / "a", lk.LoRA(rank=2))
    return folder


def begin(name, folder):
    """What a user had before."""
    folder.mkdir(parents=True)
    made.save_adapter(folder / "old")
    if name == "save":
        made.save_adapter(folder / "a")


@pytest.mark.parametrize("name", ["save", "study", "train", "compress", "compare", "export", "convert"])
def test_a_killed_call_loses_nothing_and_is_made_again(name, things, model, tmp_path, injected):
    begin(name, tmp_path / "whole")
    target, args, read = prepared(name, tmp_path / "whole", things, model)
    process = Process(target, args, tmp_path / "whole")
    code, said = process.end()
    assert code == 0, said
    whole, operations = read(), process.count.value
    assert operations > 5
    assert left_over(tmp_path) == []
    draw = random.Random(name)
    moments = draw.sample(range(1, operations + 1), min(KILLS, operations))
    folders = [tmp_path / f"killed_{moment}" for moment in moments]
    for folder, moment in zip(folders, moments, strict=True):
        begin(name, folder)
        target, args, read = prepared(name, folder, things, model)
        killed = Process(target, args, folder, moment)
        assert killed.end()[0] == -9
        injected(f"kill -9 of {name}")
        assert made.read_adapter(folder / "old") == made.read_adapter(tmp_path / "whole/old")
        if name == "save":  # the old one or the new one, whole
            assert made.read_adapter(folder / "a") in (made.read_adapter(folder / "old"), whole)
        result = {"train": "t/adapter", "compress": "small", "export": "x", "convert": "p"}.get(name, "old")
        again(lambda: target(*args), folder / result)  # noqa: B023
        assert read() == whole, f"killed before operation {moment} of {operations}"
        made.save_adapter(folder / "next")
        assert left_over(folder) == []
        shutil.rmtree(folder)
