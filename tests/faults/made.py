"""One of every kind of file that this package writes, tiny, and what reading it gives."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.commands import Recipe, compress_subject, save_small, subject_of
from lorax_kit.commands.compress.comparison import Comparison, compare
from lorax_kit.commands.compress.compression import load_small
from lorax_kit.files.lines import read_lines
from lorax_kit.report import read_run
from lorax_kit.report.pages.compression import read_rows
from lorax_kit.serve import load_stablehlo, load_tensors, save_stablehlo, save_tensors
from lorax_kit.study.folder.store import RunStore
from lorax_kit.training import saved
from tests import tiny

PARAMS = tiny.params(jax.random.key(0))
SPEC = lk.Spec({"{up,down}/kernel": lk.LoRA(rank=2, alpha=4), "head/bias": lk.Full()})
PLAN = lk.resolve(SPEC, PARAMS, tiny.apply, tiny.points(0, 4))
BASE, _FRESH = lk.split(PARAMS, PLAN, jax.random.key(1))
FACTORS = jax.tree.map(lambda x: x + 0.25, _FRESH)
OTHERS = jax.tree.map(lambda x: x - 0.5, _FRESH)
NAMES = {"up/kernel": "up.weight", "down/kernel": "down.weight", "head/bias": "head.bias"}
STUDY = tiny.study(rank=[1, 2], probe_lr=(), steps=8, eval_every=4)
QUIET = {"rounds": 0, "progress": False}
COMPARISON = Comparison(methods=("int8", "svd"), keeps=(0.6,), batches=2)
TRAIN = [
    *("train", "--problem", "tests.tiny:built", "--target", "{up,down}/kernel", "--rank", "2", "--lr", "0.01"),
    *("--epochs", "2", "--steps-per-epoch", "6", "--json", "--out"),
]


def save_adapter(path, factors=FACTORS, **options):
    lk.save_adapter(path, PLAN, factors, base=BASE, **options)


def save_peft(path, factors=FACTORS, **options):
    lk.save_peft(path, PLAN, factors, base=BASE, names=NAMES, **options)


def program(params, x):
    return tiny.apply(params, tiny.Points(x, None))


def save_program(path, **options):
    save_stablehlo(path, program, PARAMS, {"x": tiny.points(0, 4).x}, **options)


def everything(folder: Path) -> dict[str, Path]:
    """Write one of each kind."""
    paths = {name: folder / name for name in ("adapter", "peft", "spec", "tensors", "program", "run", "comparison")}
    save_adapter(paths["adapter"])
    save_peft(paths["peft"])
    paths["spec"].write_text(SPEC.to_json())
    save_tensors(paths["tensors"], PARAMS)
    save_program(paths["program"])
    lk.run(STUDY, tiny.problem(), out=paths["run"], progress=False)
    main([*TRAIN, str(folder / "trained")])
    subject = subject_of(folder / "trained")
    row, small = compress_subject(subject, Recipe(method="svd", keep=0.6), **QUIET)
    save_small(folder / "small", subject, row, small)
    compare(subject, paths["comparison"], COMPARISON, **QUIET)
    saved.save_training(folder / "training.npz", saved.Saved(FACTORS, [{"loss": 0.5}]), {"lr": 0.1})
    paths["log"] = folder / "trained" / "metrics.jsonl"
    return paths | {name: folder / name for name in ("trained", "small", "training.npz")}


def comparable(x):
    """Arrays as bytes, so that results compare by `==`."""
    leaves, treedef = jax.tree.flatten(x)
    return str(treedef), [
        (np.asarray(y).tobytes(), str(np.asarray(y).dtype)) if hasattr(y, "dtype") else y for y in leaves
    ]


def read_folder(path):
    run = read_run(path)
    identity = json.loads((path / "study.json").read_text())["identity"]
    store = RunStore(path, identity)
    return run.trials, run.curves, run.spectra, run.study, sorted(store.finished)


def read_small(path, trained):
    row, small = load_small(path, subject_of(trained))
    return row, comparable(small.params)


def read_adapter(path):
    found = lk.load_adapter(path, base=BASE)
    return found.plan, comparable(found.factors)


def read_peft(path):
    found = lk.load_peft(path, base=BASE, names=NAMES)
    return found.meta.get("notes"), comparable(found.factors), [site.scale for site in found.plan.sites]


def read_training(path):
    found = saved.load_training(path, FACTORS, {"lr": 0.1})
    return comparable(found.state), found.history


READ = {
    "adapter": read_adapter,
    "peft": read_peft,
    "spec": lambda path: lk.Spec.from_json(path.read_bytes()),
    "tensors": lambda path: comparable(load_tensors(path)),
    "program": lambda path: comparable(load_stablehlo(path)(jnp.asarray(tiny.points(0, 4).x))),
    "run": read_folder,
    "comparison": lambda path: read_rows(path),
    "log": lambda path: (read_lines(path),),
    "training.npz": read_training,
    "small": lambda path: read_small(path, path.parent / "trained"),
}


def is_told(path):
    """Whether the report of a folder says that rows are missing."""
    run = read_run(path)
    return not run.finished or bool(run.notes)
