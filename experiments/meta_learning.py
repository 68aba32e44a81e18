"""Does a meta-learnt start learn new intents from five examples each better than LoRA's own, and in new languages?

Command:   pip install --no-deps home-assistant-intents==2026.11.25 && python experiments/meta_learning.py
Hardware:  2 CPU cores
Time:      11 min with other work on the machine
Result:    accuracy after the inner steps, %, intervals of 95 %, differences and p of a paired test to the plain start

    arm              intents never seen, English: 60 tasks     and in languages never seen: 15 languages
    plain            87.0 [84.2, 89.7]                         74.4 [69.4, 79.3]
    plain, 9 steps   86.7  -0.4 [-5.2, +2.8]  p = 0.85         76.9  +2.6 [+1.3,  +3.8]  p = 0.0007
    joint            89.1  +2.0 [-0.4, +4.4]  p = 0.09         80.5  +6.1 [+2.8, +10.0]  p = 0.002
    FOMAML           88.3  +1.2 [-0.6, +3.0]  p = 0.18         81.7  +7.4 [+4.6, +10.3]  p = 0.0001
    MAML             90.3  +3.3 [+1.7, +5.1]  p = 0.00008      82.5  +8.1 [+5.3, +11.2]  p = 0.0001

           The start that MAML learnt beats the plain one, most where the base knows least, and in each of the three
           folds (English: +2.8, +1.5, +5.5). Joint training gives most of it: MAML is ahead of it by +1.2 points
           [-1.0, +3.6] and +2.0 [-0.2, +4.4], which do not tell. It matters how the rates are chosen: of twelve pairs
           on twelve tasks, and with an outer rate of 0.003, validation took bad ones, and MAML lost to the plain start
           in a fold. The outer rate is the better of 0.001 and 0.003 on the first fold's validation tasks.
Writes:    runs/meta_learning/{table,tasks}.csv

A task: sentences of five intents of a voice assistant, five examples of each to learn from and ten others, of other
templates, to be judged by. MiniLM's upper two layers have LoRA of rank 8, the head is trained in full, three inner
steps of SGD. The 36 intents are held out a third at a time: neither meta-training nor validation has any of their
sentences in any language. MiniLM is English; meta-training is in six languages, the held-out ones are fifteen others,
of which each counts once, by the mean of its three tasks. English tasks count one by one, though they share intents.

Arms, all with the same inner steps, at the scale of the inner rates that is best on 30 validation tasks of other
intents: `plain` is the zero update; `joint` has learnt all meta-training intents as one classification, as many
sentences a step for as many steps, and its head is taken off; MAML and FOMAML have learnt to be adapted. The sentences
are drawn from templates that people wrote (Home Assistant, Apache-2.0); what a home brings, names of rooms and things,
is ours, and English in all languages.
"""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tables import against, spread, write
from tqdm import tqdm

import lorax_kit as lk
from lorax_kit.analysis.statistics.conditions import paired_test
from lorax_kit.assets import locate
from lorax_kit.meta import Task, adapt_to, inner_rates, maml, meta_step
from lorax_kit.models import BertEncoder, load_model
from lorax_kit.models.encoders.bert import Layer

OUT = Path("runs/meta_learning")
WAYS, SHOTS, QUERY, LENGTH = 5, 5, 10, 16
STEPS, TASKS, OUTER_STEPS, OUTER_RATE, JOINT_RATE = 3, 4, 60, 1e-3, 3e-3
INNER_RATES = {"full": 0.3, "a": 0.1, "b": 0.1}
SCALES = (1 / 9, 1 / 3, 1, 3, 9)  # of the inner rates, for validation to choose from
VAL_TASKS, TEST_TASKS, FOLDS = 30, 20, 3
# In Latin script, of which MiniLM's tokenizer knows pieces, and with five intents in each fold. Left out as too like
# others: de-CH, pt-BR and sr-Latn.
TRAIN_LANGUAGES, VAL_LANGUAGES = ("en", "de", "nl", "fr", "es", "pl"), ("en", "eu", "sk")
TEST_LANGUAGES = ("ca", "cs", "da", "fi", "ga", "gl", "hr", "hu", "it", "ms", "nb", "pt", "ro", "sl", "sv")

TESTS = ("intents", "languages")

