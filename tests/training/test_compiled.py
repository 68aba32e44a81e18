"""A step that `lk.fit` sees compiled again is warned of once, with the argument that changed."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lorax_kit as lk

PARTS = jax.sharding.PartitionSpec


def loss(base, factors, batch):
    return jnp.mean((batch["x"] @ (base + factors["w"])) ** 2)


def batch(rows, dtype=np.float32):
    return {"x": np.ones((rows, 3), dtype)}


def fitted(batches, state=None, step=None):
    init, made = lk.make_step(loss, optax.sgd(0.01))
    state = init({"w": jnp.zeros((3, 2))}) if state is None else state
    return lk.fit(made if step is None else step, state, jnp.ones((3, 2)), [batches], progress=False)


def warned(batches, **changes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fitted(batches, **changes)
    return [str(w.message) for w in caught if "compiled again" in str(w.message)], caught


def test_a_last_batch_of_another_size_is_named():
    (text,), caught = warned([batch(8), batch(8), batch(5), batch(4)])
    assert text.startswith("the step was compiled again at its call 3, in ")
    assert "\n  batch/x: float32 (8, 3) -> float32 (5, 3)\n" in text
    assert "fill or leave out batches of another size" in text
    assert caught[-1].filename == __file__.replace(".pyc", ".py")


def test_batches_of_one_form_are_not_warned_of():
    assert warned([batch(8)] * 4)[0] == []
    assert warned([batch(8), {"x": jnp.ones((8, 3))}, batch(8)])[0] == []  # on the host or not: the same program


def test_a_step_that_was_compiled_before_is_watched_too():
    init, step = lk.make_step(loss, optax.sgd(0.01))
    state, _ = step(init({"w": jnp.zeros((3, 2))}), jnp.ones((3, 2)), batch(8))
    (text,), _ = warned([batch(8), batch(5)], state=state, step=step)
    assert "batch/x: float32 (8, 3) -> float32 (5, 3)" in text


def test_a_program_that_is_there_already_is_not_warned_of():
    init, step = lk.make_step(loss, optax.sgd(0.01))
    state = init({"w": jnp.zeros((3, 2))})
    for rows in (5, 8):
        state, _ = step(state, jnp.ones((3, 2)), batch(rows))
    assert warned([batch(8), batch(5)], state=state, step=step)[0] == []


@pytest.mark.usefixtures("standard_promotion")
def test_another_dtype_is_named():
    (text,), _ = warned([batch(8), batch(8, np.float16)])
    assert "batch/x: float32 (8, 3) -> float16 (8, 3)" in text


def test_other_devices_are_named():
    placed = jax.device_put(jnp.ones((8, 3)), jax.devices()[0])
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    init, step = lk.make_step(loss, optax.sgd(0.01))
    whole = jax.sharding.NamedSharding(mesh, PARTS())
    state, base = jax.device_put((init({"w": jnp.zeros((3, 2))}), jnp.ones((3, 2))), whole)
    batches = [{"x": jax.device_put(placed, jax.sharding.NamedSharding(mesh, PARTS(*how)))} for how in ((), ("data",))]
    with pytest.warns(UserWarning, match=r"batch/x: float32 \(8, 3\) on NamedSharding.*'data'"):
        lk.fit(step, state, base, [batches], progress=False)


def test_a_static_field_is_told():
    plain = jax.tree_util.Partial(jnp.tanh)
    other = jax.tree_util.Partial(jnp.sin)
    init, step = lk.make_step(lambda base, f, b: jnp.mean(b["f"](b["x"] @ f["w"])), optax.sgd(0.01))
    batches = [{"x": jnp.ones((8, 3)), "f": f} for f in (plain, other)]
    (text,), _ = warned(batches, state=init({"w": jnp.zeros((3, 2))}), step=step)
    assert "the containers or static fields of the arguments" in text


def test_sharded_steps_are_watched():
    mesh = lk.device_mesh()
    init, step = lk.sharded_step(loss, optax.sgd(0.01), mesh)
    state = init({"w": jnp.zeros((3, 2))})
    (text,), _ = warned([batch(8), batch(8), batch(4)], state=state, step=step)
    assert "call 3" in text
    assert "batch/x: float32 (8, 3) -> float32 (4, 3)" in text
