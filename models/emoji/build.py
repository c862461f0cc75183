"""Rebuild the embedded model: Qwen-Image's classes in miniature, trained by this project on the emoji in colour.

    python models/emoji/build.py init outputs/emoji_init
    python train.py experiment=emoji/autoencoder
    python models/emoji/build.py autoencoder outputs/emoji_init outputs/emoji_autoencoder-*/weights/step-3500.*
    python train.py experiment=emoji/pretrain
    python models/emoji/build.py release outputs/emoji_init models/emoji outputs/emoji_pretrain-*/weights/step-2000.*

The folders have the layout of the released repository, so that every program that reads Qwen-Image reads this, too.
"""

import csv
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffsynth.core.process.console import keep_console
from diffsynth.pipelines.qwen_image import PROMPT_TEMPLATE, QwenImageVAE

DATA = Path(__file__).parents[2] / "data" / "emoji"
VOCABULARY = 1536  # every word of the captions is one token
WIDTH = 128  # of the text encoder; a guess
SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
# The regular expression by which Qwen2's tokenizer splits text into words.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def init(folder: str) -> None:
    """Write the tokenizer and all networks with random weights."""
    torch.manual_seed(0)
    root = Path(folder)
    template = PROMPT_TEMPLATE
    for token in SPECIAL_TOKENS:
        template = template.replace(token, "")
    tokenizer = train_tokenizer([template], SPECIAL_TOKENS)
    tokenizer.save_pretrained(root / "tokenizer")
    text_encoder(tokenizer).save_pretrained(root / "text_encoder")
    transformer().save_pretrained(root / "transformer")
    vae().save_pretrained(root / "vae")
    scheduler().save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps(model_index(), indent=2) + "\n")


def train_tokenizer(template: Sequence[str], special_tokens: Sequence[str]) -> Qwen2Tokenizer:
    """Train a small byte-level BPE in which each word of the prompt template is one token, as in the real vocabulary.

    Args:
        template: Parts of the prompt template between special tokens.
        special_tokens: All special tokens; the class adds the first one itself.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    size = VOCABULARY - len(special_tokens)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    texts = captions("color_captions.csv") + captions("all_train.csv") + captions("all_held_out.csv")
    bpe.train_from_iterator([*template] * 1000 + texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=trained["vocab"], merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens[1:]})
    return tokenizer


def text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    special = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    special |= {name: tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>") for name in ("image", "video")}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=True,
        vision_start_token_id=special["vision_start"],
        vision_end_token_id=special["vision_end"],
        image_token_id=special["image"],
        video_token_id=special["video"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    # Embeddings of words start far apart; with the default standard deviation of 0.02 prompts are learnt much slower.
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight)
    return model


def transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
    )


def vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(base_dim=16, num_res_blocks=1, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The released scheduler configuration."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )


def model_index() -> dict:
    return {
        "_class_name": "QwenImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }


def autoencoder(folder: str, weights: str) -> None:
    """Copy trained autoencoder weights into `folder`, and set the latents' statistics to those of the colour emoji."""
    path = Path(folder) / "vae"
    model = QwenImageVAE.from_pretrained(path).use_single_frame_convolutions()
    model.load_state_dict(load_file(weights))
    with torch.no_grad():
        latents = model.distribution(pixels("color.csv")).mean
        for metadata in ("all_train.csv", "all_held_out.csv"):
            images = pixels(metadata)
            print(f"{metadata}: {psnr(images, model.reconstruct(model.distribution(images).mean)):.2f} dB")
    mean, std = (statistic(dim=(0, 2, 3, 4)).tolist() for statistic in (latents.mean, latents.std))
    config = json.loads((path / "config.json").read_text()) | {"latents_mean": mean, "latents_std": std}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(weights, path / "diffusion_pytorch_model.safetensors")


def release(source: str, target: str, *weights: str) -> None:
    """Copy `source` to `target` in bf16, with the trained weights `step-N.dit` and `step-N.text_encoder`."""
    trained = {Path(path).name.split(".")[1]: load_file(path) for path in weights}
    shutil.copytree(source, target, dirs_exist_ok=True)
    for folder, name in {"transformer": "dit", "text_encoder": "text_encoder", "vae": "vae"}.items():
        (file,) = (Path(target) / folder).glob("*.safetensors")
        tensors = {**load_file(file), **trained.get(name, {})}
        small = {key: t.bfloat16() if t.is_floating_point() else t for key, t in tensors.items()}
        save_file(small, file, {"format": "pt"})


def captions(metadata: str) -> list[str]:
    return [row["prompt"] for row in rows(metadata)]


def pixels(metadata: str) -> torch.Tensor:
    """The N images of a csv file as RGB (N, 3, 64, 64) in [-1, 1]."""
    images = [np.array(Image.open(DATA / row["image"]).convert("RGB"), dtype=np.float32) for row in rows(metadata)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


def psnr(images: torch.Tensor, reconstructed: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over images (N, 3, H, W) in [-1, 1]."""
    return (-10 * ((images - reconstructed) / 2).pow(2).mean((1, 2, 3)).log10()).mean().item()


def rows(metadata: str) -> list[dict]:
    with (DATA / metadata).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    keep_console()
    {"init": init, "autoencoder": autoencoder, "release": release}[sys.argv[1]](*sys.argv[2:])
