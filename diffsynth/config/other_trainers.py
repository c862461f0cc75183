"""What other trainers call the keys of this one; error messages alone know these names."""

import re
from collections.abc import Collection

# What to type: the names in kohya's scripts, diffusers' examples and DiffSynth-Studio. `{}` is the value. Of several
# rows with one name, the first counts whose keys the script has.
NAMES = {
    "optimizer.lr={}": "learning_rate lr unet_lr",
    "optimizer.weight_decay={}": "weight_decay adam_weight_decay",
    "optimizer=…": "optimizer_type optimizer_name",
    "optimizer=adamw_8bit": "use_8bit_adam",
    "logger=[{}]": "report_to log_with",
    "lr_scheduler.num_warmup_steps={}": "lr_warmup_steps warmup_steps",
    "lora.rank={}": "rank lora_rank lora_r lora_dim network_dim",
    "lora.alpha={}": "alpha lora_alpha network_alpha",
    "lora.dropout={}": "lora_dropout network_dropout",
    "lora.models=[{}]": "lora_base_model",
    "lora.target_modules=[{}]": "lora_target_modules lora_layers",
    "lora.checkpoint={}": "lora_checkpoint network_weights",
    "lora.preset={}": "preset_lora_path base_weights",
    "lora=none task.trainable_models=[{}]": "trainable_models",
    "task.extra_inputs=[{}]": "extra_inputs",
    "task=prior": "with_prior_preservation prior_loss_weight class_data_dir reg_data_dir",
    "max_steps={}": "max_train_steps num_train_steps train_steps steps iterations",
    "max_steps=null num_epochs={}": "num_epochs num_train_epochs max_train_epochs epochs",
    "batch_size={}": "train_batch_size",
    "micro_batch_size={}": "per_device_train_batch_size per_gpu_batch_size",
    "batch_size=… micro_batch_size=…": "gradient_accumulation_steps accumulation_steps",
    "memory=checkpointing": "gradient_checkpointing use_gradient_checkpointing",
    "memory=checkpointing_offload": "use_gradient_checkpointing_offload",
    "memory=fp8": "fp8_base fp8_models",
    "ema=power": "use_ema",
    "dataset=image_folder dataset.path={}": "train_data_dir instance_data_dir data_dir dataset_base_path data_path",
    "dataset=hf_dataset dataset.path={}": "dataset_name",
    "dataset.metadata={}": "in_json metadata_path dataset_metadata_path",
    "dataset.data_file_keys=[{}]": "data_file_keys image_column",
    "dataset.height={} dataset.width={}": "resolution image_size",
    "dataset.height={}": "height",
    "dataset.width={}": "width",
    "dataset.max_pixels={}": "max_pixels",
    "dataset.buckets=true": "enable_bucket",
    "dataset.repeat={}": "num_repeats repeats dataset_repeat dataset_repeats",
    "dataset.num_workers={}": "dataloader_num_workers max_data_loader_n_workers dataset_num_workers",
    "dataset.augmentation.prefix={}": "instance_prompt trigger trigger_word trigger_words",
    "dataset.augmentation.caption_dropout={}": "caption_dropout_rate",
    "dataset.augmentation.shuffle_tags=true": "shuffle_caption",
    "dataset.augmentation.flip=0.5": "flip_aug random_flip",
    'validation.prompts=["{}"]': "validation_prompt",
    "validation.prompts=[{}]": "validation_prompts sample_prompts",
    "validation.every={}": "validation_steps eval_steps sample_every_n_steps",
    "export.save_steps={}": "save_steps save_every_n_steps",
    "export.remove_prefix_in_ckpt={}": "remove_prefix_in_ckpt",
    "checkpoint.every={}": "checkpointing_steps",
    "logger=[…]": "report_to log_with",
    "model=…": "model_id model_paths model_name base_model model_id_with_origin_paths pretrained_model_name_or_path",
    "path={}": "output_dir output_path out_dir outdir",
    "output={}": "output_dir output_path out_dir outdir",
    "output_root={}": "output_dir output_path out_dir outdir",
    "name={}": "output_name run_name",
    "options.num_inference_steps={}": "num_steps steps inference_steps sample_steps",
    "options.cfg_scale={}": "cfg guidance_scale scale",
    "options.height={} options.width={}": "resolution size image_size",
    "options.height={}": "height",
    "options.width={}": "width",
    "lora_path={}": "lora lora_weights lora_file adapter",
    "lora_scale={}": "lora_weight lora_multiplier network_mul",
    "negative_prompt={}": "n_prompt negative",
    "input_image={}": "image init_image",
    "inpaint_mask={}": "mask mask_image",
    "denoising_strength={}": "strength",
}

# What a name needs besides what is to be typed.
NOTES = dict.fromkeys(
    ("gradient_accumulation_steps", "accumulation_steps"), ", with batch_size = {} × micro_batch_size × devices"
)
# Names that need nothing here, by the reason.
NOT_NEEDED = {
    "the same command goes on from the last checkpoint": "resume resume_from_checkpoint",
    "networks compute in model.torch_dtype": "mixed_precision full_bf16 full_fp16",
    "torch's own attention is used": "xformers enable_xformers_memory_efficient_attention sdpa mem_eff_attn",
    "an adapter is trained by default; lora=… chooses its kind": "network_module network_train_unet_only",
    "without a table, dataset=image_folder takes the .txt beside each image": "caption_extension caption_extention",
}


def not_needed(name: str) -> str:
    """Return why a key of another trainer needs nothing here; an empty text for other names."""
    return next((reason for reason, names in NOT_NEEDED.items() if name.replace("-", "_") in names.split()), "")


def spelled_here(name: str, value: str, keys: Collection[str]) -> list[str]:
    """Return what to type for a key of another trainer, word by word; an empty list if no row for this script has it.

    Args:
        name: The key, also with dashes between its words.
        value: Its value; if empty, `…`.
        keys: Keys at the top level of the script's configuration.
    """
    for spelling, names in NAMES.items():
        words = spelling.split()
        is_known_here = all(re.split("[.=]", word)[0] in keys for word in words)
        if is_known_here and name.replace("-", "_") in names.split():
            return [word.replace("{}", value or "…") for word in words]
    return []
