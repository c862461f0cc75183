"""FLUX.2 in miniature with random weights, in folders like those of klein (Qwen3) and dev (Mistral 3)."""

import json
from functools import cache
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from miniatures.autoencoders import give_batch_norm_statistics
from tiny import COMPONENTS, kept_folder
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from diffsynth.pipelines.flux2_image import Flux2ImagePipeline, ModelConfig
from models.emoji.build import VOCABULARY, train_tokenizer
from models.emoji_flux2 import build

MAX_TOKENS = 24
DEV_TOKENS = 120  # the system message takes 103 of them
# Like Mistral's: a message has parts, and the template writes the first token and the roles.
DEV_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[SYSTEM_PROMPT]' if message.role == 'system' else '[INST]' }}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}"
    "{{ '[/SYSTEM_PROMPT]' if message.role == 'system' else '[/INST]' }}{% endfor %}"
)
DEV_SPECIAL_TOKENS = [
    "<|endoftext|>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]",
]  # fmt: skip


@cache
def klein() -> Path:
    """The folder of a model repository like FLUX.2-klein's; written once per session."""
    folder = kept_folder() / "klein"
    build.init(str(folder))
    randomise(Flux2Transformer2DModel.from_pretrained(folder / "transformer"), folder / "transformer")
    give_batch_norm_statistics(folder / "vae")
    return folder


@cache
def dev() -> Path:
    """The folder of a model repository like FLUX.2-dev's, whose network reads the guidance scale; written once."""
    folder = kept_folder() / "dev"
    build.init(str(folder))
    config = json.loads((folder / "transformer" / "config.json").read_text()) | {"guidance_embeds": True}
    randomise(Flux2Transformer2DModel.from_config(config), folder / "transformer")
    give_batch_norm_statistics(folder / "vae")
    _write_mistral(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"_class_name": "Flux2Pipeline"}
    index |= {"text_encoder": ["transformers", "Mistral3ForConditionalGeneration"]}
    del index["is_distilled"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def randomise(model: ModelMixin, folder: Path) -> None:
    """Add noise to all weights, so that every parameter changes the output; gates would be zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)


def _write_mistral(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([], DEV_SPECIAL_TOKENS)
    tokenizer.bos_token, tokenizer.chat_template = "<s>", DEV_TEMPLATE
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 4}
    config = Mistral3Config(
        text_config={"model_type": "mistral", "vocab_size": VOCABULARY, "num_hidden_layers": 4, **sizes}
        | {"num_key_value_heads": 2, "sliding_window": None},
        vision_config={"model_type": "pixtral", "num_hidden_layers": 1, "image_size": 32, "patch_size": 16, **sizes},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    for part in ("tokenizer", "text_encoder"):
        for file in (folder / part).iterdir():
            file.unlink()
    tokenizer.save_pretrained(folder / "tokenizer")
    model = Mistral3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(folder / "text_encoder")


def pipeline(folder: Path | None = None, **options) -> Flux2ImagePipeline:
    """Our pipeline with the weights of a folder in fp32, for images of 64 × 64 pixels."""
    folder = folder or klein()
    tokens = DEV_TOKENS if folder == dev() else MAX_TOKENS
    sizes = {"height": 64, "width": 64, "max_sequence_length": tokens, "edit_image_pixels": 64 * 64}
    configs = {name: ModelConfig(path=str(folder / part)) for name, part in COMPONENTS.items()}
    pipe = Flux2ImagePipeline.from_components(**configs, torch_dtype="float32", **sizes | options)
    pipe.progress_bar = iter
    return pipe


def overrides(folder: Path | None = None) -> list[str]:
    """Overrides that replace the configured model by the miniature."""
    parts = [f"model.{name}.path={(folder or klein()) / part}" for name, part in COMPONENTS.items()]
    return ["model=emoji_flux2", *parts]
