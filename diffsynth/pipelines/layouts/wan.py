"""The layout in which Wan's authors release the weights, and the layers' names in it, by which LoRA files call them.

The transformer's keys are diffusers' by diffusers' own converter. It has none for Wan 2.2's autoencoder, UMT5 and CLIP,
whose tables are here.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from ...core.loader import Layout
from ...diffusion.adapters.names import LayerNames

Names = Mapping[str, tuple[str, ...]]

# Patterns of keys, and what takes their place; the first pattern that a key matches counts.
RESIDUAL = {
    r"(.*)\.residual\.0\.(.*)": r"\1.norm1.\2",
    r"(.*)\.residual\.2\.(.*)": r"\1.conv1.\2",
    r"(.*)\.residual\.3\.(.*)": r"\1.norm2.\2",
    r"(.*)\.residual\.6\.(.*)": r"\1.conv2.\2",
    r"(.*)\.shortcut\.(.*)": r"\1.conv_shortcut.\2",
}
VAE_22 = {
    r"encoder\.downsamples\.(\d+)\.downsamples\.\d+\.(resample|time_conv)\.": r"encoder.down_blocks.\1.downsampler.\2.",
    r"encoder\.downsamples\.(\d+)\.downsamples\.": r"encoder.down_blocks.\1.resnets.",
    r"decoder\.upsamples\.(\d+)\.upsamples\.\d+\.(resample|time_conv)\.": r"decoder.up_blocks.\1.upsampler.\2.",
    r"decoder\.upsamples\.(\d+)\.upsamples\.": r"decoder.up_blocks.\1.resnets.",
    r"(encoder|decoder)\.middle\.1\.": r"\1.mid_block.attentions.0.",
    r"(encoder|decoder)\.middle\.0\.": r"\1.mid_block.resnets.0.",
    r"(encoder|decoder)\.middle\.2\.": r"\1.mid_block.resnets.1.",
    r"(encoder|decoder)\.head\.0\.": r"\1.norm_out.",
    r"(encoder|decoder)\.head\.2\.": r"\1.conv_out.",
    r"(encoder|decoder)\.conv1\.": r"\1.conv_in.",
    r"conv1\.": r"quant_conv.",
    r"conv2\.": r"post_quant_conv.",
}
UMT5 = {
    r"token_embedding\.": r"shared.",  # encoder.embed_tokens is tied to it
    r"norm\.": r"encoder.final_layer_norm.",
    r"blocks\.(\d+)\.norm1\.": r"encoder.block.\1.layer.0.layer_norm.",
    r"blocks\.(\d+)\.attn\.([qkvo])\.": r"encoder.block.\1.layer.0.SelfAttention.\2.",
    r"blocks\.(\d+)\.pos_embedding\.embedding\.": (r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    r"blocks\.(\d+)\.norm2\.": r"encoder.block.\1.layer.1.layer_norm.",
    r"blocks\.(\d+)\.ffn\.gate\.0\.": r"encoder.block.\1.layer.1.DenseReluDense.wi_0.",
    r"blocks\.(\d+)\.ffn\.fc1\.": r"encoder.block.\1.layer.1.DenseReluDense.wi_1.",
    r"blocks\.(\d+)\.ffn\.fc2\.": r"encoder.block.\1.layer.1.DenseReluDense.wo.",
}
CLIP = {
    r"visual\.patch_embedding\.": r"vision_model.embeddings.patch_embedding.",
    r"visual\.cls_embedding$": r"vision_model.embeddings.class_embedding",
    r"visual\.pos_embedding$": r"vision_model.embeddings.position_embedding.weight",
    r"visual\.pre_norm\.": r"vision_model.pre_layrnorm.",
    r"visual\.post_norm\.": r"vision_model.post_layernorm.",
    r"visual\.transformer\.(\d+)\.norm([12])\.": r"vision_model.encoder.layers.\1.layer_norm\2.",
    r"visual\.transformer\.(\d+)\.attn\.to_qkv\.": r"vision_model.encoder.layers.\1.self_attn.qkv.",
    r"visual\.transformer\.(\d+)\.attn\.proj\.": r"vision_model.encoder.layers.\1.self_attn.out_proj.",
    r"visual\.transformer\.(\d+)\.mlp\.0\.": r"vision_model.encoder.layers.\1.mlp.fc1.",
    r"visual\.transformer\.(\d+)\.mlp\.2\.": r"vision_model.encoder.layers.\1.mlp.fc2.",
}
NOT_IN_CLIP = r"textual\.|log_scale$|visual\.head$"  # parts of the whole CLIP that Wan does not use


def renamed(key: str, table: Mapping[str, str]) -> str:
    """A key after the first pattern of a table that it begins with; the key itself if there is none."""
    pattern = next((pattern for pattern in table if re.match(pattern, key)), None)
    return key if pattern is None else re.sub(f"^{pattern}", table[pattern], key)


def of_transformer(keys: Collection[str]) -> Names:
    """diffusers' names of the transformer's keys, also of those that ComfyUI's files have."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted = convert_wan_transformer_to_diffusers({key: key for key in keys})
    # The converter leaves the positions of CLIP's tokens, which only FLF2V has, as they are.
    positions = {"img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed"}
    return {key: (positions.get(name, name),) for name, key in converted.items()}


