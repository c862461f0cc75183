"""Merge adapters into a model: `python fuse.py lora_path=… output=…` writes a repository that diffusers loads."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import hydra

from diffsynth.config import build, check, explained, locked, run_main


def fuse(
    model: Any,
    lora_path: str | Sequence[str],
    lora_scale: float = 1.0,
    output: str = "outputs/fused",
    rest: Literal["link", "copy", "none"] = "link",
) -> list[Path]:
    """Add each adapter's update to the weights it adapts, in fp32, and save those models in the base's own dtype.

    With the rest of the base's repository, diffusers loads the folder: `DiffusionPipeline.from_pretrained(output)`.

    Args:
        model: A partial of a family's `from_components` that lacks only `device`; it builds the pipeline.
        lora_path: Files of adapters.
        lora_scale: Factor of the updates.
        output: Folder to write to.
        rest: The other components and `model_index.json`: `link` links to the base's, `copy` copies them, `none` leaves
            them out.

    Returns:
        The folders of the saved models.

    Raises:
        ValueError: `output` has files or such a folder that this program has not made, or that is read.
    """
    import torch

    from diffsynth.core.files import check_replaceable, mark_as_made, replacing_folder, was_made
    from diffsynth.diffusion.pipeline import repository, sampling_settings
    from diffsynth.diffusion.pipeline.components import save

    models = [config.parent for config in Path(output).glob("*/config.json")]
    if not any(map(was_made, models)):  # until 2026-11-30 those were marked, and the folder was not
        check_replaceable(output)
    pipe = model(device="cpu")
    pipe.check_adapters(paths := [lora_path] if isinstance(lora_path, str) else lora_path)
    for path in paths:
        pipe.use_sampling_settings_of(path)
    settings = pipe.settings_for({})
    adapted = sorted({name for path in paths for name in pipe.adapted_by(path)})
    folders = [Path(output, pipe.lora_prefixes[name]) for name in adapted]
    inputs = [
        *map(pipe.adapter_file, paths),
        *(source["path"] for source in pipe.sources().values()),
        *pipe.folders.values(),
    ]
    for folder in folders:
        check_replaceable(folder, inputs)
    index = None if rest == "none" else repository.find_index(model.keywords[adapted[0]])
    others = repository.component_folders(pipe, index) if index else {}
    others = {name: folder for name, folder in others.items() if Path(output, name) not in folders}
    if index:
        repository.check_rest(Path(output), index, others, inputs, rest)
    Path(output).mkdir(parents=True, exist_ok=True)
    mark_as_made(Path(output))
    pipe.load_models(adapted, dtypes=dict.fromkeys(adapted, torch.float32))
    for path in paths:
        pipe.load_adapter(path, lora_scale, fuse=True)
    for name, folder in zip(adapted, folders, strict=True):
        network = pipe.named_model(name).to(pipe.torch_dtype)
        if settings and name in pipe.in_iteration_models:
            sampling_settings.keep(network, settings)
        with replacing_folder(folder) as partial:
            save(network, partial)
            mark_as_made(partial)
    if index:
        repository.complete(Path(output), index, others, rest)
    elif rest != "none":
        logging.warning(
            "The base has no model_index.json, so that %s holds the merged models alone and diffusers cannot load it "
            "by itself; set rest=none to silence this.",
            output,
        )
    return folders


@hydra.main(version_base="1.3", config_path="conf", config_name="fuse")
def main(cfg) -> None:
    with explained():
        check(cfg, fuse)
        given = build(cfg)
        with locked(given["output"]):
            fuse(**given)
        print(given["output"])
        if Path(given["output"], "model_index.json").is_file():
            print(f'DiffusionPipeline.from_pretrained("{given["output"]}")')


if __name__ == "__main__":
    run_main(main, fuse)
