"""Stable Diffusion 3.5's transformer: the names of its layers."""

from ...diffusion.adapters.names import LayerNames

BLOCK = "transformer_blocks.*"
# Stability AI's names of the layers; in the swapped ones they have the shift before the scale.
LORA_NAMES = LayerNames(
    prefix="transformer",
    original={
        "joint_blocks.*.x_block.attn.qkv": tuple(f"{BLOCK}.attn.to_{part}" for part in "qkv"),
        "joint_blocks.*.context_block.attn.qkv": tuple(f"{BLOCK}.attn.add_{part}_proj" for part in "qkv"),
        "joint_blocks.*.x_block.attn2.qkv": tuple(f"{BLOCK}.attn2.to_{part}" for part in "qkv"),
        "joint_blocks.*.x_block.attn2.proj": f"{BLOCK}.attn2.to_out.0",
        "joint_blocks.*.x_block.attn.proj": f"{BLOCK}.attn.to_out.0",
        "joint_blocks.*.context_block.attn.proj": f"{BLOCK}.attn.to_add_out",
        "joint_blocks.*.x_block.mlp.fc1": f"{BLOCK}.ff.net.0.proj",
        "joint_blocks.*.x_block.mlp.fc2": f"{BLOCK}.ff.net.2",
        "joint_blocks.*.context_block.mlp.fc1": f"{BLOCK}.ff_context.net.0.proj",
        "joint_blocks.*.context_block.mlp.fc2": f"{BLOCK}.ff_context.net.2",
        "joint_blocks.*.x_block.adaLN_modulation.1": f"{BLOCK}.norm1.linear",
        "joint_blocks.*.context_block.adaLN_modulation.1": f"{BLOCK}.norm1_context.linear",
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    },
    swapped=("final_layer.adaLN_modulation.1",),
)
