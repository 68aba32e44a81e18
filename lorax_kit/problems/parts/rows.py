"""What problems on a user's own file of texts share: their settings, the parts of the data, batches and facts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lorax_kit.core.quantised import METHODS as QUANTISATIONS
from lorax_kit.core.specs.setting import is_int, shown
from lorax_kit.data import Encode, Examples, Row, evaluation_batches, read_rows, split_rows, training_stream
from lorax_kit.data.split import disagreeing, distinct
from lorax_kit.errors import DataError, LoraxError, StudyError
from lorax_kit.models import Loaded, load_model
from lorax_kit.models.stored.load import PACKAGED
from lorax_kit.problems.settings import Settings

LONGEST, EVALUATED_AT_ONCE, PART_THAT_FITS = 128, 32, 0.95

Make = Callable[[Examples, np.ndarray, int, int], Any]
"""(examples, places of a batch's, rows of the batch, its length) -> a batch."""


@dataclass(frozen=True, kw_only=True)
class TextSettings(Settings):
    """Rows of a user's own file, for a pretrained model.

    Args:
      data: a CSV, TSV, JSON Lines or Parquet file; what `val_data` and `test_data` do not give is split off it.
      model: what `load_model` takes: "minilm", "smollm2", a GGUF file or a Hugging Face folder.
      quantise: "int8", "int4" or "nf4": keep the kernels of the model's layers in so many bits, as they are loaded.
      val_data, test_data: further files of the same columns.
      encoding: of the files, where they are text.
      batch_size: examples of a training batch.
      length: tokens of an example; longer ones are cut. None: the least multiple of 16 that holds 95 % of the training
        examples whole, at most 128.
      val, test: what to split off: a share of the rows (a number below 1) or a number of rows.
      split_seed: of the split.
      sha256: of each file, which must be as it was: adapters remember it. None: as the files are.
    """

    data: str
    model: str = "minilm"
    quantise: str | None = None
    val_data: str | None = None
    test_data: str | None = None
    encoding: str = "utf-8"
    batch_size: int = 16
    length: int | None = None
    val: float | int = 0.1
    test: float | int = 0.1
    split_seed: int = 0
    sha256: Mapping[str, str] | None = None

    roles: ClassVar[tuple[str, ...]] = ()
    """Which settings are names of columns."""
    answers: ClassVar[str] = "label"
    """The role of what the model is to find."""

    def __post_init__(self) -> None:
        optional = [name for name in ("val_data", "test_data") if getattr(self, name) is not None]
        for name in ("data", "model", "encoding", *self.roles, *optional):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise StudyError(f"problem {name} is {shown(getattr(self, name))}; it must be a string.")
        if self.quantise is not None and self.quantise not in QUANTISATIONS:
            known = ", ".join(QUANTISATIONS)
            raise StudyError(f"problem quantise is {shown(self.quantise)}; choose from {known}, or leave it out.")
        for name, low in (("batch_size", 1), ("length", 2), ("split_seed", 0)):
            x = getattr(self, name)
            if (name != "length" or x is not None) and (not is_int(x) or x < low):
                raise StudyError(f"problem {name} is {shown(x)}; it must be an integer of at least {low}.")
        for name in ("val", "test"):
            x = getattr(self, name)
            share = isinstance(x, float) and 0 < x < 1
            if not share and not (is_int(x) and x >= 1):
                raise StudyError(f"problem {name} is {shown(x)}; it must be a share of the rows, or their number.")

        if self.sha256 is not None and not isinstance(self.sha256, Mapping):
            raise StudyError(f"problem sha256 is {shown(self.sha256)}; it must be an object, from files to digests.")

    @property
    def columns(self) -> dict[str, str]:
        """Role -> column."""
        return {role: getattr(self, role) for role in self.roles}

    @property
    def asked_columns(self) -> dict[str, str]:
        """Role -> column, but for that of the answers."""
        return {role: column for role, column in self.columns.items() if role != self.answers}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, files and the model's folder by their absolute paths; `from_dict` is the inverse."""
        data = asdict(self)
        if self.model not in PACKAGED and Path(self.model).exists():
            data["model"] = str(Path(self.model).absolute())
        for name in ("data", "val_data", "test_data"):
            data[name] = None if data[name] is None else str(Path(data[name]).absolute())
        default = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in data.items() if value != default[name]}


