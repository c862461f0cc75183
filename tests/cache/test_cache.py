"""Training in two stages: what is cached, that it changes nothing, and what becomes of it when anything changes.

FAULTS=200 kills `make_cache.py` 200 times.
"""

import functools
import json
import os
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import contextmanager
from datetime import date
from itertools import chain
from pathlib import Path

import kills
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import warm
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsynth.cache import make as making
from diffsynth.cache.keys import CacheKeys
from diffsynth.cache.make import CacheReport, launch_data_process_task
from diffsynth.cache.verify import collect_garbage, stats, verify
from diffsynth.core.data import AddressedDataset, Augmentation, CachedDataset, MixedDataset, Sample, UnifiedDataset
from diffsynth.core.data.cache import CacheIndex, Shard, keys_of
from diffsynth.core.data.loading import WorkerKilled, loading
from diffsynth.core.input_files import changed, describe
from diffsynth.core.loader import ModelConfig
from diffsynth.core.process import locks
from diffsynth.core.process.locks import LOCK, FolderInUse
from diffsynth.diffusion.adapters.lora import LoRA
from diffsynth.diffusion.loss import AutoencoderLoss, FlowMatchSFT
from diffsynth.diffusion.training_module import PipelineTrainingModule
from diffsynth.pipelines import qwen_image
from diffsynth.pipelines.qwen_image import QwenImagePipeline
from diffsynth.training.accelerator import make_accelerator

DIT = LoRA(target_modules=["to_q", "to_v"], rank=4)
TEXT = LoRA(models=("text_encoder",), target_modules=["q_proj"], rank=4)
IMAGES, PROMPTS = "InputImageEmbedder", "QwenImageUnit_PromptEmbedder"
EVALUATING = ["validation=base", "validation.prompts=[a]", "validation.options={height: 32, width: 32}"]
CLOSE = {"rel": 1e-6, "abs": 1e-6}
VARIED = Augmentation(caption_dropout=0.4, flip=0.5)


# The two stages, by their parts ---------------------------------------------------------------------------------------


def dataset(folder: Path | None = None, **options) -> UnifiedDataset:
    rows = UnifiedDataset.from_folder(str(folder or tiny.dataset()), **{"height": 32, "width": 32, **options})
    rows.scan()
    return rows


def training(lora=DIT, task=None, root: Path | None = None, dtype="float32", **models) -> PipelineTrainingModule:
    """A training whose models are built, not loaded."""
    root = root or tiny.model()
    configs = {name: ModelConfig(path=str(root / part)) for name, part in tiny.COMPONENTS.items()}
    pipe = QwenImagePipeline.from_components(**configs | models, torch_dtype=dtype)
    return PipelineTrainingModule(pipe, task or FlowMatchSFT(), lora)


@functools.cache
def unloaded() -> PipelineTrainingModule:
    """The one that stage one may use again and again."""
    return training()


def make(folder: Path, rows: UnifiedDataset | None = None, module=None, **options) -> CacheReport:
    accelerator = make_accelerator("cpu", "float32")
    return launch_data_process_task(accelerator, rows or dataset(), module or unloaded(), folder, **options)


def changes(folder: Path, rows: UnifiedDataset | None = None, module=None) -> list[str]:
    """What `make_cache.py verify` says."""
    return verify(rows or dataset(), module or unloaded(), folder)


def losses(rows, module: PipelineTrainingModule) -> list[float]:
    """Of the first two steps, nothing trained in between."""
    module.load(cached=isinstance(rows, CachedDataset))
    order, samples = rows.order(4, seed=0), AddressedDataset(rows)
    batches = [[samples[order.sample(position)] for position in range(start, start + 4)] for start in (0, 4)]
    return torch.cat([module(batch) for batch in batches]).tolist()


def content(folder: Path) -> dict[str, dict]:
    """Every entry of a cache that a sample needs, by key, as plain data."""
    index = CacheIndex(folder)
    keys = sorted({key for record in index.records() for key in keys_of(record)})
    return {key: {name: plain(value) for name, value in index.entries([key])[0].items()} for key in keys}


def plain(value):
    return (str(value.dtype), value.tolist()) if isinstance(value, Tensor) else value.tobytes()


def records(folder: Path) -> list[dict]:
    return list(CacheIndex(folder).records())


def stored(folder: Path) -> list[str]:
    """The key of every entry in every shard, as often as it is there."""
    return sorted(chain.from_iterable(Shard(path).contents for path in folder.rglob("*.safetensors")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished cache of the tiny data set, all in one shard."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    make(folder)
    return folder


@pytest.fixture
def cache(whole, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "cache"))


# The same training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trained, made",
    [
        ({"lora": DIT}, {IMAGES: 8, PROMPTS: 8}),
        ({"lora": None}, {IMAGES: 8, PROMPTS: 8}),
        ({"lora": TEXT}, {IMAGES: 8}),
        ({"lora": DIT, "task": FlowMatchSFT(trainable_models=["text_encoder"])}, {IMAGES: 8}),
    ],
)
def test_what_is_trained_is_not_cached_and_all_else_is_and_losses_are_the_same(trained, made, tmp_path):
    module = training(**trained)
    assert make(tmp_path, module=module).made == made
    expected = losses(dataset(), module)
    assert losses(CachedDataset(str(tmp_path)), training(**trained)) == pytest.approx(expected, **CLOSE)


