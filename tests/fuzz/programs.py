"""Random small programs over one to three parameters, as Python source, so that a failure prints what to run.

A program makes weights out of parameters (`Maker.weight`: transposed, cut, joined, scaled, ...), multiplies inputs by
them or looks entries up (`Maker.use`), and does so within functions that JAX calls (`Maker.within`: jit, scan, ...).
"""

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

SIZES = (2, 3, 4, 6)
LARGEST = 400
"""Entries of a weight; larger ones are not changed further."""


def const(*shape, of=0):
    """An array whose values depend on its shape, and on a number."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, of)).encode()))
    return jnp.asarray(rng.uniform(0.5, 1.5, size=shape) * rng.choice([-1, 1], size=shape), jnp.float32)


@jax.custom_jvp
def doubled(y):
    return 2.0 * y


doubled.defjvp(lambda primals, tangents: (doubled(*primals), 2.0 * tangents[0]))


def with_rule(fn):
    """A function with a derivative rule of its own, which is the true one."""
    wrapped = jax.custom_jvp(fn)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(fn, primals, tangents))
    return wrapped


NAMES = {"jax": jax, "jnp": jnp, "lax": lax, "const": const, "with_rule": with_rule, "doubled": doubled}


class Program(NamedTuple):
    """A function of (params, inputs).

    Attributes:
      source: of the function, `fn`.
      params, inputs: arrays by name.
      rounds: whether it casts to bfloat16.
      reverse: whether JAX can differentiate it backwards.
    """

    source: str
    params: dict[str, jax.Array]
    inputs: dict[str, jax.Array]
    rounds: bool
    reverse: bool

    def __str__(self):
        shapes = {name: x.shape for name, x in {**self.params, **self.inputs}.items()}
        return f"{self.source}\n{shapes}"

    @property
    def fn(self):
        names = dict(NAMES)
        exec(self.source, names)
        return names["fn"]


class Maker:
    """Draws a program, line by line."""

    def __init__(self, draw):
        self.draw, self.lines, self.inputs, self.params = draw, [], {}, {}
        self.rounds, self.reverse, self.count = False, True, 0

    def below(self, n):
        return self.draw(st.integers(0, n - 1))

    def pick(self, values):
        return values[self.below(len(values))]

    def order(self, n):
        return tuple(self.draw(st.permutations(range(n))))

    def some(self, values, least=0):
        mask = [self.below(2) for _ in values]
        chosen = [x for x, m in zip(values, mask, strict=True) if m]
        return chosen if len(chosen) >= least else list(values)[:least]

    def let(self, expression):
        self.count += 1
        self.lines.append(f"v{self.count} = {expression}")
        return f"v{self.count}"

    def input(self, *shape):
        """A new input, or one that was read before: products of it with several weights may run as one."""
        known = [name for name, x in self.inputs.items() if x.shape == shape and jnp.issubdtype(x.dtype, jnp.floating)]
        if known and self.below(2):
            return f"x[{self.pick(known)!r}]"
        name = f"x{len(self.inputs)}"
        self.inputs[name] = const(*shape, of=len(self.inputs))
        return f"x[{name!r}]"

    def index(self, size, *shape):
        name = f"x{len(self.inputs)}"
        rng = np.random.default_rng(len(self.inputs))
        self.inputs[name] = jnp.asarray(rng.integers(0, size, shape), jnp.int32)
        return f"x[{name!r}]"

    def program(self):
        shapes = []
        for i in range(self.pick([1, 1, 1, 2, 2, 3])):
            alike = shapes and self.below(2)
            shapes.append(self.pick(shapes) if alike else tuple(self.pick(SIZES) for _ in range(2 + self.below(3))))
            self.params[f"p{i}"] = const(*shapes[i], of=-i)
        weights = [(self.let(f"p['p{i}']"), shape) for i, shape in enumerate(shapes)]
        outs = []
        for one in [*weights, *(weights[:1] if self.below(5) == 0 else [])]:
            weight = one
            for _ in range(self.pick([0, 1, 1, 2, 3])):
                weight = self.weight(*weight, weights)
            outs += [self.within(*weight) for _ in range(self.pick([1, 1, 1, 2]))]
        body = "\n    ".join(self.lines)
        source = f"def fn(p, x):\n    {body}\n    return [{', '.join(outs)}]"
        return Program(source, self.params, self.inputs, self.rounds, self.reverse)

    # Weights made of weights.

    def weight(self, w, shape, others):
        """One change of a weight: (expression, shape)."""
        if int(np.prod(shape)) > LARGEST:
            return w, shape
        change = self.pick(
            [
                *(self.transposed, self.reshaped, self.sliced, self.sliced_by_input, self.scaled, self.spread),
                *(self.joined, self.joined, self.added, self.looked_up, self.padded, self.called, self.split),
            ]
        )
        expression, shape = change(w, shape, others)
        return self.let(expression), tuple(shape)

    def transposed(self, w, shape, others):
        if self.below(3) == 0:
            return f"jnp.flip({w}, {self.below(len(shape))})", shape
        order = self.order(len(shape))
        return f"jnp.transpose({w}, {order})", [shape[d] for d in order]

    def reshaped(self, w, shape, others):
        d = self.below(len(shape))
        if self.below(2) and d + 1 < len(shape):
            new = (*shape[:d], shape[d] * shape[d + 1], *shape[d + 2 :])
        else:
            part = self.pick([n for n in range(1, shape[d] + 1) if shape[d] % n == 0])
            new = (*shape[:d], part, shape[d] // part, *shape[d + 1 :])
        return f"jnp.reshape({w}, {new})", new

    def sliced(self, w, shape, others):
        d = self.below(len(shape))
        start, step = self.below(shape[d]), 1 + self.below(2)
        cut = ", ".join([":"] * d + [f"{start}::{step}"])
        return f"{w}[{cut}]", [len(range(start, n, step)) if i == d else n for i, n in enumerate(shape)]

    def sliced_by_input(self, w, shape, others):
        d = self.below(len(shape))
        size, start = 1 + self.below(shape[d]), self.index(shape[d])
        cut = [size if i == d else n for i, n in enumerate(shape)]
        return f"lax.dynamic_slice_in_dim({w}, {start}, {size}, {d})", cut

    def scaled(self, w, shape, others):
        way = self.below(8)
        along = [n if i == self.below(len(shape)) else 1 for i, n in enumerate(shape)]
        if way == 7:
            self.rounds = True
            return f"{w}.astype(jnp.bfloat16).astype(jnp.float32)", shape
        texts = (
            *(f"0.5 * {w}", f"{w} / -3.0", f"-{w}", f"{w} * const{tuple(along)}", f"{w} / const{tuple(along)}"),
            *(f"{w} * {self.input()}", f"jnp.tanh({w})" if self.below(4) == 0 else f"doubled({w})"),
        )
        return texts[way], shape

    def spread(self, w, shape, others):
        d, way = self.below(len(shape) + 1), self.below(4)
        if way == 0 and 1 in shape:
            d = shape.index(1)
            return f"jnp.squeeze({w}, {d})", (*shape[:d], *shape[d + 1 :])
        if way == 1:
            reps = tuple(1 + self.below(2) for _ in shape)
            return f"jnp.tile({w}, {reps})", [n * m for n, m in zip(shape, reps, strict=True)]
        new = (*shape[:d], 1, *shape[d:])
        text = f"jnp.expand_dims({w}, {d})"
        if way == 2:
            return text, new
        wide = (*shape[:d], 2, *shape[d:])
        return f"jnp.broadcast_to({text}, {wide})", wide

    def partner(self, shape, others):
        """Another weight of a shape, out of any that can be given it, or an array."""
        fits = [name for name, other in others if other == shape]
        turned = [(name, other) for name, other in others if other != shape and sorted(other) == sorted(shape)]
        if fits and self.below(4):
            return self.pick(fits)
        if turned and self.below(4):
            name, other = self.pick(turned)
            order = tuple(
                int(i) for i in np.argsort(other, kind="stable")[np.argsort(np.argsort(shape, kind="stable"))]
            )
            return f"jnp.transpose({name}, {order})"
        return f"const{shape}"

    def joined(self, w, shape, others):
        other = self.partner(shape, others)
        pair = [w, other] if self.below(2) else [other, w]
        text = ", ".join(pair)
        if self.below(2):
            d = self.below(len(shape) + 1)
            return f"jnp.stack([{text}], {d})", (*shape[:d], 2, *shape[d:])
        d = self.below(len(shape))
        return f"jnp.concatenate([{text}], {d})", [2 * n if i == d else n for i, n in enumerate(shape)]

    def added(self, w, shape, others):
        other = self.pick([self.partner(shape, others), f"jnp.flip({w}, 0)", f"0.5 * {w}"])
        return f"{w} {self.pick(['+', '-', '+', '-', '*'])} {other}", shape

    def looked_up(self, w, shape, others):
        d, lead = self.below(len(shape)), self.pick([(), (2,), (2, 2)])
        if len(shape) < 2:
            lead = (2,)
        mode = self.pick(["'clip'", "'fill'", "None"])
        rows = (*shape[:d], *lead, *shape[d + 1 :])
        return f"jnp.take({w}, {self.index(shape[d], *lead)}, {d}, mode={mode})", rows

    def padded(self, w, shape, others):
        config = tuple((self.below(2), self.below(2), self.below(2)) for _ in shape)
        new = [n + low + high + inner * (n - 1) for n, (low, high, inner) in zip(shape, config, strict=True)]
        return f"lax.pad({w}, jnp.float32({self.pick([0.0, 0.5])}), {config})", new

    def called(self, w, shape, others):
        text, new = self.pick([self.transposed, self.scaled, self.sliced])("w", shape, [])
        text = f"(lambda w: {text})"
        call = self.pick(["jax.jit", "jax.checkpoint", "with_rule", "lax.optimization_barrier"])
        if call == "with_rule" and "x[" in text:  # JAX has no derivative where such a function closes over an input
            call = "jax.jit"
        return (f"{call}({w})", shape) if call.startswith("lax") else (f"{call}({text})({w})", new)

    def split(self, w, shape, others):
        d = self.below(len(shape))
        if self.below(2) and len(shape) > 1:
            return f"jnp.unstack({w}, axis={d})[{self.below(shape[d])}]", (*shape[:d], *shape[d + 1 :])
        at, side = self.below(shape[d] - 1) + 1 if shape[d] > 1 else 0, self.below(2)
        if at == 0:
            return f"jnp.negative({w})", shape
        size = shape[d] - at if side else at
        return f"jnp.split({w}, [{at}], {d})[{side}]", [size if i == d else n for i, n in enumerate(shape)]

    # Uses of weights.

    def use(self, w, shape, x=()):
        """(expression of a use, the input in it or None); `x` are leading axes that an outer function takes away."""
        kinds = [self.dot, self.dot, self.dot, self.einsum]
        kinds += [self.row] if len(shape) > 1 else []
        kinds += [self.convolution] if len(shape) in (3, 4) else []
        return self.pick(kinds)(w, shape, x)

    def dot(self, w, shape, x):
        order = self.order(len(shape))
        contract = order[: 1 + self.below(max(len(shape) - 1, 1))]
        batch = self.some([d for d in order if d not in contract]) if self.below(2) else []
        free = tuple(self.pick(SIZES[:2]) for _ in range(self.below(3)))
        axes = [(shape[d], d) for d in (*batch, *contract)] + [(n, None) for n in free]
        places = self.order(len(axes))
        mine = [axes[i] for i in places]
        at = {d: i for i, (_, d) in enumerate(mine) if d is not None}
        name = self.input(*x, *(n for n, _ in mine))
        sides = (tuple(at[d] for d in contract), contract), (tuple(at[d] for d in batch), tuple(batch))
        if self.below(2):
            return f"lax.dot_general(y, {w}, {sides})", name
        return f"lax.dot_general({w}, y, {tuple(pair[::-1] for pair in sides)})", name

    def einsum(self, w, shape, x):
        letters = "abcdef"[: len(shape)]
        shared = self.some(letters, 1)
        own = "xy"[: self.below(3)]
        sizes = dict(zip(letters, shape, strict=True)) | {"x": 2, "y": 3}
        mine = [([*shared, *own])[i] for i in self.order(len(shared) + len(own))]
        rest = [c for c in letters if c not in shared]
        out = self.some([*rest, *shared, *own])
        out = [out[i] for i in self.order(len(out))]
        name = self.input(*x, *(sizes[c] for c in mine))
        pair = [("".join(mine), "y"), (letters, w)][:: self.pick([1, -1])]
        text = f"{pair[0][0]},{pair[1][0]}->{''.join(out)}"
        return f"jnp.einsum({text!r}, {pair[0][1]}, {pair[1][1]})", name

    def row(self, w, shape, x):
        d, lead = self.below(len(shape)), (*x, *self.pick([(2,), (3,), (2, 2)]))
        mode = self.pick(["'clip'", "'fill'", "None"])
        return f"jnp.take({w}, y, {d}, mode={mode})", self.index(shape[d], *lead)

    def convolution(self, w, shape, x):
        order = self.order(len(shape))
        letters = "OIHW"[: len(shape)]
        kernel = "".join(letters[order.index(d)] for d in range(len(shape)))
        size = {c: shape[kernel.index(c)] for c in letters}
        groups = self.pick([g for g in (1, 2, 3) if size["O"] % g == 0])
        lhs = "".join("NCHW"[: len(shape)][i] for i in self.order(len(shape)))
        sizes = {"N": 2, "C": size["I"] * groups, "H": size["H"] + 2, "W": size.get("W", 0) + 2}
        name = self.input(*x, *(sizes[c] for c in lhs))
        strides = tuple(1 + self.below(2) for _ in range(len(shape) - 2))
        spread = tuple(1 + self.below(2) for _ in range(len(shape) - 2))
        padding = tuple((self.below(3), self.below(2)) for _ in strides)
        numbers = (lhs, kernel, lhs)
        return (
            f"lax.conv_general_dilated(y, {w}, {strides}, {padding}, lhs_dilation={spread}, "
            f"dimension_numbers={numbers}, feature_group_count={groups})"
        ), name

    def within(self, w, shape):
        """A use, within a function that JAX calls; the expression of its results."""
        way = self.below(13)
        if len(shape) > 1 and way in (0, 1, 2):
            return self.layers(w, shape, way)
        lead = (2,) if way in (3, 4) else ()
        text, x = self.use("w", shape, lead)
        one = f"lambda w, y: {text}"
        tested = f"jnp.sum({x}) > 0" if self.below(2) else "True"
        calls = {
            3: f"jax.vmap({one}, in_axes=(None, 0))({w}, {x})",
            4: f"lax.scan(lambda h, y: (h + 1.0, jnp.sin(({one})({w}, y))), 0.0, {x})[1]",
            5: f"jax.jit({one})({w}, {x})",
            6: f"jax.checkpoint({one})({w}, {x})",
            7: f"with_rule({one})({w}, {x})" if "take" not in text else f"({one})({w}, {x})",
            8: f"lax.cond({tested}, {one}, lambda w, y: 0.5 * ({one})(w, y), {w}, {x})",
            9: f"lax.fori_loop(0, 2, lambda i, h: 0.5 * h + jnp.sum(({one})({w}, {x})), 0.0)",
            10: f"lax.scan(lambda c, _: (c, jnp.cos(({one})(c, {x}))), {w}, None, length=2)[1]",
            11: f"lax.switch(1, [{one}, lambda w, y: -({one})(w, y)], {w}, {x})",
        }
        if way == 12 and self.below(3) == 0:
            self.reverse = False
            body = f"lambda s: (s[0] + 1, 0.5 * s[1] + jnp.sum(({one})({w}, {x})))"
            return self.let(f"lax.while_loop(lambda s: s[0] < 2, {body}, (0, 0.0))[1]")
        return self.let(calls.get(way, f"({one})({w}, {x})"))

    def layers(self, w, shape, way):
        """One axis of a weight taken away by vmap or scan."""
        d = self.below(len(shape)) if way == 0 else 0
        text, x = self.use("w", (*shape[:d], *shape[d + 1 :]), (shape[d],) if way == 1 else ())
        if way == 0:
            return self.let(f"jax.vmap(lambda w, y: {text}, in_axes=({d}, None))({w}, {x})")
        if way == 1:
            return self.let(f"jax.vmap(lambda w, y: {text})({w}, {x})")
        turn = self.pick(["", ", reverse=True", ", unroll=2"])
        body = f"lambda h, w: (jnp.tanh(h + jnp.sum((lambda y: {text})({x}))), jnp.sin(h))"
        return self.let(f"lax.scan({body}, 0.0, {w}{turn})[1]")
