"""Start a ControlNet from a model's transformer, for `train.py`: `python controlnet.py model=z_image output=…`."""

import shlex
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from diffsynth.config import build, check, explained, locked, run_main
from diffsynth.core.ranges import PositiveInt, Seed


def controlnet(
    model: Any,
    blocks: PositiveInt | None = None,
    inpaint: bool = False,
    seed: Seed = 0,
    output: str = "outputs/controlnet",
) -> Path:
    """Write a ControlNet whose blocks are copies of the transformer's, and whose outputs are zero.

    It reads from the model's files only the tensors that it copies. The folder has the released layout, config.json and
    safetensors, so that diffusers loads it.

    Args:
        model: A partial of a family's `from_components` that lacks only `device`; it builds the pipeline.
        blocks: Number of blocks that are copied; None takes the family's.
        inpaint: Whether the ControlNet reads the mask of an image to inpaint, too.
        seed: Seed of the layers that are neither copied nor zero.
        output: Folder to write to.

    Returns:
        The folder.

    Raises:
        ValueError: The family has no ControlNet, or `output` is a folder that this program has not made.
    """
    from diffsynth.core.files import check_replaceable, mark_as_made, replacing_folder
    from diffsynth.diffusion.controlnet.start import start_controlnet

    check_replaceable(output)
    pipe = model(device="cpu")
    network = start_controlnet(pipe, blocks, inpaint, seed)
    with replacing_folder(Path(output)) as partial:
        network.save_pretrained(partial)
        mark_as_made(partial)
    return Path(output)


def training_command(folder: Path, inpaint: bool) -> str:
    """The command that trains the ControlNet in a folder, on edges of the images of the default data set.

    A ControlNet that inpaints reads columns of its own, so that the command for it has no condition.
    """
    chosen = HydraConfig.get()
    model, overrides = chosen.runtime.choices["model"], chosen.overrides.task
    names = GlobalHydra.instance().config_loader().get_group_options("model")
    is_option = f"{model}_controlnet" in names
    words = [f"model={model}_controlnet"] if is_option else [f"model={model}", "+model@model.controlnet=_network"]
    words += [override for override in overrides if override.lstrip("+~").startswith("model.")]
    words += [f"model.controlnet.path={folder}", "task.trainable_models=[controlnet]", "lora=none"]
    words += [] if is_option else ["task.extra_inputs=[controlnet_image]"]
    words += [] if inpaint else ["condition=canny"]
    return shlex.join(["python", "train.py", *words])


@hydra.main(version_base="1.3", config_path="conf", config_name="controlnet")
def main(cfg) -> None:
    with explained():
        check(cfg, controlnet)
        given = build(cfg)
        with locked(given["output"]):
            folder = controlnet(**given)
        print(training_command(folder, given.get("inpaint", False)))


if __name__ == "__main__":
    run_main(main, controlnet)
