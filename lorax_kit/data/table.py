"""Rows of a user's own file, CSV, TSV, JSON Lines or Parquet, read one at a time; errors name the line."""

from __future__ import annotations

import codecs
import csv
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from lorax_kit.errors import DataError
from lorax_kit.extras import need
from lorax_kit.json_text import parse_json

LONGEST_CELL = 2**31 - 1
"""Characters of a cell of CSV; Python's own limit, 131,072, is below a long article."""
SUFFIXES = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "txt"}


class Row(NamedTuple):
    """One row of a file.

    Attributes:
      line: where it begins (of Parquet: its number), from 1.
      cells: by the names asked for.
      file: its path.
    """

    line: int
    cells: Mapping[str, Any]
    file: str = ""

    @property
    def where(self) -> str:
        """File and line, as errors name them."""
        return f"{self.file!r}, line {self.line}"


def read_rows(
    file: str | Path, columns: Mapping[str, str], *, encoding: str = "utf-8", may_be_empty: Collection[str] = ()
) -> Iterator[Row]:
    """Read the rows of a file in order; only one is in memory at a time.

    Args:
      file: NAME.csv or .tsv with a header, .jsonl with an object on each line, .parquet (the extra `data`), or .txt,
        whose paragraphs, which empty lines part, are the cells of one column.
      columns: the name that a cell gets -> the file's column. Cells of CSV are strings; others are as they are stored.
      encoding: of CSV and JSON Lines; a byte order mark is skipped.
      may_be_empty: names of cells that need not hold anything.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: Parquet, and pyarrow is not installed.
      DataError: another kind of file, a column that is missing or stands twice, a malformed row, an empty cell, bytes
        of another encoding, no rows at all.

    Example:
      >>> import tempfile, pathlib
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "a.csv"
      >>> _ = file.write_text("text,label\\ngood,yes\\n")
      >>> row = next(read_rows(file, {"text": "text"}))
      >>> row.line, row.cells
      (2, {'text': 'good'})
    """
    path = Path(file)
    kind = SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise DataError(f"{str(path)!r} is no file of rows that is known; known are {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    readers = {"csv": _read_csv, "jsonl": _read_jsonl, "txt": _read_txt}
    rows = _read_parquet(path, columns) if kind == "parquet" else readers[kind](path, columns, _known(encoding))
    return _not_empty(path, rows, may_be_empty)


def _not_empty(path: Path, rows: Iterator[Row], may_be_empty: Collection[str]) -> Iterator[Row]:
    """The rows, each of whose cells holds something; an error where there are none."""
    count = 0
    for count, row in enumerate(rows, 1):  # noqa: B007
        row = row._replace(file=str(path))
        for name, value in row.cells.items():
            empty = value is None or (isinstance(value, str) and not value.strip())
            if empty and name not in may_be_empty:
                raise DataError(f"{row.where}: {name} is empty.\n  fill it in, or remove the row")
        yield row
    if count == 0:
        raise DataError(f"{str(path)!r} holds no rows.")


def _known(encoding: str) -> str:
    try:
        "".encode(encoding)
    except LookupError:
        raise DataError(f"the encoding {encoding!r} is not known; such as utf-8, latin-1, cp1252.") from None
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def read_lines(file: str | Path) -> Iterator[str]:
    """Read the lines of a UTF-8 text, each of which holds something; lines without anything may end it.

    Raises:
      DataError: bytes of another encoding, or a line that is empty.
    """
    empty = 0
    with open(file, encoding="utf-8-sig") as handle:
        try:
            for number, line in enumerate(handle, 1):
                if not line.strip():
                    empty = empty or number
                elif empty:
                    raise DataError(f"{str(file)!r}, line {empty} is empty.\n  each line is a text: take it out")
                else:
                    yield line.strip()
        except UnicodeError:
            hint = "write it in UTF-8: iconv -f {likely} -t utf-8"
            raise _wrong_encoding(Path(file), "utf-8", hint) from None


def _wrong_encoding(path: Path, encoding: str, hint: str = "say what it is, such as encoding={likely}") -> DataError:
    """What to say of bytes that are not text in an encoding: the line where they begin, and which it may be."""
    decoder, line = codecs.getincrementaldecoder(encoding)(), 0
    with open(path, "rb") as handle:
        first = handle.read(2)
        handle.seek(0)
        with suppress(UnicodeError):
            for line, text in enumerate(handle, 1):  # noqa: B007
                decoder.decode(text)
    if encoding.lower().startswith("utf") and encoding[-2:] in ("16", "32"):
        hint = f"without a byte order mark say which: encoding={encoding}-le, or encoding={encoding}-be"
    likely = "utf-16" if first in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin-1"
    likely = likely if likely != encoding else "cp1252"
    return DataError(
        f"{str(path)!r}, line {line} is not {encoding.removesuffix('-sig')} text.\n  {hint.format(likely=likely)}"
    )


def _expect(path: Path, columns: Mapping[str, str], there: Sequence[str]) -> None:
    """Raise unless every column asked for is there once."""
    for name, column in columns.items():
        if (count := list(there).count(column)) != 1:
            what = f"no column {column!r}" if count == 0 else f"{count} columns {column!r}"
            says = "" if name == column else f" for {name}"
            hint = f"say which it is: {name}=COLUMN"
            if len(there) == 1 and (sign := next((sign for sign in ";\t|" if sign in str(there[0])), "")):
                hint = f"its cells are set apart by {sign!r}: write them with commas, or as a .tsv with tabs"
            raise DataError(
                f"{str(path)!r} has {what}{says}; its columns are {', '.join(map(str, there)) or 'none'}.\n  {hint}"
            )


def _read_csv(path: Path, columns: Mapping[str, str], encoding: str) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    last = 0
    with open(path, encoding=encoding, newline="") as handle:
        reader = csv.reader(handle, delimiter=delimiter, strict=True)
        rows = _of_any_length(reader)
        try:
            header = next(rows, None)
            if not header:
                raise DataError(f"{str(path)!r} has no header: its first line names the columns.")
            if any("\0" in cell for cell in header):
                raise DataError(
                    f"{str(path)!r} is not {encoding.removesuffix('-sig')} text: it holds zero bytes, as UTF-16 does.\n"
                    "  say what it is, such as encoding=utf-16-le"
                )
            _expect(path, columns, header)
            places = {name: header.index(column) for name, column in columns.items()}
            last = reader.line_num
            for cells in rows:
                line, last = last + 1, reader.line_num
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise DataError(
                        f"{str(path)!r}, line {line} has {len(cells)} cells, and the header {len(header)} columns.\n"
                        "  a cell that holds the separator or a new line stands in double quotes"
                    )
                yield Row(line, {name: cells[place] for name, place in places.items()})
        except UnicodeError:
            raise _wrong_encoding(path, encoding) from None
        except csv.Error as e:
            raise DataError(f"{str(path)!r}, line {last + 1}: {e}.") from None


def _of_any_length(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The rows of a reader, however long their cells; the process's limit is after each as it was before."""
    while True:
        before = csv.field_size_limit(LONGEST_CELL)
        try:
            cells = next(reader, None)
        finally:
            csv.field_size_limit(before)
        if cells is None:
            return
        yield cells


def _read_jsonl(path: Path, columns: Mapping[str, str], encoding: str) -> Iterator[Row]:
    number = 0
    with open(path, encoding=encoding, newline="\n") as handle:
        try:
            for number, text in enumerate(handle, 1):
                if not text.strip():
                    continue
                try:
                    record = parse_json(text)
                except ValueError as e:
                    raise DataError(f"{str(path)!r}, line {number} is not JSON: {e}.") from None
                if not isinstance(record, dict):
                    raise DataError(f"{str(path)!r}, line {number} is no object, but {type(record).__name__}.")
                if missing := [column for column in columns.values() if column not in record]:
                    raise DataError(
                        f"{str(path)!r}, line {number} lacks {missing[0]!r}; it has {', '.join(record) or 'nothing'}."
                    )
                yield Row(number, {name: record[column] for name, column in columns.items()})
        except UnicodeError:
            raise _wrong_encoding(path, encoding) from None


def _read_txt(path: Path, columns: Mapping[str, str], encoding: str) -> Iterator[Row]:
    if len(columns) != 1:
        raise DataError(f"{str(path)!r} is plain text, without the columns {', '.join(columns.values())}.")
    (name,) = columns
    number, start, held = 0, 1, list[str]()
    with open(path, encoding=encoding) as handle:
        try:
            for number, text in enumerate(handle, 1):
                if text.strip():
                    start = start if held else number
                    held.append(text)
                elif held:
                    yield Row(start, {name: "".join(held).strip()})
                    held = []
        except UnicodeError:
            raise _wrong_encoding(path, encoding) from None
    if held:
        yield Row(start, {name: "".join(held).strip()})


def _read_parquet(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    need("data", "pyarrow")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as opened:
            _expect(path, columns, opened.schema_arrow.names)
            number = 0
            for part in opened.iter_batches(4096, columns=list(dict.fromkeys(columns.values()))):
                held = {column: part.column(column).to_pylist() for column in columns.values()}
                for i in range(part.num_rows):
                    number += 1
                    yield Row(number, {name: held[column][i] for name, column in columns.items()})
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as e:  # what damaged pages raise is any of them
        raise DataError(f"{str(path)!r} is damaged, or no Parquet file: {str(e).splitlines()[0]}.") from None