def test_an_image_that_is_needed_as_it_is_is_cached_as_it_is(tmp_path):
    """Training the autoencoder; the noise that its unit would read must come from a seed."""
    folder, noise = tiny.write_dataset(tmp_path / "data"), "NoiseInitializer"
    rows = [{"image": f"{n}.png", "prompt": f"a {n}", "seed": n} for n in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trained = {"lora": None, "task": FlowMatchSFT(trainable_models=["vae"], extra_inputs=["seed"])}
    rows = dataset(folder, metadata="metadata.jsonl")
    assert make(tmp_path / "cache", rows, training(**trained)).made == {"images": 8, noise: 8, PROMPTS: 8}
    cached = CachedDataset(str(tmp_path / "cache"))
    assert losses(cached, training(**trained)) == pytest.approx(losses(rows, training(**trained)), **CLOSE)


def mixed_sizes(folder: Path) -> Path:
    """Pictures of several sizes, three of them wide."""
    rows = []
    for number, size in enumerate([(32, 32), (64, 32), (32, 32), (48, 80), (64, 32), (64, 32), (32, 48), (16, 16)]):
        Image.effect_noise(size, 50 + number).convert("RGB").save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "prompt": f"number {number}"})
    return tiny.write_rows(folder, rows)


@pytest.mark.parametrize("augmentation", [VARIED, Augmentation(prefix="a photo: ", suffix=", in ink")])
def test_what_is_left_to_chance_falls_alike(augmentation, tmp_path):
    rows = dataset(augmentation=augmentation)
    make(tmp_path, rows)
    cached = CachedDataset(str(tmp_path), augmentation=augmentation)
    assert losses(cached, training()) == pytest.approx(losses(rows, training()), **CLOSE)


@pytest.mark.parametrize("options", [{"buckets": True, "max_pixels": 2048}, {}, {"repeat": 3}])
def test_samples_of_several_sizes_stand_in_the_same_order(options, tmp_path):
    rows = dataset(mixed_sizes(tmp_path), height=None, width=None, **options)
    make(tmp_path / "cache", rows)
    orders = [each.order(2, seed=0) for each in (rows, CachedDataset(str(tmp_path / "cache"), repeat=rows.repeat))]
    images, cached = ([order.sample(position) for position in range(40)] for order in orders)
    assert images == cached


def test_masks_of_the_loss_are_cached_as_what_their_unit_makes_of_them(tmp_path):
    folder, task = tiny.write_dataset(tmp_path / "data"), FlowMatchSFT(extra_inputs=["loss_mask"])
    rows = [{"image": f"{n}.png", "prompt": f"a {n}", "loss_mask": f"{(n + 1) % 8}.png"} for n in range(8)]
    options = {"data_file_keys": ["image", "loss_mask"], "augmentation": Augmentation(flip=0.5)}
    masked = dataset(tiny.write_rows(folder, rows), **options)
    made = make(tmp_path / "cache", masked, training(task=task)).made
    assert made == {IMAGES: 16, PROMPTS: 8, "LossMask": 16}
    cached = CachedDataset(str(tmp_path / "cache"), augmentation=options["augmentation"])
    assert losses(cached, training(task=task)) == pytest.approx(losses(masked, training(task=task)), **CLOSE)


def test_samples_of_several_data_sets_keep_their_sizes_and_captions(tmp_path):
    photos = dataset(mixed_sizes(tmp_path), height=16, width=16, augmentation=Augmentation(prefix="a photo: "))
    mixed = MixedDataset({"flipped": dataset(augmentation=Augmentation(flip=0.5)), "photos": photos})
    make(tmp_path / "cache", mixed)
    cached, module = CachedDataset(str(tmp_path / "cache")), training().load()
    for number in (0, 15):
        images, stored = (module([Sample(rows[number], 0, number, None)]).item() for rows in (mixed, cached))
        assert stored == pytest.approx(images, **CLOSE)
    refused(tmp_path / "cache", "no variant 'mirrored'", augmentation=Augmentation(flip=0.5))


def mixture(folder: Path, plain: Path | None = None) -> MixedDataset:
    """Pictures of one size shown twice a pass, others in buckets, shown 2.5 times."""
    buckets = {"height": None, "width": None, "buckets": True, "max_pixels": 2048}
    plain = dataset(plain, repeat=2, on_error="skip")
    return MixedDataset({"plain": plain, "sorted": dataset(mixed_sizes(folder), **buckets)}, {"sorted": 2.5})


