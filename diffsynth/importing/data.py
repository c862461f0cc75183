"""Readers of the flags about data."""

from collections.abc import Iterator
from pathlib import PurePosixPath

from .lines import Differs, LeftOut, Line, Set
from .theirs import DEFAULTS, Theirs, listed, names_in, path

IN_CACHE = "the cache holds the images' latents"
# Inputs that have another name here, which is also that of their column in the table.
NAMES = {"kontext_images": "edit_image", "flux_fill_mask": "inpaint_mask"}
# Inputs that follow here from others.
FOLLOWING = {"flux_fill_image": "the image outside of inpaint_mask is what is not filled"}


def base_path(value: str, theirs: Theirs) -> Iterator[Line]:
    if theirs.method == "trajectory_imitation":
        yield LeftOut("only the prompts of the table are read; distill.py samples the images")
    elif theirs.stage == "train":
        yield from _cache(path(value), theirs)
    else:
        of_videos = theirs.model is not None and theirs.model.makes_videos
        yield Set("dataset", "video_folder" if of_videos else "image_folder")
        yield Set("dataset.path", path(value))


def _cache(folder: str, theirs: Theirs) -> Iterator[Line]:
    yield Set("dataset", "cache")
    yield Set("dataset.path", theirs.cache or folder)
    if theirs.cache not in ("", folder):
        yield Differs(
            f"Their second stage reads {folder}, but their first one writes {theirs.cache}: "
            f"both commands use {theirs.cache}."
        )
    yield Differs(
        f"A cache that DiffSynth-Studio made in {theirs.cache or folder} (.pth files) is refused, because pickles can "
        "run code: make_cache.py makes it again, best in a new folder."
    )


def metadata_path(value: str, theirs: Theirs) -> Iterator[Line]:
    table, folder = PurePosixPath(value), PurePosixPath(theirs["dataset_base_path"])
    if theirs.method == "trajectory_imitation":
        yield Set("prompts.path", path(value))
    elif theirs.stage == "train":
        yield LeftOut("the cache holds the captions")
    else:
        yield Set("dataset.metadata", str(table.relative_to(folder) if table.is_relative_to(folder) else table))


def max_pixels(value: str, theirs: Theirs) -> Iterator[Line]:
    if {"height", "width"} <= theirs.flags.keys():
        yield LeftOut("height and width decide, there and here")
    else:
        yield Set("dataset.max_pixels", value, IN_CACHE)


def workers(value: str, theirs: Theirs) -> Iterator[Line]:
    if theirs.says("dataset_num_workers"):  # their default is slow, and the number changes no result
        yield Set("dataset.num_workers", value)


def file_keys(value: str, theirs: Theirs) -> Iterator[Line]:
    if value != DEFAULTS["data_file_keys"]:  # the columns of either kind that a table may have
        yield Set("dataset.data_file_keys", listed(_names_here(value)), IN_CACHE)


def _names_here(value: str) -> list[str]:
    return [NAMES.get(name, name) for name in names_in(value) if name not in FOLLOWING]


def extra_inputs(value: str, theirs: Theirs) -> Iterator[Line]:
    from .inputs import unknown_inputs  # it imports torch

    names = [name for name in _names_here(value) if name != "template_inputs"]
    if theirs.method != "sft":  # a distillation's settings of sampling
        yield LeftOut("the distillation's own column is seed; task.student has the settings of sampling")
        return
    unknown = unknown_inputs(theirs.model, names) if theirs.model else {}
    yield Set("task.extra_inputs", listed([name for name in names if name not in unknown]))
    yield from (LeftOut(FOLLOWING[name]) for name in names_in(value) if name in FOLLOWING)
    for name in [name for name in names_in(value) if name in NAMES]:
        yield Differs(f"The column {name} is called {NAMES[name]} here: rename it in the table.")
    yield from unknown.values()
