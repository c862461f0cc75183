"""What DiffSynth-Studio's files say is read as the shell reads it: flags, launcher, and whose weights they are."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from studio_commands import KLEIN, KLEIN_TARGETS, QWEN

from diffsynth.importing.data import base_path, extra_inputs, file_keys
from diffsynth.importing.launch import launch_of
from diffsynth.importing.lines import Differs, Set
from diffsynth.importing.models import LACKING, Files, find_model, known_models
from diffsynth.importing.parsing import Command, read_commands
from diffsynth.importing.shell import statements
from diffsynth.importing.theirs import Theirs
from diffsynth.importing.trained import lora_targets, streaming
from diffsynth.importing.translate import PROJECT
from diffsynth.importing.weights import hub_files, quant_options

MODELS = list(known_models(PROJECT / "conf"))
KLEIN_4B, QWEN_IMAGE = (
    next(model for model in MODELS if model.name == name) for name in ("flux2_klein_base_4b", "qwen_image")
)
TRAIN = "accelerate launch train.py"


def read(text: str, folder, name: str = "theirs.sh") -> list[Command]:
    (folder / name).write_bytes(text.encode())
    return [command for statement in read_commands(folder / name) for command in statement.commands]


def written_back(text: str, folder) -> list[str]:
    """The statements of a script with T in the place of each training."""
    (folder / "theirs.sh").write_text(text, encoding="utf-8")
    parts = [statement.parts for statement in read_commands(folder / "theirs.sh")]
    return ["".join(part if isinstance(part, str) else "T" for part in each) for each in parts]


@pytest.mark.parametrize(
    "text, flags",
    [
        (f"{TRAIN} --lora_rank 8 --use_gradient_checkpointing --task sft", ["8", "true", "sft"]),
        (
            f"{TRAIN} \\\n  --lora_rank 8 \\\n# a comment\n  --use_gradient_checkpointing \\\n --task 'sft'",
            ["8", "true", "sft"],
        ),
        (
            f"{TRAIN} \\\r\n --lora_rank 8\\\r\n --use_gradient_checkpointing \\\r\n --task sft\r\n",
            ["8", "true", "sft"],
        ),
        (
            f"{TRAIN} \\ \n --lora_rank=8 --use_gradient_checkpointing --task sft  # rank --lora_rank 9",
            ["8", "true", "sft"],
        ),
        (f"cd x && {TRAIN} --lora_rank 8 --use_gradient_checkpointing --task 'sft' > log 2>&1 &", ["8", "true", "sft"]),
    ],
)
def test_flags_are_read_as_the_shell_reads_them(text, flags, tmp_path):
    *_, command = read(text, tmp_path)
    assert list(command.flags) == ["lora_rank", "use_gradient_checkpointing", "task"]
    assert list(command.flags.values()) == flags


def test_a_list_of_files_may_have_several_lines(tmp_path):
    (command,) = read(f'{TRAIN} --model_paths \'[\n"a/b.safetensors",\n["c", "d"]\n]\' \\\n--task sft', tmp_path)
    assert command.flags["model_paths"].split() == ["[", '"a/b.safetensors",', '["c",', '"d"]', "]"]


@pytest.mark.parametrize(
    "statement",
    [
        'OUT="my models"',
        'mkdir -p "$OUT" ~/data',
        "echo s > log.txt 2>&1",
        "ls | wc -l || true",
        "modelscope download 'a b' && rm -f c",
        "ARGS=(a 'b c'  # it's\n d)",
        "cat <<'X' > notes\nit's; train.py --task sft\nX",
        'echo "$(date "+%s; it\'s")" `hostname` ${A:-"b c"} $((1 + 2))',
        "if [ -d a ]; then\n  rm -r a  # it's old\nfi",
        "f() {\n  echo a; echo b\n}",
        "case $A in\n  a) echo b ;;\n  *) echo c\nesac",
        "sleep 9 &",
        "echo a\xa0b\f",
    ],
)
def test_other_commands_stay_as_they_are(statement, tmp_path):
    assert written_back(f"# it's\n{statement}\n{TRAIN} --task sft", tmp_path) == [statement, "T"]


@pytest.mark.parametrize(
    "text, statements",
    [
        (f"{TRAIN} --task sft &> log", ["T &> log"]),
        (f"{TRAIN} --task sft &>>log", ["T &>>log"]),
        (f"{TRAIN} --task sft 2>&1 | tee log", ["T 2>&1 | tee log"]),
        (f"{TRAIN} --task sft > log --lora_rank 8", ["T > log"]),
        (f"{TRAIN} --task sft & {TRAIN} --task sft&", ["T &", "T&"]),
        (f"{TRAIN} --task sft; wait", ["T", "wait"]),
        (f"A=1 nohup env B=2 {TRAIN} --task sft &", ["A=1 nohup env B=2 T &"]),
        (f"mkdir a && cd a && {TRAIN} --task sft && echo done", ["mkdir a && T && echo done"]),
        (f"(cd a; {TRAIN} --task sft) > log", ["(T) > log"]),
        (f"for a in 1 2; do\n  {TRAIN} --lora_rank $a\ndone\necho", ["for a in 1 2; do\n  T\ndone", "echo"]),
        ("torchrun --standalone train.py --task sft", ["T"]),
    ],
)
def test_a_training_is_taken_out_of_its_statement(text, statements, tmp_path):
    assert written_back(text, tmp_path) == statements


def test_a_folder_that_a_script_goes_to_is_said(tmp_path):
    (command,) = read(f"cd their/repository && {TRAIN} --task sft", tmp_path)
    assert command.folder == "cd their/repository"
    (tmp_path / "theirs.sh").write_text(f"cd their/repository || exit 1\n{TRAIN} --task sft", encoding="utf-8")
    alone, _ = read_commands(tmp_path / "theirs.sh")
    assert alone.parts == ("cd their/repository || exit 1",) and "the folder of train.py" in alone.problem


def test_a_python_script_of_theirs_is_not_carried_over(tmp_path):
    (tmp_path / "theirs.sh").write_text(f"{TRAIN} --task sft\npython examples/validate.py --seed 1", encoding="utf-8")
    training, validation = read_commands(tmp_path / "theirs.sh")
    assert not training.problem and validation.parts == ("python examples/validate.py --seed 1",)
    assert validation.problem == "examples/validate.py is a Python script that is not of this project"


def test_a_value_that_the_shell_makes_is_known_as_one(tmp_path):
    flags = '--a $A --b "x/${B}" --c `date` --d $(date) --e ~/data --f \'a.*$\' --g "a.*$" --h \\$A --i=$I'
    (command,) = read(f"{TRAIN} {flags}", tmp_path)
    assert command.variables == {"a", "b", "c", "d", "e", "i"}
    assert (command.flags["f"], command.flags["g"], command.flags["h"]) == ("a.*$", "a.*$", "$A")


@given(st.text(alphabet="ab \n\t;&|<>()'\"\\$`#{}=~\xa0"))
@settings(max_examples=200, deadline=None)
def test_any_script_is_cut_into_its_own_text_or_refused(text):
    try:
        found = list(statements(text))
    except ValueError as error:
        assert "close the quote" in str(error)
        return
    places = [place for each in found for place in (each.start, each.end)]
    assert places == sorted(places) and all(0 <= place <= len(text) for place in places)


def test_false_and_null_are_absent_from_a_runs_arguments_and_zero_is_not(tmp_path):
    text = '{"a": null, "b": false, "c": true, "d": 0, "e": 0.5, "f": "", "lora_target_modules": ""}'
    (command,) = read(text, tmp_path, "training_args.json")
    assert command.flags == {"c": "true", "d": "0", "e": "0.5", "lora_target_modules": ""}


@pytest.mark.parametrize(
    "text, error",
    [
        ("echo nothing", "has no command of DiffSynth-Studio; expected a script with `accelerate launch"),
        (f"{TRAIN} --task 'sft", "line 1: No closing quotation for .*; close the quote"),
        ('{"task": ', "theirs.sh is no JSON"),
    ],
)
def test_a_file_that_is_none_of_theirs_is_refused(text, error, tmp_path):
    with pytest.raises(ValueError, match=error):
        read(text, tmp_path)


@pytest.mark.parametrize(
    "text, problem",
    [
        (f"{TRAIN} stray --task sft", "'stray' after train.py belongs to no flag; expected --flag value"),
        (f'{TRAIN} --task sft "${{ARGS[@]}}"', ""),
        ("deepspeed --num_gpus 2 train.py --task sft", "'deepspeed' starts train.py; expected accelerate launch"),
        ("accelerate launch --num_processes $N train.py --task sft", "accelerate launch --num_processes $N: the shell"),
    ],
)
def test_a_command_that_cannot_be_read_leaves_the_others(text, problem, tmp_path):
    mistaken, command = read(f"{text}\n{TRAIN} --lora_rank 8", tmp_path)
    assert mistaken.problem.startswith(problem) and bool(mistaken.problem) == bool(problem)
    assert command == Command({"lora_rank": "8"}, "train.py")


LAUNCHES = {
    ("", ""): (["accelerate", "launch"], 1),
    ("--num_processes 4 --mixed_precision bf16", ""): (["accelerate", "launch", "--num_processes", "4"], 4),
    ("torchrun --nproc_per_node=2 --nnodes 2 --standalone", ""): (
        ["accelerate", "launch", "--num_processes", "4", "--num_machines", "2"],
        4,
    ),
    ("--config_file full/accelerate_config_14B.yaml", ""): ("zero2_offload", [], 8),
    ("--config_file full/accelerate_config.yaml", ""): ("zero2", [], 8),
    ("--config_file a.yaml", "distributed_type: MULTI_GPU\nnum_processes: 2\n"): ("ddp", ["--num_processes", "2"], 2),
    ("--config_file a.yaml", "deepspeed_config:\n  zero_stage: 2\nnum_processes: 8\n"): ("zero2", [], 8),
    ("--config_file a.yaml", "deepspeed_config:\n  zero_stage: 3\nnum_processes: 1\n"): ("zero3_offload", [], 1),
    (
        "--config_file a.yaml",
        "deepspeed_config:\n  zero_stage: 2\n  offload_optimizer_device: cpu\nnum_processes: 8\n",
    ): ("zero2_offload", [], 8),
    (
        "--config_file a.yaml",
        "deepspeed_config:\n  zero_stage: 2\n  offload_optimizer_device: none\nnum_processes: 8\n",
    ): ("zero2", [], 8),
}


@pytest.mark.parametrize("launcher, file", LAUNCHES)
def test_their_launcher_file_has_a_counterpart(launcher, file, tmp_path):
    script = tmp_path / "lora" / "theirs.sh"
    script.parent.mkdir()
    if file:
        (tmp_path / "a.yaml").write_text(file, encoding="utf-8")
    found = launch_of(Command({}, launcher=tuple(launcher.split())), script, PROJECT)
    *option, own, processes = LAUNCHES[launcher, file]
    words = ["accelerate", "launch", "--config_file", f"conf/accelerate/{option[0]}.yaml", *own] if option else own
    assert (found.words, found.processes) == (words, processes)
    says_that_it_is_absent = any(isinstance(line, Differs) for _, line in found.lines)
    assert says_that_it_is_absent == bool(option and not file)


COMPONENTS = {
    "Qwen/Qwen-Image:transformer/diffusion_pytorch_model*.safetensors": "dit",
    "Qwen/Qwen-Image:text_encoder/model*.safetensors": "text_encoder",
    "Qwen/Qwen-Image:vae/diffusion_pytorch_model.safetensors": "vae",
    "Wan-AI/Wan2.1-VACE-1.3B:diffusion_pytorch_model*.safetensors": "dit",
    "Wan-AI/Wan2.2-T2V-A14B:models_t5_umt5-xxl-enc-bf16.pth": "text_encoder",
    "Wan-AI/Wan2.2-T2V-A14B:Wan2.1_VAE.pth": "vae",
    "Wan-AI/Wan2.1-I2V-14B-480P:models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "image_encoder",
    "black-forest-labs/FLUX.1-dev:flux1-dev.safetensors": "dit",
    "black-forest-labs/FLUX.1-dev:text_encoder_2/*.safetensors": "text_encoder_2",
    "black-forest-labs/FLUX.1-dev:ae.safetensors": "vae",
    "DiffSynth-Studio/Qwen-Image-Blockwise-ControlNet-Canny:model.safetensors": "controlnet",
}


@pytest.mark.parametrize("text, component", COMPONENTS.items())
def test_components_are_known_by_the_names_of_their_files(text, component):
    assert Files(*text.split(":")).component == component


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_with_a_file_is_found_by_its_transformer_and_its_other_networks(model):
    files = [
        Files(model.components["dit"]["model_id"], "transformer/x"),
        *(Files("a/b", f"{n}/x") for n in model.networks),
    ]
    assert find_model(files, MODELS).components == model.components  # an option for editing may have the same networks


def test_weights_of_another_layout_are_those_that_a_model_here_reads():
    klein = "black-forest-labs/FLUX.2-klein-4B"
    flags = {"model_id_with_origin_paths": f"{klein}:ae.safetensors,own/encoder:text_encoder/a.safetensors"}
    vae_id, vae_pattern, differs, encoder_id, encoder_pattern = hub_files("", Theirs(flags, PROJECT, KLEIN_4B))
    assert (vae_id.value, vae_pattern.value) == (klein, "vae/diffusion_pytorch_model.safetensors")
    assert differs.how.startswith(f"{klein}:ae.safetensors is read as vae/diffusion_pytorch_model.safetensors")
    assert (encoder_id.value, encoder_pattern.value) == ("own/encoder", "text_encoder/a.safetensors")


def test_the_second_stage_reads_what_the_first_one_makes():
    theirs = Theirs({"task": "sft:train"}, PROJECT, cache="made")
    *words, elsewhere, pickles = base_path("./other", theirs)
    assert words == [Set("dataset", "cache"), Set("dataset.path", "made")]
    assert "second stage reads other, but their first one writes made" in elsewhere.how
    assert "(.pth files) is refused" in pickles.how
    *_, alone, _ = base_path("./other", replace(theirs, cache=""))
    assert alone == Set("dataset.path", "other")


def test_an_input_with_another_name_here_has_ours():
    theirs = Theirs({"data_file_keys": "image,kontext_images", "extra_inputs": "kontext_images"}, PROJECT, KLEIN_4B)
    assert [*file_keys(theirs["data_file_keys"], theirs)][0].value == "[image,edit_image]"
    inputs, differs = extra_inputs("kontext_images", theirs)
    assert inputs.value == "[edit_image]" and "rename it in the table" in differs.how


@pytest.mark.parametrize("pattern, family", LACKING.items())
def test_a_family_without_a_file_is_named(pattern, family):
    files, others = Files(pattern.replace("*", "-new"), "transformer/x.safetensors"), [QWEN_IMAGE, KLEIN_4B]
    with pytest.raises(LookupError, match=f"{files.model_id}: the family {family} has no file in conf/model/ yet"):
        find_model([files], others)
    own = replace(QWEN_IMAGE, name="own", node={"dit": {"model_id": pattern.replace("*", "-old")}})
    with pytest.raises(LookupError, match="this model has no file .*; if the weights fit own, type it, model="):
        find_model([files], [*others, own])


STREAMS, PARTS = ("img", "txt"), ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
ORIGINAL = ",".join([*(f"{stream}_{part}" for stream in STREAMS for part in PARTS), "linear1", "linear2"])


@pytest.mark.parametrize(
    "targets, words",
    [
        (KLEIN_TARGETS, []),  # every block by its number
        (KLEIN_TARGETS.rpartition(",")[0], [KLEIN_TARGETS.rpartition(",")[0]]),  # all blocks but one
        (ORIGINAL, []),  # every layer of the defaults by its name in the original code
        (  # some of them: in blocks of one kind alone
            "img_attn.proj,txt_mlp.2",
            [r"transformer_blocks\.\d+\.attn\.to_out\.0,transformer_blocks\.\d+\.ff_context\.linear_out"],
        ),
        ("to_q,to_k", ["to_q,to_k"]),
        (r".*\.to_q", [r".*\.to_q"]),  # one alone is a regular expression
    ],
)
def test_layers_have_our_names_and_the_defaults_are_left_out(targets, words):
    flags = {"lora_base_model": "dit", "lora_target_modules": targets}
    lines = list(lora_targets(targets, Theirs(flags, PROJECT, KLEIN_4B)))
    typed = [f"[{word}]" if "," in word else word for word in words]
    assert lines == [Set("lora.target_modules", word) for word in typed]


def test_half_of_the_blocks_stream():
    flags = {"lora_base_model": "dit"}
    streamed = list(streaming("true", Theirs(flags, PROJECT, KLEIN_4B)))
    assert streamed == [Set("memory", "streaming"), Set("memory.stream_blocks", "12")]  # of 5 + 20
    assert list(streaming("true", Theirs(flags, PROJECT, QWEN_IMAGE))) == streamed[:1]  # half of Qwen-Image's already


@pytest.mark.parametrize(
    "value, storage",
    [
        (f"{QWEN.split(',')[0]}:bitsandbytes_nf4", "nf4"),
        (f'{{"{QWEN.split(",")[0]}": {{"method": "torchao_int8_w8a16"}}}}', "int8"),
        (f"{QWEN.split(',')[0]}:comfy_kitchen_int8_w8a8", None),
        (f"{QWEN.split(',')[0]}:bitsandbytes_nf4;{QWEN.split(',')[1]}:torchao_fp8_w8a16", None),
    ],
)
def test_one_format_of_frozen_weights_is_kept_and_others_are_refused(value, storage):
    flags = {"quant_options": value, "model_id_with_origin_paths": QWEN}
    lines = list(quant_options(value, Theirs(flags, PROJECT, QWEN_IMAGE)))
    assert lines[:1] == [Set("memory.storage", storage)] if storage else "type memory.storage=nf4" in lines[0].why
    assert not storage or lines[1] == Set("memory.stored", "[dit]")


def test_klein_reads_its_encoder_from_another_repository():
    assert find_model([Files(*each.rsplit(":", 1)) for each in KLEIN.split(",")], MODELS).name == "flux2_klein_base_4b"