def test_samples_of_several_data_sets_are_shown_as_often_and_in_the_same_order(tmp_path):
    mixed = mixture(tmp_path)
    make(tmp_path / "cache", mixed)
    orders = [each.order(2, seed=0) for each in (mixed, CachedDataset(str(tmp_path / "cache")))]
    images, cached = ([order.sample(position) for position in range(80)] for order in orders)
    assert images == cached


def test_a_sample_that_is_skipped_leaves_the_others_as_often(tmp_path):
    make(tmp_path / "cache", mixture(tmp_path, truncated(tmp_path / "data")))
    parts = CachedDataset(str(tmp_path / "cache")).rows_in_buckets()
    assert parts[(32, 32)][0].rate == 7 * 2
    assert sum(part.rate for own in parts.values() for part in own) == 7 * 2 + 8 * 2.5


def test_a_whole_run_is_the_same_from_a_cache_and_needs_no_encoders(tmp_path):
    augmentation = ["dataset.augmentation.caption_dropout=0.3", "dataset.augmentation.flip=0.5"]
    absent = [f"model.{name}=null" for name in ("vae", "text_encoder", "tokenizer")]
    tiny.make_cache(tmp_path / "cache", *augmentation)
    images, cached = tiny.train(tmp_path / "images", *augmentation), from_cache(tmp_path, *augmentation, *absent)
    assert curve(cached) == pytest.approx(curve(images), **CLOSE)


def from_cache(folder: Path, *overrides: str) -> Path:
    """A run from the cache in a folder, beside it."""
    return tiny.train(folder / "cached", "dataset=cache", f"dataset.path={folder / 'cache'}", *overrides)


def curve(run_dir: Path) -> list[float]:
    return [line["loss"] for line in tiny.metrics(run_dir)]


def test_no_encoder_is_loaded_in_the_second_stage(whole):
    module = training()
    losses(CachedDataset(str(whole)), module)
    assert module.pipe.vae is None and module.pipe.text_encoder is None and module.pipe.dit.device.type != "meta"


# What is cached -------------------------------------------------------------------------------------------------------


def test_a_cache_holds_tensors_and_an_index_and_nothing_else(whole):
    files = {path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()}
    shards = files - {"index.sqlite"}
    assert shards and all(name.startswith("shards/") and name.endswith(".safetensors") for name in shards)
    names, dtypes = set(), set()
    for name in shards:
        tensors = load_file(whole / name)
        names |= {key.rpartition("/")[2] for key in tensors}
        dtypes |= {tensor.dtype for tensor in tensors.values()}
    assert names == {"input_latents", "prompt_emb", "prompt_emb_mask"} and torch.uint8 not in dtypes


def test_equal_images_and_equal_prompts_are_stored_once(tmp_path):
    folder = tiny.write_dataset(tmp_path / "data")
    Image.open(folder / "0.png").save(folder / "1.png")
    rows = [{"image": f"{n}.png", "prompt": f"a {'cat' if n % 2 else 'dog'}"} for n in range(8)]
    assert make(tmp_path / "cache", dataset(tiny.write_rows(folder, rows))).made == {IMAGES: 7, PROMPTS: 2}
    assert "shared    3 entries by several samples" in stats(tmp_path / "cache")


def test_the_empty_prompt_is_stored_once_and_mirrored_images_once_each(tmp_path):
    assert make(tmp_path, dataset(augmentation=VARIED)).made == {IMAGES: 16, PROMPTS: 9}


def test_what_is_never_shown_is_not_made_but_for_the_plain_image(tmp_path):
    assert make(tmp_path, dataset(augmentation=Augmentation(flip=1.0))).made == {IMAGES: 16, PROMPTS: 8}


def test_all_captions_of_a_row_are_cached_and_chosen_from(tmp_path):
    folder = tiny.write_dataset(tmp_path / "data")
    texts = [["a cat"], ["a dog", "a puppy", "a hound"]]
    rows = [{"image": f"{n}.png", "prompt": texts[n % 2], "tags": f"tag {n}"} for n in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"metadata": "metadata.jsonl", "augmentation": Augmentation(captions={"prompt": 1.0, "tags": 2.0})}
    assert make(tmp_path / "cache", dataset(folder, **options)).made == {IMAGES: 8, PROMPTS: 4 + 8}
    cached = CachedDataset(str(tmp_path / "cache"), augmentation=options["augmentation"])
    assert losses(cached, training()) == pytest.approx(losses(dataset(folder, **options), training()), **CLOSE)


@pytest.mark.parametrize("option", ["shuffle_tags", "random_crop"])
def test_what_has_no_end_is_refused_by_name(option, tmp_path):
    with pytest.raises(ValueError, match=f"{option}=true makes new variants each time, which cannot be cached"):
        make(tmp_path, dataset(augmentation=Augmentation(**{option: True}), on_error="skip"))


def test_a_training_of_which_nothing_is_frozen_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="Nothing can be cached: no frozen unit makes what a training of vae reads"):
        make(tmp_path, module=training(lora=None, task=AutoencoderLoss()))


