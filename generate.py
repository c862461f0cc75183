"""Draw: `python generate.py prompt="…" lora_path=…`; `python generate.py --help` lists every choice."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import hydra

from diffsynth.config import build, check, explained, run


def generate(
    model,
    prompt: str | Sequence[str],
    negative_prompt: str = "",
    seed: int | Sequence[int] = 0,
    lora_path: str | Sequence[str] | None = None,
    lora_scale: float = 1.0,
    input_image: str | None = None,
    denoising_strength: float = 1.0,
    inpaint_mask: str | None = None,
    options: Mapping[str, object] | None = None,
    batch_size: int = 16,
    output: str = "outputs/generated",
    device: str = "auto",
) -> list[Path]:
    """Draw every prompt with every seed and return the files: one image each, and a grid of them all."""
    from diffsynth.diffusion.drawing import draw, load_images, read_prompts
    from diffsynth.diffusion.runner import choose_device

    pipe = model(device=choose_device(device))
    requests = [
        {
            "prompt": text,
            "negative_prompt": negative_prompt,
            "seed": number,
            "denoising_strength": denoising_strength,
            **(options or {}),
        }
        for text in read_prompts(prompt)
        for number in ([seed] if isinstance(seed, int) else seed)
    ]
    images = load_images(input_image=input_image, inpaint_mask=inpaint_mask)
    pipe.check_adapters(paths := [lora_path] if isinstance(lora_path, str) else lora_path or [])
    for request in requests:
        pipe.complete(request)  # what it does not know is refused before any weight is read
    pipe.load_models()
    for path in paths:
        pipe.load_adapter(path, lora_scale)
    source = {"lora_path": [str(path) for path in paths], "lora_scale": lora_scale}
    return draw(pipe, requests, images, batch_size, Path(output), source)


@hydra.main(version_base="1.3", config_path="conf", config_name="generate")
def main(cfg) -> None:
    with explained():
        check(cfg, generate)
        for path in generate(**build(cfg)):
            print(path)


if __name__ == "__main__":
    run(main)
