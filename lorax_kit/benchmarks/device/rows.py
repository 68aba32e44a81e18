"""What `bench device` measures, in order: what tells most for its time comes first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from lorax_kit.benchmarks.calibrate import fitted, time_forms
from lorax_kit.benchmarks.case import make_case
from lorax_kit.benchmarks.device.machine import environment
from lorax_kit.benchmarks.device.run import Row
from lorax_kit.benchmarks.device.stacked import Stacks
from lorax_kit.benchmarks.device.steps import Shape, Timing, order_row, step_row
from lorax_kit.benchmarks.inference.forward import bench_forward


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes of every kind of row.

    Attributes:
      timing: of every measurement.
      square, line: of the product and of the copy whose rates are measured.
      steps: of the training steps, by width.
      stacks, counts: models of stacked trials, and how many are stacked.
      forms, ranks: (tokens, inputs, outputs) of products, and their ranks.
      forward: models whose forward pass is compressed.
    """

    timing: Timing
    square: int
    line: int
    steps: Sequence[Shape]
    stacks: Sequence[Shape]
    counts: Sequence[int]
    forms: Sequence[tuple[int, int, int]]
    ranks: Sequence[int]
    forward: Sequence[Shape]


CARD = Sizes(
    timing=Timing(rounds=15, least_ms=20.0),
    square=8192,
    line=2**27,
    steps=(
        Shape(2048, 2, 16, 512, 128, "bfloat16"),
        Shape(768, 3, 32, 512, 64, "bfloat16"),
        Shape(2048, 2, 16, 512, 128, "float32"),
        Shape(768, 3, 32, 512, 64, "float32"),
        Shape(4096, 2, 8, 512, 128, "bfloat16"),
        Shape(4096, 2, 8, 512, 128, "float32"),
    ),
    stacks=(Shape(384, 2, 8, 128, 32, "float32"), Shape(2048, 2, 8, 128, 128, "bfloat16")),
    counts=(1, 4, 16, 64),
    forms=((1024, 768, 768), (8192, 768, 3072), (1024, 2048, 2048), (8192, 2048, 8192), (512, 4096, 4096)),
    ranks=(1, 8, 64),
    forward=(Shape(2048, 2, 16, 512, 128, "bfloat16"), Shape(768, 3, 32, 512, 64, "float32")),
)
SMALL = Sizes(
    timing=Timing(rounds=3, least_ms=0.0),
    square=64,
    line=4096,
    steps=(Shape(32, 1, 2, 8, 16, "bfloat16"), Shape(32, 1, 2, 8, 16, "float32")),
    stacks=(Shape(16, 1, 2, 8, 8, "float32"),),
    counts=(3,),
    forms=((16, 8, 8),),
    ranks=(1, 4),
    forward=(Shape(32, 1, 2, 8, 16, "float32"),),
)


def device_rows(*, small: bool = False, peer: bool = True) -> Iterator[Row]:
    """The rows, with estimates of the seconds that they take on one card, compilation and all.

    Args:
      small: tiny shapes, which any processor measures in seconds.
      peer: whether torch and PEFT take part where they are installed.
    """
    sizes = SMALL if small else CARD
    timing, roof = sizes.timing, {"square": sizes.square, "line": sizes.line}

    def row(kind: str, about: dict[str, Any], seconds: float, measure: Callable[[], Iterable[dict[str, Any]]]) -> Row:
        return Row(kind, about, 1.0 if small else seconds, measure)

    def step(shape: Shape, seconds: float, *, compiled_peer: bool = False) -> Row:
        measure = partial(step_row, shape, timing=timing, **roof, peer=peer, compiled_peer=compiled_peer)
        return row("step", shape._asdict() | {"compiled_peer": compiled_peer}, seconds, measure)

    def order(shape: Shape) -> Row:
        return row("order", shape._asdict(), 25, partial(order_row, shape, timing=timing))

    def forward(shape: Shape) -> Row:
        return row("forward", shape._asdict(), 10, partial(_forward, shape, timing))

    def stacked(shape: Shape) -> Iterator[Row]:
        stacks = Stacks(shape, timing)
        for count in sizes.counts:
            seconds = 20 if count == sizes.counts[0] else 10  # the first compiles the solo steps, too
            yield row("stacked", shape._asdict() | {"trials": count}, seconds, partial(stacks.rows, count))

    halves = [shape for shape in sizes.steps if shape.dtype == "bfloat16"]
    wholes = [shape for shape in sizes.steps if shape.dtype == "float32"]
    yield row("environment", {}, 15, lambda: [environment(**roof, rounds=timing.rounds, least_ms=timing.least_ms)])
    yield step(halves[0], 25)
    yield from stacked(sizes.stacks[0])
    yield row("form", {}, 30, partial(_forms, sizes))
    yield step(wholes[0], 30)
    yield order(halves[0])
    yield forward(sizes.forward[0])
    for shape in (*halves[1:], *wholes[1:]):
        yield step(shape, 30)
    for shape in sizes.stacks[1:]:
        yield from stacked(shape)
    for shape in sizes.forward[1:]:
        yield forward(shape)
    if not small:
        yield order(wholes[0])
        if peer:
            yield step(halves[0], 80, compiled_peer=True)


def _forms(sizes: Sizes) -> Iterator[dict[str, Any]]:
    """A row per product in fp32, the only dtype in which sums are formed, and the costs fitted to them."""
    rows = []
    for shape, rank in product(sizes.forms, sizes.ranks):
        rows.append(time_forms(shape, rank, rounds=sizes.timing.rounds, least_ms=sizes.timing.least_ms))
        yield dict(rows[-1])
    costs = fitted(rows)
    yield {"row": "calibrate", **costs, "choices": [row["choice"] for row in rows]}


def _forward(shape: Shape, timing: Timing) -> Iterator[dict[str, Any]]:
    case = make_case(**shape._asdict(), rank=1, targets="all-linear")
    measured = bench_forward(case, keep=0.5, decomposed=False, progress=False, **timing._asdict())
    yield shape.facts() | measured