def test_a_text_encoder_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="text_encoder needs a tokenizer, but model.tokenizer is null"):
        training(tokenizer=None)


def test_a_network_that_is_needed_and_not_there_is_named_with_what_needs_it(tmp_path):
    with pytest.raises(ValueError, match=f"{IMAGES} needs vae, but model.vae is null"):
        make(tmp_path, module=training(vae=None))


def test_what_is_chosen_at_random_is_refused(tmp_path):
    module = training(lora=None, task=FlowMatchSFT(trainable_models=["vae"]))
    with pytest.raises(ValueError, match="NoiseInitializer uses random numbers.*task.extra_inputs=.seed."):
        make(tmp_path, module=module)


def truncated(folder: Path) -> Path:
    """A data set whose fourth picture opens, but cannot be decoded."""
    path = tiny.write_dataset(folder) / "3.png"
    path.write_bytes(path.read_bytes()[:1000])
    return folder


def test_a_picture_that_cannot_be_decoded_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"row 4: image '3.png': .*truncated.*dataset.on_error=skip"):
        make(tmp_path / "cache", dataset(truncated(tmp_path / "data")))


def test_a_picture_that_cannot_be_decoded_may_be_skipped(tmp_path):
    rows = dataset(truncated(tmp_path / "data"), on_error="skip")
    report = make(tmp_path / "cache", rows)
    assert report.skipped == [3] and len(CachedDataset(str(tmp_path / "cache"))) == 7
    assert report.made == {IMAGES: 7, PROMPTS: 7} and make(tmp_path / "cache", rows).made == {}
    assert changes(tmp_path / "cache", rows) == []


