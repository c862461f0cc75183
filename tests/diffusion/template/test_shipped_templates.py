"""The templates in models/templates: they load, sample, and have the effect that their pages claim."""

import filecmp
import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from conftest import import_file
from PIL import Image, ImageOps, features

from diffsynth.config import check
from diffsynth.core.data import UnifiedDataset, open_file
from diffsynth.diffusion.template import ModelConfig, TemplatePipeline, Templates, load_template_model
from diffsynth.diffusion.template.code import read_code
from diffsynth.diffusion.template.model import load_template

benchmark = import_file(tiny.ROOT / "benchmarks" / "templates.py")
FOLDER, DATA = tiny.ROOT / "models" / "templates", tiny.ROOT / "data" / "emoji"
INPUTS = {
    "brightness": ({"scale": 0.5}, {"scale": 0.9}),
    "soft_rgb": ({"r": 0.5, "g": 0.9, "b": 0.9}, {"r": 0.9, "g": 0.9, "b": 0.5}),
    "structure": tuple({"image": Image.open(DATA / "line" / name)} for name in ("rocket.webp", "bear.webp")),
    "edit": tuple({"image": Image.open(DATA / "flat" / name)} for name in ("rocket.webp", "bear.webp")),
}
KLEIN = {"blocks": {"double": 5, "single": 20}, "heads": 24, "head_dim": 128}
READING = {  # further sizes of those that read a picture
    "structure": {"size": 1024, "grid": 32, "width": 1024},
    "edit": {"size": 512, "channels": 128, "patch": 1, "width": 1024},
}


def read_rows(name: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}_{split}.jsonl").read_text().splitlines()]


def test_every_folder_is_tested():
    assert sorted([*INPUTS, "blockwise_controlnet"]) == sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def test_all_weights_together_are_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) < 4e6


@pytest.mark.parametrize("name", INPUTS)
def test_it_changes_a_sampled_image(name):
    pipe = benchmark.base()
    templates = TemplatePipeline(torch.float32, model_configs=[ModelConfig(path=str(FOLDER / name))])
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "cfg_scale": 2.0, "seed": 0}
    sampled = [templates(pipe, [inputs], [inputs], prompt="a color emoji", **options) for inputs in INPUTS[name]]
    plain = pipe(prompt="a color emoji", **options)
    assert len({image.tobytes() for image in (plain, *sampled)}) == 3


@pytest.mark.parametrize("name", INPUTS)
def test_its_weights_are_finite_and_complete(name):
    code = read_code(FOLDER / name)
    model = load_template_model(FOLDER / name, torch.float32)
    assert [path.name for path in code.weights] == ["model.safetensors"]
    assert all(tensor.isfinite().all() and tensor.abs().sum() > 0 for tensor in model.state_dict().values())


def test_from_scratch_leaves_the_trained_weights_out():
    def weights(seed: int, from_scratch: bool) -> torch.Tensor:
        template = Templates(path=str(FOLDER / "brightness"), from_scratch=from_scratch).load_one(seed)
        return torch.cat([tensor.flatten().float() for tensor in template.model.state_dict().values()])

    assert torch.equal(weights(0, False), weights(1, False))
    assert torch.equal(weights(0, True), weights(0, True))
    assert not torch.equal(weights(0, True), weights(1, True))
    assert not torch.equal(weights(0, True), weights(0, False))


@pytest.mark.parametrize("name", INPUTS)
def test_the_sizes_that_its_docstring_names_for_klein_make_its_blocks(name):
    code = read_code(FOLDER / name)
    with torch.device("meta"):
        model = code.model(**KLEIN, **READING.get(name, {}))
    config = " ".join((FOLDER / name / "model.py").read_text().split("class ")[0].split())
    assert list(model.blocks) == [*(f"double_{n}" for n in range(5)), *(f"single_{n}" for n in range(20))]
    assert json.dumps({**KLEIN, **READING.get(name, {})})[1:-1] in config


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("name", INPUTS)
def test_its_rows_name_files_that_its_processor_reads(name, split):
    rows = read_rows(name, split)
    template = load_template(read_code(FOLDER / name))
    for row in rows:
        given = row["template_inputs"].items()
        inputs = {key: str(DATA / value) if isinstance(value, str) else value for key, value in given}
        made = template.process_data(inputs)
        with Image.open(open_file(str(DATA / row["image"]))) as image:
            assert image.size == (64, 64) and made.keys() == INPUTS[name][0].keys()
        assert all(not isinstance(value, float) or 0 <= value <= 1 for value in made.values())


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("name", INPUTS)
def test_its_rows_are_of_the_concepts_of_their_split(name, split):
    files = [Path(row["image"]).stem for row in read_rows(name, split)]
    known = {Path(name).stem for name, _ in benchmark.concepts(split, 1000)}
    assert known >= {re.sub(r"-\d$", "", file) for file in files} != set()


@pytest.mark.parametrize("name", ["structure", "edit"])
def test_a_row_whose_input_is_mirrored_shows_the_mirrored_picture(name):
    dataset = UnifiedDataset(DATA, f"{name}_held_out.jsonl")
    for row, shown in zip(dataset.rows, dataset, strict=True):
        colour = Image.open(DATA / "color" / Path(row["image"]).name)
        expected = ImageOps.mirror(colour) if row["template_inputs"]["mirror"] else colour
        assert benchmark.distance([shown["image"]], [expected]) < 0.035  # what storing it once more as WebP loses


@pytest.mark.skipif(features.version("webp") != "1.6.0", reason="another libwebp writes other bytes")
def test_its_shards_and_rows_are_what_their_script_writes(tmp_path, monkeypatch):
    script = import_file(DATA / "build_templates.py")
    shutil.copytree(DATA, tmp_path, ignore=shutil.ignore_patterns("*.tar", "*.jsonl"), dirs_exist_ok=True)
    monkeypatch.setattr(script, "HERE", tmp_path)
    script.main()
    written = [path.name for path in DATA.iterdir() if path.suffix in (".tar", ".jsonl") and path.stem != "motion"]
    assert len(written) == 13
    assert filecmp.cmpfiles(DATA, tmp_path, written, shallow=False) == (written, [], [])


@pytest.mark.parametrize("name", INPUTS)
def test_its_experiment_trains_it_from_its_rows(name):
    cfg = tiny.compose("train", f"experiment=emoji_template/{name}")
    check(cfg, tiny.schema("train"))
    assert cfg.template.path == f"models/templates/{name}" and cfg.dataset.metadata == f"{name}_train.jsonl"


# What they do ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_brightness_follows_its_scale(split):
    figures, _ = benchmark.brightness(split)
    assert figures["rank_correlation_lowest"] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_sampled_images_follow_the_line_art(split):
    figures, _ = benchmark.structure(split)
    assert figures["unnamed_overlap_right"] > 0.1 + max(
        figures["unnamed_overlap_wrong"], figures["unnamed_overlap_none"]
    )
    assert figures["distance_right"] < min(figures["distance_wrong"], figures["distance_none"])


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_sampled_images_follow_the_reference(split):
    figures, _ = benchmark.edit(split)
    assert figures["overlap_right"] > 0.1 + max(figures["overlap_wrong"], figures["overlap_none"])
    assert figures["retrieval_right"] > 5 * figures["retrieval_none"]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_mean_colour_follows_the_numbers(split):
    figures, _ = benchmark.soft_rgb(split)
    assert min(figures.values()) > 0.7
