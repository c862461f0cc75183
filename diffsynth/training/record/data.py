"""Writes which data a run trains on, and which rows of it are skipped."""

from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from ...core.data import TrainingData
from ...core.files import going_on_without, write_text
from ...core.json_text import to_json
from ...core.masking import masked_values

if TYPE_CHECKING:
    from accelerate import Accelerator


def record_data(accelerator: "Accelerator", dataset: TrainingData, fingerprint: str, run_dir: str) -> None:
    """Write path and fingerprint of the data to `data.json`, and the rows that any process skipped to `skipped.jsonl`.

    All processes call it.
    """
    dataset.undecodable |= torch.stack(gather_object([dataset.undecodable])).any(0)
    if accelerator.is_main_process:
        about = {"path": masked_values(dataset.metadata_path), "rows": dataset.size, "fingerprint": fingerprint}
        with going_on_without(f"{run_dir}/data.json"):
            write_text(f"{run_dir}/data.json", to_json(about, indent=1))
        with going_on_without(f"{run_dir}/skipped.jsonl"):
            dataset.write_skipped(f"{run_dir}/skipped.jsonl")
