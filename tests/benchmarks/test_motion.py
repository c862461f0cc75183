"""The clips of moving emoji: what data/emoji holds, and that the benchmark tells their motions apart."""

import csv

import pytest
import tiny
from conftest import import_file
from omegaconf import OmegaConf
from PIL import Image, features

from data.emoji import build_motions
from data.emoji.build_motions import HERE, MOTIONS, NEW_MOTIONS, Pose
from diffsynth.config import check
from diffsynth.config.nodes import build
from diffsynth.core.data import open_file

benchmark = import_file(tiny.ROOT / "benchmarks" / "motion.py")
KNOWN = MOTIONS | NEW_MOTIONS
TABLES = ("motion", "motion_train", "motion_held_out", "new_motion_train", "new_motion_held_out")
WRITTEN = ("motion.tar", *(f"{table}.csv" for table in TABLES), "all_motion_train.csv", "all_motion_held_out.csv")


def rows(table: str) -> list[dict]:
    with (HERE / f"{table}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def told(row: dict) -> tuple[str, str]:
    """(concept, motion) of a row, by its caption."""
    caption = row["prompt"].removeprefix("a color emoji of ")
    motion = next(name for name in KNOWN if caption.endswith(f" {name}"))
    return caption.removesuffix(f" {motion}"), motion


def concepts(*tables: str) -> set[str]:
    return {told(row)[0] for table in tables for row in rows(table)}


# Tables ---------------------------------------------------------------------------------------------------------------


def test_tables_are_split_by_concept_as_those_of_the_images():
    for split in ("train", "held_out"):
        names = {name for _, name in build_motions.read_concepts(split)}
        assert names >= concepts(f"motion_{split}", f"new_motion_{split}") != set()
        assert rows(f"all_motion_{split}") == rows(f"motion_{split}") + rows(f"new_motion_{split}")
    assert rows("motion") == rows("motion_train") + rows("motion_held_out")


def test_new_motions_are_in_no_table_of_the_pretraining():
    for table in TABLES:
        motions = NEW_MOTIONS if table.startswith("new") else MOTIONS
        assert {told(row)[1] for row in rows(table)} == set(motions)


@pytest.mark.parametrize("table", ["motion", "new_motion_train"])
def test_all_motions_are_about_equally_frequent(table):
    motions = [told(row)[1] for row in rows(table)]
    counts = [motions.count(name) for name in set(motions)]
    assert max(counts) <= 1.2 * min(counts)


# Clips ----------------------------------------------------------------------------------------------------------------


def slugs() -> dict[str, str]:
    return {name: slug for split in ("train", "held_out") for slug, name in build_motions.read_concepts(split)}


@pytest.mark.skipif(features.version("webp") != "1.6.0", reason="another libwebp writes other bytes")
@pytest.mark.parametrize("table", ["motion_train", "motion_held_out", "new_motion_train", "new_motion_held_out"])
def test_clips_in_the_shard_are_what_their_script_makes(table):
    for row in rows(table)[::59]:
        concept, motion = told(row)
        made = build_motions.clip(build_motions.read_image(slugs()[concept]), KNOWN[motion])
        assert open_file(str(HERE / row["video"])).read() == build_motions.encoded(made)


@pytest.mark.slow
@pytest.mark.skipif(features.version("webp") != "1.6.0", reason="another libwebp writes other bytes")
def test_the_shard_and_the_tables_are_what_their_script_writes(tmp_path, monkeypatch):
    for name in WRITTEN:
        (tmp_path / name).write_bytes((HERE / name).read_bytes())
    for folder in ("color", "color_train.csv", "color_held_out.csv"):
        (tmp_path / folder).symlink_to(HERE / folder)
    monkeypatch.setattr(build_motions, "HERE", tmp_path)
    monkeypatch.setattr("data.emoji.build_templates.HERE", tmp_path)
    build_motions.main()
    for name in WRITTEN:
        assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes(), name


def test_clips_are_small_enough_to_be_shipped():
    assert (HERE / "motion.tar").stat().st_size < 3e6


def test_a_clip_has_nine_frames_and_begins_with_the_still():
    for row in rows("motion")[::29]:
        image = Image.open(open_file(str(HERE / row["video"])))
        image.load()  # only then is the duration known
        still = build_motions.frame(build_motions.read_image(slugs()[told(row)[0]]), Pose())
        assert (image.n_frames, image.size, image.info["duration"]) == (9, (64, 64), 125)
        assert benchmark.psnr(image.convert("RGB"), still) > 27  # what WebP of quality 75 loses


def test_the_data_set_loads_clips_from_the_shard():
    cfg = tiny.compose("train", "model=emoji_wan", "dataset=emoji_motion", "dataset.metadata=motion_held_out.csv")
    dataset = build(OmegaConf.masked_copy(cfg, ["dataset", "model"]))["dataset"]
    row = dataset[4]
    assert len(dataset) == 90 and len(row["video"]) == 9
    assert {frame.size for frame in row["video"]} == {(64, 64)}
    assert benchmark.classify(row["video"]) == told(row)[1]


@pytest.mark.parametrize(
    ("motion", "right", "down", "area"),
    [
        ("moves left", -12, 0, 1),
        ("moves right", 12, 0, 1),
        ("moves up", 0, -12, 1),
        ("moves down", 0, 12, 1),
        ("grows", 0, 0, 2.1),
        ("shrinks", 0, 0, 0.25),
        ("bounces", 0, 0, 1),
    ],
)
def test_a_motion_goes_where_its_name_says(motion, right, down, area):
    first, *_, last = build_motions.clip(Image.new("RGB", (64, 64), "red"), MOTIONS[motion])
    (start, start_area), (end, end_area) = benchmark.moments(first), benchmark.moments(last)
    assert end - start == pytest.approx([right, down], abs=1.1)  # at the edge, a part of the square is cut off
    assert end_area / start_area == pytest.approx(area, rel=0.15)


def test_what_turns_turns_clockwise():
    top = Image.new("RGB", (64, 64), "white")
    top.paste("red", (24, 0, 40, 16))
    last = build_motions.clip(top, MOTIONS["turns"])[-1]
    centroid, _ = benchmark.moments(last)
    assert centroid == pytest.approx([16.5, 0], abs=0.5)


# Classifying ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motion", benchmark.ALL_MOTIONS)
def test_motions_of_true_clips_are_told(motion):
    for slug in ("rocket", "tiger-face", "hamburger", "umbrella", "bicycle"):
        clip = build_motions.clip(build_motions.read_image(slug), benchmark.ALL_MOTIONS[motion])
        assert benchmark.classify(clip) == motion


def test_motions_of_stored_held_out_clips_are_told():
    for table in ("motion_held_out", "new_motion_held_out"):
        for row in rows(table)[::7]:
            image = Image.open(open_file(str(HERE / row["video"])))
            frames = []
            for number in range(image.n_frames):
                image.seek(number)
                frames.append(image.convert("RGB"))
            assert benchmark.classify(frames) == told(row)[1], row["prompt"]


def test_a_clip_without_anything_in_it_has_a_class():
    assert benchmark.classify([Image.new("RGB", (64, 64), "white")] * 9) in benchmark.ALL_MOTIONS


@pytest.mark.parametrize("part", ["autoencoder", "pretrain"])
def test_the_experiments_train_on_the_clips(part):
    cfg = tiny.compose("train", f"experiment=emoji_wan/{part}")
    check(cfg, tiny.schema("train"))
    if part == "autoencoder":
        assert cfg.dataset.metadata == "all_motion_train.csv"
    else:
        assert cfg.dataset.path == "outputs/emoji_wan_cache"  # of motion.csv
