import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from diffsynth.core.data import (
    AddressedDataset,
    BatchPlan,
    BatchSampler,
    ImageCropAndResize,
    LoadImage,
    Operator,
    RouteByType,
    SampleOrder,
    SequentialProcess,
    SkippedRow,
    ToAbsolutePath,
    ToFloat,
    ToInt,
    ToList,
    ToStr,
    UnifiedDataset,
    collate,
    operators,
    read_metadata,
)

# --- Folders to read -------------------------------------------------------------------------------------------------


def save_image(path, size=(32, 32), color="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def save_truncated(path):
    """A file whose header is whole and whose body is not."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """Rows 1 to 3: three red images of 32x32."""
    for name in "abc":
        save_image(tmp_path / f"{name}.png")
    write_rows(tmp_path, [{"image": f"{name}.png", "prompt": f"a {name}"} for name in "abc"])
    return tmp_path


# --- Metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", '\ufeffimage,prompt\na.png,"red, café"\n\nb.png,blue\n'),
        ("m.json", '[{"image": "a.png", "prompt": "red, café"}, {"image": "b.png", "prompt": "blue"}]'),
        (
            "m.jsonl",
            '{"image": "a.png", "prompt": "red, café"}\n\n{"image": "b.png", "prompt": "blue"}\n \n',
        ),
    ],
)
def test_all_formats_read_the_same_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_metadata(tmp_path / name) == [
        {"image": "a.png", "prompt": "red, café"},
        {"image": "b.png", "prompt": "blue"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.txt", b"", r"suffix '.txt' is not one of .csv, .json, .jsonl"),
        ("m.csv", b"image,prompt\na.png,red\nb.png,red, blue\n", "row 2: 3 cells, 2 columns; quote"),
        ("m.csv", b"image,prompt\na.png,\xc4\xe3\n", "save it as UTF-8"),
        ("m.csv", b"prompt\n" + b"x" * 200_000, "field larger than field limit"),
        ("m.json", b'{"image": "a.png"}', "holds one dict, not a list of rows"),
        ("m.json", b"[1]", "row 1: 1 is not an object"),
        ("m.jsonl", b'{"a": 1}\n\n{"a": \n', "row 2: .*one JSON object a line"),
    ],
)
def test_unreadable_metadata_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_metadata(tmp_path / name)
    assert name in str(error.value)


def test_missing_metadata_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match=r"looked for .*metadata\.csv, .*metadata\.json, .*metadata\.jsonl"):
        UnifiedDataset(tmp_path)
    with pytest.raises(ValueError, match=r"looked for .*other\.csv, other\.csv"):
        UnifiedDataset.from_folder(tmp_path, metadata="other.csv")
    with pytest.raises(ValueError, match="base_path and metadata_path are both None"):
        UnifiedDataset()
    with pytest.raises(ValueError, match="gone.csv: not found"):
        UnifiedDataset(metadata_path="gone.csv")


def test_metadata_without_rows_is_refused(tmp_path):
    (tmp_path / "metadata.csv").write_text("image,prompt\n")
    with pytest.raises(ValueError, match="metadata.csv: has no rows"):
        UnifiedDataset(tmp_path)


# --- Operators -------------------------------------------------------------------------------------------------------


def test_operators_compose_from_left_to_right():
    assert (ToInt() >> ToStr() >> ToList())("3") == ["3"]
    assert ToFloat()("0.5") == 0.5
    assert ToStr(none_value="nothing")(None) == "nothing"
    assert SequentialProcess(ToInt())(["1", "2"]) == [1, 2]


def test_route_is_the_first_type_that_fits():
    route = RouteByType([(str, ToInt()), (None, ToStr())])
    assert (route("1"), route(2)) == (1, "2")
    with pytest.raises(ValueError, match="is of type float, expected str or list"):
        RouteByType([(str, ToInt()), (list, ToStr())])(1.0)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.png", "sub/../../secret.png", ".."])
def test_path_that_leaves_the_folder_is_refused(path):
    with pytest.raises(ValueError, match="leads out of data/x"):
        ToAbsolutePath("data/x")(path)


@pytest.mark.parametrize(
    ("path", "absolute"),
    [
        ("a.png", "data/x/a.png"),
        ("sub/../a.png", "data/x/a.png"),
        ("..a.png", "data/x/..a.png"),
        ("https://example.org/../a.png", "https://example.org/../a.png"),
    ],
)
def test_path_is_relative_to_the_folder(path, absolute):
    assert ToAbsolutePath("data/x")(path) == absolute


def test_image_is_loaded_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    image = LoadImage(mode="RGBA")(str(tmp_path / "a.jpg"))
    assert (image.size, image.mode) == ((10, 20), "RGBA")


def test_sixteen_bit_image_is_refused_rather_than_clipped(tmp_path):
    Image.fromarray(np.full((32, 32), 300, dtype=np.uint16)).save(tmp_path / "depth.png")
    with pytest.raises(ValueError, match="mode I;16"):
        LoadImage()(str(tmp_path / "depth.png"))


def test_url_is_tried_three_times_with_growing_waits(monkeypatch, tmp_path):
    save_image(tmp_path / "a.png", (5, 7))
    waits, answers = [], [OSError("busy"), OSError("busy"), (tmp_path / "a.png").open("rb")]

    def answer(url, timeout):
        assert timeout == 30
        result = answers.pop(0)
        if isinstance(result, OSError):
            raise result
        return result

    monkeypatch.setattr(operators, "urlopen", answer)
    monkeypatch.setattr(operators.time, "sleep", waits.append)
    assert LoadImage()("https://example.org/a.png").size == (5, 7)
    assert waits == [1, 2]
    answers += [OSError("gone")] * 3
    with pytest.raises(ValueError, match="could not be fetched in 3 tries: gone"):
        LoadImage()("https://example.org/a.png")


SIDES = st.integers(1, 400)


@given(width=SIDES, height=SIDES, max_pixels=st.integers(2000, 40_000), factor=st.sampled_from([8, 16, 32]))
def test_dynamic_size_is_a_multiple_of_the_factor_and_never_larger(width, height, max_pixels, factor):
    crop = ImageCropAndResize(None, None, max_pixels, factor, 2 * factor)
    shrink = max(1, (width * height / max_pixels) ** 0.5)
    assume(width / shrink >= 2 * factor + 1 and height / shrink >= factor + 1)
    target = crop(Image.new("L", (width, height))).size
    assert target[0] % (2 * factor) == 0 and target[1] % factor == 0
    assert 0 < target[0] <= width and 0 < target[1] <= height
    assert target[0] * target[1] <= max_pixels
    assert width / shrink - target[0] < 2 * factor + 1 and height / shrink - target[1] < factor + 1


@pytest.mark.parametrize(("size", "target"), [((1920, 1080), (1360, 768)), ((1000, 1000), (992, 992))])
def test_dynamic_size_is_upstreams(size, target):
    assert ImageCropAndResize().target_size(*size) == target


@given(width=st.integers(20, 200), height=st.integers(20, 200))
def test_fixed_size_keeps_the_centre(width, height):
    """A dot in the middle stays in the middle, and no side shows anything but the image."""
    pixels = np.zeros((height, width), dtype=np.uint8)
    pixels[height // 2 - 3 : height - height // 2 + 3, width // 2 - 3 : width - width // 2 + 3] = 255
    cropped = np.asarray(ImageCropAndResize(height=96, width=128)(Image.fromarray(pixels))) / 255.0
    assert cropped.shape == (96, 128)
    rows, columns = np.indices(cropped.shape)
    scale = max(128 / width, 96 / height)
    assert abs((rows * cropped).sum() / cropped.sum() - 47.5) < 0.5 + scale / 10
    assert abs((columns * cropped).sum() / cropped.sum() - 63.5) < 0.5 + scale / 10
    white = np.asarray(ImageCropAndResize(height=96, width=128)(Image.new("L", (width, height), 255)))
    assert white.min() == 255


def test_image_smaller_than_one_patch_is_refused():
    with pytest.raises(ValueError, match=r"image 10x8 is smaller than one patch \(16x16\)"):
        ImageCropAndResize()(Image.new("RGB", (10, 8)))
    with pytest.raises(ValueError, match="image 100000x20 is smaller than one patch"):
        ImageCropAndResize().target_size(100_000, 20)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"height": 512}, "height=512 and width=None: give both"),
        ({"width": 512}, "height=None and width=512: give both"),
        ({"height": 500, "width": 512}, "height=500 is not a multiple of height_division_factor=16: use 496"),
        ({"height": 512, "width": 8}, "width=8 is not a multiple of width_division_factor=16: use 16"),
    ],
)
def test_impossible_target_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        ImageCropAndResize(**sizes)


# --- Dataset ---------------------------------------------------------------------------------------------------------


def test_dataset_of_the_training_documents_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_image(tmp_path / "data/x/image_1.jpg", (640, 480))
    (tmp_path / "data/x/metadata.csv").write_text('image,prompt\nimage_1.jpg,"a dog"\n')
    dataset = UnifiedDataset(
        base_path="data/x",
        metadata_path="data/x/metadata.csv",
        repeat=50,
        data_file_keys="image",
        main_data_operator=UnifiedDataset.default_image_operator(
            base_path="data/x",
            height=512,
            width=512,
            height_division_factor=16,
            width_division_factor=16,
        ),
    )
    assert len(dataset) == 50
    assert dataset[49]["image"].size == (512, 512)
    assert dataset[49]["prompt"] == "a dog"
    assert dataset.scan() == []


def test_repeat_costs_nothing_and_indices_wrap(folder):
    dataset = UnifiedDataset(folder, repeat=10**9)
    assert len(dataset) == 3 * 10**9
    assert dataset[3 * 10**9 - 1]["prompt"] == "a c"
    assert len(UnifiedDataset(folder, max_data_items=2)) == len(list(UnifiedDataset(folder, max_data_items=2))) == 2
    with pytest.raises(IndexError):
        dataset[3 * 10**9]


def test_files_are_found_beside_the_metadata(folder):
    assert UnifiedDataset(metadata_path=folder / "metadata.jsonl")[0]["image"].size == (32, 32)


def test_lists_are_loaded_element_by_element(folder):
    write_rows(folder, [{"image": "a.png", "edit_image": ["b.png", "c.png"], "prompt": "p"}])
    row = UnifiedDataset(folder, data_file_keys="image, edit_image")[0]
    assert [image.size for image in [row["image"], *row["edit_image"]]] == [(32, 32)] * 3


def test_special_operators_need_no_data_file_key(folder):
    write_rows(folder, [{"image": "a.png", "prompt": "p", "scale": "3"}, {"image": "b.png", "prompt": "p"}])
    dataset = UnifiedDataset(folder, special_operator_map={"scale": ToInt()})
    assert dataset[0]["scale"] == 3
    assert "scale" not in dataset[1]
    special = {"image": ToAbsolutePath(str(folder)) >> LoadImage("RGBA")}
    assert UnifiedDataset(folder, special_operator_map=special)[0]["image"].mode == "RGBA"


@pytest.mark.parametrize("metadata", [None, "metadata.jsonl", "elsewhere"])
def test_from_folder_takes_a_name_or_a_path(folder, tmp_path_factory, metadata):
    if metadata == "elsewhere":
        metadata = str((folder / "metadata.jsonl").rename(tmp_path_factory.mktemp("other") / "m.jsonl"))
    dataset = UnifiedDataset.from_folder(str(folder), metadata, height=64, width=48, repeat=2, on_error="skip")
    assert (len(dataset), dataset[0]["image"].size, dataset.on_error) == (6, (48, 64), "skip")


def test_on_error_is_one_of_two(folder):
    with pytest.raises(ValueError, match='on_error=\'ignore\', expected "raise" or "skip"'):
        UnifiedDataset(folder, on_error="ignore")


BAD_ROWS = [
    ({"image": "a.png", "prompt": ""}, None, "prompt is empty"),
    ({"image": "a.png", "prompt": "  "}, None, "prompt is empty"),
    ({"image": "a.png", "prompt": None}, None, "prompt is empty"),
    ({"image": "a.png", "prompt": "NaN"}, None, "prompt is empty"),
    ({"image": "a.png", "prompt": float("nan")}, None, "prompt is empty"),
    ({"image": "a.png"}, None, "prompt is empty"),
    ({"image": "", "prompt": "p"}, None, "image is empty"),
    ({"image": "nan", "prompt": "p"}, None, "image is empty"),
    ({"image": float("nan"), "prompt": "p"}, None, "image is empty"),
    ({"image": "/etc/x.png", "prompt": "p"}, "/etc/x.png", "image '/etc/x.png': leads out of {folder}; write it"),
    ({"image": "../x.png", "prompt": "p"}, "../x.png", "image '../x.png': leads out of {folder}; write it"),
    ({"image": "no.png", "prompt": "p"}, "no.png", "image 'no.png': not found (looked in {folder} for no.png)"),
    ({"image": "text.png", "prompt": "p"}, "text.png", "image 'text.png': is not an image that Pillow can read"),
    (
        {"image": "tiny.png", "prompt": "p"},
        "tiny.png",
        "image 'tiny.png': image 10x8 is smaller than one patch (16x16)",
    ),
    ({"image": 3, "prompt": "p"}, "3", "image 3: is of type int, expected str or list"),
    (
        {"image": ["a.png", "no.png"], "prompt": "p"},
        "['a.png', 'no.png']",
        "image ['a.png', 'no.png']: not found (looked in {folder} for no.png)",
    ),
    ({"image": "a.png", "prompt": "p", "scale": "x"}, "x", "scale 'x': invalid literal for int()"),
]


@pytest.mark.parametrize(("row", "file", "reason"), BAD_ROWS)
def test_bad_row_is_found_before_training(folder, row, file, reason):
    (folder / "text.png").write_text("no image")
    save_image(folder / "tiny.png", (10, 8))
    write_rows(folder, [{"image": "b.png", "prompt": "p"}, row])
    special = {"scale": ToInt()}
    reason = reason.format(folder=folder)

    with pytest.raises(ValueError, match=r"^1 of 2 rows of .*metadata.jsonl cannot be used") as error:
        UnifiedDataset(str(folder), special_operator_map=special).scan()
    assert f"row 2: {reason}" in str(error.value)
    assert "dataset.on_error=skip" in str(error.value)

    dataset = UnifiedDataset(str(folder), special_operator_map=special, on_error="skip", repeat=2)
    (skipped,) = dataset.scan()
    assert (skipped.row, skipped.file) == (2, file) and reason in skipped.reason
    assert len(dataset) == 2
    assert dataset.skipped == [skipped]


def test_empty_csv_cell_is_found(folder):
    (folder / "m.csv").write_text("image,prompt\na.png,p\n,p\nb.png\n")
    dataset = UnifiedDataset(folder, folder / "m.csv", on_error="skip")
    assert [str(row) for row in dataset.scan()] == ["row 2: image is empty", "row 3: prompt is empty"]


def test_scan_reports_the_first_five_rows_and_counts_all(folder):
    write_rows(folder, [{"image": "a.png", "prompt": "p"}] + [{"image": f"{n}.png", "prompt": "p"} for n in range(40)])
    with pytest.raises(ValueError) as error:
        UnifiedDataset(folder).scan()
    lines = str(error.value).splitlines()
    assert lines[0].startswith("40 of 41 rows")
    assert [line.split(":")[0].strip() for line in lines[1:6]] == [f"row {n}" for n in range(2, 7)]
    assert lines[6:] == ["  and 35 more", "Correct them, or leave them out with dataset.on_error=skip."]


def test_scan_that_leaves_nothing_is_an_error(folder):
    write_rows(folder, [{"image": "no.png", "prompt": "p"}])
    with pytest.raises(ValueError, match="(?s)1 of 1 rows.*Correct them.$"):
        UnifiedDataset(folder, on_error="skip").scan()


def test_scan_reads_no_more_than_headers(folder):
    save_truncated(folder / "b.png")
    assert UnifiedDataset(folder).scan() == []


def test_scan_fetches_no_url_and_calls_no_plain_function(folder):
    write_rows(folder, [{"image": "https://example.invalid/a.png", "prompt": "p", "x": 1}])
    assert UnifiedDataset(folder, special_operator_map={"x": pytest.fail}).scan() == []
    assert UnifiedDataset(folder, special_operator_map={"x": Operator() >> pytest.fail}).scan() == []


def test_scan_uses_the_prompt_key(folder):
    write_rows(folder, [{"image": "a.png", "caption": "p"}])
    assert UnifiedDataset(folder).scan(prompt_key="caption") == []


def test_undecodable_file_is_named(folder):
    save_truncated(folder / "b.png")
    with pytest.raises(ValueError, match="row 2: image 'b.png': .*truncated.*dataset.on_error=skip"):
        UnifiedDataset(folder)[1]


def test_next_row_takes_the_place_of_an_undecodable_one(folder, caplog):
    save_truncated(folder / "b.png")
    dataset = UnifiedDataset(folder, on_error="skip", repeat=2)
    assert [dataset[index]["prompt"] for index in (1, 4, 1)] == ["a c"] * 3
    assert dataset.skipped == [SkippedRow(2, "b.png", "could not be decoded")]
    assert len(caplog.records) == 1 and "row 2: image 'b.png'" in caplog.text
    save_truncated(folder / "c.png")
    assert dataset[1]["prompt"] == "a a"
    save_truncated(folder / "a.png")
    with pytest.raises(ValueError, match="none of the 3 rows"):
        dataset[1]


def test_skipped_rows_are_written_as_json_lines(folder):
    write_rows(folder, [{"image": "é.png", "prompt": "p"}, {"image": "a.png", "prompt": "p"}])
    dataset = UnifiedDataset(str(folder), on_error="skip")
    dataset.scan()
    dataset.write_skipped(folder / "skipped.jsonl")
    assert read_metadata(folder / "skipped.jsonl") == [
        {"row": 1, "file": "é.png", "reason": f"image 'é.png': not found (looked in {folder} for é.png)"}
    ]
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_workers_give_the_same_samples_and_report_what_they_skip(folder, start_method):
    save_truncated(folder / "b.png")
    dataset = UnifiedDataset(folder, on_error="skip")
    dataset.scan()
    sampler = BatchSampler(SampleOrder(len(dataset), seed=0), BatchPlan(2, 1), rank=0, start_step=0, num_steps=3)
    loader = DataLoader(
        AddressedDataset(dataset),
        batch_sampler=sampler,
        collate_fn=list,
        num_workers=1,
        multiprocessing_context=start_method,
    )
    batches = list(loader)
    assert dataset.skipped == [SkippedRow(2, "b.png", "could not be decoded")]
    addressed = AddressedDataset(dataset)
    assert batches == [[addressed[address] for address in batch] for batch in sampler]
    assert [(sample.epoch, sample.index) for (sample,) in batches] == [address for (address,) in sampler]


def test_dataset_survives_pickling(folder):
    dataset = pickle.loads(pickle.dumps(UnifiedDataset(folder)))
    assert dataset[0]["image"].size == (32, 32)


# --- Collate ---------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), dtype=st.sampled_from([torch.bool, torch.int64]))
def test_the_mask_undoes_the_padding(lengths, dtype):
    texts = [torch.randn(1, length, 3) for length in lengths]
    masks = [torch.ones(1, length, dtype=dtype) for length in lengths]
    batch = collate([{"emb": text, "emb_mask": mask} for text, mask in zip(texts, masks, strict=True)])
    assert batch["emb"].shape == (len(lengths), max(lengths), 3)
    assert batch["emb_mask"].dtype == dtype
    for row, mask, text in zip(batch["emb"], batch["emb_mask"].bool(), texts, strict=True):
        assert torch.equal(row[mask], text[0])
        assert not row[~mask].any()
        assert torch.equal(mask, mask.sort(descending=True).values)


def test_tensors_of_one_shape_become_a_batch():
    batch = collate([{"latents": torch.full((1, 4, 2, 2), value)} for value in (1.0, 2.0)])
    assert batch["latents"].shape == (2, 4, 2, 2)
    assert batch["latents"][:, 0, 0, 0].tolist() == [1, 2]


def test_shared_scalars_stay_one_value_and_all_else_becomes_lists():
    image = Image.new("RGB", (2, 2))
    shared = {"height": 32, "cfg": 1.0, "name": "x", "flag": True, "none": None}
    samples = [
        shared | {"prompt": "a", "image": image, "edit_image": [image], "seed": 0},
        shared | {"prompt": "b", "image": image, "edit_image": [image, image], "seed": 1},
    ]
    assert collate(samples) == shared | {
        "prompt": ["a", "b"],
        "image": [image, image],
        "edit_image": [[image], [image, image]],
        "seed": [0, 1],
    }


def test_equal_scalars_of_unequal_type_are_not_shared():
    assert collate([{"x": 1}, {"x": True}]) == {"x": [1, True]}


def test_one_sample_is_a_batch_of_one():
    noise, scalar, image = torch.zeros(5, 4), torch.tensor(3.0), Image.new("RGB", (2, 2))
    batch = collate([{"noise": noise, "scalar": scalar, "edit": [noise], "image": image, "prompt": "p", "none": None}])
    assert batch["noise"] is noise and batch["scalar"] is scalar and batch["edit"] == [noise]
    assert (batch["image"], batch["prompt"], batch["none"]) == ([image], "p", None)


def test_lists_of_tensors_are_stacked_element_by_element():
    samples = [{"edit_latents": [torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 3, 3)]}] * 2
    assert [tuple(tensor.shape) for tensor in collate(samples)["edit_latents"]] == [(2, 4, 2, 2), (2, 4, 3, 3)]


def test_lists_of_texts_are_padded_element_by_element():
    def entities(*lengths):
        return {
            "emb": [torch.ones(1, n, 3) for n in lengths],
            "emb_mask": [torch.ones(1, n, dtype=torch.bool) for n in lengths],
        }

    batch = collate([entities(2, 5), entities(4, 1)])
    assert [tuple(tensor.shape) for tensor in batch["emb"]] == [(2, 4, 3), (2, 5, 3)]
    assert [mask.sum(1).tolist() for mask in batch["emb_mask"]] == [[2, 4], [5, 1]]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"latents": torch.zeros(1, 4, 8, 8)},
            {"latents": torch.zeros(1, 4, 8, 6)},
            r"latents: shapes \(1, 4, 8, 8\), \(1, 4, 8, 6\) differ; .*set dataset.height and dataset.width, or micro",
        ),
        (
            {"mask": torch.zeros(1, 1, 8, 8), "mask_mask": torch.zeros(1, 1)},
            {"mask": torch.zeros(1, 1, 8, 6), "mask_mask": torch.zeros(1, 1)},
            "mask: shapes",
        ),
        ({"emb": torch.zeros(1, 4, 8)}, {"emb": torch.zeros(1, 5, 8)}, "emb: shapes"),
        ({"noise": torch.zeros(3, 4)}, {"noise": torch.zeros(3, 4)}, r"noise: shape \(3, 4\) has no leading batch"),
        ({"edit": [torch.zeros(1, 2)]}, {"edit": [torch.zeros(1, 2)] * 2}, r"edit: .* \[1, 2\] tensors"),
        ({"edit": [torch.zeros(1, 2)]}, {"edit": [torch.zeros(1, 3)]}, r"edit\[0\]: shapes"),
        ({"edit": torch.zeros(1, 2)}, {"edit": None}, "edit: samples of a batch hold Tensor, NoneType"),
        ({"edit": torch.zeros(1, 2)}, {"edit": [torch.zeros(1, 2)]}, "edit: samples of a batch hold Tensor, list"),
        ({"edit": []}, {"edit": [torch.zeros(1, 2)]}, "edit: samples of a batch hold list, list"),
        ({"edit": 1}, {}, "edit is in 1 of 2 samples of a batch; set micro_batch_size=1"),
    ],
)
def test_what_does_not_stack_is_named(first, second, message):
    with pytest.raises(ValueError, match=message):
        collate([first, second])
