"""Commands of DiffSynth-Studio, written for these tests from its documented flags, and what they become here."""

import json
from dataclasses import dataclass, field

QWEN = ",".join(
    f"Qwen/Qwen-Image:{files}"
    for files in (
        "transformer/diffusion_pytorch_model*.safetensors",
        "text_encoder/model*.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    )
)
LOCAL = "models/Qwen/Qwen-Image"
KLEIN = (
    "black-forest-labs/FLUX.2-klein-base-4B:transformer/*.safetensors,"
    "black-forest-labs/FLUX.2-klein-4B:text_encoder/*.safetensors,"
    "black-forest-labs/FLUX.2-klein-4B:vae/diffusion_pytorch_model.safetensors"
)
QWEN_TARGETS = (
    "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.0,to_add_out,img_mlp.net.2,img_mod.1,txt_mlp.net.2,"
    "txt_mod.1"
)
KLEIN_TARGETS = ",".join(
    [
        "to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,linear_in,linear_out,to_qkv_mlp_proj",
        *(f"single_transformer_blocks.{number}.attn.to_out" for number in range(20)),
    ]
)


def launch(family: str, launcher: str = "", **flags: str | bool) -> str:
    """A command as their scripts write it, one flag a line."""
    words = [f"--{name}" if value is True else f"--{name} '{value}'" for name, value in flags.items()]
    start = f"accelerate launch {launcher} examples/{family}/model_training/train.py".replace("  ", " ")
    return " \\\n  ".join([start, *words]) + "\n"


@dataclass
class Case:
    """A file of theirs.

    Args:
        text: What it says.
        ours: The words of each of our commands, the launcher's first ones included.
        said: The flags that are left out, refused or unknown.
        name: The file's.
    """

    text: str
    ours: list[str]
    said: set[str] = field(default_factory=set)
    name: str = "theirs.sh"


DATA = {"dataset_base_path": "data/set", "dataset_metadata_path": "data/set/metadata.csv"}

LORA = Case(
    "# Dataset: https://example.com\n"
    'modelscope download --dataset DiffSynth-Studio/diffsynth_example_dataset --include "qwen_image/*"\n\n'
    + launch(
        "qwen_image",
        **DATA,
        max_pixels="1048576",
        num_frames="81",
        dataset_repeat="50",
        model_id_with_origin_paths=QWEN,
        learning_rate="1e-4",
        num_epochs="5",
        remove_prefix_in_ckpt="pipe.dit.",
        output_path="./models/train/Qwen-Image_lora",
        lora_base_model="dit",
        lora_target_modules=QWEN_TARGETS,
        lora_rank="32",
        use_gradient_checkpointing=True,
        dataset_num_workers="8",
        find_unused_parameters=True,
    ),
    [
        "accelerate launch train.py model=qwen_image dataset=image_folder lr_scheduler=constant dataset.path=data/set "
        "dataset.metadata=metadata.csv dataset.repeat=50 dataset.num_workers=8 max_steps=null num_epochs=5 "
        "batch_size=1 output_root=models/train name=Qwen-Image_lora export.formats=[diffsynth] export.save_steps=null"
    ],
    {"find_unused_parameters"},
)
MANY_FLAGS = Case(
    launch(
        "qwen_image",
        "--num_processes 2",
        dataset_base_path="my pictures",
        dataset_metadata_path="elsewhere/table.jsonl",
        data_file_keys="image,loss_mask",
        height="512",
        width="768",
        max_pixels="262144",
        num_frames="49",
        model_paths=(
            f'["{LOCAL}/transformer/a.safetensors", ["{LOCAL}/text_encoder/1.safetensors", '
            f'"{LOCAL}/text_encoder/2.safetensors"]]'
        ),
        processor_path="Qwen/Qwen-Image-Edit:processor/",
        audio_processor_path="audio/",
        tokenizer_path="w/tokenizer",
        extra_inputs="loss_mask,layer_input_image",
        max_timestep_boundary="0.358",
        min_timestep_boundary="0.1",
        lora_base_model="dit",
        lora_rank="16",
        lora_checkpoint="a.safetensors",
        preset_lora_path="b.safetensors",
        preset_lora_model="dit",
        weight_decay="0.1",
        customized_optimizer="bitsandbytes.optim.AdamW8bit",
        gradient_accumulation_steps="4",
        save_steps="100",
        align_to_opensource_format=True,
        use_gradient_checkpointing_offload=True,
        quant_options=f"{LOCAL}/text_encoder/1.safetensors:bitsandbytes_nf4/lm_head",
        enable_optimizer_cpu_offload=True,
        cpu_offload_split_threshold="100",
        initialize_model_on_cpu=True,
        enable_tensorboard_log=True,
        enable_wandb_log=True,
        enable_csv_log=True,
        wandb_project="emoji",
        swanlab_project="emoji",
        enable_npu_patch=True,
        enable_lora_hot_loading=True,
        zero_cond_t=True,
        framewise_decoding=True,
        noise_scale="0.5",
        embedded_guidance="1",
        seed="42",
        made_up="3",
    ),
    [
        "accelerate launch --num_processes 2 train.py model=qwen_image dataset=image_folder optimizer=adamw_8bit "
        f"logger=[tensorboard,wandb] lr_scheduler=constant model.dit.path={LOCAL}/transformer/a.safetensors "
        f"model.text_encoder.path=[{LOCAL}/text_encoder/1.safetensors,{LOCAL}/text_encoder/2.safetensors] "
        "model.tokenizer.path=w/tokenizer 'dataset.path=my pictures' dataset.metadata=elsewhere/table.jsonl "
        "dataset.data_file_keys=[image,loss_mask] dataset.height=512 dataset.width=768 task.extra_inputs=[loss_mask] "
        "task.timesteps.max_boundary=0.358 task.timesteps.min_boundary=0.1 lora.rank=16 lora.checkpoint=a.safetensors "
        "lora.preset=b.safetensors optimizer.weight_decay=0.1 max_steps=null seed=42 "
        "memory.offload_activations=true memory.storage=nf4 memory.stored=[text_encoder] export.save_steps=25 "
        "logger.trackers.wandb.project=emoji"
    ],
    {
        *("max_pixels", "num_frames", "processor_path", "audio_processor_path", "extra_inputs", "preset_lora_model"),
        *("quant_options", "enable_optimizer_cpu_offload", "cpu_offload_split_threshold", "initialize_model_on_cpu"),
        *("enable_csv_log", "swanlab_project", "enable_npu_patch", "enable_lora_hot_loading", "zero_cond_t"),
        *("framewise_decoding", "noise_scale", "embedded_guidance", "made_up"),
    },
)
FULL = Case(
    launch(
        "qwen_image",
        "--config_file examples/qwen_image/model_training/full/accelerate_config_zero2offload.yaml",
        **DATA,
        model_id_with_origin_paths=QWEN.replace("Qwen/Qwen-Image:tr", "Qwen/Qwen-Image-2512:tr"),
        trainable_models="dit,blockwise_controlnet",
        remove_prefix_in_ckpt="pipe.",
        resume_from_checkpoint="./epoch-1.safetensors",
        enable_swanlab_log=True,
        enable_model_cpu_offload=True,
    ),
    [
        "accelerate launch --config_file conf/accelerate/zero2_offload.yaml train.py model=qwen_image_2512 "
        "dataset=image_folder lora=none logger=[swanlab] lr_scheduler=constant "
        "model.dit.path=epoch-1.safetensors dataset.path=data/set "
        "dataset.metadata=metadata.csv task.trainable_models=[dit] optimizer.lr=0.0001 max_steps=null "
        "export.remove_prefix_in_ckpt=pipe. export.save_steps=null"
    ],
    {"trainable_models", "enable_model_cpu_offload"},
)
TWO_STAGES = Case(
    launch(
        "flux2",
        **DATA,
        task="sft:data_process",
        model_id_with_origin_paths=KLEIN.partition(",")[2],
        output_path="./models/train/klein_cache",
        lora_base_model="dit",
        learning_rate="1e-4",
    )
    + launch(
        "flux2",
        "--config_file examples/low_vram/deepspeed_zero3_cpuoffload.yaml",
        task="sft:train",
        dataset_base_path="./models/train/klein_split_cache",
        model_id_with_origin_paths=KLEIN,
        offload_models=KLEIN.partition(",")[2],
        fp8_models=KLEIN,
        lora_base_model="dit",
        lora_target_modules=KLEIN_TARGETS,
        output_path="./models/train/klein",
    ),
    [
        "accelerate launch make_cache.py model=flux2_klein_base_4b dataset=image_folder dataset.path=data/set "
        "dataset.metadata=metadata.csv path=models/train/klein_cache",
        "accelerate launch --config_file conf/accelerate/zero3_offload.yaml train.py model=flux2_klein_base_4b "
        "dataset=cache lr_scheduler=constant model.text_encoder=null model.vae=null "
        "dataset.path=models/train/klein_cache max_steps=null batch_size=1 memory.storage=fp8 memory.stored=[dit] "
        "output_root=models/train name=klein export.formats=[diffsynth] export.save_steps=null",
    ],
    {"learning_rate", "offload_models", "fp8_models"},
)
TEMPLATE = Case(
    launch(
        "flux2",
        **DATA,
        extra_inputs="template_inputs",
        model_id_with_origin_paths=KLEIN,
        tokenizer_path="black-forest-labs/FLUX.2-klein-4B:tokenizer/",
        template_model_id_or_path="examples/flux2/brightness",
        trainable_models="template_model",
        remove_prefix_in_ckpt="pipe.template_model.",
    ),
    [
        "accelerate launch train.py model=flux2_klein_base_4b dataset=image_folder task=template "
        "lr_scheduler=constant dataset.path=data/set dataset.metadata=metadata.csv "
        "template.path=examples/flux2/brightness max_steps=null batch_size=1 export.save_steps=null"
    ],
    {"remove_prefix_in_ckpt"},
)
DISTILLATIONS = Case(
    launch(
        "qwen_image",
        **DATA,
        task="direct_distill",
        extra_inputs="seed,rand_device,num_inference_steps,cfg_scale",
        model_id_with_origin_paths=QWEN,
        lora_base_model="dit",
    )
    + launch(
        "qwen_image",
        **DATA,
        task="trajectory_imitation",
        model_id_with_origin_paths=QWEN,
        lora_base_model="dit",
    )
    + launch(
        "flux2",
        **DATA,
        model_id_with_origin_paths=KLEIN,
        trainable_models="dit",
        dmd2_student_update_freq="4",
        dmd2_matching_t_min="0.001",
        dmd2_matching_t_max="0.999",
        dmd2_teacher_cfg_scale="3",
        dmd2_gan_loss_weight="0.1",
        dmd2_fake_score_lr="1e-5",
        dmd2_sample_steps="2",
        dmd2_student_t_list="1,0",
        dmd2_student_sample_type="sde",
    ),
    [
        "accelerate launch train.py model=qwen_image dataset=image_folder task=distill teacher=none "
        "lr_scheduler=constant dataset.path=data/set dataset.metadata=metadata.csv max_steps=null batch_size=1 "
        "export.formats=[diffsynth] export.save_steps=null",
        "accelerate launch distill.py model=qwen_image task=distill/trajectory validation=none lr_scheduler=constant "
        "prompts.path=data/set/metadata.csv held_out=null task.student.num_inference_steps=8 "
        "task.teacher.num_inference_steps=50 task.teacher.cfg_scale=2 max_steps=null batch_size=1 "
        "export.formats=[diffsynth] export.save_steps=null",
        "accelerate launch train.py model=flux2_klein_base_4b dataset=image_folder task=distill/dmd2 teacher=none "
        "lora=none lr_scheduler=constant dataset.path=data/set dataset.metadata=metadata.csv "
        "task.trainable_models=[dit] optimizer.lr=0.0001 max_steps=null batch_size=1 task.student_every=4 "
        "task.min_sigma=0.001 task.max_sigma=0.999 task.guidance=3 task.adversarial_weight=0.1 "
        "task.fake_score.learning_rate=1e-5 task.student.num_inference_steps=2 export.save_steps=null",
    ],
    {"extra_inputs", "dataset_base_path", "dmd2_student_t_list", "dmd2_student_sample_type"},
)
ARGUMENTS = Case(  # every argument of the parser is in the file, most of them with its default
    json.dumps(
        {
            **DATA,
            "model_id_with_origin_paths": QWEN.replace("Qwen-Image:", "Qwen-Image-Edit-2511:"),
            "dataset_repeat": 1,
            "dataset_num_workers": 0,
            "data_file_keys": "image,edit_image",
            "extra_inputs": "edit_image",
            "height": None,
            "width": None,
            "max_pixels": 1048576,
            "num_frames": 81,
            "lora_base_model": "dit",
            "lora_target_modules": "",
            "lora_rank": 32,
            "learning_rate": 0.0001,
            "weight_decay": 0.01,
            "num_epochs": 2,
            "save_steps": None,
            "task": "sft",
            "trainable_models": None,
            "output_path": "./models",
            "remove_prefix_in_ckpt": "pipe.dit.",
            "gradient_accumulation_steps": 1,
            "use_gradient_checkpointing": True,
            "use_gradient_checkpointing_offload": False,
            "max_timestep_boundary": 1.0,
            "min_timestep_boundary": 0.0,
            "fp8_models": None,
        }
    ),
    [
        "accelerate launch train.py model=qwen_image_edit_2511 dataset=image_folder lr_scheduler=constant "
        "dataset.path=data/set dataset.metadata=metadata.csv lora.target_modules=all-linear "
        "max_steps=null num_epochs=2 batch_size=1 export.formats=[diffsynth] "
        "export.save_steps=null"
    ],
    name="training_args.json",
)
CONTROLNET = Case(
    launch(
        "z_image",
        **DATA,
        data_file_keys="image,controlnet_image",
        model_id_with_origin_paths="Tongyi-MAI/Z-Image:transformer/*.safetensors,own/Controlnet:model.safetensors",
        trainable_models="controlnet",
        extra_inputs="controlnet_image",
        remove_prefix_in_ckpt="pipe.controlnet.",
    ),
    [
        "accelerate launch train.py model=z_image_controlnet dataset=image_folder lora=none lr_scheduler=constant "
        "model.controlnet.path=null model.controlnet.model_id=own/Controlnet "
        "model.controlnet.origin_file_pattern=model.safetensors dataset.path=data/set dataset.metadata=metadata.csv "
        "task.trainable_models=[controlnet] optimizer.lr=0.0001 max_steps=null batch_size=1 "
        "export.remove_prefix_in_ckpt=pipe.controlnet. export.save_steps=null"
    ],
)
WAN_TARGETS = "q,k,v,o,ffn.0,ffn.2"


def wan(name: str, folder: str = "", targets: str = WAN_TARGETS, base: str = "dit", **flags: str) -> str:
    """A command that trains a LoRA of a model of Wan's, without CLIP."""
    vae = "Wan2.2_VAE.pth" if "5B" in name else "Wan2.1_VAE.pth"
    patterns = (f"{folder}diffusion_pytorch_model*.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", vae)
    model = {"model_id_with_origin_paths": ",".join(f"Wan-AI/{name}:{pattern}" for pattern in patterns)}
    lora = {"lora_base_model": base, "lora_target_modules": targets} if base else {}
    size = {"dataset_base_path": "data/video", "height": "480", "width": "832", "num_frames": "49"}
    return launch("wanvideo", **size | model | lora | flags)


def our_wan(model: str, words: str, before: str = "", last: str = "export.formats=[diffsynth] ") -> str:
    """What becomes of such a command: its words after the choices, and those after the size."""
    return (
        f"accelerate launch train.py model={model} {before}dataset=video_folder lr_scheduler=constant "
        f"dataset.path=data/video dataset.height=480 dataset.width=832 dataset.num_frames=49 {words}max_steps=null "
        f"batch_size=1 {last}export.save_steps=null"
    )


TWO_EXPERTS = Case(
    wan("Wan2.2-T2V-A14B", "high_noise_model/", max_timestep_boundary="0.417", min_timestep_boundary="0")
    + wan("Wan2.2-T2V-A14B", "low_noise_model/", max_timestep_boundary="1", min_timestep_boundary="0.417"),
    [
        our_wan("wan22_t2v_a14b", "", "expert=high "),
        our_wan("wan22_t2v_a14b", "", "expert=low "),
    ],
    {"max_timestep_boundary", "min_timestep_boundary"},
)
WAN = Case(
    wan("Wan2.1-T2V-1.3B", targets="ffn.0")
    + wan("Wan2.2-I2V-A14B", "low_noise_model/", "q,k", max_timestep_boundary="1", min_timestep_boundary="0.417")
    + wan("Wan2.2-TI2V-5B", extra_inputs="input_image")
    + wan("Wan2.1-VACE-1.3B", base="vace", remove_prefix_in_ckpt="pipe.vace.")
    + wan("Wan2.1-VACE-1.3B", base="", trainable_models="vace", remove_prefix_in_ckpt="pipe.vace.")
    + wan("Wan2.1-T2V-14B", base="", trainable_models="dit", model_paths='["umt5.pth"]'),
    [
        our_wan("wan21_t2v_1_3b", r"'lora.target_modules=blocks\.\d+\.ffn\.net\.0\.proj' "),
        our_wan(
            "wan22_i2v_a14b",
            "model.boundary=0.8748 'lora.target_modules=["
            + ",".join(rf"blocks\.\d+\.attn{number}\.to_{part}" for part in "qk" for number in "12")
            + "]' ",
            "expert=low ",
        ),
        our_wan("wan22_ti2v_5b", ""),
        our_wan("wan21_vace_1_3b", ""),
        our_wan(
            "wan21_vace_1_3b",
            "'task.trainable_models=[dit.vace_blocks,dit.vace_patch_embedding]' optimizer.lr=0.0001 ",
            last="",
        ).replace("lr_scheduler", "lora=none lr_scheduler"),
        our_wan("wan21_t2v_14b", "'task.trainable_models=[dit]' optimizer.lr=0.0001 ", last="").replace(
            "lr_scheduler", "lora=none lr_scheduler"
        ),
    ],
    {"remove_prefix_in_ckpt", "model_paths"},
)
ANIMA = Case(
    launch(
        "anima",
        **DATA,
        model_id_with_origin_paths=",".join(
            f"circlestone-labs/Anima:split_files/{file}.safetensors"
            for file in ("diffusion_models/anima-preview", "text_encoders/qwen_3_06b_base", "vae/qwen_image_vae")
        ),
        tokenizer_path="Qwen/Qwen3-0.6B:./",
        tokenizer_t5xxl_path="stabilityai/stable-diffusion-3.5-large:tokenizer_3/",
        lora_base_model="dit",
        lora_target_modules="q_proj,k_proj,v_proj,output_proj,layer1,layer2",
    ),
    [
        "accelerate launch train.py model=anima dataset=image_folder lr_scheduler=constant dataset.path=data/set "
        "dataset.metadata=metadata.csv max_steps=null batch_size=1 export.formats=[diffsynth] export.save_steps=null"
    ],
    {"tokenizer_path", "tokenizer_t5xxl_path"},
)
CASES = {
    "lora": LORA,
    "many_flags": MANY_FLAGS,
    "full": FULL,
    "two_stages": TWO_STAGES,
    "template": TEMPLATE,
    "distillations": DISTILLATIONS,
    "arguments": ARGUMENTS,
    "controlnet": CONTROLNET,
    "two_experts": TWO_EXPERTS,
    "wan": WAN,
    "anima": ANIMA,
}