def test_columns_that_are_no_plain_data_do_not_matter(tmp_path):
    folder = tiny.write_dataset(tmp_path / "data")
    rows = [{"image": f"{n}.png", "prompt": f"a {n}", "taken": date(2026, 1, 1 + n), "score": n} for n in range(8)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    assert make(tmp_path / "cache", dataset(folder, metadata="metadata.parquet")).made == {IMAGES: 8, PROMPTS: 8}
    assert records(tmp_path / "cache")[3]["variants"][""]["row"].keys() == {"image", "prompt", "score"}


# What changes ---------------------------------------------------------------------------------------------------------


def first_shard(cache: Path) -> Path:
    return sorted((cache / "shards").iterdir())[0]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "act, said",
    [
        (lambda path: flip(path, -1), "is damaged: 1 of 16 entries"),
        (lambda path: flip(path, 100), "is damaged: 1 of 16 entries"),
        (lambda path: flip(path, 8), "is damaged: 16 of 16 entries"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is damaged: 16 of 16 entries"),
        (Path.unlink, "is missing: 16 entries"),
    ],
)
def test_damage_is_named_and_just_that_is_made_again(act: Callable, said: str, cache):
    (shard,), before = (cache / "shards").iterdir(), content(cache)
    act(shard)
    assert changes(cache) == [f"{shard} {said}"]
    report = make(cache)
    assert sum(report.made.values()) == int(said.split(":")[1].split()[0]) and report.lost == [shard.name]
    assert content(cache) == before and stored(cache) == sorted(before)
    assert changes(cache) == []


def changed_image(folder: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(folder / "2.png")


def changed_caption(folder: Path) -> None:
    table = folder / "metadata.csv"
    table.write_text(table.read_text().replace("2.png,a color emoji of red red", "2.png,a color emoji of blue"))


@pytest.mark.parametrize(
    "act, said, made",
    [(changed_image, "image differs", {IMAGES: 1}), (changed_caption, "prompt differs", {PROMPTS: 1})],
)
def test_a_change_of_the_data_is_named_and_just_that_is_made_again(act: Callable, said: str, made, cache, tmp_path):
    folder = tiny.write_dataset(tmp_path / "data")
    act(folder)
    assert changes(cache, dataset(folder)) == [f"sample 2: {said}"]
    assert make(cache, dataset(folder)).made == made
    assert changes(cache, dataset(folder)) == []


def test_rows_that_came_and_went_are_counted(cache, tmp_path):
    rows = dataset(tiny.write_dataset(tmp_path / "data", count=10))
    assert changes(cache, rows)[0] == "the data set has 10 samples, the cache has 8"
    assert make(cache, rows).made == {IMAGES: 2, PROMPTS: 2}


def with_other(part: str, change: Callable[[Path], None], folder: Path) -> Path:
    """The model, one of whose parts is changed."""
    root = Path(shutil.copytree(tiny.model(), folder))
    change(root / part)
    return root


def other_weights(part: Path) -> None:
    (file,) = part.glob("*.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)


def other_statistics(part: Path) -> None:
    config = json.loads((part / "config.json").read_text())
    (part / "config.json").write_text(json.dumps({**config, "latents_mean": [0.5] * 16}))


def other_merges(part: Path) -> None:
    path = next(path for path in sorted(part.iterdir()) if path.name == "tokenizer_config.json")
    path.write_text(path.read_text().replace("{", '{"a_note": "of no use", ', 1))


@pytest.mark.parametrize(
    "part, change, said, made",
    [
        ("vae", other_weights, f"{IMAGES}: the cache was made with vae", {IMAGES: 8}),
        ("vae", other_statistics, f"{IMAGES}: the cache was made with vae", {IMAGES: 8}),
        ("text_encoder", other_weights, f"{PROMPTS}: the cache was made with text_encoder", {PROMPTS: 8}),
        ("tokenizer", other_merges, f"{PROMPTS}: the cache was made with tokenizer", {PROMPTS: 8}),
        ("transformer", other_weights, None, {}),
    ],
)
def test_a_change_of_a_model_is_named_and_just_its_entries_are_made_again(part, change, said, made, cache, tmp_path):
    root = with_other(part, change, tmp_path / "model")
    lines = changes(cache, module=training(root=root))
    assert [bool(re.fullmatch(rf"{said} \S+, this run has \S+", line)) for line in lines] == ([True] if said else [])
    assert make(cache, module=training(root=root)).made == made
    assert changes(cache, module=training(root=root)) == []


def test_a_change_of_the_code_is_named_and_just_its_entries_are_made_again(cache, monkeypatch):
    template = qwen_image.PROMPT_TEMPLATE.replace("color, shape", "shape, color")  # as many tokens
    monkeypatch.setattr(qwen_image, "PROMPT_TEMPLATE", template)
    (line,) = changes(cache)
    assert line.startswith(f"{PROMPTS}: the cache was made with code ")
    assert make(cache).made == {PROMPTS: 8}
    assert changes(cache) == []


def test_what_is_there_is_not_made_again(cache):
    before = {path: path.stat().st_mtime_ns for path in (cache / "shards").iterdir()}
    report = make(cache)
    assert report.made == {} and report.lost == [] and report.samples == 8 and report.needed == 16
    assert {path: path.stat().st_mtime_ns for path in (cache / "shards").iterdir()} == before


def test_a_cache_and_a_data_set_that_were_moved_are_the_same(cache, tmp_path):
    data = Path(shutil.copytree(tiny.dataset(), tmp_path / "moved data"))
    folder = cache.rename(tmp_path / "moved cache")
    assert changes(folder, dataset(data)) == []
    assert make(folder, dataset(data)).made == {}


def other_captions(folder: Path) -> UnifiedDataset:
    """The same images, each with another caption."""
    rows = [{"image": f"{number}.png", "prompt": f"a pencil drawing of {number}"} for number in range(8)]
    return dataset(tiny.write_rows(tiny.write_dataset(folder), rows))


@pytest.mark.parametrize("use", [make, changes], ids=["make", "verify"])
def test_a_cache_of_another_data_set_is_refused_and_left_alone(use, cache, tmp_path):
    before, rows = content(cache), other_captions(tmp_path / "other")
    with pytest.raises(ValueError, match=r"cache was made of .*metadata.csv \(8 samples\), not of .*; type .* path=…"):
        use(cache, rows)
    assert content(cache) == before
    with sqlite3.connect(cache / "index.sqlite") as index:
        index.execute("DELETE FROM about WHERE name = 'data_sets'")  # as older caches
    assert changes(cache, rows) == [f"sample {number}: prompt differs" for number in range(8)]


def test_all_captions_of_the_same_data_set_may_change_and_so_may_its_path_if_it_is_moved(tmp_path):
    cache, data = tmp_path / "cache", tmp_path / "data"
    make(cache, dataset(tiny.write_dataset(data)))
    shutil.rmtree(data)
    assert make(cache, other_captions(data)).made == {PROMPTS: 8}
    shutil.rmtree(data)
    assert make(cache, dataset(tiny.write_dataset(tmp_path / "moved"))).made == {}


def test_tidying_deletes_what_a_changed_caption_left_and_nothing_else(cache, tmp_path):
    folder = tiny.write_dataset(tmp_path / "data")
    changed_caption(folder)
    make(cache, dataset(folder))
    before = content(cache)
    assert len(stored(cache)) == 17 and "of which 1 are no longer needed" in stats(cache)
    assert collect_garbage(cache).startswith("1 of 2 files rewritten")
    assert content(cache) == before and stored(cache) == sorted(before)
    assert collect_garbage(cache).startswith("0 of 2 files rewritten")
    assert changes(cache, dataset(folder)) == [] and make(cache, dataset(folder)).made == {}


def test_a_cache_that_is_being_tidied_can_be_read_at_every_moment(cache, tmp_path, monkeypatch):
    folder, unlink = tiny.write_dataset(tmp_path / "data"), Path.unlink
    changed_caption(folder)
    make(cache, dataset(folder))
    before = content(cache)

    def cut_after(path, missing_ok=False):
        unlink(path, missing_ok)
        if path.suffix == ".safetensors" and not path.name.startswith("."):
            raise tiny.PowerCut

    with monkeypatch.context() as patched, pytest.raises(tiny.PowerCut):
        patched.setattr(Path, "unlink", cut_after)
        collect_garbage(cache)
    assert content(cache) == before and changes(cache, dataset(folder)) == []


# What is refused ------------------------------------------------------------------------------------------------------


def refused(cache: Path, message: str, module=None, **options) -> None:
    """A training that is not to be had from this cache, as train.py refuses it before weights are read."""
    module = module or unloaded()
    with pytest.raises(ValueError, match=message):
        rows = CachedDataset(str(cache), **options)
        rows.scan(required=("image", "prompt", *module.task.extra_inputs))
        rows.check_made_for(CacheKeys(module).about)


def unfinished(cache: Path) -> None:
    with sqlite3.connect(cache / "index.sqlite") as database:
        database.execute("DELETE FROM samples")


@pytest.mark.parametrize(
    "damage, message",
    [
        (unfinished, "is not finished; python make_cache.py with the same options finishes it"),
        (lambda cache: first_shard(cache).unlink(), r"lacks 1 shards \(\w+.safetensors\); run make_cache.py again"),
        (lambda cache: (cache / "index.sqlite").unlink(), "is no cache: it has no index.sqlite"),
    ],
)
def test_a_cache_that_lacks_something_is_refused(damage, message, cache):
    damage(cache)
    refused(cache, message)


def test_a_cache_whose_samples_lost_entries_is_as_one_that_was_never_finished(cache):
    first_shard(cache).unlink()
    index = CacheIndex(cache, writable=True)  # making goes on, and is killed
    index.match_shards()
    index.close()
    refused(cache, "is not finished")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"height": 64}, "samples of 32 x 32 pixels, but dataset.height=64; set dataset.height=null"),
        ({"width": 64}, "samples of 32 x 32 pixels, but dataset.width=64; set dataset.width=null"),
        ({"flip": 0.5}, "no variant 'mirrored'.*run make_cache.py again with this dataset.augmentation"),
        ({"caption_dropout": 0.1}, "no variant 'no caption'"),
        ({"prefix": "sks"}, "was made with dataset.augmentation.prefix='', not 'sks'; leave that option out"),
        ({"captions": {"tags": 1.0}}, "was made with dataset.augmentation.captions={'prompt': 1.0}, not {'tags': 1.0}"),
        ({"shuffle_tags": True}, "shuffle_tags=true makes new variants each time"),
    ],
)
def test_a_cache_of_other_samples_is_refused(options, message, whole):
    sizes = {name: options.pop(name) for name in ("height", "width") if name in options}
    refused(whole, message, augmentation=Augmentation(**options), **sizes)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"dtype": "bfloat16"},
            f"{IMAGES}: the cache was made with dtype torch.float32, this run has torch.bfloat16\n  {PROMPTS}: ",
        ),
        ({"lora": TEXT}, "the cache holds no prompt, which this run reads"),
        (
            {"task": FlowMatchSFT(extra_inputs=["inpaint_mask"])},
            "holds no inpaint_mask, which this task needs; add the column",
        ),
    ],
)
def test_a_cache_of_another_training_is_refused(options, message, whole):
    refused(whole, message, training(**options))


