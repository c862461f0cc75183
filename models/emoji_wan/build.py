"""Rebuild the embedded Wan: its classes in miniature, trained by this project on short clips of moving emoji.

    python -m models.emoji_wan.build init outputs/emoji_wan_init
    python train.py experiment=emoji_wan/autoencoder
    python -m models.emoji_wan.build autoencoder outputs/emoji_wan_init outputs/emoji_wan_autoencoder-*/weights/step-2400.*
    python make_cache.py …  # models/emoji_wan/README.md has the whole command
    python train.py experiment=emoji_wan/pretrain
    python -m models.emoji_wan.build release outputs/emoji_wan_init models/emoji_wan outputs/emoji_wan_pretrain-*/weights/step-2700.*

The folders have the layout of Wan 2.1's repository, so that every program that reads that reads this, too.
"""  # noqa: E501

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from diffsynth.core.data import UnifiedDataset
from diffsynth.core.data.videos.load_clip import LoadClip
from diffsynth.core.process.console import keep_console
from diffsynth.diffusion.pipeline.video_media import VideoMedia
from diffsynth.pipelines.autoencoders.wan import WanVAE
from models.emoji.build import DATA, captions, release

IMAGE_VAE = Path(__file__).parents[1] / "emoji" / "vae" / "diffusion_pytorch_model.safetensors"
WIDTH = 128  # of the text encoder; a guess
CLIPS_AT_ONCE = 10


def init(folder: str) -> None:
    """Write the tokenizer, the networks with random weights, and the autoencoder that `inflated` makes."""
    torch.manual_seed(0)
    root = Path(folder)
    words = tokenizer()
    words.save_pretrained(root / "tokenizer")
    text_encoder(words).save_pretrained(root / "text_encoder")
    transformer().save_pretrained(root / "transformer")
    vae().save_pretrained(root / "vae")
    scheduler().save_pretrained(root / "scheduler")
    (root / "model_index.json").write_text(json.dumps(model_index(), indent=2) + "\n")


def tokenizer() -> T5Tokenizer:
    """A unigram model in which each word of the captions is one token; other words are spelled by their letters."""
    tables = ("color_captions.csv", "all_train.csv", "all_held_out.csv", "motion.csv", "new_motion_train.csv")
    counts = Counter(word for table in tables for caption in captions(table) for word in caption.split())
    words = [f"▁{word}" for word in sorted(counts)]
    letters = [letter for letter in sorted({"▁", *map(chr, range(33, 127)), *"".join(words)}) if letter not in words]
    # The tokens of a prompt are those of largest total score: one word before any two parts.
    scores = [(word, -1.0) for word in words] + [(letter, -10.0) for letter in letters]
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    return T5Tokenizer(vocab=special + scores, extra_ids=0)


def text_encoder(words: T5Tokenizer) -> UMT5EncoderModel:
    sizes = {"d_model": WIDTH, "d_kv": 32, "d_ff": 2 * WIDTH, "num_layers": 2, "num_heads": 4}
    return UMT5EncoderModel(UMT5Config(vocab_size=len(words), dropout_rate=0.0, **sizes))


def transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        ffn_dim=384,
        num_layers=5,
        text_dim=WIDTH,
    )


@torch.no_grad()
def vae() -> AutoencoderKLWan:
    """The autoencoder of the embedded Qwen-Image, which has the same layers, made to see one frame at a time.

    Of each kernel only the last temporal slice was trained, on single images. The earlier ones become zero, and the
    convolutions that change the number of frames, which images do not use, keep one frame or repeat it.
    """
    model = AutoencoderKLWan(base_dim=16, num_res_blocks=1, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(IMAGE_VAE).items()})
    for name, weight in model.named_parameters():
        if weight.dim() == 5:
            weight[:, :, :-1] = 0
        if "time_conv" in name:
            weight[:] = keeps_frames(weight)
    return model


def keeps_frames(weight: Tensor) -> Tensor:
    """The kernel (D', D, 3, 1, 1) or bias (D') of which every D of the outputs are the newest frame's D channels."""
    kernel = torch.zeros_like(weight)
    if weight.dim() == 5:
        outputs, inputs = weight.shape[:2]
        kernel[:, :, -1, 0, 0] = torch.eye(inputs).repeat(outputs // inputs, 1)
    return kernel


def scheduler() -> UniPCMultistepScheduler:
    """The released scheduler configuration, with the shift of conf/model/emoji_wan.yaml."""
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    return UniPCMultistepScheduler(**flow)


def model_index() -> dict:
    return {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


@torch.no_grad()
def autoencoder(folder: str, weights: str) -> None:
    """Copy trained autoencoder weights into `folder`, and set the latents' statistics to those of the clips."""
    path = Path(folder) / "vae"
    model = WanVAE.from_pretrained(path)
    model.load_state_dict(load_file(weights))
    for metadata in ("all_motion_train.csv", "motion_held_out.csv", "new_motion_held_out.csv"):
        values = [psnr(video, model.reconstruct(model.distribution(video).mean)) for video in videos(metadata)]
        print(f"{metadata}: {torch.cat(values).mean():.2f} dB")
    latents = torch.cat([model.distribution(video).mean for video in videos("motion.csv")])
    mean, std = (statistic(dim=(0, 2, 3, 4)).tolist() for statistic in (latents.mean, latents.std))
    config = json.loads((path / "config.json").read_text()) | {"latents_mean": mean, "latents_std": std}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(model.state_dict(), path / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def videos(metadata: str) -> Iterator[Tensor]:
    """The clips of a table, some at once, as RGB (N, 3, 9, 64, 64) in [-1, 1]."""
    clip = LoadClip(str(DATA))
    dataset = UnifiedDataset(str(DATA), metadata, data_file_keys=["video"], main_data_operator=clip)
    pixels = [VideoMedia().preprocess(row["video"], torch.device("cpu"), torch.float32) for row in dataset]
    return torch.cat(pixels).split(CLIPS_AT_ONCE)


def psnr(clips: Tensor, reconstructed: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip, (N,), for clips (N, 3, F, H, W) in [-1, 1]."""
    return -10 * ((clips - reconstructed) / 2).pow(2).mean((1, 2, 3, 4)).log10()


if __name__ == "__main__":
    keep_console()
    {"init": init, "autoencoder": autoencoder, "release": release}[sys.argv[1]](*sys.argv[2:])
