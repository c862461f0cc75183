"""The cache's store by itself: entries in shards, the index over them, and what becomes of damage."""

import contextlib
import json
import math
import pickle
import random
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from diffsynth.cache.verify import collect_garbage, damaged_shards, mend, stats
from diffsynth.core.data.cache import (
    CacheIndex,
    CacheRequests,
    DamagedCache,
    DamagedShard,
    Entry,
    Shard,
    ShardWriter,
    rewrite,
)
from diffsynth.core.data.cache.database import naming
from diffsynth.core.data.cached_dataset import CachedDataset

ABOUT = {"made_of": {"pipeline": "Pipeline", "units": {}}}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def entries(count: int, size: int = 8) -> dict[str, Entry]:
    return {f"key{n}": {"latents": torch.full((1, size), n), "plain": n} for n in range(count)}


def write(folder: Path, given: dict[str, Entry], shard_bytes: int = 2**28) -> list[Path]:
    """Shards of these entries, in a folder that is a cache's."""
    with ShardWriter(folder / "shards", shard_bytes) as writer:
        for key, entry in given.items():
            writer.add(key, entry)
    return sorted(writer.written)


def record(*keys: str) -> dict:
    return {"weights": [1.0], "variants": {"": {"row": {"prompt": "a"}, "runs": [(key, "shared") for key in keys]}}}


def open_index(folder: Path) -> CacheIndex:
    """An index that has learned what shards there are."""
    index = CacheIndex(folder, writable=True)
    index.match_shards()
    return index


def cache(folder: Path, given: dict[str, Entry], needed: list[str] | None = None, shard_bytes: int = 2**28) -> Path:
    """A finished cache, each sample of one entry."""
    write(folder, given, shard_bytes)
    index = open_index(folder)
    index.put([((32, 32), record(key)) for key in (given if needed is None else needed)], ABOUT)
    index.close()
    return folder


def mended(index: CacheIndex) -> list[str]:
    return mend(index, damaged_shards(index.shards).values())


def content(folder: Path) -> dict[str, list]:
    """Every entry that the index leads to, by key."""
    index = CacheIndex(folder)
    return {key: plain(index.entries([key])[0]) for key in sorted(index.keys())}


