"""What the command line says in errors: the option to give, where Python and JSON have a setting; and it works."""

import json
import re
from pathlib import Path

import click
import pytest

from lorax_kit.cli import cli, main
from lorax_kit.cli.root import in_options
from lorax_kit.study import Study
from tests.problems.folders import write_model

pytestmark = pytest.mark.usefixtures("standard_promotion")

ROWS = [(f"the {word} lamp {number}", word) for number in range(20) for word in ("café", "thé")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "bert", [word for text, _ in ROWS for word in text.split()])


SAYS = [
    ("train", "no column 'text'.\n  say which it is: text=COLUMN", "say which it is: --text COLUMN"),
    ("train", "say which it is: question=COLUMN", "say which it is: --column question=COLUMN"),
    ("train", "give one: template='plain', or Jinja text", "give one: --with template=plain, or Jinja text"),
    ("train", "such as encoding=utf-16", "such as --with encoding=utf-16"),
    ("predict", "such as encoding=utf-16", "such as --encoding utf-16"),
    ("study", "say which it is: text=COLUMN", 'say which it is: "text": "COLUMN"'),
    ("study", "discard it: overwrite=True", "discard it: --overwrite"),
    ("compress", "'a' exists.\n  choose another path", "choose another path"),
    ("train", "give less: batch_size=N, or length=N", "give less: --batch-size N, or --length N"),
    ("train", "problem several is 'x'; it must be", "--with several is 'x'; it must be"),
    ("train", "problem length is 1; it must be", "--length is 1; it must be"),
    ("study", "problem length is 1; it must be", "problem length is 1; it must be"),
    ("train", "cut it: truncate(adapter, rank=3)", "cut it: truncate(adapter, rank=3)"),
    ("train", "Problem(facts={'steps_per_epoch': N})", "Problem(facts={'steps_per_epoch': N})"),
    ("train", "'rank=3' stays as it was given", "'rank=3' stays as it was given"),
]


@pytest.mark.parametrize(("command", "message", "says"), SAYS)
def test_settings_are_named_by_their_options(command, message, says):
    assert says in in_options(message, cli.commands[command])


def test_commands_of_groups_name_their_options(monkeypatch, capsys):
    group = cli.commands["bench"]
    assert isinstance(group, click.Group)
    assert {type(command) for command in group.commands.values()} == {type(cli.commands["train"])}


def said(capsys, *argv):
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in argv])
    assert e.value.code == 2
    return next(line for line in capsys.readouterr().err.splitlines() if line.startswith("lorax-kit: "))


@pytest.mark.parametrize(("encoding", "line"), [("latin-1", 3), ("utf-16", 1)])
def test_the_option_for_another_encoding_works(tmp_path, model, capsys, encoding, line):
    file = tmp_path / "a.csv"
    lines = ["body,label", "the lamp,thé", *(f"{text},{label}" for text, label in ROWS)]
    text = "\n".join(lines if encoding == "utf-16" else [*lines[:1], "the lamp,x", *lines[2:]])
    file.write_bytes(text.encode(encoding))
    argv = ["evaluate", "--model", model, "--task", "classify", "--data", str(file), "--text", "body", "--json"]
    message = said(capsys, *argv)
    assert message.endswith(f"line {line} is not utf-8 text. | say what it is, such as --with encoding={encoding}")
    main([*argv, "--with", f"encoding={encoding}", "--with", "val=5", "--with", "test=6"])
    assert json.loads(capsys.readouterr().out)["examples"] == 6


def test_the_option_for_another_column_works(tmp_path, model, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": t, "label": [x]}) + "\n" for t, x in ROWS))
    argv = ["evaluate", "--model", model, "--task", "classify", "--data", file, "--json"]
    assert "say that it may have more: --with several=true" in said(capsys, *argv)
    main([*map(str, argv), "--with", "several=true"])
    capsys.readouterr()
    table = tmp_path / "a.csv"
    table.write_text("words,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS))
    argv[6] = table
    assert "say which it is: --text COLUMN" in said(capsys, *argv)
    config = tmp_path / "c.json"
    problem = {"task": "classify", "model": model, "data": str(table)}
    config.write_text(json.dumps({"problem": problem, "study": {"rank": 1, "lr": 1e-3, "seed": [0], "steps": 1,
                                                                 "targets": {"all": ["**/kernel"]}}}))  # fmt: skip
    assert 'say which it is: "text": "COLUMN"' in said(capsys, "study", "--config", config, "--out", tmp_path / "r")


def test_the_readmes_study_is_whole_and_an_error_shows_one(tmp_path, model, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", readme, re.DOTALL)
    given = json.loads(block)
    table = tmp_path / "a.csv"
    table.write_text("body,topic\n" + "".join(f"{text},{label}\n" for text, label in ROWS), encoding="utf-8")
    given["problem"] |= {"data": str(table), "model": model}
    config = tmp_path / "c.json"
    config.write_text(json.dumps(given))
    main(["study", "--config", str(config), "--dry-run", "--json"])
    planned = json.loads(capsys.readouterr().out)
    assert len(planned["trials"]) == 3 * 2 * 3 + 3  # and the probe's seeds
    config.write_text(json.dumps(given | {"study": {"rank": 1}}))
    message = said(capsys, "study", "--config", config, "--out", tmp_path / "r")
    assert "study lacks 'lr', 'targets'" in message
    whole = Study.from_dict(json.loads(message[message.rindex(": | ") + 4 :]))
    assert len(whole.trials()) == 9


def test_lines_of_another_encoding_are_told_with_the_way_to_utf_8(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\ncafé\n".encode("latin-1"))
    message = said(capsys, "generate", "--model", tmp_path, "--prompts", file)
    assert message.endswith("line 2 is not utf-8 text. | write it in UTF-8: iconv -f latin-1 -t utf-8")


def test_a_finished_training_says_what_to_do(tmp_path, model, capsys):
    file = tmp_path / "a.csv"
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS), encoding="utf-8")
    (tmp_path / "o" / "adapter").mkdir(parents=True)
    argv = ["train", "--model", model, "--task", "classify", "--data", file, "--out", tmp_path / "o"]
    message = said(capsys, *argv)
    assert message.endswith("that training is finished. | choose another folder, or delete this one")


def test_an_interruption_is_one_whatever_is_raised_while_it_is_passed_on(monkeypatch, tmp_path, capsys):
    def hidden(*_, **__):
        try:
            raise KeyboardInterrupt
        finally:
            raise ValueError("Can't close the ZIP file")

    monkeypatch.setattr("lorax_kit.commands.inspect_model", hidden)
    with pytest.raises(SystemExit) as stopped:
        main(["inspect"])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("lorax-kit: interrupted\n")
