"""Meta-learning over factors: a start from which a few steps of SGD on a few examples learn a new task.

`maml` and `reptile` say how one task would move the start, `meta_step` averages that over tasks and moves the start by
an optax optimiser, `adapt_to` takes the few steps of a new task. The base is the same for all tasks and stays frozen.
"""

from lorax_kit.meta.inner import adapt_to, inner_rates
from lorax_kit.meta.learner import MetaState, meta_step
from lorax_kit.meta.tasks import MetaGradient, Task, maml, reptile

__all__ = ["MetaGradient", "MetaState", "Task", "adapt_to", "inner_rates", "maml", "meta_step", "reptile"]
