"""An adapter that remembers its task, merged into its model: a folder that loads and computes the same."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.commands import train_adapter
from lorax_kit.commands.adapters.merging import merge_trained
from lorax_kit.models import load_model
from lorax_kit.problem.base import restored
from lorax_kit.problems import Answer, Classify, Language
from lorax_kit.problems.load import base_of, problem_of
from tests.problems.folders import write_model

pytestmark = pytest.mark.usefixtures("standard_promotion")
WORDS = "what is it a the please yes no red green blue house car .".split()  # noqa: SIM905


def rows(file, found):
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(file)


def trained(out, problem):
    train_adapter(problem, lk.LoRA(rank=2), out=out, lr=1e-2, seed=0, epochs=1, steps_per_epoch=2, progress=False)
    problem = problem_of(out)
    base = base_of(problem, out / "adapter")
    adapter = lk.load_adapter(out / "adapter", base=base)
    return problem, lk.merge(base, adapter.factors, adapter.plan)


def test_a_decoders_adapter_becomes_a_model_of_its_family(tmp_path, capsys):
    decoder = write_model(tmp_path / "m", WORDS, "llama")
    data = rows(tmp_path / "a.jsonl", [{"text": " ".join(np.roll(WORDS, i)) + f" {i}"} for i in range(40)])
    problem, merged = trained(tmp_path / "o", Language(data=data, model=decoder, batch_size=2, length=16).build())
    main(["merge", str(tmp_path / "o"), "--out", str(tmp_path / "merged"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {site["path"].split("/")[0] for site in found["sites"]} == {"layer_0", "layer_1"}
    loaded = load_model(tmp_path / "merged")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, merged)
    batch = problem.test[0]
    np.testing.assert_array_equal(problem.apply(loaded.params, batch), problem.apply(merged, batch))
    with pytest.raises(SystemExit):
        main(["merge", str(tmp_path / "o"), "--out", str(tmp_path / "merged")])
    assert "merged' exists" in capsys.readouterr().err
    merge_trained(str(tmp_path / "o"), str(tmp_path / "merged"), dtype="bfloat16", overwrite=True)
    half = load_model(tmp_path / "merged").params
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-8), half, merged)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    few = Language(data=data, model=decoder, batch_size=2, length=16, quantise="int8").build()
    _, merged = trained(tmp_path / "few", few)
    merge_trained(str(tmp_path / "few"), str(tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "whole").params, restored(merged))
    with pytest.raises(lk.LoraxError, match="which is read"):
        merge_trained(str(tmp_path / "o"), str(Path(decoder) / "in"))


def test_a_head_that_transformers_has_goes_along_and_another_is_refused(tmp_path):
    encoder = write_model(tmp_path / "m", WORDS)
    found = [{"question": f"what is {a}", "context": f"{b} is the {a}", "answer": b} for a in WORDS for b in WORDS[:5]]
    data = rows(tmp_path / "a.jsonl", [row for row in found if row["answer"] not in row["question"]])
    _, merged = trained(tmp_path / "qa", Answer(data=data, model=encoder, length=16, overlap=2).build())
    merge_trained(str(tmp_path / "qa"), str(tmp_path / "merged"))
    loaded = load_model(tmp_path / "merged")
    jax.tree.map(np.testing.assert_array_equal, {"encoder": loaded.params, **loaded.heads}, merged)
    found = [{"text": f"{a} {b} {c}", "label": a} for a in ("red", "blue") for b in WORDS for c in WORDS]
    problem = Classify(data=rows(tmp_path / "b.jsonl", found), model=encoder).build()
    _, merged = trained(tmp_path / "c", problem)
    with pytest.raises(lk.AdapterError, match="a linear map of the mean over the tokens, which no class of transf"):
        merge_trained(str(tmp_path / "c"), str(tmp_path / "d"))
    assert not (tmp_path / "d").exists()
    merge_trained(str(tmp_path / "c"), str(tmp_path / "d"), head=False)
    loaded = load_model(tmp_path / "d")
    assert not loaded.heads
    jax.tree.map(np.testing.assert_array_equal, loaded.params, merged["encoder"])


def test_an_adapter_without_a_task_needs_a_base(tmp_path):
    from tests import tiny

    train_adapter(tiny.problem(facts={}), lk.LoRA(rank=2), out=tmp_path / "o", lr=1e-2, seed=0, epochs=1,
                  steps_per_epoch=2, progress=False, targets=["up/kernel"])  # fmt: skip
    with pytest.raises(lk.AdapterError, match="does not say which model it is of"):
        merge_trained(str(tmp_path / "o"), str(tmp_path / "d"))
