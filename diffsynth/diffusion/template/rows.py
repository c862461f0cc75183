"""Data for training a template: the column `template_inputs` of a data set's rows, and the files that it names."""

import json
import os
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import Any

from ...core.data.dataset import TrainingData
from ...core.data.operators.base import Operator
from ...core.data.operators.unread import Unread
from ...core.data.operators.video import open_bytes
from ...core.data.sources.storage import absolute, is_part
from ..loss.base import Objective
from ..pipeline.media import Media
from .model import Template


def as_dict(template_inputs: Any) -> dict[str, Any]:
    """A cell of the column `template_inputs`, which is a dict or its JSON text, as a dict.

    Raises:
        ValueError: The cell is something else.
    """
    try:
        value = json.loads(template_inputs) if isinstance(template_inputs, str) else template_inputs
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        example = '{"scale": 0.2}'
        raise ValueError(
            f"found {template_inputs!r:.99}, expected template inputs such as {example}, which a csv holds as JSON text"
        )
    return value


class ReadTemplateInputs(Operator):
    """Reads the `template_inputs` of a row, and makes the names of files in it absolute paths.

    A value names a file if it is the path of a file, absolute or relative to `base_path`, or if it is a name that
    `read_shards` gives a file in a tar shard.
    """

    def __init__(self, base_path: str):
        self.base_path = base_path

    def __call__(self, data: Any) -> dict[str, Any]:
        return self._with_files(as_dict(data), str)

    def check(self, data: Any) -> dict[str, Any]:
        return self._with_files(as_dict(data), _require_opens)

    def unread(self, data: Any) -> dict[str, Any]:
        return self._with_files(as_dict(data), _known_by_content)

    def _with_files(self, value: Any, make: Callable[[str], Any]) -> Any:
        """Replace each name of a file in a value by `make(path)`."""
        if isinstance(value, dict):
            return {name: self._with_files(element, make) for name, element in value.items()}
        if isinstance(value, list):
            return [self._with_files(element, make) for element in value]
        if not isinstance(value, str):
            return value
        path = os.path.join(absolute(self.base_path), value)
        return make(path) if is_part(value) or os.path.isfile(path) else value


def _require_opens(path: str) -> str:
    open_bytes(path).close()
    return path


def _known_by_content(path: str) -> Unread:
    return Unread((0, 0), partial(str, path), partial(_name_and_digest, path))


def _name_and_digest(path: str) -> list[str]:
    with open_bytes(path) as file:
        return [os.path.basename(path), blake2b(file.read(), digest_size=16).hexdigest()]


def required_columns(media: Media, task: Objective, template: Template | None) -> tuple[str, ...]:
    """The columns that a training needs in its data set."""
    needed = [column for column in task.columns if column not in media.derived]
    return (media.column, "prompt", *needed, *(("template_inputs",) if template else ()))


def prepare_data(dataset: TrainingData, media: Media, task: Objective, template: Template | None) -> None:
    """Configure a data set for a training: with alpha or without, resized or not, and how to read template inputs.

    Raises:
        ValueError: Augmentation would change images that the objective needs as they are, there are no images, the
            objective knows no rows for regularisation, or it compares images and the model makes videos.
    """
    if task.image_columns and media.column != "image":
        raise ValueError(
            f"{type(task).__name__} compares {' and '.join(['image', *task.image_columns])}, but the model makes "
            f"{media.column}s; choose a model of images, or another task."
        )
    if dataset.has_regularisation and not task.reads_regularisation:
        raise ValueError(
            f"{dataset.metadata_path} has rows for regularisation, which {type(task).__name__} would train like all "
            "others; set task=prior, or leave dataset.regularisation out (of a cache: make it again without)."
        )
    for own in dataset.datasets.values():
        if not own.has_images and task.reads_images and task.teacher is None:
            raise ValueError(
                f"{own.metadata_path} holds prompts without images, but {type(task).__name__} learns from images; "
                "choose dataset=image_folder, or task=distill or task=distill/…, whose teacher samples the images."
            )
        for column in task.image_columns:
            own.read_images_of(column)
        if not own.has_images and media.column != own.column:
            raise ValueError(
                f"{own.metadata_path} holds prompts for images, but this model generates a {media.column}; take files "
                "of videos: python train.py dataset=video_folder dataset.path=…."
            )
        own.read_images_in(media.mode)
        if task.keeps_images:
            own.keep_images_as_they_are()
        if template is not None:
            own.read_column("template_inputs", ReadTemplateInputs)
