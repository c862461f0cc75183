"""Error messages, by mistake: the rows of docs/errors.md, which `make errors` writes and test_errors.py compares."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save

PAGE = ROOT / "docs" / "errors.md"
HEAD = """# Error messages, by mistake

Every mistake on this page is found before weights are read; the answer is one line, and the exit status is 1
([runs.md](runs.md) lists others). With `DIFFSYNTH_TRACEBACK=1` in the environment, an error of a run's configuration or
input is raised with its traceback. `FOLDER` stands for a folder with the files of the case. `make errors` runs these
commands and writes this page.
"""
COLUMNS = ("| typed | status | answer |", "| --- | --- | --- |")


@dataclass(frozen=True)
class Refusal:
    """A command that is refused.

    Args:
        command: As it is typed into a shell; `FOLDER` stands for a folder of the case's own.
        files: What the folder holds, by name.
        about: What is wrong with them, in words.
    """

    command: str
    files: Mapping[str, bytes | str] = field(default_factory=dict)
    about: str = ""

    @property
    def shown(self) -> str:
        """The case as the page shows it."""
        return f"`{self.command}`" + (f" ({self.about})" if self.about else "")

    def arguments(self, folder: Path) -> list[str]:
        """The command's words, its script first; writes its files."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return [word.replace("FOLDER", str(folder)) for word in shlex.split(self.command)]

    def row(self, status: int, answer: str, folder: Path) -> str:
        """The page's line about it."""
        text = answer.replace(str(folder), "FOLDER").replace(f"{ROOT}/", "").strip()
        cells = [self.shown, str(status), " ".join(text.split())]
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


PICTURE = BytesIO()
Image.new("RGB", (64, 64), "red").save(PICTURE, "PNG")
PNG = PICTURE.getvalue()
SMALL_PICTURE = BytesIO()
Image.new("L", (64, 32), "white").save(SMALL_PICTURE, "PNG")
SMALL = SMALL_PICTURE.getvalue()
DEEP_PICTURE = BytesIO()
Image.new("I;16", (64, 64)).save(DEEP_PICTURE, "PNG")
ROW = "image,prompt\na.png,a red square\n"


def of_data(about: str, files: Mapping[str, bytes | str]) -> Refusal:
    """A training on a folder with these files and the picture a.png."""
    return Refusal("train.py dataset=image_folder dataset.path=FOLDER", {"a.png": PNG, **files}, about)


def of_table(about: str, content: str) -> Refusal:
    """A training on a folder whose metadata.csv has this content."""
    return of_data(about, {"metadata.csv": content})


