"""Writes which data a run trains on, and which rows of it are skipped."""

import json
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object

from ...core.data import TrainingData
from ...core.files import write_text
from ...core.masking import masked

if TYPE_CHECKING:
    from accelerate import Accelerator


def record_data(accelerator: "Accelerator", dataset: TrainingData, fingerprint: str, run_dir: str) -> None:
    """Write path and fingerprint of the data to `data.json`, and the rows that any process skipped to `skipped.jsonl`.

    All processes call it.
    """
    dataset.undecodable |= torch.stack(gather_object([dataset.undecodable])).any(0)
    if accelerator.is_main_process:
        about = {"path": masked(dataset.metadata_path), "rows": len(dataset), "fingerprint": fingerprint}
        write_text(f"{run_dir}/data.json", json.dumps(about, indent=1))
        dataset.write_skipped(f"{run_dir}/skipped.jsonl")
