"""Writes which files a run reads to `inputs.json`, and refuses to resume with files that have changed."""

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from ...core.files import write_text
from ...core.input_files import InputFile, Record, beside, describe, digest_of_all, first_difference, read_records
from ...core.json_text import to_json

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...diffusion.base_pipeline import BasePipeline
    from ..run import Run

FILE = "inputs.json"  # in the run's folder; config/run_folder.py reads it as well


def record_inputs(accelerator: "Accelerator", run: "Run", pipe: "BasePipeline") -> dict[str, str]:
    """Write the files of data, weights, adapters and template that a run reads, and return a digest of each group.

    All processes call it; the first one reads samples of the files' bytes.

    Raises:
        ValueError: The run has a checkpoint or is finished, and a file differs from the one that it was trained with.
    """
    found, failure = [None], None
    if accelerator.is_main_process:
        try:
            found = [_record(run, pipe)]
        except Exception as error:  # broadcast, so that all processes raise it and none waits
            found, failure = [str(error)], error
    (digests,) = broadcast_object_list(found)
    if isinstance(digests, str):
        raise ValueError(digests) from failure
    return digests


def _record(run: "Run", pipe: "BasePipeline") -> dict[str, str]:
    path = Path(run.run_dir) / FILE
    records = {name: describe(files) for name, files in input_files(run, pipe).items()}
    if path.exists() and (run.checkpoint.steps() or path.with_name("finished.json").exists()):
        _check_same(run.run_dir, read_records(path), records)
    write_text(path, to_json(records, indent=1))
    return {name: digest_of_all(record) for name, record in records.items()}


def input_files(run: "Run", pipe: "BasePipeline") -> dict[str, dict[str, InputFile]]:
    """Return the files whose content a run's result depends on, by group and name."""
    adapters = {"lora.checkpoint": run.lora.checkpoint, "lora.preset": run.lora.preset} if run.lora else {}
    groups = {f"files of the {name}": data.input_files() for name, data in run.data.items()}
    groups |= pipe.input_files()
    groups |= {name: beside(Path(path), [Path(path)]) for name, path in adapters.items() if path}
    if run.template:
        code = run.template.code
        groups["files of the template"] = beside(code.file, [code.file, *code.weights])
    return {name: files for name, files in groups.items() if files}


def _check_same(run_dir: str, before: dict[str, Record], now: dict[str, Record]) -> None:
    for name in now:
        if difference := first_difference(before.get(name, now[name]), now[name]):
            raise ValueError(
                f"{run_dir} was trained with other inputs, {name}: {difference}. Restore that file, or set name=… to "
                "start a new run."
            )
