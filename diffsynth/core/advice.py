"""What error messages of several packages advise in the same words."""

from pathlib import Path


def how_to_start_from(run_dir: Path) -> str:
    """Say how a new run starts from the weights that another run exported, whatever that run trained."""
    return (
        f"To start from its weights in {run_dir}/weights, set lora.checkpoint=… for an adapter, model.dit.path=… and "
        "model.dit.config=… for a model trained in full, or TEMPLATE_MODEL_PATH in the model.py of a template; to "
        "start a separate run, set name=…."
    )
