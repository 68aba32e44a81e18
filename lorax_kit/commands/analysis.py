"""Analyses the adapters of a study: the directions they share, their intruders, and what the base forgets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from lorax_kit.analysis import Directions, adapter_intruders, count_intruders, delta_directions, subspace_overlap
from lorax_kit.analysis.intruders import EPSILON, TOP
from lorax_kit.checkpoint.adapter import Adapter, load_adapter
from lorax_kit.core.lowrank import dense
from lorax_kit.core.merge import merge
from lorax_kit.core.paths import Params, flatten, unflatten
from lorax_kit.core.quantised import Quantised
from lorax_kit.errors import StudyError
from lorax_kit.files.staging import replace_file
from lorax_kit.json_text import parse_json, sealed_json
from lorax_kit.problem import Evaluator, Problem
from lorax_kit.problems.load import PACKAGED, base_of, problem_from, problem_of
from lorax_kit.report import read_run, write_report
from lorax_kit.report.conditions import summarise
from lorax_kit.report.run_folder import Record
from lorax_kit.study.folder.store import plain

LEADING = 16  # directions that overlaps are recorded of


class Chosen(NamedTuple):
    """An adapter of the conditions that the report shows.

    Attributes:
      row: of its trial.
      adapter: plan and factors.
    """

    row: Record
    adapter: Adapter


def analyse_run(
    run_folder: str | Path,
    *,
    problem: Problem | None = None,
    held_out: Problem | None = None,
    seeds: int = 2,
    intruders: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Analyse the adapters of a study at the chosen rate of each rank, and write its report anew.

    Writes `overlaps.jsonl` (phi(i, j) of the deltas' leading directions on the side of the inputs, between ranks of one
    seed and between seeds of one rank), `intruders.jsonl` (how many of the ten leading singular vectors of W' are like
    none of W, beside two controls) and `forgetting.jsonl` (the metrics of another problem, before and after).

    Args:
      run_folder: of a study.
      problem: of the study; None: the one that its adapters remember.
      held_out: what the base could do before: a problem that has parameters of the study's, by path and shape. Those
        are replaced by the merged ones, but for what the study trains in full (its head); its test set is measured.
        None: no forgetting.
      seeds: so many of each rank; the fewest first.
      intruders: count them, for which every adapted matrix is decomposed whole.
      progress: draw bars, where stderr is a terminal.

    Returns:
      {"setting": whose adapters, "by_rank": means by rank: "top_overlap" (of the first direction with that of the other
      seeds), "intruders" and those of "random" directions, "before" and "after" of the held-out metric; "overlaps",
      "intruders", "forgetting": how many records were written, "report": its path}. What is not measured is left out.

    Raises:
      RunFolderError: no run folder.
      StudyError: no finished trials of rank above 0, a held-out problem without an adapted parameter.
      AdapterError: adapters that are damaged, or of another base.
    """
    run = read_run(run_folder)
    summary = summarise(run)
    rows = [
        row
        for condition in summary.ladder
        for row in sorted(condition.done, key=lambda row: row["seed"])[:seeds]
        if row.get("adapter")
    ]
    if not rows:
        raise StudyError(f"{str(run_folder)!r} has no finished trial with an adapter to analyse.")
    first = run.path / rows[0]["adapter"]
    problem = problem or problem_of(first)
    base = base_of(problem, first)
    chosen = [Chosen(row, load_adapter(run.path / row["adapter"], base=base)) for row in rows]
    analyses = plain(
        {
            "overlaps": list(_overlaps(base, chosen)),
            "intruders": list(_intruders(base, _bar(chosen, "intruders", progress))) if intruders else [],
            "forgetting": list(_forgetting(base, _bar(chosen, "forgetting", progress), held_out)) if held_out else [],
        }
    )
    files = {run.path / f"{name}.jsonl": records for name, records in analyses.items() if records}
    earlier = {file: file.read_bytes() if file.exists() else None for file in files}
    try:
        for file, records in files.items():
            replace_file(file, "".join(sealed_json(record) + "\n" for record in records).encode())
        page = write_report(run.path)
    except BaseException:
        for file, content in earlier.items():
            file.unlink(missing_ok=True) if content is None else replace_file(file, content)
        raise
    return {
        "setting": str(summary.ladder[0].family),
        "by_rank": [_means(rank, chosen, analyses) for rank in sorted({row["rank"] for row in rows})],
        **{name: len(records) for name, records in analyses.items()},
        "report": str(page),
    }


