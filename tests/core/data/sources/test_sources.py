"""Where rows and their files come from: folders with captions, tar shards, `datasets` on disk, object stores."""

import json
import os
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from itertools import chain

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader

from diffsynth.core.data import HubRows, UnifiedDataset, open_file, read_shards
from diffsynth.core.data.order.row_index import AllBut
from diffsynth.core.data.sources import table
from diffsynth.core.data.sources.picture_formats import readable_formats
from diffsynth.core.data.sources.storage import EmbeddedFile, part_of
from diffsynth.core.data.sources.tar_shards import expand

COLORS = {"a": "red", "b": "lime", "c": "blue"}


def png(color="red", size=(32, 32)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, color).save(file, "png")
    return file.getvalue()


FILES = {f"{name}.png": png(color) for name, color in COLORS.items()}
PROMPTS = {f"{name}.png": f"a {color} square" for name, color in COLORS.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of one's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DIFFSYNTH_CACHE", str(folder))
    return folder / "tables"


# What each kind of source has in common -------------------------------------------------------------------------------


def write_files(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return str(path.parent)


def with_captions(files, prompts):
    """Each file, then its prompt in a text file."""
    both = [((name, content), (f"{os.path.splitext(name)[0]}.txt", prompts[name])) for name, content in files.items()]
    return dict(chain.from_iterable(both))


def write_captions(folder, files, prompts):
    write_files(folder, with_captions(files, prompts))


def write_shards(folder, files, prompts):
    members = list(with_captions(files, prompts).items())
    write_tar(folder / "0.tar", dict(members[:2]))
    write_tar(folder / "1.tar", dict(members[2:]))


def write_table(folder, files, prompts):
    rows = [{"image": name, "prompt": prompt} for name, prompt in prompts.items()]
    write_files(folder, files | {"metadata.json": json.dumps(rows)})


def write_parquet(folder, files, prompts):
    folder.mkdir()
    pq.write_table(pa.table({"image": files.values(), "prompt": prompts.values()}), folder / "metadata.parquet")


def write_hub(folder, files, prompts):
    images = [{"bytes": content, "path": name} for name, content in files.items()]
    save_to_disk(folder, image=(datasets.Image(), images), text=(datasets.Value("string"), list(prompts.values())))


def save_to_disk(folder, **columns):
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    cells = {name: values for name, (_, values) in columns.items()}
    datasets.Dataset.from_dict(cells, features).save_to_disk(str(folder))
    return str(folder)


@dataclass
class Source:
    """How pictures and prompts are written to a folder, how its path is given, and what reads the rows."""

    write_to: Callable
    path: str = "{}"
    rows: Callable | None = None

    def write(self, folder, files=FILES, prompts=PROMPTS):
        self.write_to(folder, files, prompts)
        return folder

    def open(self, folder, **options):
        return UnifiedDataset.from_folder(self.path.format(folder), self.rows, **options)


SOURCES = {
    "captions": Source(write_captions),
    "shards": Source(write_shards, rows=read_shards),
    "hub": Source(write_hub, rows=HubRows),
    "parquet": Source(write_parquet),
    "table in a store": Source(write_table, "file://{}"),
    "shards in a store": Source(write_shards, "file://{}", read_shards),
    "captions in a store": Source(write_captions, "file://{}"),
}
EXPECTED = [((255, 0, 0), "a red square"), ((0, 255, 0), "a lime square"), ((0, 0, 255), "a blue square")]


@pytest.fixture(params=SOURCES)
def source(request) -> Source:
    return SOURCES[request.param]


def seen(row) -> tuple:
    return row["image"].getpixel((0, 0)), row["prompt"]


@pytest.mark.parametrize("large", [False, True])
def test_each_source_gives_the_same_samples_here_and_in_a_copy(source, large, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "IN_MEMORY", -1 if large else 1 << 20)
    dataset = source.open(source.write(tmp_path / "data"), repeat=2)
    assert list(map(seen, dataset)) == EXPECTED * 2
    assert list(map(seen, pickle.loads(pickle.dumps(dataset)))) == EXPECTED * 2
    assert dataset.scan(required=("image", "prompt")) == []


def test_spawned_workers_read_every_source(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "IN_MEMORY", -1)
    dataset = ConcatDataset([source.open(source.write(tmp_path / name)) for name, source in SOURCES.items()])
    loader = DataLoader(dataset, None, num_workers=1, multiprocessing_context="spawn")
    assert list(map(seen, loader)) == EXPECTED * len(SOURCES)


@pytest.mark.parametrize(
    ("option", "name"), [("webdataset", "shards"), ("hf_dataset", "hub"), ("image_folder", "captions")]
)
def test_each_option_of_the_configuration_reads_its_source(option, name, tmp_path):
    path = SOURCES[name].write(tmp_path / "data")
    node = tiny.compose("train", f"dataset={option}", f"dataset.path={path}").dataset
    assert list(map(seen, instantiate(node, _convert_="all"))) == EXPECTED


def test_each_source_names_and_skips_what_cannot_be_used(source, tmp_path):
    source.write(tmp_path / "data", FILES | {"b.png": b"no image", "d.png": png()}, PROMPTS | {"d.png": ""})
    with pytest.raises(ValueError, match="^2 of 4 rows of .*data(.|\n)*row 2: .*it begins with b'no image'"):
        source.open(tmp_path / "data").scan()
    dataset = source.open(tmp_path / "data", on_error="skip")
    assert [fault.row for fault in dataset.scan()] == [2, 4]
    assert list(map(seen, dataset)) == [EXPECTED[0], EXPECTED[2]]


def test_each_source_is_another_one_with_other_rows_but_not_in_another_place(source, tmp_path):
    source.write(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    source.write(tmp_path / "other", prompts=PROMPTS | {"b.png": "said otherwise"})
    here, there, other = (source.open(tmp_path / name).fingerprint() for name in ("here", "there", "other"))
    assert here == there != other


# Folders with captions ------------------------------------------------------------------------------------------------


def test_images_of_subfolders_are_found_folder_by_folder(tmp_path):
    files = {
        "b/2.PNG": png(),
        "b/2.txt": "\ufefftwo\n",
        "b/10.jpg": png(),
        "b/10.txt": "ten",
        "a-1.png": png(),
        "a.png": png(),
        "a.txt": "",
        "a.webp": png(),
        "notes.txt": "none",
        ".hidden/x.png": png(),
        "._a.png": png(),
    }
    write_files(tmp_path, files)
    found = [(row["image"], row["prompt"]) for row in UnifiedDataset(tmp_path).rows]
    assert found == [("b/10.jpg", "ten"), ("b/2.PNG", "two"), ("a.png", ""), ("a.webp", ""), ("a-1.png", "")]
    in_store = [(row["image"], row["prompt"]) for row in UnifiedDataset(f"file://{tmp_path}").rows]
    assert sorted(in_store) == sorted(found)


def test_a_table_wins_over_captions(tmp_path):
    write_files(tmp_path, with_captions(FILES, PROMPTS) | {"metadata.csv": "image,prompt\na.png,said in the table\n"})
    assert [row["prompt"] for row in UnifiedDataset(tmp_path).rows] == ["said in the table"]


def test_every_picture_of_a_folder_is_a_row(tmp_path, monkeypatch):
    """Also those that cannot be read here, which are named."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    readable_formats.cache_clear()
    for name in ("a.png", "b.jfif", "c.jp2"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    heif, jxl = b"\0\0\0\x18ftypheic" + bytes(12), b"\0\0\0\x0cJXL \r\n\x87\n"
    write_files(tmp_path, {"d.heic": heif, "e.jxl": jxl, "f.JPG": heif, "g.eps": b"%!PS-Adobe"})
    write_files(tmp_path, {f"{name}.txt": name for name in "abcdefg"})
    dataset = UnifiedDataset(tmp_path, on_error="skip")
    assert [fault.reason.partition(": ")[2] for fault in dataset.scan()] == [
        "is HEIC, which Pillow cannot read here: pip install pillow-heif, or save it as PNG",
        "is JPEG XL, which Pillow cannot read here: pip install pillow-jxl-plugin, or save it as PNG",
        "is HEIC, which Pillow cannot read here: pip install pillow-heif, or save it as PNG",
        "is PostScript, which is a program; save it as PNG",
    ]
    assert [row["prompt"] for row in dataset] == ["a", "b", "c"]


def test_a_folder_without_captions_says_where_they_are_looked_for(tmp_path):
    write_files(tmp_path, FILES | {"notes.txt": "none"})
    with pytest.raises(ValueError, match=r"no image has a caption; write that of a.png into a.txt .*metadata.csv"):
        UnifiedDataset(tmp_path)


def test_a_table_of_a_hugging_face_folder_is_read_as_it_is(tmp_path, caplog):
    write_files(tmp_path, FILES | {"metadata.csv": "file_name,text,seed\na.png,p,1\n"})
    caplog.set_level("INFO")
    dataset = UnifiedDataset(tmp_path)
    assert dataset.scan(("image", "prompt")) == [] and seen(dataset[0]) == ((255, 0, 0), "p")
    assert "file_name is taken as image, text is taken as prompt" in caplog.text
    write_files(tmp_path, {"metadata.csv": "image,text\na.png,p\n"})
    with pytest.raises(ValueError, match="has no prompt, but image, text; 'dataset.augmentation.captions={NAME: 1}'"):
        UnifiedDataset(tmp_path).scan(("image", "prompt"))


def test_captions_can_be_in_another_encoding(tmp_path):
    write_files(tmp_path, {"a.png": png(), "a.txt": "你好".encode("gbk")})
    assert UnifiedDataset.from_folder(str(tmp_path), encoding="gbk").rows[0]["prompt"] == "你好"
    with pytest.raises(ValueError, match="a.txt.*dataset.encoding=gbk"):
        UnifiedDataset(tmp_path)


def test_a_changed_caption_is_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "IN_MEMORY", -1)
    for prompt in ("once", "and again"):
        write_files(tmp_path, {"a.png": png(), "a.txt": prompt})
        assert UnifiedDataset(tmp_path).rows[0]["prompt"] == prompt


# Tar shards -----------------------------------------------------------------------------------------------------------


def test_a_sample_has_a_column_for_each_of_its_images_and_its_caption_from_json(tmp_path):
    members = {
        "x/0001.png": png("red"),
        "x/0001.edit_image.jpg": png("blue"),
        "x/0001.json": '{"caption": "no", "long": "yes"}',
        "x/0001.txt": "not this one",
        "x/._0001.png": b"of a Mac",
        "y/0001.webp": png("lime"),
        "y/0001.json": "{}",
        "z.txt": "without an image",
    }
    dataset = UnifiedDataset(
        write_tar(tmp_path / "s.tar", members),
        lambda path: read_shards(path, caption_key="long"),
        data_file_keys="image, edit_image",
        on_error="skip",
    )
    assert [fault.row for fault in dataset.scan()] == [2, 3]
    assert seen(dataset[0]) == ((255, 0, 0), "yes")
    assert dataset[0]["edit_image"].getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("content", "shards", "message"),
    [
        (None, "*.tar", "no file in .* matches \\*.tar; set dataset.path or dataset.metadata.shards"),
        (b"", "s-{0..1}.tar", "one is missing: .*s-1.tar.*dataset.metadata.shards"),
        (b"no tar" * 200, "s-0.tar", "shard s-0.tar: .*; expected a complete, uncompressed tar file"),
    ],
)
def test_shards_that_cannot_be_read_are_named(tmp_path, content, shards, message):
    if content is not None:
        write_files(tmp_path, {"s-0.tar": content})
    with pytest.raises(ValueError, match=message):
        read_shards(str(tmp_path), shards)


def test_a_key_with_a_dot_is_named(tmp_path):
    write_tar(tmp_path / "s.tar", {"22.05.png": png(), "22.05.txt": "p"})
    with pytest.raises(ValueError, match=r"shard s.tar: 22.05.*key ends at the first dot .*such as 22_05"):
        read_shards(str(tmp_path))


def test_a_caption_that_is_no_text_is_named(tmp_path):
    write_tar(tmp_path / "s.tar", {"1.txt": b"\xff", "2.json": "[]"})
    with pytest.raises(ValueError, match="1.txt of .*expected text in UTF-8"):
        read_shards(str(tmp_path))
    with pytest.raises(ValueError, match="2.json of .*expected one JSON object in UTF-8"):
        read_shards(str(tmp_path), caption_key="caption")


def test_a_cut_shard_is_refused(tmp_path):
    write_tar(tmp_path / "s.tar", {"1.png": bytes(2000)})
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes()[:1500])
    with pytest.raises(ValueError, match="s.tar: unexpected end of data"):
        read_shards(str(tmp_path))


@given(st.lists(st.tuples(st.text("ab/.-"), st.integers(0, 120), st.integers(0, 3), st.integers(1, 4)), max_size=2))
def test_ranges_stand_for_all_their_numbers_in_order(parts):
    pattern, names = "", [""]
    for text, first, more, width in parts:
        pattern += f"{text}{{{first:0{width}}..{first + more}}}"
        names = [
            f"{name}{text}{n:0{max(width, len(str(first)))}}" for name in names for n in range(first, first + more + 1)
        ]
    assert expand(pattern) == names


@given(content=st.binary(max_size=50), before=st.binary(max_size=9), moves=st.lists(st.integers(0, 60), max_size=5))
def test_a_part_of_a_file_is_a_file(tmp_path_factory, content, before, moves):
    path = tmp_path_factory.getbasetemp() / "any.tar"
    path.write_bytes(before + content + b"after")
    with open_file(part_of(str(path), len(before), len(content), "x/y.png")) as part:
        expected = BytesIO(content)
        for position in moves:
            assert part.seek(position) == expected.seek(position)
            assert part.read(7) == expected.read(7)
        assert part.seek(0, os.SEEK_END) == len(content)


# `datasets` -----------------------------------------------------------------------------------------------------------


def test_columns_are_named_and_others_stay(tmp_path):
    images = [{"bytes": FILES["a.png"], "path": None}, {"bytes": None, "path": "b.png"}]
    text, pictures = datasets.Value("string"), [datasets.Image()]
    columns = {"img": (datasets.Image(), images[:1]), "caption": (text, ["said"]), "prompt": (text, ["unsaid"])}
    path = save_to_disk(tmp_path / "train", more=(pictures, [images[:1]]), **columns)
    row = HubRows(path, "img", "caption")[0]
    assert row.keys() == {"image", "prompt", "more"}
    assert row["prompt"] == "said"
    assert [file.open().read() for file in [row["image"], *row["more"]]] == [FILES["a.png"]] * 2
    with pytest.raises(ValueError, match="train has no column 'image', but more, img, caption, prompt"):
        HubRows(path)


def test_a_split_is_asked_for(tmp_path):
    split = datasets.Dataset.from_dict({"image": ["a.png"]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path))
    with pytest.raises(ValueError, match=f"holds the splits train, test; .*dataset.path={tmp_path}/t"):
        HubRows(str(tmp_path))
    with pytest.raises(ValueError, match="gone is not a folder that save_to_disk"):
        HubRows(str(tmp_path / "gone"))


def test_files_in_cells_are_read_where_they_are():
    files = [png("red"), None, png("blue")]
    cells = {
        "bare": files,
        "named": [file and {"bytes": file, "path": "x.png"} for file in files],
        "outside": [{"bytes": None, "path": "y.png"}] * 3,
        "lists": [[{"bytes": file, "path": None} for file in files[:1]], [], None],
    }
    columns = pa.table(cells)
    found = {name: [table.read_cell(columns.column(name), n) for n in range(3)] for name in cells}
    assert [file and file.open().read() for file in found["bare"]] == files
    assert [file and file.open().read() for file in found["named"]] == files
    assert (str(found["named"][0]), found["named"][1], found["outside"]) == ("x.png", None, ["y.png"] * 3)
    assert [file.open().read() for file in found["lists"][0]] == files[:1]
    assert isinstance(found["bare"][2], EmbeddedFile)
    travelling = pickle.dumps(table.read_cell(pa.chunked_array([[files[0]] * 1000]), 7))
    assert len(travelling) < 1000
    assert pickle.loads(travelling).open().read() == files[0]


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "diffsynth-hydra\[data\]"'):
        HubRows(str(tmp_path))


# Object stores --------------------------------------------------------------------------------------------------------


def test_a_data_set_can_lie_in_an_object_store(tmp_path):
    memory = fsspec.filesystem("memory")
    for name, content in (FILES | {"metadata.csv": b"image,prompt\na.png,p\nb.png,p\n../c.png,p\nno.png,p\n"}).items():
        memory.pipe(f"/bucket/folder/{name}", content)
    dataset = UnifiedDataset.from_folder("memory://bucket/folder", on_error="skip")
    assert [fault.reason for fault in dataset.scan()] == [
        "image '../c.png': leads out of memory://bucket/folder; write it relative to that folder",
        "image 'no.png': not found (looked in memory://bucket/folder for no.png)",
    ]
    assert [row["image"].getpixel((0, 0)) for row in dataset] == [(255, 0, 0), (0, 255, 0)]
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("name", ["file:///etc/hostname", "x::file:///etc/hostname", "memory://x"])
def test_metadata_cannot_name_files_of_another_store(tmp_path, name):
    write_files(tmp_path, {"metadata.json": json.dumps([{"image": name, "prompt": "p"}])})
    for folder in (str(tmp_path), f"file://{tmp_path}"):
        with pytest.raises(ValueError, match="not found"):
            UnifiedDataset(folder).scan()


@pytest.mark.parametrize(
    ("url", "message"), [("s3://x", 'pip install "fsspec.s3."'), ("s9://x", "Protocol not known: s9; write a path")]
)
def test_a_store_that_cannot_be_reached_is_named(url, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=f"{url}.*{message}"):
        UnifiedDataset(url)


# Size -----------------------------------------------------------------------------------------------------------------


@given(size=st.integers(0, 30), skipped=st.sets(st.integers(0, 29)))
def test_what_is_left_is_counted_through(size, skipped):
    skipped = sorted(number for number in skipped if number < size)
    assert list(AllBut(size, skipped)) == [number for number in range(size) if number not in skipped]


def test_what_is_left_of_many_rows_takes_the_room_of_what_is_not():
    left = AllBut(10**9, [3, 10**8])
    assert (len(left), left[3], left[10**8], left[10**9 - 3]) == (10**9 - 2, 4, 10**8 + 2, 10**9 - 1)
    assert len(pickle.dumps(left)) < 1000


def test_no_more_rows_are_read_than_configured(tmp_path, caplog):
    caplog.set_level("INFO")
    write_files(tmp_path, {"a.png": png(), "metadata.csv": "image,prompt\n" + "a.png,p\n" * 2 + "no.png,p\n" * 5})
    dataset = UnifiedDataset.from_folder(str(tmp_path), scan_rows=2)
    assert dataset.scan() == []
    assert f"5 of 7 rows of {tmp_path}/metadata.csv were not checked; dataset.scan_rows=2" in caplog.text
    with pytest.raises(ValueError, match="1 of 3 rows .*cannot be used"):
        UnifiedDataset.from_folder(str(tmp_path), scan_rows=3).scan()