def plain(value):
    """Equal for equal bytes of equal type and shape."""
    if isinstance(value, dict):
        return {name: plain(element) for name, element in value.items()}
    if isinstance(value, list | tuple):
        return [plain(element) for element in value]
    if isinstance(value, Image.Image):
        return value.mode, value.size, value.tobytes()
    if isinstance(value, Tensor):
        return str(value.dtype), list(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist()
    return value


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def header_length(path: Path) -> int:
    """Bytes before the tensors."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


# Entries --------------------------------------------------------------------------------------------------------------


@st.composite
def tensors(draw) -> Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape)
    numbers = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=count, max_size=count))
    return torch.tensor(numbers, dtype=torch.int64).reshape(shape).to(draw(st.sampled_from(DTYPES)))


@st.composite
def images(draw) -> Image.Image:
    size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    mode = draw(st.sampled_from(["RGB", "RGBA", "L"]))
    return Image.frombytes(mode, size, draw(st.binary(min_size=64, max_size=64))[: size[0] * size[1] * len(mode)])


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    tensors() | images() | PLAIN | st.dictionaries(st.text(), PLAIN), lambda inner: st.lists(inner, max_size=3)
)


@settings(max_examples=40)
@given(entry=st.dictionaries(st.sampled_from(["latents", "edit_latents", "mask", "size"]), VALUES, max_size=3))
def test_an_entry_is_read_as_it_was_written(entry, tmp_path_factory):
    (path,) = write(tmp_path_factory.mktemp("cache"), {"key": entry})
    assert plain(Shard(path).read("key")) == plain(entry)
    assert Shard(path).whole_entries() == {"key"}


def test_a_view_of_a_batch_is_stored_without_the_batch(tmp_path):
    (path,) = write(tmp_path, {"key": {"latents": torch.zeros(1000, 1000)[:1, :10]}})
    assert path.stat().st_size < 1000


def test_an_entry_is_kept_as_it_was_when_it_was_added(tmp_path):
    latents = torch.zeros(4)
    with ShardWriter(tmp_path / "shards") as writer:
        writer.add("key", {"latents": latents})
        latents += 1
    assert not Shard(*writer.written).read("key")["latents"].any()


def test_equal_entries_make_equal_files_whatever_their_order(tmp_path):
    given = entries(5)
    paths = [
        write(tmp_path / name, dict(order)) for name, order in (("a", given.items()), ("b", [*given.items()][::-1]))
    ]
    assert len({path.name for (path,) in paths}) == len({path.read_bytes() for (path,) in paths}) == 1


def test_a_shard_is_written_when_it_is_full(tmp_path):
    assert len(write(tmp_path, entries(10), shard_bytes=5 * 8 * 8)) == 2


def test_a_shard_is_written_when_its_entries_grow_old(tmp_path):
    with ShardWriter(tmp_path / "shards", seconds=0) as writer:
        for key, entry in entries(3).items():
            writer.add(key, entry)
    assert len(writer.written) == 3


def test_what_is_complete_when_making_fails_is_kept(tmp_path):
    with pytest.raises(MemoryError), ShardWriter(tmp_path / "shards") as writer:
        writer.add("key", {"latents": torch.zeros(4)})
        raise MemoryError
    assert Shard(*writer.written).contents.keys() == {"key"}


def test_a_disk_that_is_full_is_an_error_not_a_cache(tmp_path):
    (tmp_path / "shards").write_text("not a folder")
    with pytest.raises(OSError):
        write(tmp_path, entries(3), shard_bytes=1)


def test_storing_costs_a_hundredth_of_the_tensors(tmp_path):
    """An image of 256 x 256 pixels and a prompt of 100 tokens, in bf16."""
    latents, text = torch.zeros(1, 16, 32, 32).bfloat16(), torch.zeros(1, 100, 3584).bfloat16()
    mask = torch.ones(1, 100, dtype=torch.bool)
    given = {f"{n:032x}": {"input_latents": latents} for n in range(4)}
    given |= {f"{n + 4:032x}": {"prompt_emb": text, "prompt_emb_mask": mask} for n in range(4)}
    cache(tmp_path, given)
    needed = 4 * (latents.nbytes + text.nbytes + mask.nbytes)
    shards = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert shards < 1.01 * needed
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 1.02 * needed


# Damage ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_noticed_wherever_it_is_and_no_damaged_entry_passes_for_a_good_one(
    place, bit, tmp_path_factory
):
    folder, given = tmp_path_factory.mktemp("cache"), entries(3)
    (path,) = write(folder, given)
    flip(path, int(place * path.stat().st_size), bit)
    shard = Shard(path)
    assert not shard.is_whole()
    assert all(plain(shard.read(key)) == plain(given[key]) for key in shard.whole_entries())


@settings(max_examples=20)
@given(place=st.floats(0, 1, exclude_max=True))
def test_a_flipped_bit_in_the_tensors_costs_one_entry(place, tmp_path_factory):
    (path,) = write(tmp_path_factory.mktemp("cache"), entries(5))
    start = header_length(path)
    flip(path, start + int(place * (path.stat().st_size - start)))
    assert len(Shard(path).whole_entries()) == 4


@settings(max_examples=20)
@given(length=st.integers(0, 200))
def test_a_shard_that_was_cut_off_is_refused_by_name(length, tmp_path_factory):
    (path,) = write(tmp_path_factory.mktemp("cache"), entries(2))
    path.write_bytes(path.read_bytes()[:length])
    assert not Shard(path).is_whole() and Shard(path).whole_entries() == set()
    with pytest.raises(DamagedShard, match=f"{path} cannot be read.*make_cache.py"):
        Shard(path).read("key0")


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["layout", "digest", "tensor", "image", "list", "plain", "x"]), inner, max_size=3
        )
    ),
)


def safetensors_file(path: Path, listing: str, **tensors) -> Path:
    """A file of one tensor, `key/x`, as anyone might write it."""
    about = {"key/x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}, **tensors}
    header = json.dumps({**about, "__metadata__": {"entries": listing}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    return path


@settings(max_examples=40)
@given(listing=st.dictionaries(st.just("key"), JSON, min_size=1).map(json.dumps) | JSON.map(json.dumps) | st.text())
def test_a_listing_that_is_not_ours_is_refused(listing, tmp_path_factory):
    path = safetensors_file(tmp_path_factory.mktemp("cache") / "shard.safetensors", listing)
    assert Shard(path).whole_entries() == set()
    try:
        Shard(path).read("key")
    except DamagedShard as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("listing", ["[" * 100_000, '{"key": {"layout": {"x": {"image": "x"}}}}'])
def test_a_listing_that_only_looks_like_ours_is_refused(listing, tmp_path):
    with pytest.raises(DamagedShard):
        Shard(safetensors_file(tmp_path / "shard.safetensors", listing)).read("key")


@settings(max_examples=30)
@given(data=st.binary(max_size=100) | st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little") + b"{}"))
def test_bytes_that_are_no_shard_are_refused(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "shard.safetensors"
    path.write_bytes(data)
    with pytest.raises(DamagedShard, match="cannot be read|lists no entries"):
        Shard(path).read("key")


def test_offsets_beyond_the_file_are_refused(tmp_path):
    huge = {"dtype": "F32", "shape": [2**40], "data_offsets": [4, 4 + 2**42]}
    with pytest.raises(DamagedShard, match="cannot be read"):
        Shard(safetensors_file(tmp_path / "shard.safetensors", "{}", huge=huge)).read("key")


class Burglar:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_executes_nothing(tmp_path):
    path = tmp_path / "shard.safetensors"
    path.write_bytes(pickle.dumps(Burglar(tmp_path / "mark")))
    with pytest.raises(DamagedShard, match="cannot be read"):
        Shard(path).read("key")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


ELSEWHERE = ["../../keep.safetensors", "{folder}/keep.safetensors", "x.safetensors"]


@pytest.mark.parametrize("outside", [*ELSEWHERE, "x" * 10_000, "", None])
def test_a_shard_whose_name_leads_elsewhere_is_refused_and_nothing_there_is_touched(outside, tmp_path):
    keep = tmp_path / "keep.safetensors"
    write(tmp_path / "other", entries(1))[0].rename(keep)
    index = CacheIndex(tmp_path / "a" / "cache", writable=True)
    write(index.folder, entries(2))
    index.match_shards()
    name = outside and outside.format(folder=tmp_path)
    with sqlite3.connect(index.path) as database:
        database.execute("UPDATE shards SET name = ?", (name,))
    for use in (index.match_shards, lambda: index.shards, lambda: index.entries(["key0"])):
        with pytest.raises(DamagedCache, match="names a shard .*expected 32 hex digits.*Delete that file") as refused:
            use()
        assert len(str(refused.value)) < 600
    index.close()
    before = keep.read_bytes()
    index.path.unlink()  # as the message says
    assert index.match_shards() == [] and len(index.entries(["key0", "key1"])) == 2
    assert keep.read_bytes() == before


# Packing anew ---------------------------------------------------------------------------------------------------------


def pack_anew(shards, keep: set[str], **size: int) -> None:
    """As `cache.verify` does, which deletes the old shards when the index no longer names them."""
    for path in rewrite(shards, keep, **size):
        path.unlink()


@settings(max_examples=10)
@given(keep=st.sets(st.sampled_from([f"key{n}" for n in range(6)])), shard_bytes=st.integers(1, 1000))
def test_packing_anew_keeps_what_is_wanted_byte_for_byte(keep, shard_bytes, tmp_path_factory):
    folder, given = tmp_path_factory.mktemp("cache"), entries(6)
    shards = list(map(Shard, write(folder, given, shard_bytes=3 * 64)))
    pack_anew(shards, keep, shard_bytes=shard_bytes)
    open_index(folder).close()
    assert content(folder) == {key: plain(given[key]) for key in sorted(keep)}


def test_packing_anew_never_deletes_what_it_has_just_written(tmp_path):
    (path,) = write(tmp_path, entries(3))
    pack_anew([Shard(path)], set(entries(3)))  # packed the same way, it has the same name
    assert Shard(path).contents.keys() == entries(3).keys()


def test_what_two_shards_hold_is_kept_once(tmp_path):
    first, second = write(tmp_path, entries(3)), write(tmp_path, entries(4))
    pack_anew(map(Shard, first + second), set(entries(4)))
    (path,) = (tmp_path / "shards").iterdir()
    assert len(Shard(path).contents) == 4


# The index ------------------------------------------------------------------------------------------------------------


def test_the_index_leads_to_every_entry(tmp_path):
    given = entries(7)
    assert content(cache(tmp_path, given, shard_bytes=100)) == plain(dict(sorted(given.items())))


def test_an_index_that_is_gone_is_made_anew_from_the_shards(tmp_path):
    before = content(cache(tmp_path, entries(7), shard_bytes=100))
    (tmp_path / "index.sqlite").unlink()
    open_index(tmp_path).close()
    assert content(tmp_path) == before


@pytest.mark.parametrize("data", [b"", b"no database", b"SQLite format 3\0" + bytes(random.Random(0).randbytes(8192))])
def test_an_index_that_is_damaged_is_refused_with_the_remedy(data, tmp_path):
    cache(tmp_path, entries(2))
    (tmp_path / "index.sqlite").write_bytes(data)
    with pytest.raises(DamagedCache, match="index.sqlite cannot be read.*delete that file"):
        len(CacheIndex(tmp_path))


ABOUT_ALL = {
    "format": 3,
    "made_of": {"pipeline": "Pipeline", "units": {}, "inputs": []},
    "captions": [{"captions": {"prompt": 1.0}, "prefix": "", "suffix": ""}],
    "variants": [[[1.0], [""]]],
    "by_size": False,
    "parts": [[2, "1"]],
    "left_out": [],
}


def read_all(folder: Path) -> list:
    """What training reads of a cache."""
    data = CachedDataset(str(folder))
    data.scan()
    return [data.rows_in_buckets(), *(data[number] for number in range(len(data)))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished cache of two samples that training can read."""
    folder = cache(tmp_path_factory.mktemp("whole"), entries(2))
    index = CacheIndex(folder, writable=True)
    index.put([((32, 32), record(key)) for key in entries(2)], ABOUT_ALL)
    index.close()
    assert len(read_all(folder)) == 3
    return folder


CELL = JSON.map(json.dumps) | st.text() | st.binary() | st.none()
CELLS = ["samples.record", "samples.size", "about.value", "shards.name", "entries.shard", "entries.key"]


@settings(max_examples=40)
@given(cell=st.sampled_from(CELLS), row=st.integers(0, 6), value=CELL)
@example(cell="samples.record", row=0, value="[" * 100_000)
@example(cell="samples.record", row=0, value='{"weights": [1], "variants": {}}')
@example(cell="about.value", row=3, value="9" * 5000)
def test_an_index_of_any_content_is_read_or_refused_in_one_line(cell, row, value, whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any") / "cache"
    shutil.copytree(whole, folder)
    table, column = cell.split(".")
    first = {"samples": "number", "about": "name", "shards": "number", "entries": "key"}[table]
    with closing(sqlite3.connect(folder / "index.sqlite")) as database, contextlib.suppress(sqlite3.Error):
        keys = [key for (key,) in database.execute(f"SELECT {first} FROM {table} ORDER BY {first}")]
        database.execute(f"UPDATE {table} SET {column} = ? WHERE {first} = ?", (value, keys[row % len(keys)]))
        database.commit()
    try:
        read_all(folder)
    except ValueError as error:
        assert isinstance(error, DamagedCache | DamagedShard) and str(folder) in str(error) and "\n" not in str(error)


@settings(max_examples=20)
@given(place=st.floats(0, 1, exclude_max=True), data=st.binary(min_size=1, max_size=50))
def test_an_index_with_any_damaged_bytes_is_read_or_refused(place, data, whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes") / "cache"
    shutil.copytree(whole, folder)
    content = bytearray((folder / "index.sqlite").read_bytes())
    start = int(place * len(content))
    content[start : start + len(data)] = data
    (folder / "index.sqlite").write_bytes(content)
    try:
        read_all(folder)
    except (DamagedCache, DamagedShard) as error:
        assert str(folder) in str(error)


def test_a_disk_that_is_full_is_told_by_name_and_what_was_made_is_kept(tmp_path, no_room):
    index, room = open_index(tmp_path), {"key": {"latents": torch.zeros(4)}}
    write(tmp_path, room)
    no_room()
    with pytest.raises(OSError, match=r"index\.sqlite cannot be used: .*same command again"):
        index.match_shards()
    with pytest.raises(OSError, match=r"requests\.sqlite"):
        CacheRequests(tmp_path / "requests.sqlite")
    with pytest.raises(OSError, match=r"File too large: '.*\.safetensors'"):
        write(tmp_path, entries(1))
    no_room(but=None)
    index.match_shards()
    assert index.keys() == {"key"}
    index.close()


def test_an_index_that_was_left_in_the_middle_of_a_change_is_refused_until_making_goes_on(tmp_path):
    cache(tmp_path / "cache", entries(2))
    database = sqlite3.connect(tmp_path / "cache" / "index.sqlite", isolation_level=None)
    database.execute("PRAGMA cache_size = 1")  # so that pages are written before the change is complete
    database.execute("BEGIN")
    database.executemany("INSERT INTO entries VALUES (?, 1)", [(f"{n:064x}",) for n in range(1000)])
    shutil.copytree(tmp_path / "cache", tmp_path / "killed")
    database.close()
    with pytest.raises(DamagedCache, match="Run make_cache.py again"):
        len(CacheIndex(tmp_path / "killed"))
    open_index(tmp_path / "killed").close()
    assert content(tmp_path / "killed").keys() == {"key0", "key1"}


def test_a_folder_without_an_index_is_no_cache(tmp_path):
    with pytest.raises(DamagedCache, match="is no cache: it has no index.sqlite; python make_cache.py makes one"):
        len(CacheIndex(tmp_path))


def test_a_shard_that_is_gone_takes_its_entries_and_all_samples_along(tmp_path):
    cache(tmp_path, entries(4), shard_bytes=1)
    lost = write(tmp_path, {"key2": entries(3)["key2"]})[0]
    lost.unlink()
    index = open_index(tmp_path)
    assert index.keys() == {"key0", "key1", "key3"}
    with pytest.raises(DamagedCache, match="is not finished; python make_cache.py with the same options finishes it"):
        index.require_finished()


def test_a_shard_that_is_gone_takes_nothing_along_that_another_one_holds(tmp_path):
    first = write(tmp_path, entries(2))
    write(tmp_path, entries(3))
    index = open_index(tmp_path)
    index.put([((32, 32), record("key0"))], ABOUT)
    first[0].unlink()
    assert index.match_shards() == [first[0].name]
    assert index.keys() == set(entries(3)) and len(index) == 1


def test_files_that_are_not_ours_are_left_alone(tmp_path):
    foreign = tmp_path / "shards" / "model.safetensors"
    cache(tmp_path, entries(2))
    foreign.write_bytes(b"of another program")
    index = open_index(tmp_path)
    assert len(index.shards) == 1 and mended(index) == []
    collect_garbage(tmp_path)
    assert foreign.exists()


def test_a_cache_is_moved_with_its_folder(tmp_path):
    before = content(cache(tmp_path / "here", entries(3)))
    (tmp_path / "here").rename(tmp_path / "a folder?&#%20")
    assert content(tmp_path / "a folder?&#%20") == before


# Mending and tidying --------------------------------------------------------------------------------------------------


def test_mending_drops_the_entries_that_a_flipped_bit_hit_and_no_other(tmp_path):
    before = content(cache(tmp_path, entries(5)))
    (path,) = (tmp_path / "shards").iterdir()
    flip(path, path.stat().st_size - 1)
    index = open_index(tmp_path)
    assert mended(index) == [path.name] and mended(index) == []
    (lost,) = before.keys() - index.keys()
    assert content(tmp_path) == {key: entry for key, entry in before.items() if key != lost}


def test_mending_replaces_what_cannot_be_read_at_all_known_or_not(tmp_path):
    known, unknown = write(tmp_path, entries(3))[0], write(tmp_path, {"other": {"x": 1}})[0]
    for path in (known, unknown):
        path.write_bytes(path.read_bytes()[:100])
    index = open_index(tmp_path)
    assert set(mended(index)) == {known.name, unknown.name}
    assert index.keys() == set() and list((tmp_path / "shards").iterdir()) == []


def test_a_shard_that_is_gone_and_one_that_is_damaged_are_mended_together(tmp_path):
    first, second, third = write(tmp_path, entries(3), shard_bytes=1)
    index = open_index(tmp_path)
    first.unlink()
    second.write_bytes(b"")
    index.match_shards()
    mended(index)
    assert index.keys() == set(Shard(third).contents)


def test_tidying_deletes_what_no_sample_needs_and_keeps_the_rest_byte_for_byte(tmp_path):
    needed = ["key0", "key3"]
    before = content(cache(tmp_path, entries(6), needed, shard_bytes=3 * 64))
    assert collect_garbage(tmp_path).startswith("2 of 2 files rewritten")
    assert content(tmp_path) == {key: before[key] for key in needed}
    assert len(CacheIndex(tmp_path)) == 2


def test_tidying_again_does_nothing(tmp_path):
    cache(tmp_path, entries(6), ["key0", "key3"], shard_bytes=3 * 64)
    collect_garbage(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert collect_garbage(tmp_path) == "0 of 1 files rewritten, 0.0 MB freed"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == before


def test_tidying_takes_out_what_is_there_twice(tmp_path):
    """As after tidying that was killed before it could delete what it had packed anew."""
    before = content(cache(tmp_path, entries(6)))
    write(tmp_path, entries(3))
    for files in (2, 1):
        assert collect_garbage(tmp_path).startswith(f"{files - 1} of {files} files")
    assert content(tmp_path) == before


def test_tidying_that_was_killed_before_it_could_delete_anything_loses_nothing(tmp_path):
    before = content(cache(tmp_path, entries(6), ["key0", "key3"]))
    write(tmp_path, {key: entries(6)[key] for key in ("key0", "key3")})  # what it packs anew
    collect_garbage(tmp_path)
    assert content(tmp_path) == {key: before[key] for key in ("key0", "key3")}
    assert len(list((tmp_path / "shards").iterdir())) == 1


def test_tidying_refuses_a_cache_that_is_not_finished(tmp_path):
    write(tmp_path, entries(3))
    open_index(tmp_path).close()
    with pytest.raises(DamagedCache, match="is not finished"):
        collect_garbage(tmp_path)
    assert CacheIndex(tmp_path).keys() == set(entries(3))


def test_tidying_and_counting_make_no_cache_where_there_is_none(tmp_path):
    for act in (collect_garbage, stats):
        with pytest.raises(DamagedCache, match="is no cache"):
            act(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_counts_are_right(tmp_path):
    cache(tmp_path, entries(5, size=1000), ["key0", "key0", "key1"], shard_bytes=2 * 8000)
    lines = dict(line.split(maxsplit=1) for line in stats(tmp_path).splitlines())
    assert lines["samples"] == "3, of 32 x 32 pixels"
    assert lines["entries"] == "5, of which 3 are no longer needed"
    assert lines["shared"] == "1 entries by several samples"
    assert lines["files"].startswith("3, 0.0 MB, 13.")


# A file of anybody's --------------------------------------------------------------------------------------------------

TRAPS = {
    "trigger": "CREATE TRIGGER trap AFTER INSERT ON samples BEGIN DELETE FROM entries; END",
    "view": "CREATE VIEW trap AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) SELECT x FROM n",
    "table": "CREATE VIRTUAL TABLE trap USING fts5(text)",
}


@pytest.mark.parametrize("kind", TRAPS)
@pytest.mark.parametrize("writable", [False, True], ids=["reading", "writing"])
def test_an_index_that_is_more_than_tables_is_refused(kind, writable, tmp_path):
    folder = cache(tmp_path, entries(2))
    with sqlite3.connect(folder / "index.sqlite") as database:
        database.execute(TRAPS[kind])
    with pytest.raises(DamagedCache, match=rf"index.sqlite has a {kind} 'trap'; expected tables alone\. Delete"):
        len(CacheIndex(folder, writable=writable))


def test_an_index_that_is_read_cannot_be_written(tmp_path):
    folder = cache(tmp_path, entries(1))
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        CacheIndex(folder)._database.execute("DELETE FROM samples")


@pytest.mark.parametrize("size", ["[-1, 8]", "[8]", "[1e9, 8]", "[99999, 8]", "{}", '["8", "8"]', "[true, 8]", "null"])
def test_a_size_of_anybodys_is_bounded(size, tmp_path):
    folder = cache(tmp_path, entries(1))
    with sqlite3.connect(folder / "index.sqlite") as database:
        database.execute("UPDATE samples SET size = ?", (size,))
    with pytest.raises(DamagedCache, match=r"gives samples the size .*; expected \[width, height\] of at most 65536"):
        CacheIndex(folder).sizes()


@pytest.mark.parametrize(
    "said, remedy",
    [("database is locked", "in use by another process .* wait until it ends"), ("disk is full", "see to its disk")],
)
def test_an_error_of_a_database_says_whose_it_is(said, remedy, tmp_path):
    with pytest.raises(OSError, match=rf"index\.sqlite .*{remedy}"), naming(tmp_path / "index.sqlite"):
        raise sqlite3.OperationalError(said)