def test_a_cache_that_was_made_for_training_the_text_encoder_holds_no_embeddings(tmp_path):
    make(tmp_path, module=training(lora=TEXT))
    refused(tmp_path, f"{PROMPTS}: the cache holds none of its outputs")


@pytest.mark.parametrize(
    "part, said",
    [
        ("vae", f"{IMAGES}: the cache was made with vae"),
        ("text_encoder", f"{PROMPTS}: the cache was made with text_encoder"),
    ],
)
def test_a_cache_of_another_model_is_refused(part, said, whole, tmp_path):
    message = (
        f"was not made for this training:\n  {said} .*\nChoose the model, task and lora .* run make_cache.py again"
    )
    refused(whole, message, training(root=with_other(part, other_weights, tmp_path / "model")))


def test_a_cache_of_other_code_is_refused(whole, monkeypatch):
    monkeypatch.setattr(qwen_image, "MAX_PROMPT_TOKENS", 512)
    refused(whole, f"{PROMPTS}: the cache was made with code")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.torch_dtype=bfloat16"], "made with dtype torch.float32, this run has torch.bfloat16"),
        (["model.vae=null", *EVALUATING], "validation needs vae, but model.vae is null"),
    ],
)
def test_a_run_that_does_not_fit_its_cache_is_refused_before_weights_are_read(
    overrides, message, cache, no_weights_are_read
):
    with pytest.raises(ValueError, match=message):
        from_cache(cache.parent, *overrides)


