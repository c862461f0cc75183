"""What is found out about a run before anything heavy is read: mistakes, and what must stay as it is."""

from typing import TYPE_CHECKING, Any

from ..core.data import BatchLayout, TrainingData
from ..diffusion.template.rows import prepare_data, required_columns
from .engines import Engine

if TYPE_CHECKING:
    from ..diffusion.loss import Objective
    from ..diffusion.pipeline.media import Media
    from ..diffusion.template.model import Template
    from .run import Run


def check_run(run: "Run", engine: Engine) -> None:
    """Refuse what the rows, the batch, the validation or the export show to be wrong; `run.template` is loaded.

    Raises:
        ValueError: Names what is wrong and what to set.
    """
    BatchLayout(run.batch_size, run.micro_batch_size, engine.replicas)
    scan(run.dataset, run.media, run.task, run.template)
    if run.validation:
        for dataset in run.validation.datasets.values():
            scan(dataset, run.media, run.task, run.template)
        run.validation.check(run.ema)
    run.export.check(run.validation.numbers if run.validation else ())


def scan(dataset: TrainingData, media: "Media", task: "Objective", template: "Template | None") -> None:
    """Set a data set to what the task needs, and check its rows; see `TrainingData.scan`."""
    prepare_data(dataset, task, template)
    dataset.scan(required=required_columns(media, task, template))


def identity_of(run: "Run") -> dict[str, Any]:
    """What must be the same when the run is resumed, by name."""
    template = {"template": run.template.code.digest} if run.template else {}
    return {"data set": run.dataset.fingerprint(), **template}