def load(settings: TextSettings, task: str, kind: str | None = None) -> Loaded:
    """The model of a task, in the bits that it asks for.

    Args:
      kind: that the task needs; None: any.

    Raises:
      StudyError: the model is of another kind.
    """
    loaded = load_model(settings.model, quantise=settings.quantise)
    if kind is not None and loaded.kind != kind:
        raise StudyError(
            f"the task {task!r} needs a model of the kind {kind!r}; {settings.model!r} ({loaded.family}) is of "
            f"{loaded.kind!r}."
        )
    return loaded


class Data(NamedTuple):
    """The parts of the files' rows, encoded; the files' SHA-256; and how many rows there were and were left out."""

    train: Examples
    val: Examples
    test: Examples
    sha256: dict[str, str]
    facts: dict[str, Any]


def read_parts(
    settings: TextSettings,
    encode: Encode,
    *,
    stratum: str | None = None,
    group: str | None = None,
    target: str | None = None,
    may_be_empty: Sequence[str] = (),
) -> Data:
    """Read, encode and split the files of a problem.

    Args:
      encode: gives, besides the fields of the task, "key", equal where rows are; see `lorax_kit.data.key_of`.
      stratum, group: fields that are spread alike over the parts, or kept together.
      target: the field in which rows of one key may disagree, where that is no stratum: the first of them counts.
      may_be_empty: roles whose cells may hold nothing.

    Raises:
      FileNotFoundError, ImportError, DataError: as `read_rows` and `split_rows`.
    """
    read: dict[str, Examples] = {}
    files: dict[str, str] = {}
    for name in ("data", "val_data", "test_data"):
        if (file := getattr(settings, name)) is not None:
            rows = read_rows(file, settings.columns, encoding=settings.encoding, may_be_empty=may_be_empty)
            read[name] = Examples.of(rows, _naming_rows(encode))
            files[name] = _digest(Path(file))
            remembered = (settings.sha256 or {}).get(name, files[name])
            if remembered != files[name]:
                raise DataError(
                    f"{file!r} has changed since: its SHA-256 is {files[name][:12]}..., and was "
                    f"{remembered[:12]}....\n  evaluate --test-data FILE measures on other rows"
                )
    whole = read["data"]
    sizes = {name: 0 if f"{name}_data" in read else getattr(settings, name) for name in ("val", "test")}
    firsts = whole.firsts  # of a row that gives several examples all are in one part
    strata, groups = (None if name is None else whole[name][firsts] for name in (stratum, group))
    places = split_rows(whole["key"][firsts], strata, **sizes, seed=settings.split_seed, groups=groups)
    equal, contradictory, elsewhere = places.equal, places.contradictory, 0
    others = 0 if target is None else disagreeing(whole["key"][firsts], whole[target][firsts])
    parts: dict[str, Examples] = {}
    seen = {name: np.zeros(0, np.int64) for name in ("key", group or "key")}
    for name in ("test", "val", "train"):  # what is in an earlier one is left out of the later
        part = read.get(f"{name}_data")
        if part is None:
            part = whole.take_rows(getattr(places, name))
        else:
            starts = part.firsts
            kept, same, torn = distinct(part["key"][starts], None if stratum is None else part[stratum][starts])
            others += 0 if target is None else disagreeing(part["key"][starts], part[target][starts])
            part, equal, contradictory = part.take_rows(kept), equal + same, contradictory + torn
        starts = part.firsts
        new = ~np.any([np.isin(part[field][starts], values) for field, values in seen.items()], axis=0)
        parts[name], elsewhere = part.take_rows(np.flatnonzero(new)), elsewhere + int((~new).sum())
        seen = {field: np.concatenate([values, parts[name][field]]) for field, values in seen.items()}
    left_out = {
        "equal to an earlier row": equal - others,
        "of an earlier row's text, with another label": others,
        "of one text and different labels": contradictory,
        "that stand in the files of validation or test, too": elsewhere,
    }
    for name, part in parts.items():
        if len(part) == 0:
            why = "; ".join(f"left out {count} {why}" for why, count in left_out.items() if count)
            why = f": {why}." if why else "."
            hint = "\n  in a .txt file an empty line ends a text" if settings.data.endswith(".txt") else ""
            raise DataError(f"{settings.data!r} has {len(firsts)} rows, of which none are left for {name}{why}{hint}")
    facts = {"rows": len(firsts), "left_out": {name: count for name, count in left_out.items() if count}}
    return Data(parts["train"], parts["val"], parts["test"], files, facts)