# What a home brings and no template holds.
WORDS = {
    "area": "kitchen|bedroom|living room|office|garage|bathroom|hallway|attic|nursery|basement",
    "floor": "ground|first|second|upper|lower",
    "name": "desk lamp|heater|coffee machine|ceiling fan|front door|television|blue lamp|radio|gate|humidifier",
    "message": "dinner is ready|we leave in ten minutes|the guests are here|time for bed",
    "search_query": "queen|yesterday|the beatles|rock classics|moonlight",
    "timer_command": "open the garage door|turn off the lights|play some music|lock the door",
    "shopping_list_item": "milk|bread|apples|coffee|batteries",
    "todo_list_item": "call the dentist|pay the rent|water the plants|buy a present",
}
CLOSES = {"(": ")", "[": "]", "{": "}", "<": ">"}
Pools = dict[str, tuple[list[str], list[str]]]
"""Intent -> sentences to learn from, and sentences of other templates to be judged by."""


@cache
def parsed(template: str) -> tuple:
    """The tree of a template: ("|", alternatives), (";", parts in any order), ("{", list), ("<", rule) or text."""
    return read(template, 0, "")[0]


def read(text: str, i: int, close: str) -> tuple[tuple, int]:
    options: list[list] = [[]]
    kind = "|"
    while i < len(text) and text[i] != close:
        mark = text[i]
        if mark in "([":
            node, i = read(text, i + 1, CLOSES[mark])
            options[-1].append(node if mark == "(" else ("|", [[node], []]))
        elif mark in "{<":
            end = text.index(CLOSES[mark], i)
            options[-1].append((mark, text[i + 1 : end].split(":")[0]))
            i = end + 1
        else:
            if mark in "|;":
                kind = mark
                options.append([])
            else:
                options[-1].append(mark)
            i += 1
    return (kind, options), i + 1


def spoken(node: Any, grammar: dict, rng: np.random.Generator) -> str:
    """A sentence of a template's tree, each choice drawn."""
    if isinstance(node, str):
        return node
    kind, inner = node
    if kind == "<":
        return spoken(parsed(grammar["expansion_rules"][inner]), grammar, rng)
    if kind == "{":
        values = grammar["lists"].get(inner, {})
        if "range" in values:
            return str(rng.integers(values["range"]["from"], values["range"]["to"] + 1))
        words = (
            [x["in"] for x in values["values"]] if "values" in values else WORDS.get(inner, WORDS["name"]).split("|")
        )
        return spoken(parsed(words[rng.integers(len(words))]), grammar, rng)
    options = ["".join(spoken(part, grammar, rng) for part in option) for option in inner]
    if kind == ";":
        return " ".join(options[i] for i in rng.permutation(len(options)))
    return options[rng.integers(len(options))]


def pools_of(language: str, seed: int, most: int = 40) -> Pools:
    """Sentences of the intents that have enough; none is of two intents, or on both sides."""
    file = locate("home-assistant-intents", f"home_assistant_intents/data/{language}.json")
    grammar, rng = json.loads(file.read_text(encoding="utf-8")), np.random.default_rng(seed)
    owners: dict[str, tuple] = {}
    pools: Pools = {}
    for intent, content in sorted(grammar["intents"].items()):
        templates = sorted({text for block in content["data"] for text in block["sentences"]})
        halves = np.array_split(rng.permutation(templates), 2) if len(templates) > 1 else [templates] * 2
        for side, half in enumerate(halves):
            drawn = (spoken(parsed(str(half[k % len(half)])), grammar, rng) for k in range(4 * most))
            for text in (" ".join(sentence.split()) for sentence in drawn):
                owners.setdefault(text.lower(), (intent, side, text))
    for intent in grammar["intents"]:
        sides = [[text for who, where, text in owners.values() if (who, where) == (intent, side)] for side in (0, 1)]
        if len(sides[0]) >= SHOTS and len(sides[1]) >= QUERY:
            pools[intent] = tuple([side[i] for i in rng.permutation(len(side))[:most]] for side in sides)
    return pools


