"""Wan's miniatures under the names of Wan's own code: each table turns diffusers' and transformers' names back."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]
# Patterns of a library's names, and the original's names; all that match are applied, in this order.
TRANSFORMER = {
    r"^condition_embedder\.image_embedder\.pos_embed": "img_emb.emb_pos",
    r"^condition_embedder\.image_embedder\.norm1": "img_emb.proj.0",
    r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj": "img_emb.proj.1",
    r"^condition_embedder\.image_embedder\.ff\.net\.2": "img_emb.proj.3",
    r"^condition_embedder\.image_embedder\.norm2": "img_emb.proj.4",
    r"^condition_embedder\.time_embedder\.linear_1": "time_embedding.0",
    r"^condition_embedder\.time_embedder\.linear_2": "time_embedding.2",
    r"^condition_embedder\.text_embedder\.linear_1": "text_embedding.0",
    r"^condition_embedder\.text_embedder\.linear_2": "text_embedding.2",
    r"^condition_embedder\.time_proj": "time_projection.1",
    r"^scale_shift_table": "head.modulation",
    r"^proj_out": "head.head",
    r"\.scale_shift_table": ".modulation",
    r"\.attn1\.": ".self_attn.",
    r"\.attn2\.": ".cross_attn.",
    r"\.to_out\.0\.": ".o.",
    r"\.to_([qkv])\.": r".\1.",
    r"\.add_([kv])_proj\.": r".\1_img.",
    r"\.norm_added_k\.": ".norm_k_img.",
    r"\.ffn\.net\.0\.proj\.": ".ffn.0.",
    r"\.ffn\.net\.2\.": ".ffn.2.",
    r"\.norm2\.": ".norm_x.",
    r"\.norm3\.": ".norm2.",
    r"\.norm_x\.": ".norm3.",
    r"^(vace_blocks\.\d+)\.proj_in\.": r"\1.before_proj.",
    r"^(vace_blocks\.\d+)\.proj_out\.": r"\1.after_proj.",
}
RESIDUAL = {
    r"\.norm1\.": ".residual.0.",
    r"\.conv1\.": ".residual.2.",
    r"\.norm2\.": ".residual.3.",
    r"\.conv2\.": ".residual.6.",
    r"\.conv_shortcut\.": ".shortcut.",
}
ENDS = {
    r"\.mid_block\.resnets\.0\.": ".middle.0.",
    r"\.mid_block\.attentions\.0\.": ".middle.1.",
    r"\.mid_block\.resnets\.1\.": ".middle.2.",
    r"\.norm_out\.": ".head.0.",
    r"\.conv_out\.": ".head.2.",
    r"^(encoder|decoder)\.conv_in\.": r"\1.conv1.",
    r"^quant_conv\.": "conv1.",
    r"^post_quant_conv\.": "conv2.",
}
VAE_22 = {
    r"^encoder\.down_blocks\.(\d+)\.resnets\.": r"encoder.downsamples.\1.downsamples.",
    r"^encoder\.down_blocks\.(\d+)\.downsampler\.": r"encoder.downsamples.\1.downsamples.2.",
    r"^decoder\.up_blocks\.(\d+)\.resnets\.": r"decoder.upsamples.\1.upsamples.",
    r"^decoder\.up_blocks\.(\d+)\.upsampler\.": r"decoder.upsamples.\1.upsamples.3.",
}
UMT5 = {
    r"^shared\.": "token_embedding.",
    r"^encoder\.final_layer_norm\.": "norm.",
    r"^encoder\.block\.": "blocks.",
    r"\.layer\.0\.layer_norm\.": ".norm1.",
    r"\.layer\.0\.SelfAttention\.relative_attention_bias\.": ".pos_embedding.embedding.",
    r"\.layer\.0\.SelfAttention\.": ".attn.",
    r"\.layer\.1\.layer_norm\.": ".norm2.",
    r"\.layer\.1\.DenseReluDense\.wi_0\.": ".ffn.gate.0.",
    r"\.layer\.1\.DenseReluDense\.wi_1\.": ".ffn.fc1.",
    r"\.layer\.1\.DenseReluDense\.wo\.": ".ffn.fc2.",
}
CLIP = {
    r"^(vision_model\.)?": "visual.",
    r"\.embeddings\.patch_embedding\.": ".patch_embedding.",
    r"\.embeddings\.class_embedding": ".cls_embedding",
    r"\.embeddings\.position_embedding\.weight": ".pos_embedding",
    r"\.pre_layrnorm\.": ".pre_norm.",
    r"\.post_layernorm\.": ".post_norm.",
    r"\.encoder\.layers\.": ".transformer.",
    r"\.layer_norm([12])\.": r".norm\1.",
    r"\.self_attn\.out_proj\.": ".attn.proj.",
    r"\.self_attn\.(\w)_proj\.": r".attn.\1.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.2.",
}


def renamed(state: Mapping[str, Tensor], *tables: Mapping[str, str]) -> State:
    """Tensors under names to which every pattern of some tables is applied."""
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in [rule for table in tables for rule in table.items()]:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def transformer(state: State) -> State:
    return renamed(state, TRANSFORMER)


def vae_21(state: State) -> State:
    """The encoder's blocks are numbered alike; of the decoder, four stand for each of diffusers' blocks."""
    numbered = {_numbered(name): tensor for name, tensor in state.items()}
    return renamed(numbered, RESIDUAL, ENDS)


def _numbered(name: str) -> str:
    name = name.replace("encoder.down_blocks.", "encoder.downsamples.")
    if found := re.match(r"decoder\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)\.(.*)", name):
        return f"decoder.upsamples.{4 * int(found[1]) + int(found[3] or 3)}.{found[4]}"
    return name


def vae_22(state: State) -> State:
    return renamed(state, VAE_22, RESIDUAL, ENDS)


def umt5(state: State) -> State:
    return renamed({name: t for name, t in state.items() if name != "encoder.embed_tokens.weight"}, UMT5)


def clip(state: State) -> State:
    """With queries, keys and values in one tensor, and with the parts of CLIP that Wan does not use."""
    found = renamed(state, CLIP)
    for key in [key for key in found if ".attn.q." in key]:
        parts = [found.pop(key.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        found[key.replace(".attn.q.", ".attn.to_qkv.")] = torch.cat(parts)
    found["visual.cls_embedding"] = found["visual.cls_embedding"][None, None]
    found["visual.pos_embedding"] = found["visual.pos_embedding"][None]
    return found | {"log_scale": torch.ones(()), "visual.head": torch.ones(2, 2), "textual.x": torch.ones(1)}


def written(state: Mapping[str, Tensor], file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, file)
    return file


def state_in(folder: Path) -> State:
    """The tensors of a network's folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def repository(diffusers: Path, root: Path) -> Path:
    """A model's repository as Wan's authors lay it out, of the weights of one in diffusers' layout.

    Its config.json names a class of their own code. Pickles stand as safetensors files, as converted repositories have
    them.
    """
    written(transformer(state_in(diffusers / "transformer")), root / "diffusion_pytorch_model.safetensors")
    written(umt5(state_in(diffusers / "text_encoder")), root / "models_t5_umt5-xxl-enc-bf16.safetensors")
    written(vae_21(state_in(diffusers / "vae")), root / "Wan2.1_VAE.safetensors")
    (root / "config.json").write_text('{"_class_name": "WanModel", "dim": 64}', encoding="utf-8")
    shutil.copytree(diffusers / "tokenizer", root / "google" / "umt5-xxl", dirs_exist_ok=True)
    return root
