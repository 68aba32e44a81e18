"""Which directions do adapters share? The overlap figures of the LoRA paper, with what chance gives beside them.

Command:   python experiments/overlap.py     (a second call goes on where the first stopped)
Hardware:  2 CPU cores
Time:      2 min
Result:    phi(i, i), mean over 18 sites and six pairs, and chance

                                     i = 1                        i = 8
    pair                       inputs  outputs  chance      inputs  outputs  chance
    rank 8 and 64, one seed    0.18    0.19     0.002       0.15    0.21     0.018
    rank 8 and 64, two seeds   0.10    0.04     0.002       0.05    0.11     0.018
    rank 64, two seeds         0.16    0.10     0.002       0.09    0.19     0.018

           Agrees in kind: the leading directions are shared 20 to 80 times as much as by chance, and on the side of the
           inputs (the paper's) the excess falls with i, to nearly chance at i = 32. Not in size: 0.10 to 0.18 where the
           paper has more than 0.5. Part of what ranks of one seed share is that seed's start.
Writes:    runs/overlap/study/ (one study), runs/overlap/table.csv, runs/overlap/overlap.png

Hu et al. (arXiv 2106.09685, section 7.2): the top direction of the deltas of rank 8 and 64 overlaps by more than 0.5,
the others hardly, and two seeds of rank 64 share a few. phi(i, j) is the share that the leading i directions of one
have in the leading j of the other, a mean over the sites of MiniLM's upper layers. Chance gives max(i, j) / d. Ranks of
one seed start from the same rows of `a`, which move little: what they share on the side of the inputs need not be
learned, what two seeds share must be. The paper does not say whether its ranks had one seed. Pairs of seeds s and s + 1
have seeds in common, so their intervals are too narrow by a little.
"""

from pathlib import Path

import jax
import numpy as np
from tables import spread, write

import lorax_kit as lk
from lorax_kit.analysis import Directions, delta_directions, random_overlap, subspace_overlap
from lorax_kit.core.paths import flatten
from lorax_kit.problems import Sentiment

OUT = Path("runs/overlap")
RANKS, SEEDS, COUNTS = (8, 64), range(6), (1, 2, 4, 8, 32)


def main() -> None:
    problem = Sentiment(length=32, val=256).build()
    study = lk.Study(
        rank=RANKS,
        alpha=16,
        rslora=True,
        lr=2e-3,
        seed=SEEDS,
        targets={"upper-linear": ["encoder/layer_{3..5}/**/kernel"]},
        steps=100,
        warmup=10,
    )
    rows = lk.run(study, problem, out=OUT / "study", command="python experiments/overlap.py").rows
    base = problem.params(jax.random.key(0))
    named, _ = flatten(base)
    spans: dict[tuple[int, int], dict[str, Directions]] = {}
    for row in rows:
        adapter = lk.load_adapter(OUT / "study" / row["adapter"], base=base)
        spans[row["rank"], row["seed"]] = {
            site.path: delta_directions(site, named[site.path], adapter.factors[site.path])
            for site in adapter.plan.sites
        }
    sites = list(spans[RANKS[0], 0])

    def phi(one: tuple[int, int], other: tuple[int, int], side: str) -> np.ndarray:
        """(sites, i, j)."""
        return np.stack([subspace_overlap(getattr(spans[one][s], side), getattr(spans[other][s], side)) for s in sites])

    pairs = {
        "rank 8 and 64, one seed": [((8, seed), (64, seed)) for seed in SEEDS],
        "rank 8 and 64, two seeds": [((8, seed), (64, (seed + 1) % len(SEEDS))) for seed in SEEDS],
        "rank 64, two seeds": [((64, seed), (64, (seed + 1) % len(SEEDS))) for seed in SEEDS],
    }
    table, maps = [], {}
    for side in ("inputs", "outputs"):
        chance = {
            i: np.mean([random_overlap(i, i, getattr(spans[8, 0][s], side).shape[-2])[0] for s in sites])
            for i in COUNTS
        }
        for name, some in pairs.items():
            grids = np.stack([phi(*pair, side) for pair in some])  # (pairs, sites, i, j)
            maps[name, side] = grids.mean(axis=(0, 1))
            for i in COUNTS:
                if i <= grids.shape[-2]:
                    found = spread(grids[:, :, i - 1, i - 1].mean(axis=1))
                    table.append({"pair": name, "side": side, "i = j": i} | found | {"chance": float(chance[i])})
    write(OUT / "table.csv", table)
    draw(maps)


def draw(maps: dict) -> None:
    """Heat maps as in the paper's figures 3 and 4."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(2, 3)
    for ax, ((name, side), grid) in zip(axes.flat, maps.items(), strict=True):
        image = ax.imshow(grid, vmin=0, vmax=1, origin="lower", aspect="auto", cmap="viridis")
        ax.set(title=f"{name}: {side}", xlabel="j", ylabel="i")
    figure.colorbar(image, ax=axes, label="phi(i, j)")
    figure.savefig(OUT / "overlap.png", dpi=110)


if __name__ == "__main__":
    main()