def of_vae(keys: Collection[str]) -> Names:
    """diffusers' names of the keys of Wan 2.1's autoencoder, or of Wan 2.2's."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    if any(re.match(r"encoder\.downsamples\.\d+\.downsamples\.", key) for key in keys):
        return {key: (renamed(renamed(key, VAE_22), RESIDUAL),) for key in keys}
    return {key: (name,) for name, key in convert_wan_vae_to_diffusers({key: key for key in keys}).items()}


def of_umt5(keys: Collection[str]) -> Names:
    """transformers' names of the text encoder's keys."""
    return {key: (renamed(key, UMT5),) for key in keys}


def of_clip(keys: Collection[str]) -> Names:
    """transformers' names of the keys of CLIP's image encoder, whose queries, keys and values are one tensor."""
    return {key: () if re.match(NOT_IN_CLIP, key) else _divided(renamed(key, CLIP)) for key in keys}


def _divided(name: str) -> tuple[str, ...]:
    return tuple(name.replace(".qkv.", f".{part}_proj.") for part in "qkv") if ".qkv." in name else (name,)


TRANSFORMER_LAYOUT = Layout(r"(model\.diffusion_model\.)?blocks\.\d+\.self_attn\.", of_transformer)
VAE_LAYOUT = Layout(r"encoder\.downsamples\.", of_vae)
UMT5_LAYOUT = Layout(r"token_embedding\.", of_umt5)
CLIP_LAYOUT = Layout(r"visual\.", of_clip)

# LoRA files -----------------------------------------------------------------------------------------------------------

LAYERS = {  # of a block; image-to-video by CLIP has keys and values of the image
    **{
        f"{attention}_attn.{part}": f"attn{number}.to_{part}"
        for number, attention in ((1, "self"), (2, "cross"))
        for part in "qkv"
    },
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
ORIGINAL = {
    **{f"{kind}.*.{name}": f"{kind}.*.{ours}" for kind in ("blocks", "vace_blocks") for name, ours in LAYERS.items()},
    "vace_blocks.*.before_proj": "vace_blocks.*.proj_in",
    "vace_blocks.*.after_proj": "vace_blocks.*.proj_out",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}
# diffusers and ComfyUI read the names of Wan's own code, with the scale in the matrices, as DiffSynth-Studio does.
LORA_NAMES = LayerNames(
    prefix="transformer", comfyui="diffusion_model.", common="original", studio="original", original=ORIGINAL
)
# Programs write the names of the first expert for both: which one a file is for, only its user knows.
LOW_NOISE_LORA_NAMES = replace(LORA_NAMES, prefix="transformer_2", shared="transformer")
