"""An Equinox model as it comes: its arrays are the params, the rest of it stays in the function.

Command:   pip install equinox scikit-learn && python experiments/own_models/equinox_model.py
Hardware:  2 CPU cores
Time:      50 s with other work on the machine
Result:    turned digits 13.7 % as trained on upright ones; six seeds, 497 test images, intervals of 95 %

           rank 1: 73.8 % [67.7, 79.3],   419 numbers trained
           rank 2: 85.4 % [83.1, 87.5],   838 numbers trained
           rank 8: 90.0 % [89.1, 91.9], 3,352 numbers trained
Writes:    runs/own_models/equinox_model/
"""

import equinox as eqx
import jax
from shifted import adapt_to_turned


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Lambda(lambda x: x.transpose(2, 0, 1)),  # Equinox has the channels first
            eqx.nn.Conv2d(1, 16, 3, padding=1, key=keys[0]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Lambda(lambda x: x.reshape(-1)),
            eqx.nn.Linear(256, 64, key=keys[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(64, 10, key=keys[2]),
        ]
    )
    params, static = eqx.partition(model, eqx.is_array)

    def apply(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    adapt_to_turned("equinox_model", params, apply, "layers/*/weight")


if __name__ == "__main__":
    main()
