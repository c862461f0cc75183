"""Sample images: `python generate.py prompt="…" lora_path=…`; `python generate.py --help` lists every option."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from diffsynth.config import build, check, explained, locked, run_main
from diffsynth.core.ranges import BatchSize, PositiveFloat, PositiveFraction, PositiveInt, Seed


def generate(
    model: Any,
    template: Any,
    memory: Any,
    prompt: str | Sequence[str],
    negative_prompt: str = "",
    seed: Seed | Sequence[Seed] = 0,
    sampler: Literal["euler", "heun", "dpmpp_2m", "renoise"] | None = None,
    lora_path: str | Sequence[str] | None = None,
    lora_scale: float = 1.0,
    input_image: str | None = None,
    num_frames: PositiveInt | None = None,
    frame_rate: PositiveFloat | None = None,
    denoising_strength: PositiveFraction = 1.0,
    inpaint_mask: str | None = None,
    template_inputs: Sequence[Mapping[str, object]] = (),
    negative_template_inputs: Sequence[Mapping[str, object]] = (),
    options: Mapping[str, object] | None = None,
    batch_size: BatchSize = 16,
    output: str = "outputs/generated",
    overwrite: bool = False,
    device: str = "auto",
) -> list[Path]:
    """Sample every prompt with every seed, and return the files: one per image, and a grid of all images.

    Args:
        model: A partial of a family's `from_components` that lacks only `device`; it builds the pipeline.
        template: Templates to apply (`diffusion.template.Templates`).
        memory: How the weights are kept (`core.memory.FrozenMemory`).
        prompt: A prompt, a list of prompts, or a text file with a prompt per line.
        negative_prompt: What guidance leads away from.
        seed: A seed, or a list of seeds.
        sampler: How the velocity is integrated; None takes what is stored with the weights, else `euler`.
        lora_path: Files of adapters.
        lora_scale: Factor of the adapters' updates.
        input_image: File of an image to start from; of a model of videos, the first frame.
        num_frames, frame_rate: Of videos; None takes the model's.
        denoising_strength: How far an input image is noised, in (0, 1]; 1 starts from noise alone.
        inpaint_mask: File of a mask; only its white parts are sampled anew.
        template_inputs, negative_template_inputs: Inputs of each template, for both sides of guidance.
        options: Other arguments of the pipeline's call (`num_inference_steps`, `cfg_scale`, `height`, …); images are
            files.
        batch_size: Images that are sampled together.
        output: Folder to write to.
        overwrite: Replace images that the folder holds already.
        device: `auto`, `cpu`, `cuda` or `mps`.
    """
    from diffsynth.core.devices import choose_device
    from diffsynth.diffusion.pipeline.generation import (
        check_free,
        load_images,
        read_prompts,
        with_images,
    )
    from diffsynth.diffusion.pipeline.loaded_models import LoadedModels
    from diffsynth.diffusion.pipeline.request import check_numbers

    pipe = model(device=choose_device(device))
    of_videos = {"num_frames": num_frames, "frame_rate": frame_rate}
    options = {**(options or {}), **{name: value for name, value in of_videos.items() if value is not None}}
    files, options = options, with_images(pipe, options)
    seeds = _seeds(seed)
    common = {"sampler": sampler, "denoising_strength": denoising_strength, **options}
    requests = [
        {"prompt": text, "negative_prompt": negative_prompt, "seed": number, **common}
        for text in read_prompts(prompt)
        for number in seeds
    ]
    if not overwrite:
        check_free(Path(output), len(requests), pipe.media.suffix)
    given = {name: value for name, value in options.items() if value is not None}
    check_numbers(pipe.request, given, "options.")
    starts = {"input_image": input_image, "inpaint_mask": inpaint_mask}
    images = load_images(pipe.media.mode, **starts)
    requests = [{**images, **request} for request in requests]
    pipe.check_adapters(paths := [lora_path] if isinstance(lora_path, str) else lora_path or [])
    for path in paths:
        pipe.use_sampling_settings_of(path)
    requests = _completed(pipe, requests)
    source = {"lora_path": [str(path) for path in paths], "lora_scale": lora_scale}
    source |= {name: starts[name] for name in images}
    source |= {name: files[name] for name, value in options.items() if value is not files[name]}
    models = LoadedModels(pipe, memory, paths, lora_scale)
    templates = template, template_inputs, negative_template_inputs
    return _sample(pipe, models, *templates, requests, batch_size, Path(output), source)


def _seeds(seed: int | Sequence[int]) -> Sequence[int]:
    if seed == []:
        raise ValueError("seed is an empty list; expected a seed, or a list of seeds.")
    return [seed] if isinstance(seed, int) else seed


def _completed(pipe: Any, requests: Sequence[Mapping]) -> list[dict[str, Any]]:
    """The requests with their sampling settings and sizes; refuses wrong ones before any weight is read."""
    from diffsynth.diffusion.pipeline.generation import warn_of_ignored
    from diffsynth.diffusion.prompts.limits import warn_of_long_prompts

    completed = [pipe.complete(request) for request in requests]
    warn_of_ignored(pipe, requests[0], completed[0])
    warn_of_long_prompts(pipe, completed)
    settings = (*pipe.sampling_arguments, "height", "width", "num_frames", "frame_rate")
    sampling = [{name: whole[name] for name in settings if name in whole} for whole in completed]
    return [{**request, **own} for request, own in zip(requests, sampling, strict=True)]


def _sample(
    pipe: Any,
    models: Any,
    template: Any,
    template_inputs: Sequence[Mapping[str, object]],
    negative_template_inputs: Sequence[Mapping[str, object]],
    requests: Sequence[Mapping],
    batch_size: int,
    folder: Path,
    source: Mapping,
) -> list[Path]:
    """Load the networks one after another, and sample checked requests with templates to a folder.

    Args:
        models: The pipeline's networks (`diffusion.pipeline.loaded_models.LoadedModels`).
        source: Where the weights come from, as metadata of the files.
    """
    from diffsynth.diffusion.pipeline.generation import encode, open_files, sample_to_files

    templates = template.load_all(pipe)
    templates.check(template_inputs, negative_template_inputs)
    sides = [[open_files(inputs) for inputs in side] for side in (template_inputs, negative_template_inputs)]
    if templates.codes:
        source = {
            **source,
            "templates": [str(code.file) for code in templates.codes],
            "template_inputs": template_inputs,
            "negative_template_inputs": negative_template_inputs,
        }
    models.load_encoders(also=templates.called_models(pipe))
    size = {name: requests[0][name] for name in ("height", "width")}
    shared = templates.arguments(pipe, *sides, size=size)
    inputs = encode(pipe, [{**shared, **request} for request in requests])
    del templates  # nothing calls their networks any more
    models.load_network()
    return sample_to_files(pipe, requests, inputs, batch_size, folder, source)


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg) -> None:
    with explained():
        check(cfg, generate)
        given, job = build(cfg), HydraConfig.get()
        if job.mode == RunMode.MULTIRUN:
            given["output"] = job.runtime.output_dir
        with locked(given["output"]):
            for path in generate(**given):
                print(path)


if __name__ == "__main__":
    run_main(main, generate)
