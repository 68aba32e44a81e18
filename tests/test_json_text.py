"""Texts from anywhere: whatever is wrong with them is one line, where specs, studies, costs and configs are read."""

import json

import pytest

import lorax_kit as lk
from lorax_kit.json_text import parse_json, read_json
from lorax_kit.models import load_bert, load_llama
from lorax_kit.transform import Costs

BAD = {
    b"\xff\xfe{}": "byte 0 is not UTF-8 text",
    b'{"a": "\xe9"}': "byte 7 is not UTF-8 text",
    b"[" * 1000 + b"]" * 1000: "it nests too deeply",
    b'{"a": %s}' % (b"9" * 5000): "it holds a number of 5,000 digits",
    b'{"a": -1%s}' % (b"0" * 400): "it holds a number of 401 digits",
    b'{"rank": 1, "rank": 1}': "the key 'rank' stands twice in one object",
    b'{"rules": {"w": {"rank": 1}, "v": {"rank": 3}, "w": {"rank": 2}}}': "the key 'w' stands twice in one object",
    b"{": "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_text_is_said_in_one_line_wherever_it_is_read(text, tmp_path):
    file, folder = tmp_path / "config.json", tmp_path
    file.write_bytes(text)
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}")
    for error, call in (
        (ValueError, lambda: read_json(file)),
        (lk.SpecError, lambda: lk.Spec.from_json(text)),
        (lk.PlanError, lambda: Costs.read(file)),
        (ValueError, lambda: load_bert(folder)),
        (ValueError, lambda: load_llama(folder)),
    ):
        with pytest.raises(error) as e:
            call()
        assert BAD[text] in str(e.value)
        assert len(str(e.value).splitlines()) <= 2


def test_what_is_fine_is_read_as_json_reads_it():
    text = '{"limit": 1000000000000000019884624838656, "x": [1, -2.5, NaN, null], "é": true}'
    assert str(parse_json(text)) == str(parse_json(text.encode())) == str(json.loads(text))


SETTINGS = [
    ({"rank": 10**5000}, "rank is a int too large to write; it must be an integer of at least 1"),
    ({"rank": 10**400}, "rank is 1000"),
    ({"rank": 2, "alpha": 10**400}, "(401 characters); it must be a positive number"),
    ({"rank": 2, "alpha": float("inf")}, "alpha is inf; it must be a positive number"),
    ({"rank": 1, "alpha": 1e39}, "alpha is 1e+39; it must be a positive number of float32's range"),
    ({"rank": 1, "alpha": 1e-300}, "alpha is 1e-300; it must be a positive number of float32's range"),
    ({"rank": 2**20, "alpha": 1e-43}, "alpha 1e-43 at rank 1048576 is a scale of 9.53674e-50, below float32's range"),
    ({"rank": 2, "dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; it must name a float dtype such as"),
    ({"rank": 2, "dtype": ",float32"}, "dtype is ',float32'; it must name a float dtype such as"),
    ({"rank": 1, "init": "pissa", "start": "eva"}, "start is 'eva' and init is 'pissa': they are one setting"),
    ({"rank": 1, "init": "pissa", "start": "kaiming"}, "start is 'kaiming' and init is 'pissa'"),
    ({"rank": 1, "init": "pissa", "start": "eva", "variant": "dora"}, "start is 'eva' and init is 'pissa'"),
    ({"rank": 2, "start": ["kaiming"]}, "start is ['kaiming']; choose from kaiming"),
]


@pytest.mark.parametrize(("settings", "says"), SETTINGS)
def test_settings_out_of_range_say_so(settings, says):
    with pytest.raises(lk.SpecError) as e:
        lk.LoRA(**settings)
    assert says in str(e.value)
    assert max(map(len, str(e.value).splitlines())) < 200


SPECS = [
    ({"rules": [["w", {"kind": ["lora"], "rank": 2}]]}, "rule 1 'w' has kind ['lora']; choose from lora"),
    ({"rules": [["w", {"kind": "full", "dtype": "float8_e5m2"}]]}, "dtype is 'float8_e5m2'"),
    ({"rules": [["w", {"rank": 2}]], "compute_dtype": ",float32"}, "compute_dtype is ',float32'"),
    ({"rules": [[["w"], {"rank": 2}]]}, "rule pattern ['w'] must be a string"),
]


@pytest.mark.parametrize(("data", "says"), SPECS)
def test_specs_of_wrong_kinds_say_so(data, says):
    with pytest.raises(lk.SpecError) as e:
        lk.Spec.from_json(json.dumps(data))
    assert says in str(e.value)


STUDIES = [
    ({"rank": 10**5000}, "study rank holds a int too large to write; it must be an integer of at least 1"),
    ({"lr": 10**400}, "it must be a positive number of float32's range"),
    ({"steps": 10**400}, "(401 characters); it must be an integer of at least 1"),
    ({"seed": 10**5000}, "study seed holds a int too large to write; it must be an integer in [0, 2^31)"),
    ({"warmup": 10**5000}, "study warmup is a int too large to write"),
    ({"schedule": ["linear"]}, "study schedule is ['linear']; choose from constant, linear, cosine"),
    ({"targets": {"a": [3]}}, "study targets 'a' must be a list of patterns"),
]


@pytest.mark.parametrize(("changes", "says"), STUDIES)
def test_studies_out_of_range_say_so(changes, says):
    with pytest.raises(lk.StudyError) as e:
        lk.Study.from_dict({"rank": [1], "lr": [1e-3], "targets": {"a": ["w"]}, **changes})
    assert says in str(e.value)
    assert max(map(len, str(e.value).splitlines())) < 200
