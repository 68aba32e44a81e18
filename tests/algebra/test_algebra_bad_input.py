"""What the algebra refuses: input -> the message, before anything is computed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_kit as lk
from lorax_kit import algebra
from lorax_kit.core.site import Axes
from tests.algebra.tasks import adapter, params

BASE = params()
ONE, TWO = adapter(1), adapter(2)
FULL = adapter(3, full=True)
DORA = adapter(4, lk.DoRA(rank=1))
KEY = jax.random.key(0)


def of(shape, setting=None, x=1.0, dtype="float32", b=1.0):
    """An adapter of one parameter `w`."""
    plan = lk.resolve(lk.Spec({"w": setting or lk.LoRA(rank=1)}), {"w": jnp.ones(shape, dtype)})
    site = plan.sites[0]
    return algebra.Adaptation(plan, {"w": lk.Factors(jnp.full(site.a_shape, x), jnp.full(site.b_shape, b))})


def turned(one):
    """The same parameter contracted along its other axis."""
    sites = tuple(replace(s, axes=Axes(inputs=s.axes.outputs, outputs=s.axes.inputs)) for s in one.plan.sites)
    factors = {path: lk.Factors(x.b, x.a) for path, x in one.factors.items()}
    return algebra.Adaptation(replace(one.plan, sites=sites), factors)


def in_full(shape):
    plan = lk.resolve(lk.Spec({"w": lk.Full()}), {"w": jnp.ones(shape)})
    return algebra.Adaptation(plan, {"w": lk.FullLeaf(jnp.ones(shape))})


W = {"w": jnp.ones((4, 3))}
BIG = of((4, 3), x=10.0, b=10.0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        # the adapters
        (lambda: algebra.add(), "there are no adapters to combine"),
        (lambda: algebra.combine([], "svd"), "there are no adapters to combine"),
        (lambda: algebra.average([]), "there are no adapters to combine"),
        (lambda: algebra.combine(ONE, "svd"), "one adapter was given where several are combined"),
        (lambda: algebra.add(ONE, "two"), "a str is no adapter: it needs a plan and factors"),
        (lambda: algebra.negate((ONE.plan, ONE.factors)), "a tuple is no adapter"),
        (lambda: algebra.negate(ONE._replace(factors={})), "the factors lack 'flat' and 2 more"),
        (lambda: algebra.negate(of((4, 3), x=np.nan)), "a of 'w' holds values that are not finite"),
        (lambda: algebra.truncate(of((4, 3), x=np.inf), rank=1), "a of 'w' holds values that are not finite"),
        # that do not go together
        (lambda: algebra.add(ONE, FULL), "adapter 1 adapts 'bias' and adapter 0 does not"),
        (lambda: algebra.add(ONE, adapter(2, sites=("flat",))), "adapter 0 adapts 'heads' and adapter 1 does not"),
        (lambda: algebra.add(of((4, 3)), of((4, 5))), "'w' has shape (4, 3) in adapter 0 and (4, 5) in adapter 1"),
        (lambda: algebra.add(of((4, 3)), of((4, 3), dtype="bfloat16")), "'w' has dtype float32 in adapter 0 and"),
        (lambda: algebra.add(of((4, 3)), turned(of((4, 3)))), "'w' has axes Axes(inputs=(0,), outputs=(1,)"),
        (lambda: algebra.add(of((4, 3)), in_full((4, 3))), "adapter 0 has 'w' at low rank and adapter 1"),
        # the base
        (lambda: algebra.add(DORA, DORA), "the update of 'flat' (dora) depends on the parameter itself"),
        (lambda: algebra.to_lora(DORA), "give the base: base=params"),
        (lambda: algebra.negate(FULL), "'bias' is trained in full: its delta is its value less the base"),
        (lambda: algebra.add(ONE, base={"flat": BASE["flat"]}), "adapts 'heads', which these params do not have"),
        (lambda: algebra.add(ONE, base=BASE | {"flat": jnp.ones((5, 6))}), "'flat' has shape (5, 6)"),
        # weights and numbers
        (lambda: algebra.concatenate([ONE, TWO], [1.0]), "there are 1 weights for 2 adapters"),
        (lambda: algebra.combine([ONE, TWO], "svd", weights=[1, 2, 3]), "there are 3 weights for 2 adapters"),
        (lambda: algebra.concatenate([ONE, TWO], 2.0), "weights is 2.0; give a list with one number for each of 2"),
        (lambda: algebra.concatenate([ONE, TWO], [1.0, np.nan]), "a weight is nan; it must be a finite number"),
        (lambda: algebra.concatenate([ONE, TWO], [1.0, "2"]), "a weight is '2'; it must be a finite number"),
        (lambda: algebra.scale(ONE, float("inf")), "the factor is inf; it must be a finite number"),
        (lambda: algebra.scale(ONE, True), "the factor is True; it must be a finite number"),
        (lambda: algebra.average([ONE, TWO], [1, -1]), "the weights [1.0, -1.0] add up to zero: there is no mean"),
        (lambda: algebra.scale(ONE, 1e39), "the factor is 1e+39; it must be a finite number of float32's range"),
        (lambda: algebra.scale(ONE, 10**5000), "the factor is a int too large to write"),
        (lambda: algebra.combine([ONE, TWO], "svd", weights=[1e39, 1]), "a weight is 1e+39; it must be a finite"),
        (lambda: algebra.average([ONE, TWO], [1e308, 1e308]), "a weight is 1e+308; it must be a finite number of"),
        # results beyond float32
        (lambda: algebra.scale(BIG, 3e38), "the result at 'w' is not finite"),
        (lambda: algebra.combine([BIG, BIG], "cat", weights=[3e38, 1]), "the result at 'w' is not finite"),
        (lambda: algebra.combine([BIG, BIG], "svd", weights=[3e38, 1]), "the result at 'w' is not finite"),
        (lambda: algebra.combine([BIG, BIG], "ties", weights=[3e38, 1], density=0.5), "at 'w' is not finite"),
        (lambda: algebra.combine([BIG], "dare_linear", weights=[3e38], density=0.5, key=KEY), "at 'w' is not finite"),
        (lambda: algebra.combine_into(W, [BIG], "cat", weights=[3e38]), "the result at 'w' is not finite"),
        (lambda: algebra.combine_into(W, [BIG], "ties", weights=[3e38], density=0.5), "at 'w' is not finite"),
        (lambda: algebra.combine_into({"w": W["w"].astype("float16")}, [of((4, 3), x=1e6, dtype="float16")], "svd"),
            "the result at 'w' is not finite: it is beyond the range of its dtype"),
        (lambda: algebra.to_lora(of((4, 3), lk.LoRA(rank=1, alpha=3e38), b=4.0), rank=1), "at 'w' is not finite"),
        (lambda: algebra.stack([of((4, 3), lk.LoRA(rank=1, alpha=3e38), b=4.0)], base=W), "at 'w' is not finite"),
        (lambda: algebra.merge_loss(W, of((4, 3), lk.LoRA(rank=1, alpha=3e38), b=4.0)), "not finite once merged"),
        # how
        (
            lambda: algebra.combine([ONE], "linaer"),
            "how is 'linaer'; choose from cat, linear, svd, magnitude_prune, ties, dare_linear, dare_ties.",
        ),
        (lambda: algebra.combine([ONE], None), "how is None; choose from cat"),
        (lambda: algebra.combine_into(BASE, [ONE], "sum"), "how is 'sum'; choose from cat"),
        (lambda: algebra.combine([ONE], "ties"), "density is missing, and 'ties' needs one"),
        (lambda: algebra.combine([ONE], "svd", density=0.5), "density is given, and 'svd' has no use for it"),
        (lambda: algebra.combine([ONE], "ties", density=0.0), "density is 0.0; it must lie in (0, 1]"),
        (lambda: algebra.combine([ONE], "ties", density=1.5), "density is 1.5; it must lie in (0, 1]"),
        (lambda: algebra.combine([ONE], "ties", density="half"), "density is 'half'; it must lie in (0, 1]"),
        (lambda: algebra.combine([ONE], "dare_ties", density=0.5), "key is missing, and 'dare_ties' needs one"),
        (lambda: algebra.combine([ONE], "dare_ties", density=0.5, key=3), "key is int; it must be one random key"),
        (lambda: algebra.combine([ONE], "ties", density=0.5, key=KEY), "key is given, and 'ties' has no use for it"),
        (lambda: algebra.combine([ONE], "ties", density=0.5, disjoint="max"), "disjoint is 'max'; choose from mean"),
        (lambda: algebra.combine([ONE], "svd", disjoint="sum"), "disjoint='sum' has no use in 'svd'"),
        (lambda: algebra.combine([ONE], "cat", rank=2), "'cat' keeps all rows"),
        (
            lambda: jax.jit(lambda f: algebra.combine([ONE._replace(factors=f)], "svd").factors)(ONE.factors),
            "combine works on values, outside of jit and grad",
        ),
        # rank and energy
        (lambda: algebra.combine([ONE], "svd", rank=6), "rank 6 at 'flat' is above min(in, out) = 5 (in"),
        (lambda: algebra.truncate(ONE, rank=6), "rank 6 at 'flat' is above min(in, out) = 5"),
        (lambda: algebra.to_lora(ONE, rank=0), "rank is 0; it must be an integer of at least 1"),
        (lambda: algebra.truncate(ONE, rank=2.0), "rank is 2.0; it must be an integer of at least 1"),
        (lambda: algebra.truncate(ONE, energy=90), "energy is 90; it must lie in (0, 1]"),
        (lambda: algebra.truncate(ONE), "neither a rank nor an energy was given"),
        (lambda: algebra.grow(ONE, 6, KEY), "rank 6 at 'flat' is above min(in, out) = 5"),
        (lambda: algebra.grow(ONE, 1, KEY), "'flat' has 2 rows, more than rank 1.\n  cut it: truncate"),
        (lambda: algebra.grow(ONE, None, KEY), "rank is None; it must be an integer"),
        (lambda: algebra.grow(ONE, 3, 0), "key is int; it must be one random key"),
    ],
)  # fmt: skip
def test_the_message_says_what_is_wrong(call, says):
    with pytest.raises(lk.LoraxError) as e:
        call()
    assert says in str(e.value)
    assert str(e.value).count("\n") < 4
