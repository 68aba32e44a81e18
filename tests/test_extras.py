"""What an extra brings, where it is missing: one wording, and the error of the room."""

import pytest

from lorax_kit import extras
from lorax_kit.data import read_rows
from lorax_kit.errors import StudyError
from lorax_kit.models.stored.gguf import read_gguf
from lorax_kit.study.frame import frame
from lorax_kit.study.running.cluster import library
from lorax_kit.study.search import search
from lorax_kit.study.trackers import tensorboard, wandb
from lorax_kit.tasks.texts import text_metrics

NEEDED = {
    "table": ("pandas", StudyError, lambda folder: frame([])),
    "search": ("optuna", StudyError, lambda folder: search(None, None, {}, out=folder / "run", rounds=1)),
    "cluster": ("ray", StudyError, lambda folder: library()),
    "track": ("tensorboard", StudyError, lambda folder: tensorboard(folder / "board")),
    "track, too": ("wandb", StudyError, lambda folder: wandb("project", folder / "runs")),
    "text": ("sacrebleu", ImportError, lambda folder: text_metrics(["a"], ["a"])),
    "llama": ("gguf", ImportError, lambda folder: read_gguf(folder / "a.gguf")),
    "data": ("pyarrow", ImportError, lambda folder: list(read_rows(folder / "a.parquet", {"text": "text"}))),
}


@pytest.mark.parametrize("name", NEEDED)
def test_what_is_missing_is_named_with_its_extra(name, tmp_path, monkeypatch):
    package, error, call = NEEDED[name]
    monkeypatch.setattr(extras, "find_spec", lambda module: None if module == package else object())
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error) as e:
        call(tmp_path)
    extra = name.partition(",")[0]
    assert str(e.value) == f"{package} is not installed.\n  install the extra: pip install 'lorax_kit[{extra}]'"
    assert sorted(tmp_path.iterdir()) == before
