"""A Keras model on its JAX backend as it comes: its variables by their paths are the params.

Command:   pip install keras scikit-learn && python experiments/own_models/keras_model.py
Hardware:  2 CPU cores
Time:      50 s with other work on the machine
Result:    turned digits 12.7 % as trained on upright ones; six seeds, 497 test images, intervals of 95 %

           rank 1: 72.5 % [66.9, 77.7],   419 numbers trained
           rank 2: 83.8 % [82.6, 84.9],   838 numbers trained
           rank 8: 90.0 % [89.2, 90.9], 3,352 numbers trained
Writes:    runs/own_models/keras_model/

`stateless_call` runs a Keras model as a pure function of its variables. What is merged goes back by `variable.assign`.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import keras
import numpy as np
from shifted import adapt_to_turned, digits


def main() -> None:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10),
        ]
    )
    upright, _ = digits()
    expected = model.predict(upright.x[:8], verbose=0)  # first: it moves the variables into new arrays
    params = {variable.path: variable.value for variable in model.trainable_variables}
    fixed = [variable.value for variable in model.non_trainable_variables]

    def apply(params, x):
        return model.stateless_call([params[variable.path] for variable in model.trainable_variables], fixed, x)[0]

    np.testing.assert_allclose(apply(params, upright.x[:8]), expected, atol=1e-5)
    adapt_to_turned("keras_model", params, apply, "**/kernel")


if __name__ == "__main__":
    main()