def _naming_rows(encode: Encode) -> Encode:
    """The same, where what the model's side (a tokenizer, a chat template) refuses is told with the row it is of."""

    def named(rows: Sequence[Row]) -> Mapping[str, Sequence[Any]]:
        try:
            return encode(rows)
        except LoraxError:
            raise
        except ValueError as e:
            if len(rows) == 1:
                raise DataError(f"{rows[0].where}: {e}") from None
            for row in rows:  # texts are encoded together: which one it is shows alone
                named([row])
            raise

    return named


def _digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_length(settings: TextSettings, most: int | None) -> None:
    """Raise `StudyError` where a length is asked for that the model does not take."""
    if settings.length is not None and most is not None and settings.length > most:
        raise StudyError(f"length {settings.length} is above the {most} positions of {settings.model!r}.")


def length_of(settings: TextSettings, sizes: np.ndarray, most: int | None) -> int:
    """Tokens of a padded example.

    Args:
      sizes: tokens of the training examples.
      most: that the model takes; None: any number.

    Raises:
      StudyError: a length that the model does not take.
    """
    check_length(settings, most)
    if settings.length is not None:
        return settings.length
    fits = int(np.ceil(np.quantile(sizes, PART_THAT_FITS) / 16)) * 16
    return min(fits, LONGEST, most or LONGEST)


def evaluated_in(length: int) -> dict[str, Any]:
    """Rows and lengths of the batches of evaluation."""
    return {"batch_size": EVALUATED_AT_ONCE, "buckets": sorted({max(length // 2, 2), length})}


def batches_of(data: Data, make: Make, settings: TextSettings, length: int) -> dict[str, Any]:
    """The batches of a problem, as its keywords: those of training in one length, the others in two."""

    def evaluated(part: Examples) -> list[Any]:
        return evaluation_batches(part["ids"].lengths, partial(make, part), **evaluated_in(length))

    def train(seed: int, start: int) -> Iterator[Any]:
        return training_stream(
            data.train["ids"].lengths,
            partial(make, data.train),
            batch_size=settings.batch_size,
            length=length,
            seed=seed,
            start=start,
        )

    return {"train": train, "val": evaluated(data.val), "test": evaluated(data.test)}


def facts_of(settings: TextSettings, data: Data, length: int, task: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """What a report and an adapter say of a problem."""
    cut = sum(int((part["ids"].lengths > length).sum()) for part in (data.train, data.val, data.test))
    return {
        "name": f"{task}, {Path(settings.data).name}, {settings.model}",
        **{name: len(part.firsts) for name, part in zip(("train", "val", "test"), data[:3], strict=True)},
        "length": length,
        "cut": cut,
        "steps_per_epoch": max(len(data.train) // settings.batch_size, 1),
        "settings": {"task": task, **replace(settings, sha256=data.sha256).to_dict()},
        **data.facts,
        **more,
    }
