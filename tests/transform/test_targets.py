"""What a spec targets: layer ranges, the all-linear preset, chosen rows of a table, capped ranks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit.core.specs.patterns import expand_braces
from tests.cases import CASES
from tests.draws import draw, moved


def test_a_range_is_spelled_out_with_both_ends():
    assert expand_braces("layer_{9..11}/w") == ("layer_9/w", "layer_10/w", "layer_11/w")
    assert expand_braces("{a,2..3,b}") == ("a", "2", "3", "b")
    with pytest.raises(lk.SpecError, match=r"the range 3\.\.1 is empty"):
        expand_braces("x{3..1}")


def test_a_range_that_goes_beyond_the_layers_is_an_error():
    params = {f"layer_{i}": {"w": draw(i, 4, 3)} for i in range(3)}
    plan = lk.resolve(lk.Spec({"layer_{1..2}/w": lk.LoRA(rank=1)}), params)
    assert [site.path for site in plan.sites] == ["layer_1/w", "layer_2/w"]
    with pytest.raises(lk.PlanError, match="layer_3"):
        lk.resolve(lk.Spec({"layer_{1..3}/w": lk.LoRA(rank=1)}), params)


def test_all_linear_takes_products_and_says_what_it_leaves(capsys):
    case = CASES["tied"]()
    spec = lk.all_linear(lk.LoRA(rank=2), case.params, case.fn, *case.inputs, exclude=["attention/out/kernel"])
    taken = [pattern for pattern, _ in spec.rules]
    assert taken == ["attention/key/kernel", "attention/query/kernel", "attention/value/kernel", "stack/Dense_0/kernel"]
    told = capsys.readouterr().err
    assert "all-linear adapts 4 parameters" in told
    assert "left out (excluded): attention/out/kernel" in told
    assert "left out (gather): table/embedding" in told
    plan = lk.resolve(spec, case.params, case.fn, *case.inputs)
    assert len(plan.sites) == 4


@pytest.mark.parametrize("name", ["convolution", "materialised"])
def test_all_linear_without_a_product_is_an_error(name):
    case = CASES[name]()
    with pytest.raises(lk.PlanError, match="there is nothing linear"):
        lk.all_linear(lk.LoRA(rank=2), case.params, case.fn, *case.inputs)


def test_ranks_are_capped_on_request_only_and_reported():
    params = {"w": draw(0, 6, 3), "v": draw(1, 3, 8)}
    fn = lambda p, x: x @ p["w"] @ p["v"]  # noqa: E731
    x = draw(2, 4, 6)
    rules = {"w": lk.LoRA(rank=5, alpha=10), "v": lk.LoRA(rank=2)}
    with pytest.raises(lk.PlanError, match=r"rank 5 at 'w' is above min\(in, out\) = 3"):
        lk.resolve(lk.Spec(rules), params, fn, x)
    plan = lk.resolve(lk.Spec(rules, cap_ranks=True), params, fn, x)
    assert plan.capped == {"w": (5, 3)}
    assert plan.site("w").scale == 10 / 3
    base, factors = lk.split(params, plan, jax.random.key(0))
    found = lk.explain(lk.adapt(fn, plan), base, factors, x)
    assert "w: rank 5 capped to 3" in str(found)
    assert found.to_dict()["capped"] == {"w": [5, 3]}
    assert lk.Spec.from_json(plan.spec.to_json()) == plan.spec


@pytest.mark.parametrize("tied", [False, True])
def test_only_chosen_rows_of_a_table_move(tied):
    params, ids = {"table": draw(0, 9, 4)}, jnp.asarray([[1, 2, 5], [5, 0, 8]])

    def fn(p, ids):
        h = jnp.tanh(p["table"][ids])
        return h @ p["table"].T if tied else h

    plan = lk.resolve(lk.Spec({"table": lk.Rows(rows=[5, 2])}), params, fn, ids)
    base, factors = lk.split(params, plan, jax.random.key(0))
    trained = factors["table"]._replace(b=draw(1, 2, 4))
    merged = lk.merge(base, {"table": trained}, plan)["table"]
    expected = np.asarray(params["table"]).copy()
    expected[[5, 2]] += np.asarray(trained.b)
    np.testing.assert_allclose(merged, expected, rtol=1e-6)
    untouched = [i for i in range(9) if i not in (5, 2)]
    assert np.asarray(merged)[untouched].tobytes() == np.asarray(params["table"])[untouched].tobytes()
    adapted = lk.adapt(fn, plan)
    np.testing.assert_allclose(adapted(base, {"table": trained}, ids), fn({"table": merged}, ids), rtol=1e-5, atol=1e-6)
    grads = jax.grad(lambda f: jnp.sum(adapted(base, f, ids) ** 2))({"table": trained})["table"]
    assert float(jnp.abs(grads.a).max()) == 0
    assert float(jnp.abs(grads.b).min()) > 0


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ((), "must list different rows"),
        ((1, 1), "must list different rows"),
        ((9,), "'table': row 9 does not exist: there are 9"),
    ],
)
def test_rows_that_are_not_there_are_refused(rows, says):
    params = {"table": draw(0, 9, 4)}
    with pytest.raises(lk.LoraxError, match=says):
        lk.resolve(lk.Spec({"table": lk.Rows(rows=rows)}), params, lambda p, i: p["table"][i], jnp.arange(3))


def test_leaves_moved_at_random_keep_their_types():
    params = {"w": draw(0, 6, 3)}
    plan = lk.resolve(lk.Spec({"w": lk.DoRA(rank=2)}), params)
    assert type(moved(lk.split(params, plan, jax.random.key(0))[1])["w"]).__name__ == "DoRALeaves"
