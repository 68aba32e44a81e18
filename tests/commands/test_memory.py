"""`train` in little memory: a quantised model, everything formed again, a limit that is told before work starts."""

import json

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.commands import train_adapter
from lorax_kit.commands.adapters.evaluation import evaluate_adapter, evaluate_base
from lorax_kit.commands.adapters.generation import author_of, generate
from lorax_kit.commands.adapters.memory import bytes_of
from lorax_kit.core.paths import flatten
from lorax_kit.core.quantised import Quantised
from lorax_kit.measure import held_memory, peak_memory, release_memory
from lorax_kit.problems import Classify, Language
from tests.problems.folders import write_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

WORDS = ["red", "green", "blue", "house", "car", "the", "a", "is", "in", "and", "."]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("m"), np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 9)), "label": "ab"[i % 2]}) for i in range(60)]
    (root / "a.jsonl").write_text("\n".join(lines))
    return write_model(root / "llama", WORDS, "llama", eos_token_id=3), str(root / "a.jsonl")


def language(files, **changes):
    return Language(model=files[0], data=files[1], length=16, batch_size=2, **changes)


def train(out, problem, **changes):
    options = {"setting": lk.LoRA(rank=2), "lr": 1e-2, "seed": 0, "epochs": 1, "steps_per_epoch": 2}
    return train_adapter(problem, out=out, progress=False, **{**options, **changes})


def test_a_quantised_model_is_trained_and_remembered(tmp_path, files):
    problem = language(files, quantise="nf4")
    params = flatten(problem.build().params(jax.random.key(0)))[0]
    assert {p.rsplit("/", 1)[-1] for p, x in params.items() if isinstance(x, Quantised)} == {"kernel"}
    found = train(tmp_path / "o", problem, save_memory=True)
    plain = train(tmp_path / "plain", problem)
    assert found["test_loss"] == pytest.approx(plain["test_loss"], rel=1e-5)
    assert evaluate_adapter(tmp_path / "o")["test_loss"] == pytest.approx(found["test_loss"], rel=1e-6)
    assert evaluate_base(problem.build())["test_loss"] != evaluate_base(language(files).build())["test_loss"]
    assert generate(author_of(tmp_path / "o"), ["the red"], max_new_tokens=3)["texts"][0]["tokens"]


def test_other_tasks_take_quantised_models(tmp_path, files):
    problem = Classify(model=files[0], data=files[1], length=16, batch_size=4, quantise="int8")
    assert np.isfinite(train(tmp_path / "o", problem)["test_loss"])
    with pytest.raises(lk.StudyError, match="problem quantise is 'nf5'; choose from int8, int4, nf4, or leave it out"):
        language(files, quantise="nf5")


def test_a_limit_fails_before_work_starts_and_the_peak_is_told(tmp_path, files):
    with pytest.raises(lk.LoraxError, match=r"training would take .* at most 1\.0 MiB are allowed") as told:
        train(tmp_path / "o", language(files), max_memory=2**20)
    assert "--save-memory" in str(told.value)
    assert not (tmp_path / "o").exists()
    held, most = held_memory(), peak_memory()
    assert 0 < held <= most
    found = train(tmp_path / "o", language(files), max_memory=64 * 2**30)
    assert found["peak_memory_bytes"] >= most
    release_memory()


def test_sizes_and_the_command(tmp_path, files, capsys):
    assert [bytes_of(x) for x in ("3GiB", "1.5 mb", "7")] == [3 * 2**30, 3 * 2**19, 7]
    with pytest.raises(lk.LoraxError, match="'lots' is no size of memory; give one such as 3GiB or 800MiB"):
        bytes_of("lots")
    for odd in ("9" * 400, "\u0663GiB", "1e400", "nan", "0", "0x10"):
        with pytest.raises(lk.LoraxError, match=r"is no size of memory; give one such as 3GiB or 800MiB\.$"):
            bytes_of(odd)
    command = ["train", "--model", files[0], "--task", "lm", "--data", files[1], "--quantise", "int4", "--length", "16"]
    more = ["--rank", "2", "--epochs", "1", "--steps-per-epoch", "1", "--save-memory", "--max-memory", "40GiB"]
    main([*command, *more, "--json", "--out", str(tmp_path / "o")])
    assert json.loads(capsys.readouterr().out)["peak_memory_bytes"] > 2**20
    with pytest.raises(SystemExit):
        main(["train", "--quantise", "nf4", "--out", str(tmp_path / "x")])
    assert "--quantise goes with --task" in capsys.readouterr().err