def of_adapter(about: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Refusal:
    """Sampling with an adapter file of these tensors."""
    files = {"a.safetensors": save(dict(tensors), metadata)}
    return Refusal("generate.py lora_path=FOLDER/a.safetensors", files, about)


def with_numbers(value: float) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of one layer."""
    name = "transformer.transformer_blocks.0.attn.to_v.lora_"
    return {f"{name}A.weight": torch.full((2, 128), value), f"{name}B.weight": torch.zeros(128, 2)}


# By sections of the page; a command is in it once.
REFUSALS = {
    "Keys, options and spelling": [
        Refusal("train.py lora.rnak=8"),
        Refusal("train.py modle=emoji"),
        Refusal("train.py model=Qwen-Image"),
        Refusal("train.py --lora.rank 8"),
        Refusal("train.py lora.rank 8"),
        Refusal('train.py "lora.rank = 8"'),
        Refusal("train.py learning_rate=1e-4"),
        Refusal("train.py --network_dim 8"),
        Refusal("train.py --gradient_accumulation_steps=4"),
        Refusal("train.py --mixed_precision bf16"),
        Refusal("train.py --config FOLDER/my.yaml"),
        Refusal("train.py lora.rank=8,16"),
        Refusal("train.py 'validation.prompts=a cat, sitting'"),
        Refusal("train.py --dataset_base_path data/mine"),
        Refusal("train.py dataset=my_images"),
        Refusal("train.py dataset.path=FOLDER/gone"),
        Refusal("train.py ema.decay=0.99"),
        Refusal("train.py device=cuda:1"),
        Refusal("train.py 'lora.rank=[1'"),
        Refusal("generate.py num_inference_steps=4"),
        Refusal("generate.py lora=style.safetensors"),
        Refusal("generate.py prompt=a cat"),
        Refusal("generate.py a cat"),
        Refusal('generate.py "prompt=[\'tis the season, a dog]"'),
    ],
    "Numbers": [
        Refusal("train.py max_steps=0"),
        Refusal("train.py max_steps=ten"),
        Refusal("train.py max_steps=1e3"),
        Refusal("train.py batch_size=0"),
        Refusal("train.py max_grad_norm=-1"),
        Refusal("train.py lora.alpha=0"),
        Refusal("train.py lora.rank=1000000"),
        Refusal("train.py dataset.repeat=0"),
        Refusal("train.py export.save_steps=0"),
        Refusal("train.py seed=18446744073709551616"),
        Refusal("train.py 'lora.target_modules=[*.to_q]'"),
        Refusal("train.py condition=canny dataset.conditions.controlnet_image.low=300"),
        Refusal("generate.py options.height=0"),
        Refusal("generate.py options.cfg_scale=high"),
        Refusal("generate.py denoising_strength=2"),
        Refusal("generate.py batch_size=0"),
        Refusal("generate.py prompt=[]"),
        Refusal("generate.py seed=[]"),
    ],
    "What a run needs later": [
        Refusal("train.py lora=loha export.formats=[comfyui]"),
        Refusal("train.py lora=none export.formats=[comfyui]"),
        Refusal("train.py checkpoint.path=FOLDER/file/checkpoints", {"file": ""}),
        Refusal("train.py dataset=prompts dataset.path=FOLDER/prompts.txt", {"prompts.txt": "a cat\n"}),
        Refusal("train.py task=prior"),
        Refusal("train.py task=slider task.positive=old task.negative=young lora=none"),
    ],
    "Pictures, tables and prompts": [
        Refusal("generate.py input_image=FOLDER/gone.png"),
        Refusal("generate.py input_image=FOLDER/deep.png", {"deep.png": DEEP_PICTURE.getvalue()}, "16 bits"),
        Refusal("generate.py input_image=FOLDER/a.eps", {"a.eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"}),
        Refusal("generate.py prompt=FOLDER/prompts.csv", {"prompts.csv": "a cat\n"}),
        Refusal("generate.py prompt=FOLDER/gone.txt"),
        of_table("a quote that is never closed", 'image,prompt\na.png,"a red square\na.png,a square\n'),
        of_table("two columns of a name", "image,prompt,prompt\na.png,a,b\n"),
        of_table("a path out of the folder", ROW.replace("a.png", "../a.png")),
        of_table("a URL", ROW.replace("a.png", "https://example.org/a.png")),
        of_table("a file that is not there", ROW + "b.png,a blue square\n"),
        of_data("no captions", {"b.png": PNG}),
        Refusal(
            "train.py dataset=image_folder dataset.path=FOLDER dataset.data_file_keys=[image,loss_mask]",
            {"a.png": PNG, "mask.png": SMALL, "metadata.csv": "image,loss_mask,prompt\na.png,mask.png,a\n"},
            "a mask of another size",
        ),
        Refusal("train.py condition=masked_image"),
        Refusal("make_cache.py condition=inpaint path=FOLDER/cache"),
        Refusal("train.py dataset=cache dataset.path=FOLDER", {"0/0.pth": b""}, "a cache of DiffSynth-Studio"),
    ],
    "Weights and adapters": [
        Refusal("generate.py lora_path=FOLDER/gone.safetensors"),
        of_adapter("NaN", with_numbers(math.nan)),
        of_adapter("another model", {name.replace("to_v", "to_w"): tensor for name, tensor in with_numbers(1).items()}),
        of_adapter("broken metadata", with_numbers(1), {"lora_adapter_metadata": "{not json"}),
        Refusal(
            "train.py model.dit.path=FOLDER", {"config.json": "[]", "a.safetensors": save({})}, "config.json is a list"
        ),
        Refusal("train.py model.dit.path=FOLDER/a.ckpt", {"a.ckpt": b""}),
    ],
}