class Model:
    """MiniLM cut below its upper two layers: what lies below is the same for all factors, and computed once."""

    def __init__(self) -> None:
        loaded = load_model("minilm")
        self.encode, self.upper = loaded.tokenizer.encode, Layer(loaded.config)
        below = loaded.config.num_hidden_layers - 2
        self.names = [f"layer_{i}" for i in range(below, below + 2)]
        lower = BertEncoder(replace(loaded.config, num_hidden_layers=below))
        self.below = {name: x for name, x in loaded.params.items() if name not in self.names}
        self.lower = jax.jit(lambda params, ids, mask: lower.apply({"params": params}, ids, mask))
        self.params = {name: loaded.params[name] for name in self.names}
        self.width = loaded.config.hidden_size

    def batch(self, texts: list[str], labels: np.ndarray) -> dict[str, jax.Array]:
        ids = np.zeros((len(texts), LENGTH), np.int32)
        for row, some in zip(ids, self.encode(texts, LENGTH), strict=True):
            row[: len(some)] = some
        mask = (ids != 0).astype(np.float32)  # 0 is the id of padding
        return {"x": self.lower(self.below, ids, mask), "mask": jnp.asarray(mask), "y": jnp.asarray(labels)}

    def apply(self, params: dict, x: jax.Array, mask: jax.Array) -> jax.Array:
        for name in self.names:
            x = self.upper.apply({"params": params[name]}, x, mask[:, None, None, :] != 0)
        pooled = jnp.sum(x * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)
        return pooled @ params["head"]["kernel"] + params["head"]["bias"]

    def split(self, classes: int) -> tuple[lk.Plan, dict, dict]:
        """Plan, base and factors of a zero update, under a head of zeros."""
        head = {"kernel": jnp.zeros((self.width, classes)), "bias": jnp.zeros(classes)}
        params = self.params | {"head": head}
        spec = lk.Spec({"layer_*/**/kernel": lk.LoRA(rank=8), "head/*": lk.Full()})
        plan = lk.resolve(spec, params, self.apply, jnp.zeros((2, LENGTH, self.width)), jnp.ones((2, LENGTH)))
        return (plan, *lk.split(params, plan, jax.random.key(0)))

    def loss(self, plan: lk.Plan, trials: int = 1) -> Callable:
        adapted = lk.adapt(self.apply, plan, trials=trials)

        def loss_fn(base: dict, factors: dict, batch: dict) -> jax.Array:
            logits = adapted(base, factors, batch["x"], batch["mask"])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))

        return loss_fn


