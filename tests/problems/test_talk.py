"""Chat and translation: what is told, what is masked, and that prompts are laid out as in training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.cli import main
from lorax_kit.commands import train_adapter
from lorax_kit.commands.adapters.generation import author_of, generate
from lorax_kit.generate import Sampling
from lorax_kit.models import load_model
from lorax_kit.problem import Evaluator
from lorax_kit.problems import Chat, Translate
from lorax_kit.problems.chat import conversation_text, tokens_of
from tests.problems.folders import tokenizer, write_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

T5 = Path(__file__).parents[1] / "fixtures" / "families" / "t5"
TEXT = "user assistant system : say red green blue house car what is it a the please yes no ."
WORDS = TEXT.split()
FEW = WORDS[:16]  # as many as the recorded T5 has room for
PLAIN = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("m") / "llama", WORDS, "llama", eos_token_id=3)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m") / "t5"
    shutil.copytree(T5, folder)
    (folder / "recorded.safetensors").unlink()
    tokenizer(FEW, True).save(str(folder / "tokenizer.json"))
    return str(folder)


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def said(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def test_what_the_assistant_says_is_told_and_nothing_else(decoder):
    loaded = load_model(decoder)
    talk = said("what is red", "a house", "please say blue", "the car .")
    ids, told = tokens_of(loaded, PLAIN, [{"role": "system", "content": "say yes"}, *talk])
    words = [loaded.tokenizer.text_of(i) for i in ids]
    expected = "system say yes user what is red assistant a house user please say blue assistant the car ."
    assert words == expected.split()
    answers = [word for word, own in zip(words, told, strict=True) if own]
    assert " ".join(answers) == "a house the car ."
    asked = loaded.tokenizer.encode_spans([conversation_text(loaded, PLAIN, talk[:3])])[0][0]
    assert asked == tokens_of(loaded, PLAIN, talk)[0][: len(asked)]  # what is asked is how the whole begins
    with pytest.raises(ValueError, match="the assistant speaks first: there is nothing that it answers"):
        tokens_of(loaded, PLAIN, [{"role": "assistant", "content": "yes"}, *talk])
    with pytest.raises(ValueError, match="the assistant says nothing"):
        tokens_of(loaded, PLAIN, talk[:1])


def test_the_loss_of_a_chat_is_of_the_answers_tokens_alone(tmp_path, decoder):
    colours = ["red", "green", "blue"]
    rows = [
        {"prompt": f"what is {a} {b} {c}", "response": f"the {a} car"} for a in colours for b in colours for c in WORDS
    ]
    problem = Chat(data=lines(tmp_path / "a.jsonl", rows), model=decoder, template=PLAIN, length=32).build()
    params = problem.params(jax.random.key(0))
    measured = Evaluator(problem, params, (), problem.test)(params)
    losses = []
    for batch in problem.test:
        logits = np.asarray(problem.apply(params, batch), np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for i, t in np.argwhere(batch.told):
            losses.append(-logp[i, t - 1, batch.ids[i, t]])
    assert len(losses) == 3 * problem.facts["test"]
    assert measured["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    messages = [{"m": said(row["prompt"], row["response"])} for row in rows]
    data = lines(tmp_path / "b.jsonl", messages)
    same = Chat(data=data, model=decoder, template=PLAIN, messages="m", length=32).build()
    np.testing.assert_array_equal(next(same.train(0, 0)).ids, next(problem.train(0, 0)).ids)
    with pytest.raises(lk.StudyError, match="brings no chat template"):
        Chat(data=str(tmp_path / "a.jsonl"), model=decoder).build()
    with pytest.raises(lk.LoraxError, match="line 1: messages must be a list of objects"):
        Chat(data=lines(tmp_path / "c.jsonl", [{"m": "hello"}]), model=decoder, template=PLAIN, messages="m").build()


def test_an_adapter_of_a_chat_asks_as_it_was_trained(tmp_path, decoder):
    rows = [{"source": f"{a} {b} {c}", "target": f"the {a} car"} for a in WORDS for b in ("red", "blue") for c in WORDS]
    settings = {"model": decoder, "template": PLAIN, "prompt": "say {source} please", "length": 24}
    problem = Translate(data=lines(tmp_path / "a.jsonl", rows), **settings).build()
    train_adapter(problem, lk.LoRA(rank=2), out=tmp_path / "o", lr=1e-2, seed=0, epochs=1, steps_per_epoch=2,
                  progress=False)  # fmt: skip
    author = author_of(tmp_path / "o")
    asked = author.prompt("red blue", chat=False, system=None)
    words = [author.loaded.tokenizer.text_of(i) for i in asked]
    assert words == ["user", "say", "red", "blue", "please", "assistant"]
    with pytest.raises(lk.LoraxError, match="leaves out the system's message"):
        replace(author, asking=replace(author.asking, template="{{ messages[-1].content }}")).laid(
            "red", chat=False, system="say yes"
        )
    assert author.laid("red", chat=False, system="say yes")[0] == "system say yes user say red please assistant "
    found = generate(author, ["red blue", "no"], max_new_tokens=3)
    assert [one["prompt"] for one in found["texts"]] == ["red blue", "no"]
    assert all(1 <= len(one["tokens"]) <= 3 for one in found["texts"])


def test_an_encoder_decoder_is_taught_each_token_after_those_before_it(tmp_path, t5):
    rows = [{"source": f"{a} {b}", "target": f"{b} is {a}"} for a in FEW for b in FEW[:8]]
    problem = Translate(data=lines(tmp_path / "a.jsonl", rows), model=t5, length=16, prompt="say {source}").build()
    loaded, batch = load_model(t5), problem.test[0]
    start = json.loads((Path(t5) / "config.json").read_text())["decoder_start_token_id"]
    assert (batch.given[:, 0] == start).all()
    np.testing.assert_array_equal(batch.given[:, 1:], batch.label[:, :-1])
    logits = np.asarray(problem.apply(problem.params(jax.random.key(0)), batch))
    n = int(batch.weight[0].sum())
    ids, mask = batch.ids[:1, : batch.mask[0].sum()], np.ones((1, batch.mask[0].sum()), np.int32)
    alone = loaded.model.apply({"params": loaded.params}, ids, mask, batch.given[:1, :n], np.ones((1, n), np.int32))
    np.testing.assert_allclose(logits[0, :n], alone[0], atol=1e-4)
    with pytest.raises(lk.LoraxError, match="is an encoder-decoder: a system and a template are of a conversation"):
        Translate(data=str(tmp_path / "a.jsonl"), model=t5, system="say yes").build()


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_an_encoder_decoder_writes_what_whole_passes_say_and_penalises_what_it_wrote_alone(t5, penalty):
    loaded = load_model(t5)
    start = loaded.special.start
    sampling = Sampling(repetition_penalty=penalty)
    found = generate(author_of(t5), ["say red"], max_new_tokens=4, sampling=sampling)["texts"][0]
    out, given = [], [start]
    for _ in range(4):
        asked = np.asarray(loaded.tokenizer.encode(["say red"], 99), np.int32)
        given_now = np.asarray([given], np.int32)
        step = loaded.model.apply(
            {"params": loaded.params}, asked, np.ones_like(asked), given_now, np.ones_like(given_now)
        )
        logits = np.asarray(step)[0, -1].copy()
        for token in set(given):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        out.append(int(logits.argmax()))
        given.append(out[-1])
        if out[-1] in loaded.special.eos:
            break
    assert found["tokens"] == out


def test_generate_on_the_command_line(decoder, t5, capsys):
    main(["generate", "--model", decoder, "--prompt", "the red", "--max-new-tokens", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"model", "texts", "seconds", "tokens_per_second"}
    assert set(found["texts"][0]) == {"prompt", "text", "tokens", "finished", "logprob"}
    main(["generate", "--model", decoder, "--prompt", "the red", "--max-new-tokens", "3", "--stream"])
    assert capsys.readouterr().out == found["texts"][0]["text"] + "\n"
    for argv, says in (
        (["--prompt", "x"], "give an ADAPTER, or --model"),
        (["--model", decoder], "give --prompt, or --prompts"),
        (["--model", decoder, "--prompt", "x", "--samples", "2", "--stream"], "--stream shows one text as it comes"),
        (["--model", decoder, "--prompt", "x", "--beams", "2", "--temperature", "1"], "beams take the likeliest texts"),
        (["--model", decoder, "--prompt", "x", "--max-new-tokens", "64"], "the model has 64 positions"),
        (["--model", decoder, "--prompt", "x", "--chat"], "brings no chat template"),
        (["--model", decoder, "--prompt", "x", "--system", "y"], "a prompt that is no conversation has no system"),
        (["--model", decoder, "--prompt", "x", "--samples", "2"], "samples would be one text many times"),
        (["--model", decoder, "--prompt", "x", "--seed", "0"], "temperature 0 takes the likeliest token: no seed is"),
        (["--model", decoder, "--prompt", "x", "--seed", "1", "--stream"], "no seed is read"),
        (["--model", decoder, "--prompt", "x", "--beams", "2", "--seed", "1"], "without temperature, penalty, samples"),
        (["--model", t5, "--prompt", "say", "--chat"], "reads the prompt alone: it goes without a conversation"),
        (["--model", t5, "--prompt", "say", "--system", "y"], "reads the prompt alone"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["generate", *argv])
        assert stopped.value.code == 2
        assert says in capsys.readouterr().err
