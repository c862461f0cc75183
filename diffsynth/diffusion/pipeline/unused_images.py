"""Refuses images that nothing would read, because the component that reads them is absent."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from .request import image_arguments

if TYPE_CHECKING:
    from ..base_pipeline import BasePipeline


def check_used(pipe: "BasePipeline", names: Collection[str], where: str = "") -> None:
    """Refuse images that only a unit reads whose component (`PipelineUnit.needs`) the pipeline was built without.

    Args:
        names: The arguments that are given.
        where: What stands before an argument in errors.

    Raises:
        ValueError: The message names the argument and the component.
    """
    present = {type(unit) for unit in pipe.units}
    given = image_arguments(pipe.request) & set(names)
    readers = [unit for unit in pipe.unit_classes if unit.needs is not None and unit.reads_alone]
    absent = [unit for unit in readers if unit not in present]
    for unit in absent if given else ():
        if unused := sorted(given.intersection(unit().fetch_input_params())):
            raise ValueError(
                f"{where}{unused[0]} is given, but model.{unit.needs} is null, and without it nothing reads the "
                f"image; take {unit.model_with_it}, or leave {unused[0]} out."
            )
