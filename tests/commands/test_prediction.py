"""`predict` answers rows as `evaluate` measures them, without the rows that an adapter was trained on."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.commands import evaluate_adapter, train_adapter
from lorax_kit.commands.adapters.prediction import predict
from lorax_kit.problems import Answer, Chat, Choose, Classify, Regress
from lorax_kit.tasks import exact_match, word_f1
from tests.problems.folders import write_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

COLOURS, THINGS = ["blue", "green", "red"], ["house", "car", "tree", "lamp", "bird", "boat"]
OTHERS = "the a is in where which one does live ? . question : answer and user assistant"
WORDS = [*COLOURS, *THINGS, *OTHERS.split()]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: write_model(root / family, WORDS, family) for family in ("bert", "llama")}


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        colour, *things = rng.choice(COLOURS), *rng.choice(THINGS, 1 + rng.integers(6))
        yield f"the {colour} {' and '.join(things)}", str(colour)


def distinct(count, seed=0):
    return list(dict(texts(3 * count, seed)).items())[:count]


def table(file, header, lines):
    with open(file, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([header, *lines])
    return str(file)


def lines(file, found):
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(file)


def trained(settings, out, setting=None, **more):
    options = {"lr": 2e-2, "seed": 0, "epochs": 1, "steps_per_epoch": 3, "progress": False} | more
    train_adapter(settings.build(), setting or lk.LoRA(rank=2), out=out, **options)
    return out


def measured_on(adapter, other):
    return evaluate_adapter(adapter, files={"test_data": other})


def test_classes_are_those_that_evaluate_counts(tmp_path, models, capsys):
    data = table(tmp_path / "a.csv", ["body", "colour"], distinct(60))
    settings = Classify(data=data, model=models["bert"], text="body", label="colour", batch_size=8)
    out = trained(settings, tmp_path / "o", steps_per_epoch=30)
    new = [(f"a {text}", label) for text, label in distinct(70, seed=1)]
    other = table(tmp_path / "b.csv", ["body", "colour"], new)
    measured = measured_on(out, other)
    (tmp_path / "a.csv").unlink()  # a trained adapter answers without the rows that it was trained on
    found = predict(out, data=other)
    assert [row["text"] for row in found["answers"]] == [text for text, _ in new]
    right = [row["label"] == label for row, (_, label) in zip(found["answers"], new, strict=True)]
    assert 0.4 < np.mean(right) == pytest.approx(measured["test_accuracy"], abs=1e-6)
    nll = [-np.log(row["probabilities"][label]) for row, (_, label) in zip(found["answers"], new, strict=True)]
    assert np.mean(nll) == pytest.approx(measured["test_loss"], rel=1e-4)
    unlabelled = table(tmp_path / "c.csv", ["id", "words"], list(enumerate(text for text, _ in new)))
    assert predict(out, data=unlabelled, columns={"text": "words"})["answers"] == found["answers"]
    by_text = predict(out, [text for text, _ in new])["answers"]
    assert by_text == found["answers"]
    (tmp_path / "t.txt").write_text("\n".join(text for text, _ in new[1:]))
    main(["predict", str(out), new[0][0], "--texts", str(tmp_path / "t.txt")])
    assert capsys.readouterr().out.splitlines() == [f"{x['label']}\t{x['probability']:.4f}" for x in by_text]
    main(["predict", str(out), "--data", other, "--json"])
    assert json.loads(capsys.readouterr().out)["answers"] == found["answers"]


def test_several_classes_and_quantised_bases(tmp_path, models, capsys):
    rows = [{"text": text, "label": [label, *(["long"] if len(text) > 25 else [])]} for text, label in distinct(60)]
    settings = Classify(
        data=lines(tmp_path / "a.jsonl", rows), model=models["bert"], several=True, quantise="int8", batch_size=8
    )
    out = trained(settings, tmp_path / "o", steps_per_epoch=30)
    new = [{"text": f"a {row['text']}", "label": row["label"]} for row in rows]
    measured = measured_on(out, lines(tmp_path / "b.jsonl", new))
    found = predict(out, [row["text"] for row in new])["answers"]
    right = [sorted(x["labels"]) == sorted(row["label"]) for x, row in zip(found, new, strict=True)]
    assert np.mean(right) == pytest.approx(measured["test_accuracy"], abs=1e-6)
    assert all((x["probabilities"][name] > 0.5) == (name in x["labels"]) for x in found for name in x["probabilities"])
    main(["predict", str(out), new[0]["text"]])
    assert capsys.readouterr().out.split("\t")[0] == ", ".join(found[0]["labels"])


def test_numbers_are_in_the_units_of_the_labels(tmp_path, models, capsys):
    data = table(tmp_path / "a.csv", ["text", "label"], [(text, 100 + 7 * len(label)) for text, label in distinct(60)])
    out = trained(Regress(data=data, model=models["bert"], batch_size=8), tmp_path / "o")
    new = [(f"a {text}", 100 + 7 * len(label)) for text, label in distinct(20, seed=1)]
    measured = measured_on(out, table(tmp_path / "b.csv", ["text", "label"], new))
    found = [row["value"] for row in predict(out, [text for text, _ in new])["answers"]]
    assert np.mean(np.abs(np.subtract(found, [y for _, y in new]))) == pytest.approx(measured["test_mae"], rel=1e-4)
    main(["predict", str(out), new[0][0]])
    assert float(capsys.readouterr().out) == pytest.approx(found[0], rel=1e-4)


def passages(count):
    for i in range(count):
        thing, other = THINGS[i % 6], THINGS[(i // 6) % 6]
        filler = f"the {COLOURS[i % 3]} tree . " * (12 if i % 3 == 0 else 1)
        yield {"q": f"where is {i} ?", "p": f"a {other} is in the {thing} . {filler} {i}", "a": thing}


def test_answers_are_spans_of_their_passages(tmp_path, models):
    settings = {"question": "q", "context": "p", "answer": "a", "length": 32, "overlap": 8, "batch_size": 8}
    rows = list(passages(60))
    data = lines(tmp_path / "a.jsonl", rows[:40])
    out = trained(Answer(data=data, model=models["bert"], **settings), tmp_path / "o")
    measured = measured_on(out, lines(tmp_path / "b.jsonl", rows[40:]))
    asked = lines(tmp_path / "c.jsonl", [{"q": row["q"], "p": row["p"]} for row in rows[40:]])
    found = predict(out, data=asked)["answers"]
    assert all(x["answer"] and x["answer"] in row["p"] for x, row in zip(found, rows[40:], strict=True))
    for name, measure in (("f1", word_f1), ("exact_match", exact_match)):
        values = [measure(x["answer"], row["a"]) for x, row in zip(found, rows[40:], strict=True)]
        assert np.mean(values) == pytest.approx(measured[f"test_{name}"], abs=1e-6)


def test_choices_are_those_that_evaluate_counts(tmp_path, models):
    rng = np.random.default_rng(0)
    rows = [
        {"question": f"which one {i}", "choices": [str(x) for x in rng.choice(THINGS, 2 + i % 3, replace=False)]}
        for i in range(40)
    ]
    full = [{**row, "answer": row["choices"][i % 2]} for i, row in enumerate(rows)]
    data = lines(tmp_path / "a.jsonl", full[:25])
    settings = Choose(data=data, model=models["llama"], batch_size=4)
    out = trained(settings, tmp_path / "o")
    measured = measured_on(out, lines(tmp_path / "b.jsonl", full[25:]))
    found = predict(out, data=lines(tmp_path / "c.jsonl", rows[25:]))["answers"]
    right = [x["answer"] == row["answer"] for x, row in zip(found, full[25:], strict=True)]
    assert np.mean(right) == pytest.approx(measured["test_accuracy"], abs=1e-6)
    assert all(list(x["probabilities"]) == x["choices"] for x in found)
    with pytest.raises(lk.AdapterError, match=r"is of 'choose': it writes nothing.\n  its answers: lorax-kit predict"):
        lk.commands.adapters.generation.author_of(out)


def test_what_gives_no_answer_is_refused_with_the_next_step(tmp_path, models, capsys):
    rows = [{"prompt": text, "response": label} for text, label in distinct(40)]
    chat = Chat(data=lines(tmp_path / "a.jsonl", rows), model=models["llama"], template="plain", batch_size=4)
    out = trained(chat, tmp_path / "chat")
    for argv, says in (
        ([out, "a text"], f"is of 'chat', which writes. | lorax-kit generate {out} --prompt TEXT"),
        ([tmp_path, "a text"], "is not an adapter"),
    ):
        with pytest.raises(SystemExit) as e:
            main(["predict", *map(str, argv)])
        assert e.value.code == 2
        assert says in capsys.readouterr().err
    settings = {"question": "q", "context": "p", "answer": "a", "length": 32, "overlap": 8, "batch_size": 8}
    data = lines(tmp_path / "q.jsonl", passages(40))
    out = trained(Answer(data=data, model=models["bert"], **settings), tmp_path / "qa")
    for argv, says in (
        (["where ?"], "'qa' reads question and context, which a text alone does not give"),
        ([], "there is nothing to answer"),
        (["--encoding", "latin-1"], "--encoding goes with --data"),
        (["--data", tmp_path / "q.jsonl", "where ?"], "give one of the two"),
        (["--data", tmp_path / "q.jsonl", "--column", "label=a"], "'qa' reads no column 'label'; it reads question, c"),
        (["--data", tmp_path / "a.jsonl"], "lacks 'q'; it has prompt, response"),
    ):
        with pytest.raises(SystemExit):
            main(["predict", str(out), *map(str, argv)])
        assert says in capsys.readouterr().err


def test_adapters_that_remember_no_length_read_it_in_their_data(tmp_path, models):
    data = table(tmp_path / "a.csv", ["text", "label"], distinct(60))
    problem = Classify(data=data, model=models["bert"], batch_size=8).build()
    base = problem.params(jax.random.key(0))
    plan = lk.resolve(lk.Spec(problem.whole_rules), base, problem.apply, next(problem.train(0, 0)))
    _, factors = lk.split(base, plan, jax.random.key(1))
    meta = {name: x for name, x in problem.remembered.items() if name not in ("length", "labels")}
    lk.save_adapter(tmp_path / "old", plan, factors, base=base, meta=meta)
    lk.save_adapter(tmp_path / "new", plan, factors, base=base, meta=problem.remembered)
    assert problem.remembered["labels"] == COLOURS
    old, new = (predict(tmp_path / name, ["the red car"])["answers"] for name in ("old", "new"))
    assert old == new
    shutil.move(data, tmp_path / "b.csv")
    assert predict(tmp_path / "new", ["the red car"])["answers"] == new
