"""AdaLoRA (arXiv 2303.10512): an update in the form of an SVD, and the budget that takes its triplets away."""

import numpy as np


def adalora(w, a, e, b, scale):
    """W' = W + s A^T diag(e) B (arXiv 2303.10512, eq. 3: W0 + P Lambda Q).

    Symbols: Q is `a` (r, in), P is `b` transposed, (r, out) here, Lambda's diagonal is `e` (r,), zero where a triplet
    is masked.

    PEFT: `lora_A`, `lora_E` (r, 1), `lora_B` (out, r), s = lora_alpha / (init_r + 1e-5), or init_r / (init_r + 1e-5)
    where lora_alpha <= 0. The triplets that the budget removed are cut out of the saved tensors; s stays.
    """
    return w + scale * (a.T @ np.diag(e) @ b)


def adalora_penalty(pairs, *, squared=True):
    """|A A^T - I|_F^2 + |B B^T - I|_F^2 over (a, b) `pairs`, rows being triplets (arXiv 2303.10512, eq. 4).

    Args:
      squared: the paper's sum of squares; False: PEFT's mean of the norms, not squared, over all 2 n matrices.
    """
    squares = [((x @ x.T - np.eye(len(x))) ** 2).sum() for pair in pairs for x in pair]
    return sum(squares) if squared else np.mean(np.sqrt(squares))


def adalora_budget(step, *, start, target, warmup, final, total):
    """How many triplets remain at a step: `start` in the `warmup`, then a cubic fall, `target` in the `final` steps.

    arXiv 2303.10512, eq. 12, in PEFT's version: whole numbers by truncation, and progress counted from the warm-up
    on, (t - t_i) / (T - t_i - t_f), where the paper prints (t - t_i - t_f) / (T - t_i - t_f).
    """
    if step <= warmup:
        return start
    if step > total - final:
        return target
    left = 1 - (step - warmup) / (total - final - warmup)
    return int((start - target) * left**3 + target)


def adalora_smoothed(importance, uncertainty, x, gradient, beta1, beta2):
    """Smoothed sensitivity and its uncertainty of each element of x after one step (arXiv 2303.10512, eqs. 8 to 10).

    I = |x g|; importance <- beta1 importance + (1 - beta1) I; uncertainty <- beta2 uncertainty + (1 - beta2)
    |I - importance|, with the importance just updated.
    """
    now = np.abs(x * gradient)
    importance = beta1 * importance + (1 - beta1) * now
    return importance, beta2 * uncertainty + (1 - beta2) * np.abs(now - importance)


def adalora_scores(a, e, b):
    """Score of each triplet (r,): its singular value's plus the means of its two vectors' (arXiv 2303.10512, eq. 7).

    Args: (importance, uncertainty) of `a` (r, in), `e` (r,) and `b` (r, out); an element's score is their product.
    """
    scores = [importance * uncertainty for importance, uncertainty in (a, e, b)]
    return scores[1] + scores[0].mean(1) + scores[2].mean(1)


def adalora_keep(scores, budget):
    """Masks (r,) of the triplets that remain: the `budget` best over all sites (arXiv 2303.10512, eq. 6).

    The threshold is the best score to be removed, and goes too with its equals.
    """
    every = np.sort(np.concatenate(scores))
    removed = len(every) - budget
    return [np.ones(len(s), bool) if removed == 0 else s > every[removed - 1] for s in scores]