def draw_tasks(model: Model, sources: list[Pools], rng: np.random.Generator, count: int, query: int) -> Task:
    """Tasks of five intents, each of one source; their sources take turns."""
    sides: tuple[list[str], list[str]] = [], []
    for k in range(count):
        pools = sources[k % len(sources)]
        for intent in rng.choice(sorted(pools), WAYS, replace=False):
            for side, pool, size in zip(sides, pools[intent], (SHOTS, query), strict=True):
                side += [pool[i] for i in rng.permutation(len(pool))[:size]]
    batches = [model.batch(side, np.arange(len(side)) // (len(side) // count // WAYS) % WAYS) for side in sides]
    return Task(*jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batches))


def optimiser(plan: lk.Plan, rate: float) -> optax.GradientTransformation:
    return lk.partition(optax.adam(optax.cosine_decay_schedule(rate, OUTER_STEPS)), plan, clip=1.0)


class Learner:
    """The inner steps of five-way tasks, the outer ones, and what they reach."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.plan, self.base, self.zero = model.split(WAYS)
        loss, adapted = model.loss(self.plan), lk.adapt(model.apply, self.plan)

        @partial(jax.jit, static_argnames="steps")
        def accuracy(base: dict, factors: dict, rates: dict, tasks: Task, steps: int) -> jax.Array:
            def one(task: Task) -> jax.Array:
                own, _ = adapt_to(loss, base, factors, task.support, rates, steps=steps)
                logits = adapted(base, own, task.query["x"], task.query["mask"])
                return 100 * jnp.mean((jnp.argmax(logits, axis=-1) == task.query["y"]).astype(jnp.float32))

            return jax.lax.map(one, tasks)

        self.accuracy = accuracy
        at_once = model.loss(self.plan, trials=TASKS)
        metas = {order: maml(at_once, steps=STEPS, order=order) for order in (1, 2)}
        tx = optimiser(self.plan, OUTER_RATE)
        self.meta_steps = {order: meta_step(meta, tx) for order, meta in metas.items()}

    def after(self, factors: dict, scale: float, tasks: Task, steps: int = STEPS) -> np.ndarray:
        """Accuracy of each task after the inner steps, in %."""
        rates = inner_rates(self.plan, self.zero, {label: scale * rate for label, rate in INNER_RATES.items()})
        return np.asarray(self.accuracy(self.base, factors, rates, tasks, steps))

    def best_scale(self, factors: dict, val: Task, steps: int) -> float:
        """The scale of the inner rates that is best on validation tasks."""
        return max(SCALES, key=lambda scale: self.after(factors, scale, val, steps).mean())

    def meta(self, order: int, sources: list[Pools], seed: int) -> dict:
        (init, step), rng = self.meta_steps[order], np.random.default_rng(seed)
        state = init(self.zero, inner_rates(self.plan, self.zero, INNER_RATES))
        for _ in (bar := tqdm(range(OUTER_STEPS), desc=f"order {order}", disable=None)):
            in_turn = [sources[i] for i in rng.permutation(len(sources))]
            state, info = step(state, self.base, draw_tasks(self.model, in_turn, rng, TASKS, SHOTS))
            bar.set_postfix(loss=f"{float(info.loss):.3f}")
        return state.factors

    def joint(self, sources: list[Pools], seed: int) -> dict:
        """Factors that learnt all intents at once from as many sentences, under a new head of zeros."""
        names = sorted({intent for pools in sources for intent in pools})
        rows = [(text, names.index(i)) for pools in sources for i in pools for side in pools[i] for text in side]
        plan, base, factors = self.model.split(len(names))
        init, step = lk.make_step(self.model.loss(plan), optimiser(plan, JOINT_RATE))
        state, rng = init(factors), np.random.default_rng(seed)
        for _ in tqdm(range(OUTER_STEPS), desc="joint", disable=None):
            some = [rows[i] for i in rng.choice(len(rows), TASKS * WAYS * 2 * SHOTS, replace=False)]
            state, _ = step(state, base, self.model.batch([text for text, _ in some], np.array([y for _, y in some])))
        return {path: state.factors[path] if path.startswith("layer_") else x for path, x in self.zero.items()}


def fold(learner: Learner, pools: dict[str, Pools], held_out: set[str], seed: int) -> dict[str, dict]:
    """Arm -> scale of the rates, and accuracies of the held-out tasks: of English, and of a language each."""
    rng = np.random.default_rng([seed, 1])
    rest = rng.permutation(sorted(set(pools["en"]) - held_out))
    val_intents = set(rest[: len(rest) // 3])
    others = {intent for some in pools.values() for intent in some} - held_out - val_intents

    def sources(languages: Iterable[str], intents: set[str]) -> list[Pools]:
        found = [{i: sides for i, sides in pools[name].items() if i in intents} for name in languages]
        return [some for some in found if len(some) >= WAYS]

    train = sources(TRAIN_LANGUAGES, others)
    val = draw_tasks(learner.model, sources(VAL_LANGUAGES, val_intents), rng, VAL_TASKS, QUERY)
    tests = {
        "intents": draw_tasks(learner.model, sources(["en"], held_out), rng, TEST_TASKS, QUERY),
        "languages": draw_tasks(learner.model, sources(TEST_LANGUAGES, held_out), rng, len(TEST_LANGUAGES), QUERY),
    }
    arms = {
        "plain": (learner.zero, STEPS),
        "plain, 9 steps": (learner.zero, 3 * STEPS),
        "joint": (learner.joint(train, seed), STEPS),
        "FOMAML": (learner.meta(1, train, seed), STEPS),
        "MAML": (learner.meta(2, train, seed), STEPS),
    }
    found: dict[str, dict] = {}
    for arm, (factors, steps) in arms.items():
        scale = learner.best_scale(factors, val, steps)
        found[arm] = {"scale": scale} | {test: learner.after(factors, scale, tests[test], steps) for test in tests}
        means = {test: float(found[arm][test].mean()) for test in tests}
        print(f"fold {seed}, {arm}, scale {scale:.2g}:", means, flush=True)
    return found


def main(seed: int) -> None:
    out = OUT / f"seed_{seed}"
    out.mkdir(parents=True, exist_ok=True)
    learner = Learner(Model())
    pools = {name: pools_of(name, seed) for name in {*TRAIN_LANGUAGES, *VAL_LANGUAGES, *TEST_LANGUAGES}}
    folds = np.array_split(np.random.default_rng(seed).permutation(sorted(pools["en"])), FOLDS)
    parts = [fold(learner, pools, set(held_out), FOLDS * seed + k) for k, held_out in enumerate(folds)]
    tasks = []
    for k, part in enumerate(parts):
        for arm, found in part.items():
            for test in TESTS:
                row = {"fold": k, "arm": arm, "scale": found["scale"], "test": test}
                tasks.append(row | {"accuracy": found[test].tolist()})
    write(out / "tasks.csv", tasks)
    rows = []
    # Each English task counts by itself; the tasks of a language, one a fold, count as one.
    joined = {"intents": np.concatenate, "languages": partial(np.mean, axis=0)}
    for test, join in joined.items():
        every = {arm: join([part[arm][test] for part in parts]).tolist() for arm in parts[0]}
        for arm, values in every.items():
            row = {"test": test, "arm": arm, "tasks": len(values), "scales": [part[arm]["scale"] for part in parts]}
            row |= spread(values)
            for other in ("plain", "joint"):
                if arm != other:
                    gain = against(values, every[other])
                    row |= {f"over_{other}{key[10:]}": x for key, x in gain.items()}
                    row |= {f"over_{other}_p": paired_test(values, every[other])}
            rows.append(row)
    write(out / "table.csv", rows)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
