"""A Flax NNX model as it comes: its state is the params, its graph stays in the function.

Command:   pip install scikit-learn && python experiments/own_models/nnx_model.py
Hardware:  2 CPU cores
Time:      50 s with other work on the machine
Result:    turned digits 11.9 % as trained on upright ones; six seeds, 497 test images, intervals of 95 %

           rank 1: 68.2 % [64.0, 71.8],   419 numbers trained
           rank 2: 85.4 % [82.4, 87.9],   838 numbers trained
           rank 8: 91.0 % [90.3, 92.0], 3,352 numbers trained
Writes:    runs/own_models/nnx_model/
"""

import jax
from flax import nnx
from shifted import adapt_to_turned


class Net(nnx.Module):
    """A convolution, and two linear maps."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(256, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(jax.nn.relu(self.conv(x)), (2, 2), strides=(2, 2))
        return self.out(jax.nn.relu(self.hidden(x.reshape(len(x), -1))))


def main() -> None:
    graph, params = nnx.split(Net(nnx.Rngs(0)))

    def apply(params, x):
        return nnx.merge(graph, params)(x)

    adapt_to_turned("nnx_model", params, apply, "*/kernel/value")


if __name__ == "__main__":
    main()
