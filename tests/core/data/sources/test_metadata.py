"""What stands in a metadata table, in any format and of any size."""

import csv
import json
import os
import pickle
import re
from io import StringIO
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffsynth.core.data import Table, UnifiedDataset, read_metadata
from diffsynth.core.data.sources import json_list, metadata, table
from diffsynth.core.data.sources.metadata import JsonList
from diffsynth.core.data.sources.table import is_empty

ROWS = [{"image": "a.png", "prompt": "red, café"}, {"image": "b.png", "prompt": "blue"}]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache folder, for which every table is large enough."""
    monkeypatch.setattr(table, "IN_MEMORY", -1)
    monkeypatch.setenv("DIFFSYNTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tables"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Formats --------------------------------------------------------------------------------------------------------------


def parquet(rows, **options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, **options), sink)
    return sink.getvalue().to_pybytes()


TWO_COLUMNS = pa.BufferOutputStream()
pq.write_table(pa.table([["p"], ["q"]], names=["prompt", "prompt"]), TWO_COLUMNS)
TWO_COLUMNS = TWO_COLUMNS.getvalue().to_pybytes()

FORMATS = [
    ("m.csv", '\ufeffimage,prompt\na.png,"red, café"\n\nb.png,blue\n'),
    ("m.json", json.dumps(ROWS)),
    ("m.jsonl", '{"image": "a.png", "prompt": "red, café"}\n\n{"image": "b.png", "prompt": "blue"}\n \n'),
    ("m.parquet", parquet(ROWS)),
]


@pytest.mark.parametrize(("name", "content"), FORMATS)
def test_all_formats_read_the_same_rows(tmp_path, name, content):
    assert list(read_metadata(write(tmp_path / name, content))) == ROWS


@pytest.mark.parametrize(("name", "content"), FORMATS)
def test_a_mapped_table_is_the_one_in_memory(tmp_path, name, content, request):
    path = write(tmp_path / name, content)
    small = read_metadata(path)
    request.getfixturevalue("cache")
    large = read_metadata(path)
    assert (list(large), large.digest()) == (list(small), small.digest())
    assert isinstance(large.source, str) and not isinstance(small.source, str)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.txt", b"", r"suffix '.txt' is not one of .csv, .json, .jsonl, .parquet"),
        ("m.csv", b"image,prompt\na.png,red\nb.png,red, blue\n", "row 2: 3 cells, 2 columns; quote"),
        ("m.csv", b"image,prompt\na.png,\xc4\xe3\n", "save it as UTF-8, or .*dataset.encoding=gbk"),
        ("m.csv", b"prompt\n" + b"x" * 200_000 + b"\na,b\n", "after row 0: field larger than field limit"),
        ("m.csv", b'image,prompt\na.png,p\nb.png,"q\nc.png,r\nd.png,s\n', "row 2: a quote is opened and never closed"),
        ("m.csv", b'image,prompt\na.png\n"b.png,q\nc.png,r', "row 2: a quote is opened and never closed"),
        ("m.csv", b'"image,prompt\na.png,p\n', "the header: a quote is opened and never closed"),
        ("m.csv", b"image,prompt,prompt\na.png,p,q\n", "two columns are named 'prompt'"),
        ("m.csv", ",".join(map(str, range(10_001))), "10001 columns, expected at most 10000; delete"),
        ("m.csv", f"image,{'p' * 500},{'p' * 500}\n", r"two columns are named 'p{98}; rename"),
        ("m.parquet", TWO_COLUMNS, "two columns are named 'prompt'"),
        ("m.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', "row 2: two keys are named 'a'"),
        ("m.json", b'[{"a": 1}, {"a": 1, "a": 2}]', "row 2: two keys are named 'a'"),
        ("m.jsonl", b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}\n", "row 2: a number has too many digits"),
        ("m.json", b'[{"a": 1}, {"a": ' + b"9" * 5000 + b"}]", "row 2: a number has too many digits"),
        ("m.jsonl", b'{"a": 1}\n' + b"[" * 100_000 + b"\n", "row 2: lists or objects are nested too deeply"),
        ("m.json", b'[{"a": 1}, {"a": ' + b"[" * 100_000 + b"]", "row 2: lists or objects are nested too deeply"),
        ("m.json", b'{"a": ' * 100_000, "m.json: maximum recursion depth"),
        ("m.json", b'{"image": "a.png"}', "holds one dict, not a list of rows"),
        ("m.json", b"[1]", "row 1: 1 is not an object"),
        ("m.json", b'[{"a": 1}, {"a": ]', "row 2: Expecting value"),
        ("m.json", b'[{"a": 1},]', "row 2: Expecting value"),
        ("m.json", b'[{"a": 1}', "row 1: is followed by 'the end of the file'"),
        ("m.json", b'[{"a": 1}] [', r"the list of rows is followed by '\['"),
        ("m.json", b"", "Expecting value"),
        ("m.jsonl", b'{"a": 1}\n\n{"a": \n', "row 2: .*one JSON object per line"),
        ("m.parquet", b"PAR1, or not", "Parquet"),
        ("m.parquet", parquet([{"image": "an umlaut"}]).replace(b"umlaut", b"uml\xaeut"), "Invalid UTF8"),
    ],
)
def test_unreadable_metadata_is_named(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        read_metadata(write(tmp_path / name, content))
    assert name in str(error.value)


def test_missing_metadata_says_what_was_looked_for(tmp_path):
    names = ".*".join(f"metadata\\.{suffix}," for suffix in ("csv", "json", "jsonl", "parquet"))
    with pytest.raises(ValueError, match=f"set dataset.path .*looked for .*{names} images$"):
        UnifiedDataset(tmp_path)
    with pytest.raises(ValueError, match="there is no folder .*gone; set the data set's path"):
        UnifiedDataset(tmp_path / "gone")
    (tmp_path / "img_00.jpg").touch()
    with pytest.raises(ValueError, match=f"img_00.jpg is a file; .* dataset.path={re.escape(str(tmp_path))}$"):
        UnifiedDataset(tmp_path / "img_00.jpg")
    with pytest.raises(ValueError, match=r"dataset=image_folder dataset.path=.*looked for .*other\.csv, other\.csv$"):
        UnifiedDataset.from_folder(tmp_path, metadata="other.csv")
    with pytest.raises(ValueError, match="base_path and metadata_path are both None"):
        UnifiedDataset()
    with pytest.raises(ValueError, match="gone.csv: not found"):
        UnifiedDataset(metadata_path="gone.csv")


@pytest.mark.parametrize(
    ("name", "content"), [("csv", b"a,b\n"), ("csv", b""), ("json", b" [ ] "), ("jsonl", b"\n"), ("parquet", None)]
)
def test_metadata_without_rows_is_refused(tmp_path, name, content):
    schema = pa.schema({"image": pa.string()})
    write(tmp_path / f"metadata.{name}", parquet([], schema=schema) if content is None else content)
    with pytest.raises(ValueError, match=f"metadata.{name}: has no rows"):
        UnifiedDataset(tmp_path)


def test_an_encoding_can_be_named(tmp_path):
    path = write(tmp_path / "metadata.csv", "image,prompt\na.png,一只猫\n".encode("gbk"))
    assert read_metadata(path, "gbk")[0] == {"image": "a.png", "prompt": "一只猫"}
    assert UnifiedDataset.from_folder(tmp_path, encoding="gbk").rows[0]["prompt"] == "一只猫"
    with pytest.raises(ValueError, match="unknown encoding: latin-99.*dataset.encoding=gbk"):
        read_metadata(path, "latin-99")
    with pytest.raises(ValueError, match="m.*unknown encoding: base64; set one of text.*dataset.encoding=gbk"):
        read_metadata(path, "base64")
    utf_16 = write(tmp_path / "wide.csv", "image,prompt\na.png,p\n".encode("utf-16"))
    assert read_metadata(utf_16, "utf-16")[0] == {"image": "a.png", "prompt": "p"}


# Cells ----------------------------------------------------------------------------------------------------------------

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)


def rows_of(cells: int) -> st.SearchStrategy:
    """Rows of `cells` to 3 cells."""
    return st.lists(st.lists(CELLS, min_size=cells, max_size=3), min_size=1, max_size=8)


@given(rows_of(1) | rows_of(3))
def test_csv_reads_as_the_standard_library_does(tmp_path_factory, rows):
    text = StringIO()
    csv.writer(text).writerows([["first", "second", "third"], *rows])
    path = write(tmp_path_factory.getbasetemp() / "any.csv", "\ufeff" + text.getvalue())
    assert list(read_metadata(path)) == list(csv.DictReader(StringIO(text.getvalue(), newline="")))


def ends_within_quotes(text: str) -> bool:
    state = "start"  # of a cell
    for mark in text:
        if state == "quoted":
            state = "quote" if mark == '"' else "quoted"
        elif mark == '"' and state in ("start", "quote"):
            state = "quoted"
        else:
            state = "start" if mark in ",\r\n" else "plain"
    return state == "quoted"


@given(st.text('",\r\n ab', max_size=12).map("first,second\n{}".format))
def test_csv_of_any_form_reads_as_the_standard_library_does(tmp_path_factory, text):
    path = write(tmp_path_factory.getbasetemp() / "form.csv", text)
    expected = list(csv.DictReader(StringIO(text, newline=""), restkey="too many"))
    if ends_within_quotes(text):
        with pytest.raises(ValueError, match="2 columns|a quote is opened and never closed"):
            read_metadata(path)
    elif any("too many" in row for row in expected):
        with pytest.raises(ValueError, match="2 columns"):
            read_metadata(path)
    else:
        assert list(read_metadata(path)) == expected


def test_columns_without_a_name_may_be_many(tmp_path):
    assert read_metadata(write(tmp_path / "m.csv", "a,,\n1,,\n"))[0] == {"a": "1", "": ""}


@pytest.mark.parametrize("separator", [";", "\t"])
@pytest.mark.parametrize("rows", ["a.png{0}red, café\n", 'a.png{0}"red, café"\nb.png\n'])  # for Arrow, and for Python
def test_a_csv_of_a_spreadsheet_may_have_another_separator(tmp_path, separator, rows):
    path = write(tmp_path / "m.csv", f"image{separator}prompt\n" + rows.format(separator))
    assert read_metadata(path)[0] == ROWS[0]
    with pytest.raises(ValueError, match="row 1: 3 cells, 2 columns; quote a cell that contains"):
        read_metadata(write(path, f"image{separator}prompt\n{separator.join('abc')}\n"))


@pytest.mark.parametrize("text", ["Nan", "NaN", "NA", "null", "None"])
def test_a_word_for_nothing_is_a_text(tmp_path, text):
    rows = read_metadata(write(tmp_path / "m.csv", f"image,prompt\na.png,{text}\n"))
    assert rows[0]["prompt"] == text and not is_empty(text)


def test_a_date_that_python_has_not_is_a_text(tmp_path):
    days = pa.array([4_000_000], pa.int32()).cast(pa.date32())  # in the year 12921
    pq.write_table(pa.table({"image": ["a.png"], "taken": days}), tmp_path / "m.parquet")
    assert read_metadata(tmp_path / "m.parquet")[0] == {"image": "a.png", "taken": "12921-08-18"}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(rows=st.lists(VALUES, max_size=5), piece=st.integers(1, 9), indent=st.sampled_from([None, 0, 2]))
def test_a_json_list_is_the_same_in_pieces(rows, piece, indent):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list, "PIECE", piece)
        text = json.dumps(rows, indent=indent, ensure_ascii=False)
        elements = list(JsonList(StringIO(f" {text}\n")))
    assert [value for value, _ in elements] == [json.loads(text) for _, text in elements] == rows


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_rows_keep_their_own_keys_and_types(tmp_path, suffix):
    rows = [{"a": 1, "b": [1.5, None]}, {"c": {"d": True}}, {}]
    text = json.dumps(rows) if suffix == "json" else "\n".join(map(json.dumps, rows))
    found = read_metadata(write(tmp_path / f"m.{suffix}", text))
    assert list(found) == rows
    assert found[0] is not found[0]


def test_parquet_keeps_types_and_takes_categories_as_values(tmp_path):
    category = pa.array(["x", None, "y"]).dictionary_encode()
    columns = pa.table({"category": category, "edit_image": [["a", "b"], None, []], "score": [1, 2, 3]})
    pq.write_table(columns, tmp_path / "m.parquet", row_group_size=1)
    assert list(read_metadata(tmp_path / "m.parquet")) == columns.to_pylist()


def test_there_is_no_row_beyond_the_ends(tmp_path):
    rows = read_metadata(write(tmp_path / "m.csv", "a\n1\n"))
    for index in (1, -1):
        with pytest.raises(IndexError):
            rows[index]


# Size -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json", "parquet"])
def test_rows_of_all_batches_are_read_and_counted_through(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(table, "BATCH", 4)
    monkeypatch.setattr(metadata, "PARQUET_ROWS", 4)
    rows = [{"n": str(number)} for number in range(9)]
    text = {
        "csv": "n\n" + "\n".join(row["n"] for row in rows),
        "json": json.dumps(rows),
        "jsonl": "\n".join(map(json.dumps, rows)),
        "parquet": parquet(rows),
    }
    path = write(tmp_path / f"m.{suffix}", text[suffix])
    assert list(read_metadata(path)) == rows
    if suffix == "csv":
        with pytest.raises(ValueError, match="row 10: 2 cells, 1 columns"):
            read_metadata(write(path, text["csv"] + "\n9,9"))


def test_a_large_table_is_converted_once_for_each_version_of_its_file(tmp_path, cache):
    path = write(tmp_path / "m.csv", "a\n1\n")
    first, second = read_metadata(path), read_metadata(tmp_path / "." / "m.csv")
    assert first.source == second.source and len(list(cache.iterdir())) == 1
    assert read_metadata(write(path, "a\n1\n2\n"))[1] == {"a": "2"}
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_conversion_is_made_again(tmp_path, cache, caplog):
    path = write(tmp_path / "m.csv", "a\n1\n")
    converted = Path(read_metadata(path).source)
    converted.write_bytes(converted.read_bytes()[:-100])
    assert list(read_metadata(path)) == [{"a": "1"}]
    assert f"{converted} is damaged" in caplog.text and len(list(cache.iterdir())) == 1


def test_a_table_that_changes_within_its_size_and_date_is_read_again(tmp_path, cache):
    path = tmp_path / "m.csv"
    for cells in ("1" * 1000, "1" * 999 + "2", "3" + "1" * 999, "1" * 500 + "4" + "1" * 499):
        os.utime(write(path, f"a\n{cells}\n"), ns=(0, 0))
        assert read_metadata(path)[0] == {"a": cells}


def test_a_table_in_a_store_is_told_by_its_version_and_not_read_for_a_digest(monkeypatch):
    store = fsspec.filesystem("memory")
    store.pipe("/tables/m.csv", b"a\n1\n")
    monkeypatch.setattr(metadata, "sampled_digest", None)
    assert list(read_metadata("memory://tables/m.csv")) == [{"a": "1"}]
    store.rm("/tables", recursive=True)


def test_a_table_that_cannot_be_converted_leaves_nothing_behind(tmp_path, cache):
    with pytest.raises(ValueError, match="row 2"):
        read_metadata(write(tmp_path / "m.csv", "a\n1\n2,3\n"))
    assert list(cache.iterdir()) == []


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_CACHE", str(write(tmp_path / "file", "no folder")))
    with pytest.raises(ValueError, match="m.csv.*file/tables.*DIFFSYNTH_CACHE"):
        read_metadata(write(tmp_path / "m.csv", "a\n1\n"))


def test_a_mapped_table_travels_by_its_name(tmp_path, cache):
    rows = read_metadata(write(tmp_path / "m.csv", "a\n" + "1\n" * 10_000))
    travelling = pickle.dumps(rows)
    assert len(travelling) < 500
    assert list(pickle.loads(travelling)) == list(rows)


def test_a_table_in_memory_travels_whole(tmp_path):
    rows = read_metadata(write(tmp_path / "m.csv", "a\n1\n"))
    assert list(pickle.loads(pickle.dumps(rows))) == [{"a": "1"}]
    assert isinstance(rows, Table)


def test_a_damaged_parquet_file_is_named(tmp_path):
    pq.write_table(pa.table({"image": ["a.png"]}), path := tmp_path / "m.parquet")
    content = path.read_bytes()
    path.write_bytes(content[:-40] + b"\xff" * 32 + content[-8:])  # the end of the footer
    with pytest.raises(ValueError, match=r"^metadata .*m\.parquet: is damaged: .*; write it again$"):
        read_metadata(path)
