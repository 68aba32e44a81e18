"""Problems on rows of one's own: what is read, how it is measured, and what is refused."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.commands import evaluate_adapter, evaluate_base, train_adapter
from lorax_kit.errors import DataError
from lorax_kit.models import load_model
from lorax_kit.problem import Evaluator
from lorax_kit.problems import Answer, Choose, Classify, Language, Regress, problem_from, settings_from
from lorax_kit.problems.answer import _place
from lorax_kit.tasks import exact_match, pearson, word_f1
from tests.problems.folders import write_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

COLOURS = ["red", "green", "blue"]
THINGS = ["house", "car", "tree", "lamp", "bird", "boat"]
NAMES = ["anna", "ben", "carla", "david", "eva", "fred"]
OTHERS = "the a is lives in where does ? . question : answer which one , and"
WORDS = COLOURS + THINGS + NAMES + OTHERS.split()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: write_model(root / family, WORDS, family) for family in ("bert", "llama")}


def rows(count, seed=0):
    """Texts, and the colour each names first."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        colour, thing, other = rng.choice(COLOURS), rng.choice(THINGS), THINGS[i % len(THINGS)]
        yield f"the {colour} {thing} and the {other} {NAMES[i // 6 % 6]} {NAMES[i // 36 % 6]}", str(colour)


