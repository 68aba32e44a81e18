"""Bits flipped and files cut short, in every region of everything that is written: noticed, or without effect."""

import itertools
import random
import shutil

import pytest

from lorax_kit.study.folder.store import JSONL
from tests.faults import made
from tests.faults.verdict import outcome

REGIONS = 16
KINDS = [name for name in made.READ if name != "run"]


def regions(file, count, draw):
    """Positions in a file, one in each of `count` equal parts."""
    size = file.stat().st_size
    edges = [i * size // count for i in range(count + 1)]
    return [draw.randrange(a, b) for a, b in itertools.pairwise(edges) if b > a]


def damaged(file, content, draw):
    """The file, with a bit flipped in each region, and cut short in each; (kind of fault) by fault."""
    for at in regions(file, REGIONS, draw):
        file.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :])
        yield "bit flipped", at
    for at in regions(file, REGIONS // 4, draw):
        file.write_bytes(content[:at])
        yield "file cut short", at
    file.write_bytes(content)


def files_of(path):
    return sorted(p for p in path.rglob("*") if p.is_file() and p.stat().st_size) if path.is_dir() else [path]


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_noticed_or_changes_nothing(things, tmp_path, injected, kind):
    path, draw, missed = tmp_path / kind, random.Random(kind), []
    (shutil.copytree if things[kind].is_dir() else shutil.copyfile)(things[kind], path)
    (tmp_path / "trained").symlink_to(things["trained"])
    whole = made.READ[kind](path)
    for file in files_of(path):
        if file.suffix in (".html", ".csv", ".svg", ".png", ".pdf", ".lock"):
            continue
        for fault, at in damaged(file, file.read_bytes(), draw):
            injected(fault)
            said, found = outcome(lambda: made.READ[kind](path), path, file.name)
            # A note tells of a changed config; a comparison and a training make a row again that a kill cut.
            told = (kind == "peft" and found and found[0]) or (
                kind in ("comparison", "log") and "short" in fault and found and found[0] == whole[0][: len(found[0])]
            )
            if not said and not (found == whole or told):
                missed.append((file.name, fault, at))
    assert missed == []
    assert made.READ[kind](path) == whole


@pytest.mark.parametrize("name", ["study.json", *JSONL])
def test_damage_of_a_run_folder_is_noticed_or_said(things, tmp_path, injected, name):
    path, draw, missed = tmp_path / "run", random.Random(name), []
    shutil.copytree(things["run"], path)
    whole, file = made.read_folder(path), path / name
    for fault, at in damaged(file, file.read_bytes(), draw):
        injected(fault)
        said, found = outcome(lambda: made.read_folder(path), path)
        cut = fault == "file cut short" and found is not None and made.is_told(path)
        if not said and found != whole and not cut:
            missed.append((fault, at))
    assert missed == []
