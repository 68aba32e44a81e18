"""Files of rows: what is read, and what is wrong with a file by its line."""

import csv
import json

import pytest

from lorax_kit.data import read_rows
from lorax_kit.data.table import read_lines
from lorax_kit.errors import DataError


def cells(file, columns=("text", "label"), **more):
    return [(row.line, *row.cells.values()) for row in read_rows(file, {c: c for c in columns}, **more)]


def written(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_every_format_gives_the_same_cells(tmp_path):
    rows = [("good, very", "yes"), ('a "quoted"\nline', "no"), ("ünïcode 日本", "yes")]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("label", "text"), *[(label, text) for text, label in rows]])
    lines = [json.dumps({"text": text, "label": label, "more": 1}) for text, label in rows]
    written(tmp_path, "a.jsonl", "\n".join(lines))
    for name in ("a.csv", "a.jsonl"):
        assert [found[1:] for found in cells(tmp_path / name)] == rows
    assert [found[0] for found in cells(tmp_path / "a.csv")] == [2, 3, 5]  # the second row has two lines
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table(dict(zip(("text", "label"), zip(*rows, strict=True), strict=True)))
    parquet.write_table(table, tmp_path / "a.parquet")
    assert cells(tmp_path / "a.parquet") == [(i, *row) for i, row in enumerate(rows, 1)]


def test_other_separators_encodings_marks_and_paragraphs(tmp_path):
    assert cells(written(tmp_path, "a.tsv", "text\tlabel\na,b\tx\n")) == [(2, "a,b", "x")]
    assert cells(written(tmp_path, "b.csv", b"\xef\xbb\xbftext,label\r\na,x\r\n")) == [(2, "a", "x")]
    assert cells(written(tmp_path, "c.csv", b"text,label\ncaf\xe9,x\n"), encoding="latin-1") == [(2, "café", "x")]
    assert cells(written(tmp_path, "d.jsonl", '\n{"text": "a", "label": [1]}\n')) == [(2, "a", [1])]
    paragraphs = written(tmp_path, "e.txt", "one\ntwo\n\n\nthree\n")
    assert cells(paragraphs, ["text"]) == [(1, "one\ntwo"), (5, "three")]
    assert cells(written(tmp_path, "f.csv", "text,label\na,\n"), may_be_empty=["label"]) == [(2, "a", "")]


BAD = {
    ("a.csv", b"text,label\na,x\n\n b\n"): "line 4 has 1 cells, and the header 2 columns",
    ("a.csv", b"text,label\na,x,y\n"): "line 2 has 3 cells",
    ("a.csv", b"text,label\na,x\n,y\n"): "line 3: text is empty",
    ("a.csv", b"text,label\na,x\nb, \n"): "line 3: label is empty",
    ("a.csv", b"text,class\na,x\n"): "no column 'label'; its columns are text, class.\n  say which it is: label=COLUMN",
    ("b.csv", b"text;label\na;x\n"): "its columns are text;label.\n  its cells are set apart by ';': write them with",
    ("a.csv", b"text,label,label\na,x,x\n"): "2 columns 'label'",
    ("a.csv", b"text,label\n"): "holds no rows",
    ("a.csv", b""): "has no header",
    ("a.csv", b"text,label\na,x\ncaf\xe9,x\n"): "not utf-8 text",
    ("a.csv", b'text,label\n"a,x\n'): "line 2: unexpected end of data",
    (
        "a.csv",
        "text,label\na,x\n".encode("utf-16-le"),
    ): "is not utf-8 text: it holds zero bytes, as UTF-16 does.\n  say what it is, such as encoding=utf-16-le",
    ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b"}\n'): "line 2 lacks 'label'; it has text",
    ("a.jsonl", b'{"text": "a", "label": 1}\n{"text"\n'): "line 2 is not JSON",
    ("a.jsonl", b"[1]\n"): "line 1 is no object, but list",
    ("a.jsonl", b'{"text": null, "label": 1}\n'): "line 1: text is empty",
    ("a.txt", b"words\n"): "plain text, without the columns text, label",
    ("a.xlsx", b""): "no file of rows that is known; known are .csv",
    ("a.parquet", b"no"): "damaged, or no Parquet file",
}


@pytest.mark.parametrize(("name", "content"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_named_by_its_line(tmp_path, name, content):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    with pytest.raises(DataError) as error:
        cells(written(tmp_path, name, content))
    assert BAD[name, content] in str(error.value)
    assert len(str(error.value).splitlines()) <= 4


def test_a_cell_of_any_length_is_read_and_a_quote_that_never_ends_is_named_where_it_begins(tmp_path):
    long = "a b " * 100_000
    assert cells(written(tmp_path, "a.csv", f"text,label\n{long},x\n")) == [(2, long, "x")]
    with pytest.raises(DataError, match="line 3: unexpected end of data"):
        cells(written(tmp_path, "b.csv", 'text,label\na,x\n"a,x\n' + "b,y\n" * 100_000))


def test_damaged_pages_of_parquet_name_the_file(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = arrow.table({"text": [f"text {i}" for i in range(3000)], "label": ["x"] * 3000})
    parquet.write_table(table, tmp_path / "whole.parquet", compression="gzip")
    content = (tmp_path / "whole.parquet").read_bytes()
    for i, damaged in enumerate((content[:4] + b"\xff" * 200 + content[204:], content[:-200] + content[-100:])):
        file = written(tmp_path, f"{i}.parquet", damaged)
        with pytest.raises(DataError, match=rf"{i}\.parquet' is damaged, or no Parquet file"):
            cells(file)


def test_other_wrong_arguments(tmp_path):
    with pytest.raises(
        DataError, match=r"line 1 is not utf-16 text\.\n  without a byte order mark say which: encoding=utf-16-le"
    ):
        cells(written(tmp_path, "b.csv", "text,label\na,x\n".encode("utf-16-le")), encoding="utf-16")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        cells(tmp_path / "none.csv")
    with pytest.raises(DataError, match="encoding 'utf-9' is not known"):
        cells(written(tmp_path, "a.csv", "text,label\na,x\n"), encoding="utf-9")


def test_rows_are_read_one_at_a_time(tmp_path):
    """A damaged line is met after those before it: nothing reads ahead."""
    file = written(tmp_path, "a.jsonl", '{"text": "a"}\n' * 3 + "{\n")
    rows = read_rows(file, {"text": "text"})
    assert [next(rows).line for _ in range(3)] == [1, 2, 3]
    with pytest.raises(DataError, match="line 4"):
        next(rows)


def test_an_empty_line_among_texts_is_an_error_for_answers_would_not_stand_beside_them(tmp_path):
    assert list(read_lines(written(tmp_path, "a.txt", "one \n two\n\n \n"))) == ["one", "two"]
    with pytest.raises(DataError, match=r"a.txt', line 2 is empty.\n  each line is a text: take it out"):
        list(read_lines(written(tmp_path, "a.txt", "one\n\nthree\n")))
