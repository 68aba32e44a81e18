"""A user's own method, as `experiments/own_method.py` registers it: trained, stacked, merged, saved, loaded."""

import importlib.util
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.method import METHODS
from tests import tiny
from tests.draws import draw
from tests.methods import promises

FILE = Path(__file__).parents[2] / "experiments" / "own_method.py"


@pytest.fixture
def own():
    """The script's module; its method is taken off the table again."""
    spec = importlib.util.spec_from_file_location("own_method", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    METHODS.pop("tinylora")


def test_it_is_under_forty_lines():
    text = FILE.read_text()
    code = text[text.index("# The method: from here") : text.index("# ... to here")]
    assert len([line for line in code.splitlines() if line.strip()]) < 40


def test_it_is_trained_stacked_merged_saved_and_loaded(own, tmp_path, standard_promotion):
    problem = tiny.problem()
    study = tiny.study(
        variant="tinylora", settings={"tinylora": {"u": 5}}, rank=2, alpha=None, lr=[0.1, 1.0], seed=[0, 1], probe_lr=()
    )
    results = lk.run(study, problem, out=tmp_path / "run", progress=False)
    assert results.compiles == 1
    assert [row["status"] for row in results.rows] == ["done"] * 4
    assert {row["params"] for row in results.rows} == {2 * 5 + 18}  # two sites, and the head
    base = problem.params(jax.random.key(0))
    loaded = lk.load_adapter(tmp_path / "run" / results.rows[0]["adapter"], base=base)
    assert loaded.plan.site("up/kernel").setting == own.TinyLoRA(rank=2, u=5)
    assert float(jnp.abs(loaded.factors["up/kernel"].v).max()) > 0.01
    batch = problem.val[0]
    np.testing.assert_allclose(
        lk.adapt(problem.apply, loaded.plan)(base, loaded.factors, batch),
        problem.apply(lk.merge(base, loaded.factors, loaded.plan), batch),
        atol=1e-5,
    )


def test_its_stacked_trials_equal_their_solo_runs(own, standard_promotion):
    promises.check_stacking(
        variant="tinylora", settings={"tinylora": {"u": 5}}, rank=2, alpha=None, lr=[0.1], seed=[0, 1]
    )


class One(NamedTuple):
    gain: jax.Array


@dataclass(frozen=True, kw_only=True)
class Gain(lk.Setting):
    kind = "gain"


METHOD = lk.Method(
    setting=Gain,
    leaves=One,
    init=lambda site, w, key, hints: One(jnp.ones(site.out_shape)),
    update=lambda site, w, leaves, scale: lk.Update(out_gain=leaves.gain),
    gains=frozenset({"gain"}),
)


class Nameless(lk.Setting):
    pass


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"setting": lk.LoRA}, "the kind 'lora' is taken"),
        ({"setting": dict}, "must be a subclass of lk.Setting"),
        ({"setting": Nameless}, "with a `kind`"),
        ({"leaves": tuple}, "must be a NamedTuple"),
        ({"rows": frozenset({"a"})}, "names the leaf 'a' in rows; its leaves are gain"),
        ({"rows": "z"}, "rows of method 'gain' is 'z'; it must be a frozenset of names of leaves"),
        ({"frozen": ["gain"]}, r"frozen of method 'gain' is \['gain'\]; it must be a frozenset of names"),
        ({"gains": None}, "gains of method 'gain' is None; it must be a frozenset"),
        ({"outputs": "gain"}, "outputs of method 'gain' is 'gain'; it must be a frozenset"),
        ({"init": None}, "init of method 'gain' is None; it must be a function"),
        ({"max_rank": 3}, "max_rank of method 'gain' is 3; it must be a function"),
    ],
)
def test_a_method_that_is_none_is_refused(change, says):
    with pytest.raises(lk.SpecError, match=says):
        lk.register(replace(METHOD, **{"setting": Gain, **change}))
    with pytest.raises(lk.SpecError, match=r"is no lk\.Method"):
        lk.register(Gain)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"init": lambda *_: (1,)}, "init of method 'gain' returns tuple, not its leaves"),
        ({"update": lambda *_: lk.Update(a=jnp.ones((1, 4)))}, "with both of a and b or neither"),
        ({"update": lambda *_: lk.Update(out_gain=jnp.ones(4))}, r"has out_gain of shape \(4,\)"),
        ({"update": lambda *_: lk.Update(a=jnp.ones(()), b=jnp.ones(()))}, r"has a of shape \(\)"),
        ({"update": lambda *_: lk.Update(out_gain=1.0)}, "update of method 'gain' returns a float as 'out_gain'"),
        ({"init": lambda *_: One(1.0)}, "init of method 'gain' returns a float as 'gain'; it must be one array"),
        ({"init": lambda *_: One({"x": jnp.ones(3)})}, "init of method 'gain' returns a dict as 'gain'"),
        ({"init": lambda *_: One([jnp.ones(3)])}, "init of method 'gain' returns a list as 'gain'"),
        ({"frozen": lambda _: frozenset({"zz"})}, "method 'gain' names the leaf 'zz' in frozen; its leaves are gain"),
        ({"frozen": lambda _: ["gain"]}, r"frozen of method 'gain' is \['gain'\]; it must be a frozenset"),
        ({"max_rank": lambda _: "4"}, "max_rank of method 'gain' returns '4'; it must be an integer"),
    ],
)
def test_a_method_that_does_not_fit_says_so_when_it_is_resolved(change, says):
    lk.register(replace(METHOD, **change))
    try:
        with pytest.raises(lk.PlanError, match=says):
            lk.resolve(lk.Spec({"w": Gain()}), {"w": draw(0, 4, 3)})
    finally:
        METHODS.pop("gain")


def test_a_setting_that_was_never_registered_is_named():
    with pytest.raises(lk.SpecError, match=r"method 'gain' is unknown; choose from .*lk\.register"):
        lk.resolve(lk.Spec({"w": Gain()}), {"w": draw(0, 4, 3)}, lambda p, x: x @ p["w"], draw(1, 2, 4))


def test_every_setting_shows_what_it_takes():
    """As `help` and editors read it."""
    for method in METHODS.values():
        parameters = inspect.signature(method.setting).parameters.values()
        assert not any(one.kind is one.VAR_KEYWORD for one in parameters), method.setting