@pytest.mark.parametrize("model, user", [("vae", IMAGES), ("text_encoder", PROMPTS)])
def test_a_model_that_is_not_there_is_named_with_what_needs_it(model, user, no_weights_are_read):
    with pytest.raises(ValueError, match=f"{user} needs {model}, but model.{model} is null"):
        training(**{model: None}).load()


def test_a_model_that_is_not_there_cannot_be_trained():
    with pytest.raises(ValueError, match="has no model 'dit'; set lora.models to some of text_encoder, vae"):
        training(dit=None)


# Command lines --------------------------------------------------------------------------------------------------------


def test_a_cache_is_made_verified_and_tidied_on_the_command_line(tmp_path, monkeypatch, capsys):
    def run(*words: str) -> str:
        tiny.command_line(monkeypatch, "make_cache.py", *words, *tiny.cache_overrides(tmp_path / "cache"))
        return capsys.readouterr().out

    assert "8 samples of 16 entries, made now: 8 of InputImageEmbedder, 8 of " in run()
    assert "0 of 1 files rewritten" in run("gc")
    assert f"{tmp_path / 'cache'}: no differences from " in run("verify")
    first_shard(tmp_path / "cache").unlink()
    with pytest.raises(
        SystemExit, match=f"error: {tmp_path / 'cache'} differs from the data set .* again to update it\n  "
    ):
        run("verify")


# Processes ------------------------------------------------------------------------------------------------------------


def make_varied(folder: Path, data: Path, model: Path, workers: int = 0) -> None:
    rows, sizes = dataset(data, augmentation=VARIED), {"batch_size": 2, "shard_bytes": 1000}
    make(folder, rows, training(root=model), **sizes, num_workers=workers)


def make_and_tidy(folder: Path, data: Path, model: Path, workers: int) -> None:
    make_varied(folder, data, model, workers)
    collect_garbage(folder)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A cache that one process made without being disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    make(folder, dataset(augmentation=VARIED), batch_size=2, shard_bytes=1000)
    return folder


def test_a_made_cache_has_no_temporary_files(unbroken):
    assert not list(unbroken.rglob(".partial-*"))


@pytest.mark.slow
def test_two_processes_make_the_cache_of_one(unbroken, tmp_path):
    assert warm.ranks(2, make_varied, tmp_path, tiny.dataset(), tiny.model()) == [0, 0]
    assert content(tmp_path) == content(unbroken) and records(tmp_path) == records(unbroken)
    assert CacheIndex(tmp_path).about == CacheIndex(unbroken).about
    assert len(stored(tmp_path)) == len(set(stored(tmp_path))) == 25
    assert not list(tmp_path.rglob(".partial-*"))


def older(folder: Path, data: Path) -> None:
    """What a cache may be before it is made: it has a flipped byte, a lost shard, and what is needed no more."""
    rows = [{"image": f"{n}.png", "prompt": f"a {n}"} for n in range(4)]
    shutil.copytree(data, folder / "data")
    make(folder / "cache", dataset(tiny.write_rows(folder / "data", rows)), shard_bytes=4000)
    lost, flipped, *_ = sorted((folder / "cache" / "shards").iterdir())
    lost.unlink()
    flip(flipped, -1)
    shutil.rmtree(folder / "data")


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_cache_whose_making_is_killed_at_any_moment_ends_as_one_that_was_not(unbroken, tmp_path):
    data, expected = (tiny.dataset(), tiny.model(), kills.WORKERS), content(unbroken)
    seconds = kills.duration(make_and_tidy, tmp_path / "timed", *data)
    older(tmp_path, tiny.dataset())

    def work(number: int) -> tuple:
        return make_and_tidy, Path(shutil.copytree(tmp_path / "cache", tmp_path / f"broken-{number}")), *data

    for number in kills.survived(work, seconds, syncs=50):
        folder = tmp_path / f"broken-{number}"
        assert content(folder) == expected and records(folder) == records(unbroken)
        assert stored(folder) == sorted(expected)  # nothing twice, nothing too much


@pytest.mark.slow
def test_two_processes_train_from_the_cache_of_two_as_one_from_images(tmp_path):
    torchrun = ["torchrun", "--standalone", "--nproc_per_node", "2"]
    said = tiny.process(*torchrun, "make_cache.py", *tiny.cache_overrides(tmp_path / "cache"))
    assert said.count("8 samples of 16 entries") == 1
    chosen = ["dataset=cache", f"dataset.path={tmp_path / 'cache'}"]
    assert warm.ranks(2, tiny.run, tiny.merged(tiny.train_overrides(tmp_path / "runs"), chosen)) == [0, 0]
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert curve(run_dir) == pytest.approx(curve(tiny.train(tmp_path / "one")), rel=1e-5)


@pytest.mark.slow
def test_workers_make_the_same_cache(unbroken, tmp_path):
    rows = dataset(augmentation=VARIED, num_workers=2)
    make(tmp_path, rows, batch_size=2, shard_bytes=1000, num_workers=rows.num_workers)
    assert content(tmp_path) == content(unbroken) and records(tmp_path) == records(unbroken)