def table(file, header, lines):
    with open(file, "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([header, *lines])
    return str(file)


def lines(file, found):
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(file)


def test_classes_are_learnt_and_an_adapter_needs_only_its_folder(tmp_path, models, capsys):
    data = table(tmp_path / "a.csv", ["body", "colour"], rows(180))
    settings = {"task": "classify", "model": models["bert"], "data": data, "text": "body", "label": "colour"}
    problem = problem_from({**settings, "batch_size": 8})
    assert problem.facts["labels"] == sorted(COLOURS)
    assert (problem.facts["train"], problem.facts["val"], problem.facts["test"]) == (144, 18, 18)
    done = train_adapter(problem, lk.LoRA(rank=4), out=tmp_path / "o", lr=2e-2, seed=0, epochs=4, steps_per_epoch=None,
                         progress=False)  # fmt: skip
    assert done["test_accuracy"] > 0.9 > evaluate_base(problem)["test_accuracy"]
    again = evaluate_adapter(tmp_path / "o")
    assert again["examples"] == 18
    assert {name: again[name] for name in done if name.startswith("test_")} == {
        name: value for name, value in done.items() if name.startswith("test_")
    }
    moved = tmp_path / "elsewhere" / "a.csv"
    moved.parent.mkdir()
    shutil.move(data, moved)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        evaluate_adapter(tmp_path / "o")
    assert evaluate_adapter(tmp_path / "o", files={"data": str(moved)}) == again
    with open(data := str(moved), "a") as more:
        more.write("the red car,red\n")
    for files in (None, {"data": data}):
        with pytest.raises((DataError, FileNotFoundError), match=r"has changed since: its SHA-256|there is no file"):
            evaluate_adapter(tmp_path / "o", files=files)


def test_other_rows_are_measured_on_the_adapters_own_terms(tmp_path, models, capsys):
    data = table(tmp_path / "a.csv", ["text", "label"], rows(90))
    problem = Classify(data=data, model=models["bert"], batch_size=8).build()
    train_adapter(problem, lk.LoRA(rank=2), out=tmp_path / "o", lr=1e-2, seed=0, epochs=1, steps_per_epoch=2,
                  progress=False)  # fmt: skip
    other = table(tmp_path / "b.csv", ["text", "label"], [(f"a {text}", label) for text, label in rows(20)])
    main(["evaluate", str(tmp_path / "o"), "--test-data", other, "--json"])
    assert json.loads(capsys.readouterr().out)["examples"] == len({text for text, _ in rows(20)})
    mauve = table(tmp_path / "c.csv", ["text", "label"], [("a red car", "mauve"), ("a blue car", "blue")])
    with pytest.raises(
        DataError, match=r"c\.csv' has the class 'mauve', which no row to train on has; .* have blue, green"
    ):
        evaluate_adapter(tmp_path / "o", files={"test_data": mauve})
    numbers = table(tmp_path / "n.csv", ["text", "label"], [(text, i % 7) for i, (text, _) in enumerate(rows(90))])
    problem = Regress(data=numbers, model=models["bert"], batch_size=8).build()
    train_adapter(problem, lk.LoRA(rank=2), out=tmp_path / "r", lr=1e-2, seed=0, epochs=1, steps_per_epoch=2,
                  progress=False)  # fmt: skip
    pairs = [(f"a {text}", i % 7) for i, (text, _) in enumerate(rows(20))]
    near = table(tmp_path / "d.csv", ["text", "label"], pairs)
    far = table(tmp_path / "e.csv", ["text", "label"], [(text, x + 1000) for text, x in pairs])
    found = [evaluate_adapter(tmp_path / "r", files={"test_data": x})["test_mae"] for x in (near, far)]
    assert found[1] == pytest.approx(1000, abs=8)
    assert found[0] < 8


def test_no_row_is_in_two_parts_whatever_the_files(tmp_path, models):
    some = list(rows(60))
    data = table(tmp_path / "a.csv", ["text", "label"], some)
    test = table(tmp_path / "b.csv", ["text", "label"], [*some[:12], *some[:3]])
    problem = Classify(data=data, test_data=test, model=models["bert"], batch_size=4).build()
    parts = {name: {tuple(row[row > 0]) for batch in getattr(problem, name) for row in batch.ids[batch.weight > 0]}
             for name in ("val", "test")}  # fmt: skip
    parts["train"] = {tuple(row[row > 0]) for _, batch in zip(range(40), problem.train(0, 0), strict=False)
                      for row in batch.ids}  # fmt: skip
    assert not parts["val"] & parts["test"]
    assert not parts["train"] & (parts["val"] | parts["test"])
    assert problem.facts["left_out"]["that stand in the files of validation or test, too"] >= 12
    with pytest.raises(DataError, match="none are left for val: left out"):
        Classify(data=data, test_data=test, val_data=test, model=models["bert"], batch_size=4).build()


def test_rows_that_disagree_are_told_from_equal_ones(tmp_path, models):
    found = [(text, len(label)) for text, label in rows(60)]
    found += [(found[0][0], found[0][1]), (found[1][0], 50), (found[2][0], 50), (found[2][0], 51)]
    facts = Regress(data=table(tmp_path / "a.csv", ["text", "label"], found), model=models["bert"]).build().facts
    assert facts["left_out"] == {
        "equal to an earlier row": 64 - 3 - len({text for text, _ in found}),
        "of an earlier row's text, with another label": 3,
    }
    torn = table(tmp_path / "b.csv", ["text", "label"], [("the car", "red"), ("the car", "blue")] * 3)
    with pytest.raises(DataError, match="all 6 rows contradict each other: each has another row's text, and another l"):
        Classify(data=torn, model=models["bert"]).build()
    odd = table(tmp_path / "c.csv", ["text", "label"], [("a bird", "red;mauve"), ("a lamp", "blue")])
    data = table(tmp_path / "d.csv", ["text", "label"], rows(60))
    with pytest.raises(DataError, match=r"c\.csv' has the class 'mauve', which no row to train on has"):
        Classify(data=data, val_data=odd, separator=";", model=models["bert"]).build()


def test_what_is_cut_is_counted_and_what_is_ambiguous_is_read_as_it_stands(tmp_path, models):
    data = table(tmp_path / "a.csv", ["text", "label"], rows(60))
    assert Classify(data=data, model=models["bert"], length=3).build().facts["cut"] > 30
    with pytest.raises(lk.StudyError, match="several is 'False'"):
        Classify(data=data, model=models["bert"], several="False")
    sums = [{"question": f"what is 1 + {i}", "choices": [1, 2, 3], "answer": 2} for i in range(30)]
    problem = Choose(data=lines(tmp_path / "s.jsonl", sums), model=models["llama"], length=24).build()
    assert all((batch.label[batch.weight > 0] == 1).all() for batch in problem.test)
    assert _place("the matter on the mat", "mat") == 18
    assert _place("İİİ dog, Good cat", "good") == 9
    assert _place("a cat", "dog") is None
    with pytest.raises(lk.StudyError, match="length 1000 is above the 64 positions"):
        Answer(data=data, model=models["bert"], length=1000).build()
    broken = lines(tmp_path / "u.jsonl", [{"text": "half \ud83d", "label": "a"}, {"text": "b", "label": "b"}])
    with pytest.raises(DataError, match="line 1: text holds half of a character"):
        Classify(data=broken, model=models["bert"]).build()


def test_macro_f1_is_that_of_its_definition(tmp_path, models):
    data = table(tmp_path / "a.csv", ["text", "label"], rows(120))
    problem = Classify(data=data, model=models["bert"], test=40).build()
    params = problem.params(jax.random.key(3))
    found = Evaluator(problem, params, (), problem.test)(params)
    pairs = [
        (label, given)
        for batch in problem.test
        for label, given, weight in zip(
            batch.label, np.argmax(problem.apply(params, batch), axis=-1), batch.weight, strict=True
        )
        if weight
    ]
    assert len(pairs) == 40
    scores = []
    for c in range(3):
        true, told = sum(a == c for a, _ in pairs), sum(b == c for _, b in pairs)
        scores.append(2 * sum(a == b == c for a, b in pairs) / (true + told) if true + told else None)
    assert found["macro_f1"] == pytest.approx(np.mean([x for x in scores if x is not None]), abs=1e-6)
    assert found["accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs]), abs=1e-6)


def test_several_classes_a_text(tmp_path, models):
    found = [{"text": text, "label": [label, "long"] if i % 2 else []} for i, (text, label) in enumerate(rows(80))]
    by_list = Classify(data=lines(tmp_path / "a.jsonl", found), model=models["bert"], several=True).build()
    cells = [[row["text"], "|".join(row["label"])] for row in found]
    data = table(tmp_path / "a.csv", ["text", "label"], cells)
    by_cell = Classify(data=data, model=models["bert"], separator="|").build()
    assert by_list.facts["labels"] == by_cell.facts["labels"] == sorted([*COLOURS, "long"])
    for ours, theirs in zip(by_list.test, by_cell.test, strict=True):
        np.testing.assert_array_equal(ours.label, theirs.label)
    assert {tuple(row) for batch in by_list.test for row in batch.label[batch.weight > 0]} >= {(0, 0, 0, 0)}
    assert by_list.metric == "micro_f1"


def test_numbers_are_measured_in_their_own_units(tmp_path, models):
    data = table(tmp_path / "a.csv", ["text", "label"], [(text, 100 + 7 * len(label)) for text, label in rows(120)])
    problem = Regress(data=data, model=models["bert"]).build()
    params = problem.params(jax.random.key(0))
    found = Evaluator(problem, params, (), problem.test)(params)
    mean, spread = problem.facts["label_mean"], problem.facts["label_spread"]
    errors = [
        spread * (float(x[0]) - y)
        for batch in problem.test
        for x, y, w in zip(problem.apply(params, batch), batch.label, batch.weight, strict=True)
        if w
    ]
    true = {round(mean + spread * y) for batch in problem.test for y in batch.label[batch.weight > 0]}
    assert true <= {121, 128, 135}
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-5)
    assert found["mae"] == pytest.approx(np.mean(np.abs(errors)), rel=1e-5)


def test_the_correlation_of_numbers_that_lie_closely_together_is_that_of_float64(tmp_path, models):
    data = table(tmp_path / "a.csv", ["text", "label"], [(text, 100 + 7 * len(label)) for text, label in rows(120)])
    problem = Regress(data=data, model=models["bert"]).build()
    params = problem.params(jax.random.key(0))
    params["classifier"]["output"]["bias"] += 2000  # what is found varies in the fourth digit
    found = Evaluator(problem, params, (), problem.test)(params)
    outputs = [np.asarray(problem.apply(params, batch), np.float64)[batch.weight > 0, 0] for batch in problem.test]
    true = [np.asarray(batch.label[batch.weight > 0], np.float64) for batch in problem.test]
    assert found["pearson"] == pytest.approx(np.corrcoef(*map(np.concatenate, (outputs, true)))[0, 1], abs=1e-2)
    assert found["rmse"] == pytest.approx(problem.facts["label_spread"] * 2000, rel=0.01)
    x = 1e5 + np.arange(50, dtype=np.float32) / 64
    y = np.sin(np.arange(50))
    assert pearson(x, y) == pytest.approx(np.corrcoef(np.float64(x), y)[0, 1], rel=1e-12)
    assert np.isnan(pearson(np.full(3, 0.1), np.arange(3)))


FAR = {
    "out of double precision": ("a", [1e308, -1e308], "a.csv': the labels lie between -1e+308 and 1e+308: their mean"),
    "one number": ("a", [0.1], "every training row has the label 0.1; there is nothing to learn"),
    "far off in a file of its own": ("b", [1, 2], "b.csv', line 2: label 1e+300 lies 2e+300 times the spread 0.4"),
}


@pytest.mark.parametrize("name", FAR)
def test_labels_that_cannot_be_scaled_are_named(tmp_path, models, name):
    where, labels, says = FAR[name]
    found = [(text, labels[i % len(labels)]) for i, (text, _) in enumerate(rows(61))]
    more = {} if where == "a" else {"test_data": table(tmp_path / "b.csv", ["text", "label"], [("the bird", 1e300)])}
    with pytest.raises(DataError) as error:
        Regress(data=table(tmp_path / "a.csv", ["text", "label"], found), model=models["bert"], val=11, **more).build()
    assert says in str(error.value)


def test_answers_are_spans_of_passages_of_any_length(tmp_path, models):
    rng = np.random.default_rng(0)
    found = []
    for i in range(90):
        who, where = rng.choice(NAMES, 2, replace=False), rng.choice(THINGS, 2)
        filler = "the red tree . " * (12 if i % 3 == 0 else 0)
        context = f"{who[0]} lives in {where[0]} . {filler}{who[1]} lives in the {where[1]} ."
        answer = [f"the {where[1]}", str(where[1])]
        found.append({"q": f"where does {who[1]} ?", "p": f"{context} {i}", "a": answer})
    settings = {"question": "q", "context": "p", "answer": "a", "length": 32, "overlap": 8}
    data = lines(tmp_path / "a.jsonl", found)
    problem = Answer(data=data, model=models["bert"], **settings).build()
    assert (problem.facts["test"], problem.facts["val"], problem.facts["train"]) == (9, 9, 72)  # questions
    assert sum(batch.weight.sum() for batch in problem.test) > 9  # windows, of which a long passage has several
    for batch in problem.val:
        for i in np.flatnonzero(batch.weight):
            start, end = batch.start[i], batch.end[i]
            assert (start == end == 0) or (batch.inside[i, start : end + 1] == 1).all()
            assert start == 0 or batch.ids[i, start] == 4 + sorted(set(WORDS)).index("the")
    params = problem.params(jax.random.key(1))
    measured = Evaluator(problem, params, (), problem.test)(params)
    assert 0 <= measured["exact_match"] <= measured["f1"] <= 1
    assert (exact_match("The  red, car!", "red car"), word_f1("the red car", "a red boat")) == (1.0, 0.5)


def test_questions_with_two_answers_in_two_rows_are_told(tmp_path, models):
    found = [
        {"question": f"where {i} ?", "context": f"the car {i} is by the house .", "answer": "house"} for i in range(30)
    ]
    found += [found[0], {**found[1], "answer": "car"}]
    problem = Answer(data=lines(tmp_path / "a.jsonl", found), model=models["bert"], length=32, batch_size=2).build()
    assert problem.facts["left_out"] == {
        "equal to an earlier row": 1,
        "of an earlier row's text, with another label": 1,
    }


def test_too_few_rows_for_a_batch_say_the_way_out(tmp_path, models):
    found = [
        {"question": f"where {i} ?", "context": f"the car {i} is by the house .", "answer": "house"} for i in range(9)
    ]
    data = lines(tmp_path / "a.jsonl", found)
    with pytest.raises(DataError, match=r"^7 examples do not fill one batch of 16.\n  give more of them, or a small"):
        Answer(data=data, model=models["bert"], length=32).build()


def test_packed_texts_have_the_losses_they_have_alone(tmp_path, models):
    data = table(tmp_path / "a.csv", ["text"], [[text] for text, _ in rows(100)])
    problem = Language(data=data, model=models["llama"], length=32, batch_size=2).build()
    params = problem.params(jax.random.key(0))
    batch = next(problem.train(0, 0))
    assert batch.mask.max() > 1  # several texts in a row
    packed = np.asarray(problem.apply(params, batch))
    for row, segments, logits in zip(batch.ids, batch.mask, packed, strict=True):
        for number in range(1, segments.max() + 1):
            at = segments == number
            alone = batch._replace(ids=row[None, at], mask=np.ones((1, at.sum()), np.int32), told=None)
            np.testing.assert_allclose(logits[at], problem.apply(params, alone)[0], atol=2e-5)
            assert row[at][-1] == 3 or at[-1]  # each ends with the end of text, unless it was cut
    measured = Evaluator(problem, params, (), problem.test)(params)
    assert measured["perplexity"] == pytest.approx(np.exp(measured["loss"]))


def test_choices_are_ranked_by_their_mean_log_likelihood(tmp_path, models):
    rng = np.random.default_rng(0)
    found = []
    for i in range(40):
        some = [str(x) for x in rng.choice(THINGS, 2 + i % 3, replace=False)]
        found.append({"question": f"which one {i}", "choices": [*some[:-1], f"the {some[-1]}"], "answer": "A"})
    problem = Choose(data=lines(tmp_path / "a.jsonl", found), model=models["llama"], length=24).build()
    params = problem.params(jax.random.key(0))
    batch = problem.test[0]
    scores = np.asarray(problem.apply(params, batch))
    texts, loaded = batch.texts, load_model(models["llama"])
    for i, c in np.ndindex(scores.shape):
        if not batch.there[i, c]:
            assert scores[i, c] < -1e8
            continue
        n = int(texts.mask[i, c].sum())
        one = type("One", (), {"ids": texts.ids[i, c][None, :n], "mask": np.ones((1, n), np.int32)})
        logits = np.asarray(loaded.model.apply({"params": params}, one.ids, one.mask), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        told = np.flatnonzero(texts.told[i, c][:n])
        assert scores[i, c] == pytest.approx(np.mean([logp[t - 1, one.ids[0, t]] for t in told]), abs=1e-4)


def test_a_trained_head_serves_where_its_classes_are_the_datas(tmp_path):
    rng = np.random.default_rng(0)
    head = {
        "classifier.weight": rng.normal(size=(3, 16)).astype(np.float32),
        "classifier.bias": rng.normal(size=3).astype(np.float32),
    }
    names = ["green", "red", "blue"]
    model = write_model(tmp_path / "m", WORDS, extra=head, id2label={str(i): x for i, x in enumerate(names)})
    data = table(tmp_path / "a.csv", ["text", "label"], rows(60))
    problem = Classify(data=data, model=model).build()
    assert problem.facts["head"] == "trained"
    own = problem.params(jax.random.key(0))["classifier"]["output"]
    stored = load_file(tmp_path / "m" / "model.safetensors")
    order = [names.index(x) for x in sorted(COLOURS)]
    np.testing.assert_array_equal(own["kernel"], stored["classifier.weight"][order].T)
    np.testing.assert_array_equal(own["bias"], stored["classifier.bias"][order])
    other = table(tmp_path / "b.csv", ["text", "label"], [(text, label + "!") for text, label in rows(60)])
    assert Classify(data=other, model=model).build().facts["head"] == "fresh"
    with pytest.raises(lk.StudyError, match="no trained head for the classes blue!, green!, red!"):
        Classify(data=other, model=model, head="trained").build()


TEXTS = [[text, label] for text, label in rows(30)]
BAD = {
    "one class": ({"task": "classify"}, [[text, "red"] for text, _ in TEXTS], "has one class alone, ['red']"),
    "unknown task": ({"task": "sing"}, TEXTS, "problem task 'sing' is unknown; choose from classify, regress"),
    "no name": ({"task": ["classify"]}, TEXTS, "problem task ['classify'] is unknown; choose from classify"),
    "unknown key": ({"task": "classify", "colour": 1}, TEXTS, "problem has the unknown key 'colour'; known: data, mod"),
    "no column": ({"task": "classify", "label": "class"}, TEXTS, "no column 'class' for label; its columns are text"),
    "no number": ({"task": "regress"}, TEXTS, "line 2: label is 'blue'; it must be a finite number"),
    "too few": ({"task": "classify", "val": 20, "test": 20}, TEXTS, "30 rows that differ are too few for 20"),
    "length": ({"task": "classify", "length": 65}, TEXTS, "length 65 is above the 64 positions"),
    "share": ({"task": "classify", "val": 1.5}, TEXTS, "problem val is 1.5; it must be a share of the rows"),
    "no decoder": ({"task": "lm"}, TEXTS, "the task 'lm' needs a model of the kind 'decoder'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_said(tmp_path, models, name):
    settings, found, message = BAD[name]
    data = table(tmp_path / "a.csv", ["text", "label"], found)
    with pytest.raises(lk.LoraxError) as error:
        problem_from({"model": models["bert"], "data": data, **settings})
    assert message in str(error.value)


def test_an_answer_that_is_not_there_is_named_by_its_line(tmp_path, models):
    found = [{"question": "where ?", "context": "in the house", "answer": "the car"}]
    with pytest.raises(DataError, match="line 1: the answer 'the car' does not stand in the passage"):
        Answer(data=lines(tmp_path / "a.jsonl", found), model=models["bert"]).build()
    choices = [{"question": "where ?", "choices": ["a", "the"], "answer": "car"}]
    with pytest.raises(DataError, match="line 1: the answer 'car' is none of the choices, a, the"):
        Choose(data=lines(tmp_path / "b.jsonl", choices), model=models["llama"]).build()


def test_a_token_that_the_model_lacks_is_named_with_the_row_and_file_that_hold_it(tmp_path):
    model = write_model(tmp_path / "bert", WORDS)
    tokenizer = json.loads((tmp_path / "bert" / "tokenizer.json").read_text())
    count = len(tokenizer["model"]["vocab"])
    tokenizer["model"]["vocab"]["zebra"] = count
    (tmp_path / "bert" / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = table(tmp_path / "a.csv", ["text", "label"], rows(60))
    other = table(tmp_path / "b.csv", ["text", "label"], [["the bird", "red"], ["the zebra", "red"]])
    Classify(data=data, model=model).build()
    with pytest.raises(DataError) as error:
        Classify(data=data, val_data=other, model=model).build()
    assert str(error.value).startswith(
        f"{other!r}, line 3: the token 'zebra' has the id {count}; the model has {count} tokens, the tokenizer "
        f"{count + 1}.\n"
    )
    wrong = table(tmp_path / "c.csv", ["text", "label"], [["the bird", "many"]])
    with pytest.raises(DataError, match=r"c\.csv', line 2: label is 'many'"):
        numbers = table(tmp_path / "d.csv", ["text", "label"], [[text, i] for i, (text, _) in enumerate(rows(60))])
        Regress(data=numbers, test_data=wrong, model=model).build()


def test_windows_of_small_models_share_less_and_a_question_that_fills_one_is_named(tmp_path):
    model = write_model(tmp_path / "bert", WORDS, max_position_embeddings=32)
    asked = [
        {"question": f"where is {name} ?", "context": f"{name} lives in the " + "red house " * 30} for name in NAMES
    ]
    found = [{**row, "answer": "red house"} for row in asked]
    problem = Answer(data=lines(tmp_path / "a.jsonl", found), model=model, val=1, test=1).build()
    assert sum(float(batch.weight.sum()) for batch in problem.test) > 1
    (windows,) = load_model(model).tokenizer.encode_pairs([(asked[0]["question"], asked[0]["context"])], 32, 16)
    starts = [next(span for span in window.spans if span[0] >= 0)[0] for window in windows]
    words = [asked[0]["context"][:start].count(" ") for start in starts]
    assert set(np.diff(words)) == {32 - 7 - 16}  # the question, the specials and what is shared leave so many
    found[3]["question"] = "where " * 40
    with pytest.raises(DataError) as error:
        Answer(data=lines(tmp_path / "b.jsonl", found), model=model, val=1, test=1).build()
    assert "b.jsonl', line 4: 'where where" in str(error.value)
    assert "takes 43 of a window's 32 tokens; the rest must be more than the 16 that windows share" in str(error.value)
    assert len(load_model(model).tokenizer.encode_pairs([("where ?", "the house")], 32, 30)[0]) == 1


def test_settings_are_plain_data_both_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bert").mkdir()
    assert Classify(data="/x.csv", model="bert").to_dict()["model"] == str(tmp_path / "bert")
    made = Classify(data="/x.csv", separator="|", val=0.2)
    assert made.to_dict() == {"data": "/x.csv", "separator": "|", "val": 0.2}
    assert settings_from({"task": "classify", **made.to_dict()}) == made


def test_settings_without_rows_are_refused():
    with pytest.raises(lk.StudyError, match="problem lacks 'data'"):
        Classify.from_dict({"model": "minilm"})
