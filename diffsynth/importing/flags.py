"""The flags of DiffSynth-Studio's training scripts, and what each becomes here.

A row is a flag and its reader: `reader(value, theirs)` yields lines (`lines.py`). The order of the rows is that of the
words in our command.
"""

from . import data, tasks, trained, weights
from .lines import LeftOut, Refused, Set
from .theirs import Reader


def sets(key: str, otherwise: str = "") -> Reader:
    """The reader of a flag whose value is that of a key; see `Set`."""
    return lambda value, theirs: [Set(key, value, otherwise)]


def left_out(why: str) -> Reader:
    """The reader of a flag that needs nothing here."""
    return lambda value, theirs: [LeftOut(why)]


def refused(why: str) -> Reader:
    """The reader of a flag that has no counterpart."""
    return lambda value, theirs: [Refused(why)]


OFFLOADED = (
    "memory=streaming keeps frozen weights in host memory; for the optimizer, conf/accelerate/zero2_offload.yaml"
)
OF_PIPELINE = "no model here has such an input of the pipeline; train without it, or write a unit that reads it"
OF_DMD2 = "task=distill/dmd2 has no such setting; python train.py task=distill/dmd2 --help lists those that it has"

FLAGS: dict[str, Reader] = {
    # Model
    "model_id_with_origin_paths": weights.hub_files,
    "model_paths": weights.local_files,
    "tokenizer_path": weights.folder_of("tokenizer"),
    "tokenizer_t5xxl_path": weights.folder_of("t5_tokenizer"),
    "processor_path": weights.folder_of("processor"),
    "audio_processor_path": weights.folder_of("audio_processor"),
    "resume_from_checkpoint": weights.resume,
    # Data
    "dataset_base_path": data.base_path,
    "dataset_metadata_path": data.metadata_path,
    "data_file_keys": data.file_keys,
    "height": sets("dataset.height"),
    "width": sets("dataset.width"),
    "max_pixels": data.max_pixels,
    "num_frames": sets("dataset.num_frames", "images have no frames"),
    "dataset_repeat": sets("dataset.repeat"),
    "dataset_num_workers": data.workers,
    # Objective
    "task": tasks.task,
    "extra_inputs": data.extra_inputs,
    "max_timestep_boundary": tasks.boundary("max"),
    "min_timestep_boundary": tasks.boundary("min"),
    "template_model_id_or_path": tasks.template,
    # What is trained
    "trainable_models": trained.trainable_models,
    "lora_base_model": trained.lora_models,
    "lora_target_modules": trained.lora_targets,
    "lora_rank": sets("lora.rank"),
    "lora_checkpoint": sets("lora.checkpoint"),
    "preset_lora_path": sets("lora.preset"),
    "preset_lora_model": left_out("lora.preset is merged into the model that the new adapter is on"),
    "learning_rate": sets("optimizer.lr"),
    "weight_decay": sets("optimizer.weight_decay"),
    "customized_optimizer": trained.optimizer,
    "num_epochs": trained.epochs,
    "seed": sets("seed"),
    "gradient_accumulation_steps": trained.accumulation,
    # Memory
    "use_gradient_checkpointing": trained.checkpointing,
    "use_gradient_checkpointing_offload": trained.offloading,
    "fp8_models": weights.fp8_models,
    "quant_options": weights.quant_options,
    "offload_models": left_out("each stage loads only the networks that it needs"),
    "enable_model_cpu_offload": trained.streaming,
    "enable_optimizer_cpu_offload": left_out(OFFLOADED),
    "cpu_offload_split_threshold": left_out("memory.stream_blocks is the number of blocks in host memory"),
    "initialize_model_on_cpu": left_out("weights are mapped from their files, one tensor at a time"),
    # What is saved
    "output_path": trained.output_path,
    "save_steps": trained.save_steps,
    "align_to_opensource_format": trained.aligned,
    "remove_prefix_in_ckpt": trained.prefix,
    **{f"enable_{name}_log": tasks.tracker(name) for name in tasks.TRACKERS},
    **{f"{name}_project": tasks.project(name) for name in ("wandb", "swanlab")},
    "enable_csv_log": left_out("metrics.jsonl in the run's folder always has the losses"),
    # Of single families
    "find_unused_parameters": left_out("it is always on"),
    "enable_npu_patch": left_out("the networks are diffusers'; NPUs were not tried"),
    "enable_lora_hot_loading": left_out("a template's LoRA is applied without merging it"),
    "zero_cond_t": left_out("the transformer's own config.json says it"),
    "framewise_decoding": refused(OF_PIPELINE),
    "noise_scale": refused("the noise of the training has the scale 1 here; leave it out"),
    "embedded_guidance": left_out("a network that reads a guidance scale trains at 1, as theirs does"),
    # Of DMD2, with or without dmd2_ before them
    "student_update_freq": sets("task.student_every"),
    "matching_t_min": sets("task.min_sigma"),
    "matching_t_max": sets("task.max_sigma"),
    "teacher_cfg_scale": sets("task.guidance"),
    "gan_loss_weight": sets("task.adversarial_weight"),
    "fake_score_lr": sets("task.fake_score.learning_rate"),
    "sample_steps": sets("task.student.num_inference_steps"),
    "student_t_list": refused(OF_DMD2),
    "student_sample_type": left_out("theirs does not read it; student=renoise is the sampler with fresh noise"),
}


def reader(flag: str) -> Reader | None:
    """The reader of a flag; None if nobody knows the flag."""
    return FLAGS.get(flag) or FLAGS.get(flag.removeprefix("dmd2_"))
