"""Values of adapter_config.json of a kind that their key cannot have: an `AdapterError` that names the key."""

import json
import shutil
from functools import cache

import jax
import jax.numpy as jnp
import pytest

import lorax_kit as lk
from tests.fixtures.recorded_methods import CASES, base, folder, names


@cache
def model(kind):
    return base(kind), names(kind)


def load(path, case, **changes):
    if not (path / "adapter_model.safetensors").exists():
        shutil.copytree(folder(case), path, dirs_exist_ok=True)
    config = json.loads((folder(case) / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))
    params, table = model(CASES[case])
    return lk.load_peft(path, base=params, names=table)


NAMED = [
    ("lora", "alpha_pattern", {"q": [True]}, "has alpha_pattern 'q': [True], which is malformed"),
    *(("lokr", "decompose_factor", x, f"decompose_factor is {x!r}; ") for x in (None, "", [], {}, False, True, 0, 1.5)),
    *(("ia3", "feedforward_modules", x, f"feedforward_modules is {x!r}; ") for x in (True, -1, 1.5, [3])),
    *(("tokens", "trainable_token_indices", x, f"for trainable_token_indices, which is {x!r}") for x in (None, {}, [])),
    *(("vera_redrawn", "projection_prng_key", x, f"projection_prng_key is {x!r}; ") for x in (None, "ab", [1], 1.5)),
    ("miss_mini", "mini_r", 0, "mini_r is 0; it must be an integer of at least 1"),
    ("adalora", "init_r", 10**15, "its config (rank 1000000000000000) and"),
]


@pytest.mark.parametrize(("case", "key", "value", "says"), NAMED)
def test_a_value_of_another_kind_says_which_key(tmp_path, case, key, value, says):
    with pytest.raises(lk.AdapterError) as e:
        load(tmp_path, case, **{key: value})
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) <= 4


@pytest.mark.parametrize("value", [None, {"embed": [1, 7]}, "ab"])
def test_tokens_that_are_no_list_say_so(tmp_path, value):
    params, table = {"embed": {"embedding": jnp.ones((9, 4))}}, {"embed/embedding": ("embed.weight",)}
    spec = lk.Spec({"embed/embedding": lk.Rows(rows=(1, 7))})
    plan = lk.resolve(spec, params, lambda p, x: p["embed"]["embedding"][x], jnp.ones(2, int))
    _, factors = lk.split(params, plan, jax.random.key(0))
    lk.save_peft(tmp_path / "a", plan, factors, base=params, names=table)
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"token_indices": value}))
    with pytest.raises(lk.AdapterError, match="token_indices"):
        lk.load_peft(tmp_path / "a", base=params, names=table)


ODD = (None, True, "ab", [], [True], {"a": None}, {".*": [1]}, -1, 1.5, 10**15)
MORE = ("rank_pattern", "alpha_pattern", "lambda_pattern", "layers_pattern", "exclude_modules", "target_parameters")


@pytest.mark.parametrize(
    "case", ["lora", "dora", "adalora", "delora", "hra", "ia3", "loha", "lokr", "miss_mini", "tokens", "vera_redrawn"]
)
def test_no_key_of_a_config_raises_another_error(tmp_path, case):
    config = json.loads((folder(case) / "adapter_config.json").read_text())
    for key in (*config, *MORE):
        for value in ODD:
            try:
                load(tmp_path, case, **{key: value})
            except lk.AdapterError as e:
                assert len(str(e).splitlines()) <= 4, (key, value)
