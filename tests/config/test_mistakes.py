"""Error messages for a wrong command line or experiment."""

import re
import sys

import pytest
import tiny
from conf_folder import CONF, options
from tiny import complaint, mostly_slow

from diffsynth.config.other_trainers import NAMES
from diffsynth.config.script import is_key


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Says what the command line answers to an experiment of this content."""

    def answer(content: str) -> str:
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n" + content)
        return complaint(monkeypatch, "--config-dir", str(tmp_path), "experiment=mine", f"output_root={tmp_path}")

    return answer


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_misspelt_key_on_the_command_line_is_answered_with_the_nearest(prefix, monkeypatch, tmp_path):
    message = complaint(monkeypatch, f"{prefix}lora.rnak=8", f"output_root={tmp_path}")
    assert "lora.rnak" in message and "'rnak'" in message and "did you mean lora.rank?" in message


def test_a_misspelt_key_in_an_experiment_is_answered_with_the_nearest(experiment):
    message = experiment("lora: {rnak: 8}")
    assert "lora.rnak" in message and "'rnak'" in message and "did you mean lora.rank?" in message


def test_a_misspelt_key_at_the_top_of_an_experiment_is_answered_with_the_nearest(experiment):
    assert "no such key 'batchsize'; did you mean batch_size?" in experiment("batchsize: 8")


@pytest.mark.parametrize(
    "removed, answer",
    [
        ("~data_report", "data_report is missing: add `data_report: …` to the YAML file of the experiment."),
        (
            "~export.output_path",
            "and ModelLogger requires it: add `output_path: …` to the YAML file of export.",
        ),
    ],
)
def test_a_key_that_is_missing_is_answered_with_the_line_to_add(removed, answer, monkeypatch, tmp_path):
    assert answer in complaint(monkeypatch, removed, f"output_root={tmp_path}")


def test_the_first_of_several_misspelt_keys_is_answered(monkeypatch):
    assert "did you mean lora.rank?" in complaint(monkeypatch, "-m", "lora.rnak=8", "optimiser.lr=1", "lora=dora,lora")


FOLDERS = {
    "train.py": "output_root",
    "distill.py": "output_root",
    "make_cache.py": "path",
    "plan.py": "path",
    "generate.py": "output",
    "fuse.py": "output",
}


@pytest.mark.parametrize("script", mostly_slow(FOLDERS, "train.py", "plan.py"))
def test_a_folder_that_cannot_be_written_to_is_answered_with_its_key(script, monkeypatch, tmp_path):
    key = FOLDERS[script]
    (tmp_path / "file").write_text("where a folder should be")
    message = complaint(monkeypatch, f"{key}={tmp_path}/file/folder", script=script)
    assert f"{tmp_path}/file" in message and f"; set {key}=… to a folder that can be written to." in message


def test_what_is_no_override_is_answered_in_one_line(monkeypatch):
    assert "seed=[1" in complaint(monkeypatch, "seed=[1")


def test_a_key_below_one_that_is_not_there_is_answered_for_that_one(monkeypatch):
    assert "template: no such key 'template'; there are " in complaint(monkeypatch, "template.path=somewhere")


def test_a_misspelt_group_is_answered_with_the_nearest(monkeypatch):
    assert "did you mean model?" in complaint(monkeypatch, "modle=emoji")


@pytest.mark.parametrize(
    "chosen, answer",
    [
        (["memory=[none,checkpointing]"], ["memory=checkpointing and memory=none", "memory.checkpointing is blocks"]),
        (["memory=[fp8,streaming,int8]"], ["memory=fp8 and memory=int8", "memory.storage is fp8"]),
        (["task.timesteps={min_bond: 1}"], "no such key 'min_bond'; did you mean task.timesteps.min_boundary?"),
        (["teacher=none"], ["task=sft has no group teacher", "distill/dmd2"]),
        (["validation=[none,lpips]"], ["validation=none and validation=lpips contradict each other"]),
        (["validation=[emoji,none]"], ["validation=none and validation=emoji contradict each other"]),
        (["memory=null"], ["memory=null names no option", "--help"]),
        (["experiment=[emoji_distill/add]"], ["an experiment of distill.py, not of train.py"]),
    ],
)
def test_choices_that_contradict_each_other_are_named(chosen, answer, monkeypatch, tmp_path):
    message = complaint(monkeypatch, *chosen, f"output_root={tmp_path}")
    assert all(part in message for part in answer), message


def test_options_of_an_experiment_that_contradict_each_other_are_named(experiment):
    message = experiment("defaults:\n  - override /memory: [fp8, int8]\n")
    assert "memory=fp8 and memory=int8 contradict each other" in message


@pytest.mark.parametrize(
    "script, experiment, other",
    [
        ("train.py", "emoji_distill/dmd2", "distill.py"),
        ("distill.py", "emoji/pretrain", "train.py"),
        ("plan.py", "emoji_distill/lcm", "distill.py"),
    ],
)
def test_an_experiment_refuses_the_wrong_script_and_names_the_right_one(script, experiment, other, monkeypatch):
    message = complaint(monkeypatch, f"experiment={experiment}", script=script)
    assert message.startswith(
        f"error: experiment={experiment} is an experiment of {other}, not of {script}; run python {other} "
        f"experiment={experiment}"
    )
    assert ("to plan a distillation, python plan.py task=distill/…" in message) == (script == "plan.py")


def test_a_machines_own_file_that_is_not_there_is_named(monkeypatch):
    assert "nowhere.yaml does not exist" in complaint(monkeypatch, "local=nowhere")


def test_a_group_that_a_script_has_not_is_answered_with_those_it_has(monkeypatch):
    message = complaint(monkeypatch, "dataset=emoji", script="generate.py")
    assert "dataset: generate.py has no such group; it has model." in message


TRAINING = [
    (["lora=dara"], "lora=dara: no such option; did you mean lora=dora"),
    (["memory=[fp8,zzz]"], "memory=zzz: no such option; there are base, checkpointing, "),
    (["task=distill/dmd"], "task=distill/dmd: no such option; did you mean task=distill/dmd2"),
    (["model=Qwen-Image"], "did you mean model=qwen_image? there are qwen_image, qwen_image_21, "),
    (["model=Qwen/Qwen-Image"], "did you mean model=qwen_image?"),
    (["model=qwen"], "did you mean model=qwen_image or model=qwen_image_21 or "),
    (["model=FLUX.2-klein-4B"], "did you mean model=flux2_klein_4b or "),
    (["model=/my/weights"], "type model=… model.dit.path=/my/weights"),
    (["dataset=my_images"], "type dataset=image_folder dataset.path=my_images"),
    (["dataset=my (own) images"], 'type dataset=image_folder dataset.path="my (own) images"'),
    (["lora=x.safetensors"], "type lora.checkpoint=x.safetensors"),
    (["rank=8"], "no such key 'rank'; type lora.rank=8"),
    (["learning_rate=1e-4"], "no such key 'learning_rate'; type optimizer.lr=1e-4"),
    (["optimizer.learning_rate=1e-4"], "type optimizer.lr=1e-4"),
    (["resolution=512"], "type dataset.height=512 dataset.width=512"),
    (["model_id=Qwen/Qwen-Image"], "type model=qwen_image"),
    (["task.timesteps={min_bond: 1}"], "no such key 'min_bond'; did you mean task.timesteps.min_boundary?"),
    (["dataset.metdata=a, b"], "did you mean dataset.metadata?"),
    (["lora.rank", "=", "8"], "lora.rank: expected key=value, without spaces around =; type lora.rank=8"),
    (["lora.rank=", "8"], "type lora.rank=8"),
    (["lora.rank", "=8"], "type lora.rank=8"),
    (["lora.rank = 8"], "type lora.rank=8"),
    (["name=x", "lora.rank", "8"], "type lora.rank=8"),
    (["--lora.rank", "8"], "--lora.rank: keys are written without dashes; type lora.rank=8"),
    (["--lora.rank=8"], "type lora.rank=8"),
    (["--lora_rank", "8"], "type lora.rank=8"),
    (["--learning_rate=1e-4"], "type optimizer.lr=1e-4"),
    (["--lora_target_modules", "to_q", "to_k"], 'type "lora.target_modules=[to_q,to_k]"'),
    (["--dataset_base_path", "my images"], 'type dataset=image_folder "dataset.path=my images"'),
    (["--model_id_with_origin_paths", "Qwen/Qwen-Image:transformer/*,Qwen/Qwen-Image:vae/*"], "type model=qwen_image"),
    (["--output_path", "x"], "type output_root=x"),
    (["--num_epochs", "5"], "type max_steps=null num_epochs=5"),
    (["--lora.rnk", "8"], "did you mean lora.rank?"),
    (["lora=none", "lora.rank=4"], "the chosen option of lora has no keys; choose one that has, such as lora=lora;"),
    (["validation=none", "validation.prompts=[a]"], "such as validation=emoji;"),
    (["ema.decay=0.9"], "such as ema=power; python train.py ema=power --help lists its keys"),
    (["max_steps=2,3"], "max_steps is one number; for one run per choice type -m max_steps=2,3"),
    (
        ["lora=lora,dora"],
        'for one run per choice type -m lora=lora,dora, for all of them in one run "lora=[lora,dora]"',
    ),
    (["optimizer.betas=0.9,0.99"], 'optimizer.betas is a list; type "optimizer.betas=[0.9,0.99]"'),
    (["validation.prompts=a cat, sitting"], "is a list; type 'validation.prompts=[\"a cat, sitting\"]'"),
    (
        ["--gradient_accumulation_steps=4"],
        "type batch_size=… micro_batch_size=…, with batch_size = 4 × micro_batch_size × devices",
    ),
    (["--report_to", "wandb"], 'type "logger=[wandb]"'),
    (["--optimizer_type", "AdamW8bit"], "type optimizer=adamw_8bit"),
    (["--validation_prompt=a cat"], "type 'validation.prompts=[\"a cat\"]'"),
    (["--resume_from_checkpoint", "latest"], "not needed: the same command goes on from the last checkpoint"),
    (["mixed_precision=bf16"], "not needed: networks compute in model.torch_dtype"),
    (["--xformers"], "not needed: torch's own attention"),
    (["--network_module=networks.lora"], "not needed: an adapter is trained by default"),
    (["--caption_extension", ".txt"], "not needed: without a table"),
    (["--seed"], "type seed=…"),
    (["--config", "/runs/a/config.yaml"], "--config-path /runs/a --config-name config"),
    (["--config-name"], "expected one argument"),
    (["--help_me"], "--help_me: no such flag; did you mean --help?"),
    (
        ["dataset=image_folder", "dataset.path=x dataset.height=64"],
        "dataset.height= stands in the quotes of dataset.path; type dataset.path=x dataset.height=64",
    ),
    (
        ["max_steps=1e3"],
        "a whole number of at least 1, or null; type max_steps=1000",
    ),
    (["+lora.rank=8"], "lora.rank is; type lora.rank=8"),
    (["++foo=1"], "foo: no such key 'foo'; there are batch_size, "),
    (["lora.rank=[1"], "lora.rank=[1: expected a number, true, false, null, a list such as [a,b]"),
]
SAMPLING = [
    (["prompt=costs ${5"], "${ begins a reference to another key, such as ${name}"),
    (["promt=a, b"], "no such key 'promt'; did you mean prompt?"),
    (
        ["prompt=a", "cat"],
        'cat: expected key=value; if it belongs to the value before it, type quotes around both: "prompt=a cat"',
    ),
    (["prompt=", "a cat"], 'type "prompt=a cat"'),
    (["num_inference_steps=4"], "did you mean options.num_inference_steps?"),
    (["steps=4"], "type options.num_inference_steps=4"),
    (["--steps", "4"], "type options.num_inference_steps=4"),
    (["--resolution=512"], "type options.height=512 options.width=512"),
    (["lora=x.safetensors"], "type lora_path=x.safetensors"),
    (["--output_dir", "x"], "type output=x"),
    (["a", "cat"], 'type "prompt=a cat"'),
    (["x.safetensors"], "type lora_path=x.safetensors"),
    (["sampler=eulr"], "expected euler, heun, dpmpp_2m, renoise, or null; type sampler=euler"),
]
OTHERS = [
    ("fuse.py", ["lora=x"], "type lora_path=x"),
    ("fuse.py", ["x.safetensors"], "type lora_path=x.safetensors"),
    ("make_cache.py", ["verfy", "path=x"], "expected make, verify, stats, gc; type command=verify"),
    ("make_cache.py", ["path=no_cache", "verify"], "no_cache is no cache"),
]


@pytest.mark.parametrize(
    "script, arguments, answer",
    [("train.py", *row) for row in TRAINING] + [("generate.py", *row) for row in SAMPLING] + OTHERS,
)
def test_a_mistyped_argument_is_answered_in_one_line_with_what_to_type(script, arguments, answer, monkeypatch):
    message = complaint(monkeypatch, *arguments, script=script)
    assert message.startswith("error: ") and answer in message and "\n" not in message, message
    assert "expecting" not in message and "token recognition" not in message


@pytest.mark.parametrize("spelling", NAMES)
def test_what_is_to_be_typed_for_another_trainers_key_is_a_key_of_a_script(spelling):
    for word in spelling.split():
        key, _, option = word.partition("=")
        if (CONF / key).is_dir():
            assert option in ("…", "[…]", "[{}]") or option in options(key)
        else:
            assert any(is_key(key, tiny.compose(entry)) for entry in ("train", "generate", "plan"))


def test_another_trainers_key_in_an_experiment_is_answered_with_ours(experiment):
    assert "no such key 'learning_rate'; type optimizer.lr=…" in experiment("learning_rate: 1e-4")


def test_a_list_where_one_number_counts_for_all_is_answered_so(monkeypatch, tmp_path):
    message = complaint(monkeypatch, "lora_scale=[0.5,0.5]", f"output={tmp_path}/new", script="generate.py")
    assert "lora_scale is [0.5, 0.5] (list); expected one number for all" in message


def test_a_gpus_number_is_answered_with_where_it_belongs(monkeypatch, tmp_path):
    message = complaint(monkeypatch, "device=cuda:1", f"output={tmp_path}/new", script="generate.py")
    assert "type CUDA_VISIBLE_DEVICES=1 python … device=cuda" in message


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_another_working_directory_is_answered_with_the_one_to_go_to(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert f"type cd {tiny.ROOT})" in complaint(monkeypatch, script=script)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "script, wrong",
    [("generate.py", "denoising_strength=high"), ("generate.py", "device=tpu"), ("train.py", "lora.rank=high")],
)
def test_a_refused_command_leaves_nothing(script, wrong, monkeypatch, tmp_path):
    (tmp_path / "old").mkdir()
    for folder in ("new", "old", "above/new"):
        key = "output" if script == "generate.py" else "run_dir"
        complaint(monkeypatch, wrong, f"{key}={tmp_path / folder}", script=script)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old"]


def test_an_option_of_hydras_own_groups_is_answered_by_hydra(monkeypatch):
    assert "Could not find 'hydra/launcher/slrum'" in complaint(monkeypatch, "hydra/launcher=slrum")


@pytest.mark.parametrize("target", ["torch.optim.AdamV", "torhc.optim.Adam", "torch.optim"])
def test_a_target_that_is_none_is_named(target, monkeypatch, tmp_path):
    message = complaint(monkeypatch, f"optimizer._target_={target}", f"output_root={tmp_path}")
    assert f"optimizer._target_ is '{target}'" in message


def test_a_target_of_a_package_that_is_not_installed_is_answered_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = complaint(monkeypatch, "optimizer=adamw_8bit", f"output_root={tmp_path}")
    assert 'pip install "diffsynth-hydra[optimizers]"' in message


@pytest.mark.parametrize(
    "override, expected",
    [
        ("max_steps=ten", "max_steps is 'ten' (str); expected a whole number"),
        ("lora.rank=high", "lora.rank is 'high' (str); expected a whole number"),
        ("max_grad_norm=[1]", "max_grad_norm is [1] (list); expected a number above 0"),
        ("batch_size={a: 1}", "batch_size is {'a': 1} (mapping); expected a whole number"),
        ("seed=1.5", "seed is 1.5 (float); expected a whole number"),
        ("batch_size=null", "batch_size is None (NoneType); expected a whole number"),
        ("task.timesteps=uniform", "task.timesteps is 'uniform' (str); expected UniformTimesteps"),
    ],
)
def test_a_value_of_the_wrong_type_is_answered_with_the_right_one(override, expected, monkeypatch, tmp_path):
    assert expected in complaint(monkeypatch, override, f"output_root={tmp_path}")


@pytest.mark.parametrize(
    "override, expected",
    [
        (
            "+validation.datasets.mine.metadata=mine.csv",
            r"validation.datasets.mine has no _target_.*\(metadata\).*builds TrainingData",
        ),
        ("+validation.metrics.mine.batch_size=2", r"validation.metrics.mine has no _target_.*builds Metric"),
        ("~task.timesteps._target_", r"task.timesteps has no _target_.*builds UniformTimesteps"),
    ],
)
def test_keys_that_would_build_nothing_are_named(override, expected, monkeypatch, tmp_path):
    assert re.search(expected, complaint(monkeypatch, override, f"output_root={tmp_path}"))


def test_a_value_that_others_refer_to_and_that_is_gone_is_named(monkeypatch, tmp_path):
    message = complaint(monkeypatch, "~model.training", f"output_root={tmp_path}")
    assert "Interpolation key 'model.training" in message and "\n" not in message


def test_a_value_that_nobody_gave_is_asked_for(monkeypatch, tmp_path):
    message = complaint(monkeypatch, "dataset=image_folder", f"output_root={tmp_path}")
    assert "dataset.path" in message and "command line" in message


@pytest.mark.parametrize("script", ["train.py", "generate.py"])
def test_a_rank_that_no_launcher_gave_is_named(script, monkeypatch):
    for name in ("MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    message = complaint(monkeypatch, script=script)
    assert "RANK=1, but not MASTER_ADDR and WORLD_SIZE" in message and "unset RANK" in message and "\n" not in message


def test_other_scripts_answer_the_same(monkeypatch):
    assert "did you mean lora_path?" in complaint(monkeypatch, "lorapath=x.safetensors", script="generate.py")


@pytest.mark.parametrize("script", mostly_slow(["distill.py", "plan.py"], "distill.py"))
def test_scripts_that_hand_arguments_on_to_a_training_know_what_these_may_be(script, monkeypatch, tmp_path):
    folder = f"output_root={tmp_path}"
    assert "max_steps is 'ten' (str); expected a whole number" in complaint(
        monkeypatch, "max_steps=ten", folder, script=script
    )
    assert "did you mean max_steps?" in complaint(monkeypatch, "+max_step=10", folder, script=script)
