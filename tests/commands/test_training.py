"""`lorax-kit train` after an interruption: it goes on, and says so."""

import json

import jax
import pytest

import lorax_kit as lk
import lorax_kit.commands.adapters.training as module
from lorax_kit.commands import evaluate_adapter, train_adapter
from lorax_kit.report.pages.training import data_text
from tests import tiny

pytestmark = pytest.mark.usefixtures("standard_promotion")


def train(out, problem=None, **changes):
    settings = {"setting": lk.LoRA(rank=2, alpha=4), "lr": 1e-2, "seed": 0, "targets": ["up/kernel"], "epochs": 2}
    options = {"out": out, "steps_per_epoch": 2, "progress": False}
    return train_adapter(problem or tiny.problem(facts={}), **{**options, **settings, **changes})


def test_dropout_and_the_penalty_of_the_method_act(tmp_path):
    def loss(name, setting):
        return train(tmp_path / name, setting=setting)["test_loss"]

    assert loss("wet", lk.LoRA(rank=2, alpha=4, dropout=0.5)) != loss("dry", lk.LoRA(rank=2, alpha=4))
    assert loss("again", lk.LoRA(rank=2, alpha=4, dropout=0.5)) == loss("once", lk.LoRA(rank=2, alpha=4, dropout=0.5))
    assert loss("weak", lk.AdaLoRA(rank=2, orthogonal=0.0)) != loss("strong", lk.AdaLoRA(rank=2, orthogonal=50.0))


def test_an_interrupted_training_goes_on_and_each_epoch_is_logged_once(tmp_path, monkeypatch, capsys):
    fit, calls = module.fit, []

    def interrupted(*args, evaluate, **options):
        def measured(factors):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return evaluate(factors)

        return fit(*args, evaluate=measured, **options)

    monkeypatch.setattr(module, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "o")
    with pytest.raises(lk.LoraxError, match=r"other settings: lr was 0\.01, and is 0\.02"):
        train(tmp_path / "o", lr=0.02)
    assert "going on" in capsys.readouterr().err
    with pytest.raises(lk.AdapterError, match="a training that is not finished"):
        evaluate_adapter(tmp_path / "o")
    again, whole = train(tmp_path / "o"), train(tmp_path / "whole")
    assert again["test_loss"] == whole["test_loss"]
    assert [json.loads(x)["epoch"] for x in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    names = [".lock", "adapter", "metrics.jsonl", "plots", "report.html"]
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == names
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text('{"epoch": 1}\n')
    train(tmp_path / "old", epochs=1)
    assert "without an adapter: beginning anew" in capsys.readouterr().err
    assert len((tmp_path / "old" / "metrics.jsonl").read_text().splitlines()) == 1
    assert jax.tree.leaves(lk.load_adapter(tmp_path / "old" / "adapter", base=tiny.params(jax.random.key(0))).factors)


def test_a_training_that_ends_before_its_page_writes_it_when_called_again(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as here:
        here.setattr(module, "write_training_report", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut")
    assert (tmp_path / "cut/adapter").exists()
    again = train(tmp_path / "cut")
    assert again["test_loss"] == whole["test_loss"]
    assert (tmp_path / "cut/report.html").exists()
    with pytest.raises(lk.AdapterError, match="that training is finished"):
        train(tmp_path / "cut")
    base = tiny.problem(facts={}).params(jax.random.key(0))
    same = [lk.load_adapter(tmp_path / name / "adapter", base=base).factors for name in ("whole", "cut")]
    assert same[0]["up/kernel"].b.tobytes() == same[1]["up/kernel"].b.tobytes()


def test_a_problem_with_state_and_keys_is_trained_and_chosen_by_its_metric(tmp_path):
    from tests.problem.test_problems import normalising

    problem = normalising()
    found = train(tmp_path / "o", problem, targets=["params/up/kernel"], epochs=3)
    assert {"loss", "val_loss", "val_accuracy", "accuracy"} <= set(found["history"][0])
    best = max(row["val_accuracy"] for row in found["history"])
    base = problem.params(jax.random.key(0))
    adapter = lk.load_adapter(tmp_path / "o" / "adapter", base=base)
    merged = lk.merge(base, adapter.factors, adapter.plan)
    assert float(abs(merged["batch_stats"]["mean"]).max()) > 0
    right = [(problem.apply(merged, b).argmax(-1) == b.label).mean() for b in problem.val]
    assert best == pytest.approx(float(right[0]))


def test_an_epoch_of_unknown_length_says_so(tmp_path):
    with pytest.raises(lk.StudyError, match="problem 'points' does not say how many steps an epoch has"):
        train(tmp_path / "o", steps_per_epoch=None)
    assert not (tmp_path / "o").exists()


def test_the_page_of_a_training_says_what_was_kept_and_what_to_doubt(tmp_path):
    done = train(tmp_path / "o", epochs=3)
    page = (tmp_path / "o" / "report.html").read_text()
    assert done["report"] == str(tmp_path / "o" / "report.html")
    chief = tiny.problem(facts={}).chief
    values = [row[f"val_{chief.name}"] for row in done["history"]]
    best = values.index(max(values) if chief.better == "higher" else min(values))
    assert f"kept is epoch {best + 1} of 3" in page
    assert page.count('<tr class="best">') == 1
    assert f"test_{chief.name}" in done
    assert (tmp_path / "o" / "plots" / "training.svg").exists()


def test_what_was_read_is_told_in_one_line():
    facts = {"rows": 1300, "train": 1000, "val": 100, "test": 100, "left_out": {"equal to an earlier row": 100}}
    assert data_text(facts) == "1,300 rows: 1,000 train, 100 val, 100 test; left out 100 equal to an earlier row"
    assert data_text(facts | {"cut": 3, "length": 64}).endswith("; 3 cut at 64 tokens")