@pytest.mark.slow
def test_workers_read_the_same_cache(cache):
    workers = from_cache(cache.parent, "name=workers", "dataset.num_workers=2")
    assert curve(workers) == curve(from_cache(cache.parent))


@pytest.mark.parametrize("use", [make, collect_garbage, changes], ids=["make", "gc", "verify"])
def test_a_cache_that_another_process_writes_is_refused_and_left_alone(use, tmp_path):
    folder = tmp_path / "cache"
    with kills.owner(folder) as process:
        (unfinished := folder / ".partial-0-requests.sqlite").touch()
        with pytest.raises(FolderInUse, match=f"cache is in use by process {process.pid} on .*; wait until it ends"):
            use(folder)
        assert {path.name for path in folder.iterdir()} == {unfinished.name, LOCK}


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), ValueError("the lock is a link")])
def test_all_processes_hear_that_a_folder_cannot_be_written(error, tmp_path, monkeypatch):
    def refuse(folder):
        raise error

    heard = []
    monkeypatch.setattr(making, "locked", refuse)
    monkeypatch.setattr(making, "broadcast_object_list", lambda found: heard.extend(found) or found)
    with pytest.raises(type(error)):
        make(tmp_path)
    assert heard == [error]


@pytest.mark.parametrize("phase, saved", [(0, False), (1, True)], ids=["planning", "making"])
def test_a_killed_worker_ends_with_what_is_saved_if_anything_is(phase, saved, tmp_path, monkeypatch):
    begun = []

    @contextmanager
    def load(*arguments, **options):
        begun.append(arguments)
        if len(begun) > phase:
            raise WorkerKilled("A worker was killed.")
        with loading(*arguments, **options) as loaded:
            yield loaded

    monkeypatch.setattr(making, "loading", load)
    with pytest.raises(WorkerKilled) as killed:
        make(tmp_path)
    assert ("What was made is saved" in str(killed.value)) == saved


def test_a_cache_that_cannot_be_written_is_verified(cache, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setattr(locks, "hold", None)
    assert changes(cache) == []


def test_a_cache_of_another_format_is_refused_before_anything_is_made(tmp_path):
    (tmp_path / "cache").mkdir()
    with sqlite3.connect(tmp_path / "cache" / "index.sqlite") as database:
        database.execute("CREATE TABLE samples (number INTEGER PRIMARY KEY, width INTEGER, record TEXT)")
    for use in (lambda: tiny.make_cache(tmp_path / "cache"), lambda: CachedDataset(str(tmp_path / "cache"))):
        with pytest.raises(ValueError, match="has another format than .*; delete the folder and run make_cache"):
            use()


def moved_on(cache: Path) -> None:
    """Give every sample the caption's entry of the next one."""
    with sqlite3.connect(cache / "index.sqlite") as database:
        rows = [json.loads(row) for (row,) in database.execute("SELECT record FROM samples ORDER BY number")]
        runs = [row["variants"][""]["runs"] for row in rows]
        captions = [next(key for key, side in run if side == "posi") for run in runs]
        for number, run in enumerate(runs):
            run[:] = [[key, side] if side != "posi" else [captions[number - 7], side] for key, side in run]
        texts = [(json.dumps(row, ensure_ascii=False), number) for number, row in enumerate(rows)]
        database.executemany("UPDATE samples SET record = ? WHERE number = ?", texts)


def test_captions_that_are_moved_on_by_one_are_found_by_verify_and_by_a_training(cache):
    moved_on(cache)
    assert changes(cache) == [f"sample {number}: 1 of 2 entries are those of other inputs" for number in range(8)]
    keys = CacheKeys(training(vae=None, text_encoder=None, tokenizer=None))  # a training needs no encoders
    with pytest.raises(ValueError, match=r"the entries of sample 0 are those of another image or caption; delete \S+"):
        CachedDataset(str(cache)).check_made_for(keys.about, keys.of)


def test_a_flipped_bit_ends_in_a_line_that_names_the_entry_and_the_command(cache):
    path = first_shard(cache)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    rows = CachedDataset(str(cache))
    with pytest.raises(ValueError, match=r"the entry \w{32} differs from its checksum; python make_cache\.py") as error:
        [rows[number] for number in range(8)]
    assert "\n" not in str(error.value)
    assert sum(make(cache).made.values()) == 1 and [rows[number] for number in range(8)]


def test_a_run_from_a_cache_has_read_its_samples_which_tidying_keeps(cache, tmp_path):
    before = describe(CachedDataset(str(cache)).input_files())
    folder = tiny.write_dataset(tmp_path / "data")
    changed_caption(folder)
    make(cache, dataset(folder))
    assert re.search(r"index\.sqlite: it has changed: its fingerprint was \w{16} and is \w{16} now", changed(before))
    after = describe(CachedDataset(str(cache)).input_files())
    assert collect_garbage(cache).startswith("1 of 2 files rewritten") and changed(after) is None
