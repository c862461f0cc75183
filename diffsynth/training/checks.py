"""Checks of a run before any weight is read, and the identity by which a resumed run is recognised."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from ..core.data import BatchLayout, TrainingData, UnifiedDataset
from ..core.files import check_writable
from ..diffusion.pipeline.request import image_arguments
from ..diffusion.template.rows import prepare_data, required_columns
from .engines import Engine

if TYPE_CHECKING:
    from ..diffusion.base_pipeline import BasePipeline
    from ..diffusion.loss import Objective
    from ..diffusion.pipeline.media import Media
    from ..diffusion.template.model import Template
    from ..diffusion.training_module import PipelineTrainingModule
    from .absent import NoEMA
    from .ema import EMA
    from .run import Run


def check_run(run: "Run", engine: Engine) -> None:
    """Check the folder, rows, batch size, validation, and what a save needs, of a run with a loaded template.

    All processes call it.

    Raises:
        ValueError: One of them is wrong; the message says which one and what to set.
    """
    check_one_folder(run.run_dir)
    if run.task.learns_from_samples and run.rounds.batch_size is None:
        raise ValueError(
            f"{type(run.task).__name__} learns from rewards of the model's own samples; run it by python reward.py "
            "reward=…, with prompts.path=… and held_out.path=…."
        )
    layout = BatchLayout(run.batch_size, run.micro_batch_size, engine.replicas)
    scan(run.dataset, run.media, run.task, run.template)
    check_regularisation(run.dataset, run.task)
    check_sides(run.dataset, run.latents.multiple)
    for dataset in run.validation.datasets.values():
        scan(dataset, run.media, run.task, run.template)
    for dataset in (run.dataset, *run.validation.datasets.values()):
        check_images(dataset, run.task, run.model.func.__self__)
    if run.samples is None:  # the first few may have one size
        check_one_size(run.dataset, layout.micro_batch_size)
    run.validation.check(run.ema)
    run.export.check(run.validation.metric_names)
    run.export.check_formats(run.lora, run.model.func.__self__)
    run.logger.check()
    for key, folder in written_folders(run).items():
        check_writable(folder, key)


def written_folders(run: "Run") -> dict[str, str | Path]:
    """Return the folders that the run writes to, by the keys that set them."""
    folders = {"export.output_path": run.export.output_path}
    parts = {"checkpoint": run.checkpoint, "validation": run.validation, "logger": run.logger}
    return folders | {f"{name}.path": part.path for name, part in parts.items() if part.path is not None}


def check_one_folder(run_dir: str) -> None:
    """Check that all processes write to one folder; all processes call it.

    Raises:
        ValueError: They do not, as with a clock in the path.
    """
    folders = sorted(set(gather_object([run_dir])))
    if len(folders) > 1:
        raise ValueError(
            f"run_dir differs between processes: {', '.join(folders)}; expected one: set name=… and output_root=… to "
            "values without a clock such as ${now:…}, a process's number, or a variable of one machine."
        )


def scan(dataset: TrainingData, media: "Media", task: "Objective", template: "Template | None") -> None:
    """Prepare a data set for the task, then check its rows; see `TrainingData.scan`."""
    prepare_data(dataset, media, task, template)
    dataset.scan(required=required_columns(media, task, template))


def check_images(dataset: TrainingData, task: "Objective", pipeline: "type[BasePipeline]") -> None:
    """Check that the columns that the task reads as images are read as files, or made by conditions.

    Raises:
        ValueError: One is not, so that its cells are the names of files; names what to set.
    """
    images = {*image_arguments(pipeline.request), "loss_mask"}
    columns = [column for name, column in task.row_inputs.items() if name in images]
    for name, own in dataset.datasets.items():
        if not isinstance(own, UnifiedDataset):
            continue
        made = pipeline.media.derived.keys() - own.rows[0].keys()  # of the row's media
        for column in [column for column in columns if column not in {*own.operators, *own.conditions, *made}]:
            key = f"dataset.datasets.{name}" if name else "dataset"
            raise ValueError(
                f"{own.metadata_path}: the column {column} is read as an image, but its cells are not read as files; "
                f"set {key}.data_file_keys=[{','.join([*own.data_file_keys, column])}]."
            )


def check_regularisation(dataset: TrainingData, task: "Objective") -> None:
    """Refuse a task with a loss for rows of regularisation, of which the data set has none.

    Raises:
        ValueError: It has none; the message says how to name them.
    """
    if task.reads_regularisation and not dataset.has_regularisation:
        raise ValueError(
            f"{dataset.metadata_path} has no rows for regularisation, which task=prior needs; choose dataset=mixed and "
            "name some of its data sets: dataset.regularisation=[class_images]."
        )


def check_sides(dataset: TrainingData, multiple: int) -> None:
    """Check that the sides of all images are multiples of what the family's latents need.

    Raises:
        ValueError: Those of one are not; names what to set.
    """
    sizes = {*dataset.own_sizes, *(size for size in dataset.rows_in_buckets() if size is not None)}
    for width, height, *_ in sorted(sizes):
        if width % multiple or height % multiple:
            raise ValueError(
                f"{dataset.metadata_path}: images have {width} x {height} pixels, expected multiples of {multiple}, "
                f"which the model needs; set dataset.division_factor={multiple} or dataset.height and dataset.width."
            )


def check_one_size(dataset: TrainingData, micro_batch_size: int) -> None:
    """Check that the samples of a forward have one size.

    Raises:
        ValueError: Forwards take several samples, and images have sizes of their own; names what to set.
    """
    if micro_batch_size > 1 and len(dataset.own_sizes) > 1:
        smallest, *_, largest = (f"{width} x {height}" for width, height in sorted(dataset.own_sizes, key=math.prod))
        raise ValueError(
            f"{dataset.metadata_path}: images have {len(dataset.own_sizes)} sizes, from {smallest} to {largest}; "
            f"a forward of {micro_batch_size} samples needs one; set dataset.buckets=true, or dataset.height=… "
            "dataset.width=…, or micro_batch_size=1"
        )


def check_average(ema: "EMA | NoEMA", module: "PipelineTrainingModule") -> None:
    """Refuse an average of weights where networks take turns, because only that of the first one would be averaged.

    Raises:
        ValueError: The run has both; the message says what to set.
    """
    if "ema" in ema.weights and module.taking_turns:
        raise ValueError(
            f"ema averages the weights of one network, but {' and '.join(module.taking_turns)} are trained in turns; "
            "set ema=none, or train one in a run: expert=high or expert=low."
        )


def identity_of(run: "Run") -> dict[str, Any]:
    """Return fingerprints by name, of data, template's code and rewards, that a resumed run must have unchanged."""
    template = {"template": run.template.code.digest} if run.template else {}
    return {"data set": run.dataset.fingerprint(), **template, **run.rounds.versions}
