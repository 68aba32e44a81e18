"""Plans of random params and specs: `merge` is the inverse of `split`, what is written is read bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import lorax_kit as lk
from lorax_kit.core.method import METHODS
from lorax_kit.serve import load_tensors, save_tensors
from tests.fuzz.verdict import NOTHING, run, taken

KINDS = sorted(METHODS)
DTYPES = ("float32", "bfloat16", "float16")
SHAPES = ((4, 3), (2, 6), (6, 6))


def arrays(draw, shape):
    """An array of any float dtype, whose values JAX keeps bit for bit: zeros of both signs, too."""
    values = np.resize([0.0, -0.0, 1.5, -2.25, 1e-30, 300.0], shape)
    return jnp.asarray(values + draw(st.sampled_from([0.0, 0.125])), draw(st.sampled_from(DTYPES)))


def trees(draw):
    names = draw(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3, unique=True))
    return {name: {"kernel": arrays(draw, draw(st.sampled_from(SHAPES)))} for name in names}


def bits(tree):
    return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def test_merge_is_the_inverse_of_split(tried):
    def check(draw, said):
        params, kind = trees(draw), draw(st.sampled_from(KINDS))
        fields = METHODS[kind].setting.__dataclass_fields__
        more = {"rank": draw(st.integers(1, 3))} if "rank" in fields else {}
        more |= {"rows": (0,)} if "rows" in fields else {}
        setting = METHODS[kind].setting(**more)
        said += [jax.tree.map(lambda x: (x.shape, x.dtype), params), setting]
        plan = taken(lambda: lk.resolve(lk.Spec({"*/kernel": setting}, cap_ranks=draw(st.booleans())), params))
        if plan is not NOTHING:
            assert hash(plan) == hash(lk.resolve(plan.spec, params))
            base, factors = lk.split(params, plan, jax.random.key(0))
            assert bits(lk.merge(base, factors, plan)) == bits(params)

    run(check, 60, tried, "plans split and merged")


def test_tensors_are_read_as_written(tried, tmp_path):
    def check(draw, said):
        keys = st.sampled_from(["a", "b", "é", "a:codes", "x y", "__metadata__", "", "0"])
        shapes = st.sampled_from([(), (0,), (3,), (2, 3)])
        dtypes = st.sampled_from([*DTYPES, "int8", "uint32", "bool", "complex64"])
        tree = draw(st.dictionaries(keys, st.dictionaries(keys, st.tuples(shapes, dtypes), max_size=2), max_size=3))
        said += [tree]
        params = jax.tree.map(lambda x: np.ones(x[0], x[1]), tree, is_leaf=lambda x: isinstance(x, tuple))
        file = tmp_path / "t.safetensors"
        written = taken(lambda: save_tensors(file, params, overwrite=True), tmp_path)
        if written is not NOTHING:
            found = load_tensors(file)
            filled = {name: inner for name, inner in params.items() if inner}
            assert jax.tree.structure(found) == jax.tree.structure(filled)
            assert bits(found) == bits(filled)

    run(check, 500, tried, "trees of tensors written and read")