def _means(rank: int, chosen: Sequence[Chosen], analyses: Mapping[str, Sequence[Record]]) -> Record:
    """What the records of a rank come to, in the mean."""
    names = {one.row["trial"] for one in chosen if one.row["rank"] == rank}
    out: Record = {"rank": rank, "seeds": len(names)}
    tops = [r["phi"][0][0] for r in analyses["overlaps"] if {r["trial_i"], r["trial_j"]} <= names]
    of_rank = {name: [r for r in analyses[name] if r["trial"] in names] for name in ("intruders", "forgetting")}
    if tops := [x for x in tops if x is not None]:
        out["top_overlap"] = float(np.mean(tops))
    if of_rank["intruders"]:
        out["intruders"], out["random"] = (
            float(np.mean([r[arm] for r in of_rank["intruders"]])) for arm in ("adapter", "random")
        )
    if of_rank["forgetting"]:
        for x in ("before", "after"):
            known = [r[x] for r in of_rank["forgetting"] if r[x] is not None]
            out[x] = float(np.mean(known)) if known else None
    return out


def _bar(chosen: Sequence[Chosen], name: str, progress: bool) -> Any:
    return tqdm(chosen, desc=name, unit="adapter", disable=None if progress else True)


def _overlaps(base: Params, chosen: Sequence[Chosen]) -> Iterator[Record]:
    """Between the ranks of one seed, and between the seeds of one rank."""
    named, _ = flatten(base)
    spans: list[dict[str, Directions]] = []
    for _, (plan, factors, *_) in chosen:
        spans.append({s.path: delta_directions(s, dense(named[s.path]), factors[s.path], LEADING) for s in plan.sites})
    for (one, i), (other, j) in combinations(zip(chosen, spans, strict=True), 2):
        if one.row["seed"] != other.row["seed"] and one.row["rank"] != other.row["rank"]:
            continue
        for path in [path for path in i if path in j]:
            phi = subspace_overlap(i[path].inputs, j[path].inputs)
            grid = phi.reshape(-1, *phi.shape[-2:]).mean(axis=0)
            yield {
                "site": path,
                "rank_i": one.row["rank"],
                "rank_j": other.row["rank"],
                "trial_i": one.row["trial"],
                "trial_j": other.row["trial"],
                "phi": [[round(float(x), 4) for x in line] for line in grid],
            }


def _intruders(base: Params, chosen: Sequence[Chosen]) -> Iterator[Record]:
    for row, (plan, factors, *_) in chosen:
        for site in adapter_intruders(plan, base, factors, top=TOP):
            counts = {name: count_intruders(getattr(site, name), EPSILON) for name in ("adapter", "random", "spread")}
            yield {
                "trial": row["trial"],
                "site": site.path,
                "top": site.adapter.shape[-1],
                "epsilon": EPSILON,
                **{name: float(np.mean(count)) for name, count in counts.items()},
            }


def _forgetting(base: Params, chosen: Sequence[Chosen], held_out: Problem) -> Iterator[Record]:
    own, treedef = flatten(held_out.params(jax.random.key(0)))
    named = flatten(base)[0]
    whole = {leaf.path for one in chosen for leaf in one.adapter.plan.full}  # heads: the study's is another task's
    shared = [path for path, x in own.items() if path in named and named[path].shape == x.shape and path not in whole]

    def given(params: Params) -> Params:
        new = flatten(params)[0]
        return unflatten({path: _like(new[path], x) if path in shared else x for path, x in own.items()}, treedef)

    measure, before = None, None
    for row, (plan, factors, *_) in chosen:
        adapted = sorted({site.path for site in plan.sites} & set(shared))
        if not adapted:
            raise StudyError(
                f"the held-out problem {held_out.name!r} has no parameter that the study adapts, such as "
                f"{plan.sites[0].path!r}: nothing of it could change."
            )
        if measure is None:
            measure = Evaluator(held_out, given(base), shared, held_out.test)
            before = measure(given(base))
        after = measure(given(merge(base, factors, plan)))
        yield {
            "trial": row["trial"],
            "problem": held_out.address or held_out.name,
            "metric": held_out.chief.to_dict(),
            "before": before[held_out.metric],  # type: ignore[index]
            "after": after[held_out.metric],
            "adapted": len(adapted),
            "of": len(plan.sites),
        }


def _like(new: Any, old: Any) -> Any:
    """A parameter of the study in the form that the other problem has."""
    return (dense(new) if isinstance(new, Quantised) else new).astype(old.dtype)


def held_out_problem(data: Mapping[str, Any] | str | None) -> Problem | None:
    """What `--held-out` names: "plays", "sentiment", "module:object", or the JSON of a problem's settings."""
    if data is None:
        return None
    if isinstance(data, str) and data.lstrip().startswith("{"):
        data = parse_json(data)
    return problem_from({"name": data} if isinstance(data, str) and data in PACKAGED else data)
