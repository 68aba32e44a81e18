"""The recording is current: today's PEFT writes these folders, loads them, and computes these outputs."""

import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.fixtures.recorded_methods import CASES, PEFT_METHODS, expected, folder

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore::FutureWarning")]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from tests.fixtures import make_peft_methods as make  # noqa: E402  (imports torch and PEFT)
from tests.fixtures.torch_tiny import model, outputs  # noqa: E402


def test_the_recorded_cases_are_those_that_are_made():
    assert {case: kind for case, (kind, *_) in make.CASES.items()} == CASES


@pytest.mark.parametrize("case", CASES)
def test_peft_still_writes_the_folder(case, tmp_path):
    made = make.adapted(case)
    make.save(case, made, tmp_path)
    config, recorded = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path, folder(case)))
    for key, value in recorded.items():
        same = sorted if isinstance(value, list) and key.endswith("modules") else lambda x: x  # a set, in any order
        assert same(config[key]) == same(value) or key == "peft_version", key
    now, then = (load_file(path / "adapter_model.safetensors") for path in (tmp_path, folder(case)))
    assert set(now) == set(then)
    for name, x in then.items():
        np.testing.assert_allclose(now[name].astype(float), x.astype(float), atol=1e-5, err_msg=name)
    np.testing.assert_allclose(outputs(made.double(), CASES[case]), expected(case), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_folder(case):
    kind = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(model(kind), folder(case)).eval()
    np.testing.assert_allclose(outputs(loaded.double(), kind), expected(case), atol=1e-5)


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in PEFT_METHODS.rglob("*") if path.is_file()) < 500_000
