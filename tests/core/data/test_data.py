import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from diffsynth.core.data import (
    AddressedDataset,
    BatchLayout,
    BatchSampler,
    LoadImage,
    Operator,
    PlainData,
    SampleAddress,
    SampleOrder,
    SkippedRow,
    ToAbsolutePath,
    ToInt,
    UnifiedDataset,
    collate,
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
    ({"image": "a.png", "prompt": float("nan")}, None, "prompt is empty"),
    ({"image": "a.png"}, None, "has no prompt, but image; 'dataset.augmentation.captions="),
    ({"Image": "a.png", " prompt": "p"}, None, "has no prompt, but Image, ' prompt'; 'dataset.augmentation.captions="),
    ({"image": "a.png", "prompt": "a \ud800"}, None, "prompt is 'a \\ud800', with half of a character"),
    ({"image": "a.png", "prompt": ["a", "\ud800" * 200]}, None, "prompt is '\\ud800"),
    ({"image": "", "prompt": "p"}, None, "image is empty"),
    ({"image": "nan", "prompt": "p"}, "nan", "image 'nan': not found (looked in {folder} for nan)"),
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
        "image ['a.png', 'no.png']: 'no.png': not found (looked in {folder} for no.png)",
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
    assert lines[6:] == ["  and 35 more.", "Correct them, or skip them with dataset.on_error=skip."]


def test_scan_that_leaves_nothing_is_an_error(folder):
    write_rows(folder, [{"image": "no.png", "prompt": "p"}])
    with pytest.raises(ValueError, match="(?s)1 of 1 rows.*Correct them.$"):
        UnifiedDataset(folder, on_error="skip").scan()


def test_scan_reads_no_more_than_headers(folder):
    save_truncated(folder / "b.png")
    assert UnifiedDataset(folder).scan() == []


def test_scan_fetches_no_url_and_calls_no_plain_function(folder):
    write_rows(folder, [{"image": "https://example.invalid/a.png", "prompt": "p", "x": 1}])
    main = UnifiedDataset.default_image_operator(str(folder), allow_urls=True)
    for other in (pytest.fail, Operator() >> pytest.fail):
        assert UnifiedDataset(folder, main_data_operator=main, special_operator_map={"x": other}).scan() == []


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
    assert list(read_metadata(folder / "skipped.jsonl")) == [
        {"row": 1, "file": "é.png", "reason": f"image 'é.png': not found (looked in {folder} for é.png)"}
    ]
    assert not list(folder.glob("*.partial"))


@pytest.fixture
def decoded(monkeypatch):
    """Names of the images that are decoded."""
    names, decode = [], LoadImage.__call__

    def noted(self, data):
        names.append(data[-5:])
        return decode(self, data)

    monkeypatch.setattr(LoadImage, "__call__", noted)
    return names


def test_the_images_of_a_remembered_sample_are_not_decoded(folder, decoded):
    samples = AddressedDataset(UnifiedDataset(folder), remembers=lambda index, variant: (index, variant) == (1, ""))
    found = [samples[SampleAddress(0, index)] for index in range(3)]
    assert decoded == ["a.png", "c.png"]
    assert [(sample.index, sample.variant, bool(sample.data)) for sample in found] == [
        (0, "", True),
        (1, "", False),
        (2, "", True),
    ]


def test_a_row_that_could_not_be_decoded_is_replaced_even_if_its_sample_is_remembered(folder):
    save_truncated(folder / "b.png")
    dataset = UnifiedDataset(folder, on_error="skip")
    samples = AddressedDataset(dataset, remembers=lambda index, variant: variant == "" and dataset.undecodable.any())
    assert [samples[SampleAddress(epoch, 1)].data["prompt"] for epoch in range(2)] == ["a c"] * 2


@pytest.mark.parametrize(
    "asked, device, workers", [(None, "cuda", 2), (None, "cpu", 0), (None, "mps", 0), (3, "cpu", 3)]
)
def test_workers_decode_for_a_gpu_unless_their_number_is_set(folder, asked, device, workers):
    assert UnifiedDataset.from_folder(str(folder), num_workers=asked).workers_on(torch.device(device)) == workers
    assert PlainData([0]).workers_on(torch.device("cuda")) == 0  # its class may not be importable in another process


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_workers_give_the_same_samples_and_report_what_they_skip(folder, start_method):
    save_truncated(folder / "b.png")
    dataset = UnifiedDataset(folder, on_error="skip")
    dataset.scan()
    sampler = BatchSampler(SampleOrder(len(dataset), seed=0), BatchLayout(2, 1), rank=0, start_step=0, num_steps=3)
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
    if len(set(lengths)) == 1:
        assert batch["emb_mask"] is None and torch.equal(batch["emb"], torch.cat(texts))
        return
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
    assert collate([entities(2, 5), entities(2, 1)])["emb_mask"][0] is None


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
