"""Merge adapters into a model: `python fuse.py lora_path=… output=…` writes the model as its repository is laid out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra

from diffsynth.config import build, check, explained, run_main


def fuse(
    model: Any, lora_path: str | Sequence[str], lora_scale: float = 1.0, output: str = "outputs/fused"
) -> list[Path]:
    """Add each adapter's update to the weights it adapts, in fp32, and save those models in the base's own dtype.

    Args:
        model: A partial of a family's `from_components` that lacks only `device`; it builds the pipeline.
        lora_path: Files of adapters.
        lora_scale: Factor of the updates.
        output: Folder to write to.

    Returns:
        The folders of the saved models.

    Raises:
        ValueError: `output` has such a folder that this program has not made, or that is read.
    """
    import torch

    from diffsynth.core.files import check_replaceable, mark_as_made, replacing_folder
    from diffsynth.diffusion.pipeline import sampling_settings

    pipe = model(device="cpu")
    pipe.check_adapters(paths := [lora_path] if isinstance(lora_path, str) else lora_path)
    for path in paths:
        pipe.use_sampling_settings_of(path)
    settings = pipe.settings_for({})
    adapted = sorted({name for path in paths for name in pipe.adapted_by(path)})
    folders = [Path(output, pipe.lora_prefixes[name]) for name in adapted]
    for folder in folders:
        check_replaceable(folder, inputs=[*paths, *(source["path"] for source in pipe.sources().values())])
    pipe.load_models(adapted, dtypes=dict.fromkeys(adapted, torch.float32))
    for path in paths:
        pipe.load_adapter(path, lora_scale, fuse=True)
    for name, folder in zip(adapted, folders, strict=True):
        network = pipe.named_model(name).to(pipe.torch_dtype)
        if settings and name in pipe.in_iteration_models:
            sampling_settings.keep(network, settings)
        with replacing_folder(folder) as partial:
            network.save_pretrained(partial)
            mark_as_made(partial)
    return folders


@hydra.main(version_base="1.3", config_path="conf", config_name="fuse")
def main(cfg) -> None:
    with explained():
        check(cfg, fuse)
        for path in fuse(**build(cfg)):
            print(path)


if __name__ == "__main__":
    run_main(main, fuse)
