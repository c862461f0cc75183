"""Digests of samples of a file's bytes: what they notice, what they cost, and what counts as a change."""

import io
import json
import os

import pytest

from diffsynth.core import input_files
from diffsynth.core.data.sources.files_read import files_of_rows, table
from diffsynth.core.input_files import PIECE, PIECES, InputFile, _places, changed, describe, digest_of_all

HEADER = 300_000  # about that of Qwen-Image's 1,933 tensors


def digest(path, **part) -> str:
    return describe({"it": InputFile(str(path), **part)})["it"]["digest"]


@pytest.mark.parametrize("size", [0, 1, PIECE, PIECES * PIECE])
def test_a_small_file_counts_whole(size, tmp_path):
    file = tmp_path / "a.png"
    digests = set()
    for position in {0, size // 2, size - 1} & set(range(size)):
        file.write_bytes(bytes(position) + b"\1" + bytes(size - position - 1))
        digests.add(digest(file))
    file.write_bytes(bytes(size))
    digests |= {digest(file)}
    file.write_bytes(bytes(size + 1))
    digests |= {digest(file)}
    assert len(digests) == len({0, size // 2, size - 1} & set(range(size))) + 2


@pytest.mark.parametrize("position", [0, 5_000_000, 9_999_999])
def test_a_large_file_counts_by_samples_all_over_it(position, tmp_path):
    content = bytearray(10_000_000)
    (tmp_path / "a").write_bytes(content)
    length = 10_000_000 // (PIECES - 1)  # any change as long as the distance of two pieces
    content[max(0, position - length) : position + 1] = b"\1" * (position - max(0, position - length) + 1)
    (tmp_path / "b").write_bytes(content)
    assert digest(tmp_path / "a") != digest(tmp_path / "b")


def test_41_gb_of_weights_cost_a_header_and_a_few_pieces():
    stream = io.BytesIO(HEADER.to_bytes(8, "little"))
    places = list(_places(InputFile("a.safetensors"), 41 * 10**9, stream))
    assert sum(length for _, length in places) == 8 + HEADER + PIECES * PIECE < 600_000
    assert places[-1] == (41 * 10**9 - PIECE, PIECE)
    broken = list(_places(InputFile("a.safetensors"), 10**9, io.BytesIO(b"\xff" * 8)))  # a header of 2^64 bytes
    assert sum(length for _, length in broken) < 101_000_000


def test_a_part_counts_alone(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"xxONEyy")
    (tmp_path / "b.tar").write_bytes(b"zzzONE")
    assert digest(tmp_path / "a.tar", start=2, size=3) == digest(tmp_path / "b.tar", start=3, size=3)
    assert digest(tmp_path / "a.tar", start=2, size=3) != digest(tmp_path / "a.tar", start=1, size=3)


def test_only_content_is_a_change_and_what_is_gone_is_named(tmp_path, caplog):
    file = tmp_path / "a.txt"
    file.write_text("one")
    record = describe({"a": InputFile(str(file)), "absent": InputFile(str(tmp_path / "b")), "0": InputFile("a\0b")})
    assert record.keys() == {"a"}
    os.utime(file, (1, 1))
    assert changed(record) is None
    file.write_text("two")
    assert f"{file}: it has changed: its fingerprint was {record['a']['digest']} and is" in changed(record)
    assert digest_of_all(describe({"a": InputFile(str(file))})) != digest_of_all(record)
    file.unlink()
    assert changed(record) is None and f"{file} is gone (1 such files)" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps the time of creation alone")
def test_a_file_that_is_rewritten_within_its_size_and_date_is_read_again(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    os.utime(file, (1, 1))
    record = describe({"a": InputFile(str(file))})
    file.write_text("two")
    os.utime(file, (1, 1))
    assert "a.txt: it has changed" in changed(record)


def test_a_name_that_is_no_utf_8_counts_as_others_do(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"1")
    digests = {digest_of_all(describe({name: InputFile(str(file))})) for name in ("\udcff.png", "\udcfe.png")}
    assert len(digests) == 2


def test_a_large_table_costs_64_reads():
    assert len(list(_places(table("a.csv"), 65 << 20, io.BytesIO()))) == 64
    assert len(list(_places(table("a.csv"), 64 << 20, io.BytesIO()))) == 1


def test_a_file_that_cannot_be_read_is_recorded_as_that(tmp_path, monkeypatch):
    def refuse(path, mode):
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "a.png").write_bytes(b"1")
    monkeypatch.setattr(input_files, "open", refuse, raising=False)
    assert digest(tmp_path / "a.png") == "unreadable"


def test_an_index_that_cannot_be_read_counts_by_its_size(tmp_path):
    (tmp_path / input_files.CACHE_INDEX).write_bytes(b"no database")
    assert digest(tmp_path / input_files.CACHE_INDEX) == "unreadable, 11 bytes"


def test_a_device_and_what_is_outside_of_the_folder_are_not_read(tmp_path):
    assert describe({"a": InputFile(os.devnull)}) == {}
    folder = tmp_path / "data"
    rows = [{"image": name} for name in ("a.png", "../b.png", str(folder / "c.png"), str(tmp_path / "d.png"))]
    assert [*files_of_rows(rows, ["image"], str(folder))] == ["a.png", str(folder / "c.png")]


@pytest.mark.parametrize("name", ["a.JPG", "a.webp", "a.jxl", "a.mkv", "a.tar"])
def test_a_folder_counts_by_the_names_of_its_media_on_every_machine(name, tmp_path):
    before = digest(tmp_path)
    (tmp_path / "a.svg").touch()
    assert digest(tmp_path) == before
    (tmp_path / name).touch()
    assert digest(tmp_path) != before


@pytest.mark.parametrize("text", ['{"a": 1}', '{"dit": {"a": {"path": "a"}}}', "[]"])
def test_records_of_another_shape_count_as_absent(text, tmp_path, caplog):
    (tmp_path / "inputs.json").write_text(text)
    assert input_files.read_records(tmp_path / "inputs.json") == {} and "inputs.json is damaged" in caplog.text


def test_records_of_older_versions_are_read(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    record = describe({"a": InputFile(str(file))})
    del record["a"]["piece"], record["a"]["status"][2]
    (tmp_path / "inputs.json").write_text(json.dumps({"files": record}))
    os.utime(file, (1, 1))
    assert changed(input_files.read_records(tmp_path / "inputs.json")["files"]) is None
