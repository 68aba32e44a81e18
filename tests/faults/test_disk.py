"""Disks that fill up, limits on files, read-only and forbidden folders: one line says so, and nothing is lost."""

import shutil
from pathlib import Path

import jax
import pytest

import lorax_kit as lk
from lorax_kit.serve import save_tensors
from lorax_kit.training import saved
from tests import tiny
from tests.faults import made
from tests.faults.places import file_limit, forbidden, left, read_only, small_disk
from tests.faults.verdict import in_words, left_over, outcome

CHANGED = jax.tree.map(lambda x: x + 1, made.PARAMS)


def save_training(path, changed=False, **_):
    factors = made.OTHERS if changed else made.FACTORS
    saved.save_training(path, saved.Saved(factors, [{"loss": 0.5}]), {"lr": 0.1})


WRITERS = {
    "adapter": lambda path, changed, **o: made.save_adapter(path, made.OTHERS if changed else made.FACTORS, **o),
    "peft": lambda path, changed, **o: made.save_peft(path, made.OTHERS if changed else made.FACTORS, **o),
    "tensors": lambda path, changed, **o: save_tensors(path, CHANGED if changed else made.PARAMS, **o),
    "program": lambda path, changed, **o: made.save_program(path, **o),
    "training.npz": save_training,
}
PLACES = {
    "disk full": lambda folder: [left(folder, kib) for kib in (0, 4, 8, 12, 16, 24, 32, 48, 64)],
    "limit on files": lambda folder: [file_limit(size) for size in (0, 64, 256, 1024, 4096)],
    "disk read-only": lambda folder: [read_only(folder)],
    "permission lost": lambda folder: [forbidden(folder)],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_save_that_cannot_be_written_says_why_and_keeps_the_old(kind, place, injected):
    write, read = WRITERS[kind], made.READ[kind]
    refused = 0
    with small_disk(1024) as disk:
        folder = disk / "results"
        folder.mkdir()
        path, new = folder / kind, folder / f"new_{kind}"
        write(path, False)
        old = read(path)
        where = folder if place == "permission lost" else disk
        for faults in zip(PLACES[place](where), PLACES[place](where), strict=True):
            held = old
            for fault, target, options in zip(faults, (path, new), ({"overwrite": True}, {}), strict=True):
                with fault:
                    injected(place)
                    said, _ = outcome(lambda: write(target, True, **options), folder)  # noqa: B023
                refused += said
                assert left_over(folder) == []
                if said:
                    assert read(path) == held
                    assert not new.exists()
                elif target == path:
                    held = read(path)
            write(path, False, overwrite=True)
            assert read(path) == old
            if new.exists():
                (shutil.rmtree if new.is_dir() else Path.unlink)(new)
    assert refused


def rows(results):
    passing = ("train_seconds", "compiles", "adapter_bytes")
    return [{k: v for k, v in row.items() if k not in passing} for row in results.rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return rows(study(tmp_path_factory.mktemp("whole") / "run"))


def study(out):
    return lk.run(made.STUDY, tiny.problem(), out=out, progress=False)


@pytest.mark.parametrize("kib", [0, 8, 16, 40, 80, 120, 200])
def test_a_study_on_a_full_disk_goes_on_when_there_is_room(kib, whole, injected, monkeypatch):
    monkeypatch.setattr("lorax_kit.study.programs.engine.SAVE_SECONDS", 0.0)
    with small_disk(4096) as disk:
        with left(disk, kib):
            injected("disk full in a study")
            said, found = outcome(lambda: study(disk / "run"), disk)
            assert said or rows(found) == whole
        assert rows(study(disk / "run")) == whole
        assert left_over(disk) == []


@pytest.mark.parametrize("place", ["disk read-only", "permission lost", "limit on files"])
def test_a_study_that_may_not_write_says_so(place, whole, injected):
    with small_disk(4096) as disk:
        study(disk / "run")
        with PLACES[place](disk if place == "disk read-only" else disk / "run")[0]:
            injected(f"{place} in a study")
            more = tiny.study(rank=[1, 2, 4], probe_lr=(), steps=8, eval_every=4)
            with pytest.raises(lk.LoraxError) as e:
                lk.run(more, tiny.problem(), out=disk / "run", progress=False)
            in_words(e.value, disk)
        assert rows(study(disk / "run")) == whole
        assert left_over(disk) == []


def test_a_page_that_cannot_be_written_leaves_the_old_one(injected):
    from lorax_kit.files.staging import replace_file

    with small_disk(256) as disk:
        page = disk / "page.html"
        replace_file(page, b"old" * 1000)
        for fault in (left(disk, 0), left(disk, 4), file_limit(100), read_only(disk)):
            with fault:
                injected("page not written")
                said, _ = outcome(lambda: replace_file(page, b"new" * 10_000), page)
            assert said
            assert page.read_bytes() == b"old" * 1000
            assert left_over(disk) == []
