"""How often JAX traces a function: under `jit`, once for each program that holds it."""

from collections.abc import Callable
from typing import Any


class Traced:
    """A function that counts its calls; inside `jit` these are traces, whatever JAX keeps of its programs."""

    def __init__(self, fn: Callable) -> None:
        self.fn, self.traces = fn, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.traces += 1
        return self.fn(*args, **kwargs)
