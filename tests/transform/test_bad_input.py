"""Bad specs and functions: input -> what the message says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from tests.draws import draw

PARAMS = {
    "q": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)},
    "k": {"kernel": jnp.ones((4, 6))},
    "ids": {"kernel": jnp.ones((4, 4), jnp.int32)},
}


def fn(p, x):
    return x @ p["q"]["kernel"] + p["q"]["bias"][None] + 0 * p["ids"]["kernel"].sum().astype(jnp.float32)


R1 = lk.LoRA(rank=1)
PLANS = [
    ({"**/attn/kernel": R1}, (), "rule 1 '**/attn/kernel' matches no parameter"),
    ({"{q,valeu}/kernel": R1}, (), "with 'valeu/kernel'"),
    ({"q/kernel": R1}, ("zzz",), "exclude 'zzz' matches no parameter"),
    ({"q/*": R1}, (), "at least 2 axes"),
    ({"q/kernel": R1, "q/k*": R1}, (), "rule 2 'q/k*' changes nothing"),
    ({"q/kernel": lk.LoRA(rank=5)}, (), "above min(in, out) = 4"),
    ({"ids/kernel": R1}, (), "dtype is int32"),
    ({"k/kernel": R1}, (), "never uses 'k/kernel'"),
]


@pytest.mark.parametrize(("rules", "exclude", "says"), PLANS)
def test_bad_plans_say(rules, exclude, says):
    with pytest.raises(lk.LoraxError) as e:
        lk.resolve(lk.Spec(rules, exclude=exclude), PARAMS, fn, jnp.ones((2, 4)))
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) <= 4


SETTINGS = [
    ({"rank": 0}, "rank is 0"),
    ({"rank": -1}, "rank is -1"),
    ({"rank": 1.5}, "rank is 1.5"),
    ({"rank": True}, "rank is True"),
    ({"rank": 1, "alpha": 0}, "alpha is 0"),
    ({"rank": 1, "alpha": float("nan")}, "alpha is nan"),
    ({"rank": 1, "dropout": 1.0}, "dropout is 1.0"),
    ({"rank": 1, "start": "ones"}, "start is 'ones'"),
    ({"rank": 1, "dtype": "int8"}, "dtype is 'int8'"),
]


@pytest.mark.parametrize(("settings", "says"), SETTINGS)
def test_bad_settings_say(settings, says):
    with pytest.raises(lk.SpecError, match=says):
        lk.LoRA(**settings)


JSON = [
    ("{", "not JSON"),
    ("[]", "must be an object"),
    ('{"rules": []}', "list of [pattern, settings]"),
    ('{"rules": [["q", {"rank": 1, "rnak": 2}]]}', "unknown key 'rnak'"),
    ('{"rules": [["q", {"kind": "full"}]], "x": 1}', "unknown key 'x'"),
    ('{"rules": [["q", {"kind": "half"}]]}', "kind 'half'"),
    ('{"rules": [["re:(", {"rank": 1}]]}', "not a regular expression"),
    ('{"rules": [["re:[[a]", {"rank": 1}]]}', "is ambiguous: Possible nested set at position 1."),
    ('{"rules": [["{a", {"rank": 1}]]}', "never closed"),
]


@pytest.mark.parametrize(("text", "says"), JSON)
def test_bad_json_says(text, says):
    with pytest.raises(lk.SpecError) as e:
        lk.Spec.from_json(text)
    assert says in str(e.value)


def test_factors_of_another_plan_are_refused():
    x = jnp.ones((2, 4))
    plans = [lk.resolve(lk.Spec({"q/kernel": lk.LoRA(rank=r)}), PARAMS, fn, x) for r in (1, 2)]
    base, factors = lk.split(PARAMS, plans[0], jax.random.key(0))
    with pytest.raises(lk.AdapterError, match="rank 2"):
        lk.adapt(fn, plans[1])(base, factors, x)
    with pytest.raises(lk.AdapterError, match="lack"):
        lk.adapt(fn, plans[0])(base, {}, x)


def test_merge_refuses_what_is_not_finite():
    plan = lk.resolve(lk.Spec({"q/kernel": R1}), PARAMS, fn, jnp.ones((2, 4)))
    base, factors = lk.split(PARAMS, plan, jax.random.key(0))
    bad = {"q/kernel": factors["q/kernel"]._replace(b=jnp.full((1, 6), jnp.nan))}
    with pytest.raises(lk.AdapterError, match="not finite"):
        lk.merge(base, bad, plan)


def test_a_site_that_these_inputs_do_not_use_is_an_error():
    def branchy(p, x, use):
        return x @ p["q"]["kernel"] if use else x

    plan = lk.resolve(lk.Spec({"q/kernel": R1}), PARAMS, branchy, jnp.ones((2, 4)), True)
    base, factors = lk.split(PARAMS, plan, jax.random.key(0))
    with pytest.raises(lk.PlanError, match="does not use 'q/kernel'"):
        lk.adapt(branchy, plan)(base, factors, jnp.ones((2, 4)), False)


def changed_in_a_scan(p, x):
    return jax.lax.scan(lambda c, _: (c - 0.1 * jnp.tanh(c), x @ c), p["w"], None, length=2)[1]


def changed_in_a_while(p, x):
    w = jax.lax.while_loop(lambda c: jnp.sum(c) > 0, lambda c: c - 1.0, p["w"])
    return x @ w


def branches_on_a_value(p, x):
    y = x @ p["w"]
    if y[0, 0] > 0:
        y = -y
    return y


def leaves_for_numpy(p, x):
    return np.tanh(np.asarray(x @ p["w"]))


CLOSED_OVER = jnp.ones((4, 4))
W = {"w": jnp.ones((4, 4))}
FUNCTIONS = [
    (changed_in_a_scan, W, "'w' is carried through a scan that changes it"),
    (changed_in_a_while, W, "'w' is carried through a while loop that changes it"),
    (branches_on_a_value, W, "if y[0, 0] > 0:"),
    (leaves_for_numpy, W, "np.tanh(np.asarray(x @ p"),
    (lambda p, x: x @ CLOSED_OVER, W, "never uses 'w'"),
    (lambda p, x: (p["w"] @ p["w"][:, 0], x @ p["w"], p["w"][0] @ p["w"].T), W, None),
    (lambda p, x: (x @ p["w"][0], jnp.einsum("ti,aib->tab", x, p["w"])), {"w": jnp.ones((3, 4, 4))}, "incompatible"),
    (lambda p, x: jnp.real(x @ p["w"]), {"w": jnp.ones((4, 4), jnp.complex64)}, "dtype is complex64"),
]


@pytest.mark.parametrize(("function", "params", "says"), FUNCTIONS)
def test_bad_functions_say(function, params, says):
    resolve = lambda: lk.resolve(lk.Spec({"w": R1}), params, function, jnp.ones((2, 4)))  # noqa: E731
    if says is None:  # the transpose of the other is no contradiction
        resolve()
        return
    with pytest.raises(lk.PlanError) as e:
        resolve()
    assert says in str(e.value)
    assert len(str(e.value).splitlines()) <= 4


def test_inputs_settle_what_the_uses_leave_open():
    function, params, _ = FUNCTIONS[6]
    x = jnp.ones((2, 4))
    sites = {}
    for inputs in ((1,), (0, 2)):
        plan = lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, inputs=inputs)}), params, function, x)
        sites[inputs] = plan.site("w")
        base, factors = lk.split(params, plan, jax.random.key(0))
        factors = {"w": factors["w"]._replace(b=jnp.ones_like(factors["w"].b))}
        ours, theirs = lk.adapt(function, plan)(base, factors, x), function(lk.merge(base, factors, plan), x)
        for y, z in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(y, z, rtol=1e-5)
    assert sites[(1,)].axes == lk.core.plan.Axes(inputs=(1,), outputs=(2,), stack=(0,))
    with pytest.raises(lk.PlanError, match="must name some of them"):
        lk.resolve(lk.Spec({"w": lk.LoRA(rank=2, inputs=(0, 1, 2))}), params, function, x)


def test_a_donated_base_is_named():
    params, x = {"w": jnp.ones((4, 4))}, jnp.ones((2, 4))
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": R1}), params, fn, x)
    base, factors = lk.split(params, plan, jax.random.key(0))
    base["w"].delete()
    for use in (lambda: lk.adapt(fn, plan)(base, factors, x), lambda: lk.merge(base, factors, plan)):
        with pytest.raises(lk.PlanError, match="buffer of 'w' was deleted"):
            use()
    small = lk.quantize({"w": jnp.ones((4, 4))}, ["w"])
    small["w"].codes.delete()
    with pytest.raises(lk.PlanError, match="buffer of 'w' was deleted"):
        lk.merge(small, factors, plan)
    factors["w"].b.delete()
    whole = {"w": jnp.ones((4, 4))}
    for use in (lambda: lk.adapt(fn, plan)(whole, factors, x), lambda: lk.merge(whole, factors, plan)):
        with pytest.raises(lk.AdapterError, match="factors of 'w' were deleted"):
            use()


def test_a_base_of_another_shape_is_named():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    plan = lk.resolve(lk.Spec({"w": R1}), W, fn, jnp.ones((2, 4)))
    _, factors = lk.split(W, plan, jax.random.key(0))
    with pytest.raises(lk.PlanError, match=r"'w' has shape \(4, 5\), the plan expects \(4, 4\)"):
        lk.adapt(fn, plan)({"w": jnp.ones((4, 5))}, factors, jnp.ones((2, 4)))


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"inp": lk.LoRA(rank=2)}, "'inp' and 'out' are one array: trained, .* and 'out' stays as it is"),
        ({"inp": lk.Full(), "out": lk.Full()}, "'inp' and 'out' are one array: .* and 'out' is trained by itself"),
    ],
)
def test_one_array_in_two_leaves_is_said(rules, says):
    shared, x = draw(0, 6, 6), draw(1, 6, 6)
    zeros = jnp.zeros(6)

    def fn(p, x):
        return jnp.tanh(x @ p["inp"] + p["a"][None]) @ p["out"].T + p["b"][None]

    with pytest.warns(UserWarning, match=says) as said:
        lk.resolve(
            lk.Spec({**rules, "{a,b}": lk.Full()}), {"inp": shared, "out": shared, "a": zeros, "b": zeros}, fn, x
        )
    assert len(said) == 1
