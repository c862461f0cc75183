"""Every task of every released architecture is planned at its own size: its code holds for the whole model."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import tiny
import yaml
from families import FAMILIES
from miniatures.videos import write_rows, write_video

from diffsynth.diffusion.controlnet.start import number_of_blocks
from diffsynth.diffusion.pipeline.components import library_name
from diffsynth.plan.few_blocks import block_lists
from diffsynth.plan.meta_pipeline import meta_pipeline
from diffsynth.plan.plan import Plan, Planner
from diffsynth.plan.run import PlacedRun
from diffsynth.training.checks import scan
from diffsynth.training.validation.validation import Validation

FILES = sorted((tiny.ROOT / "conf" / "model").glob("[!_]*.yaml"))
MODELS = {file.stem: file.read_text("utf-8") for file in FILES if not file.stem.startswith("emoji")}
# The first model of each pipeline, by the line that names the pipeline; the others of a pipeline differ in sizes.
OF_EACH_PIPELINE = {line: name for name, text in reversed(MODELS.items()) for line in re.findall("_target_: .*", text)}
BASES = {name: yaml.safe_load(text)["defaults"][0] for name, text in MODELS.items() if name.endswith("_controlnet")}
CONTROLNET = ["lora=none", "task.trainable_models=[controlnet]"]
GIVEN = ["teacher=none"]  # the data set's images take the place of the teacher's
TASKS = {
    "sft": [],
    "full": ["lora=none"],
    "prior": [],
    "slider": ["task.positive=bright", "task.negative=dark"],
    "distill/dmd2": GIVEN,
    "distill/add": GIVEN,
    "distill/hyper_sd": GIVEN,
    "distill/lcm": GIVEN,
}


def planner(tmp_path, *overrides: str) -> Planner:
    """A planner that rehearses few blocks of each network where it can."""
    cfg = tiny.compose("plan", *overrides, f"output_root={tmp_path}")
    run = PlacedRun(**tiny.build(cfg), on_cuda=True).with_template()
    scan(run.dataset, run.media, run.task, run.template)
    return Planner(run, few_blocks=True)


def planned(tmp_path, *overrides: str) -> Plan:
    """The plan of the largest size."""
    return planner(tmp_path, *overrides).plan(largest_only=True)


def new_controlnet(model: str, folder: Path) -> str:
    """The folder with the configuration of the ControlNet that controlnet.py makes from a model."""
    pipe = meta_pipeline(tiny.build(tiny.compose("plan", f"model={model}"))["model"], tokens=8)
    family, transformer = pipe.control_family, pipe.network.config
    config = family.config(transformer, number_of_blocks(None, family, transformer), False)
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": library_name(family.kind)}))
    return str(folder)


def layers(folder: Path) -> list[str]:
    """Overrides for a data set of one image of two layers, of which there is no example."""
    tiny.write_dataset(folder, count=3)
    row = {"image": ["0.png", "1.png", "2.png"], "layer_input_image": "0.png", "prompt": "a"}
    (folder / "layers.jsonl").write_text(json.dumps(row) + "\n")
    given = ["dataset=image_folder", f"dataset.path={folder}", "dataset.metadata=layers.jsonl"]
    return [*given, "validation=trained"]


ALL = product(OF_EACH_PIPELINE.values(), TASKS), product(MODELS, ["sft"]), product(BASES, ["controlnet"])


@pytest.mark.slow  # test_slowdown.py rehearses a released model by default
@pytest.mark.parametrize("model, task", sorted({pair for pairs in ALL for pair in pairs}))
def test_a_released_model_is_planned(model, task, tmp_path):
    name = task if task not in ("full", "controlnet") else "sft"
    base = BASES.get(model)
    control = [f"model.controlnet.path={new_controlnet(base, tmp_path)}", "condition=canny"] if base else []
    data = layers(tmp_path / "layers") if model == "qwen_image_layered" else []
    data += ["task.num_inference_steps=null"] if data and task == "slider" else []  # of the data set's layers
    plan = planned(tmp_path, f"model={model}", f"task={name}", *TASKS.get(task, CONTROLNET), *control, *data)
    assert plan.worst.peak > plan.footprint.weights > 2e9
    assert plan.footprint.trained > 0 and plan.footprint.activations > 0


BLOCKS = {"qwen_image": {"block": 60}, "flux2_klein_base_4b": {"double": 5, "single": 20}}


@pytest.mark.slow
@pytest.mark.parametrize("model", BLOCKS)
def test_a_template_for_a_released_model_is_planned(model, tmp_path):
    code = (tiny.ROOT / "models" / "templates" / "brightness" / "model.py").read_text()
    (tmp_path / "template").mkdir()
    config = {"blocks": BLOCKS[model], "heads": 24, "head_dim": 128}
    (tmp_path / "template" / "model.py").write_text(
        f"{code}\nTEMPLATE_MODEL_CONFIG, TEMPLATE_MODEL_PATH = {config}, None\n"
    )
    data = tiny.write_dataset(tmp_path / "data", count=1)
    tiny.write_rows(data, [{"image": "0.png", "prompt": "a", "template_inputs": '{"scale": 0.5}'}])
    template = [f"template.path={tmp_path}/template", "template.from_scratch=true", f"dataset.path={data}"]
    plan = planned(tmp_path, f"model={model}", "task=template", "dataset=image_folder", *template)
    assert plan.footprint.trained > 0 and plan.worst.peak > plan.footprint.weights > 7e9


@pytest.mark.parametrize("name", tiny.mostly_slow(["brightness", "edit", "soft_rgb", "structure"]))
def test_shipped_templates_are_planned(name, tmp_path):
    asked = planner(tmp_path, f"experiment=emoji_template/{name}")
    assert not block_lists(asked.meta_modules.of(asked.run))  # a template names blocks by their numbers
    plan = asked.plan(largest_only=True)
    assert plan.footprint.trained > 0 and plan.footprint.activations > 0


@pytest.mark.slow
def test_a_task_whose_loss_has_a_mask_is_planned(tmp_path):
    plan = planned(tmp_path, "model=emoji", "condition=inpaint", "task.mask.column=inpaint_mask")
    assert plan.footprint.trained > 0 and plan.footprint.activations > 0


@pytest.mark.slow  # test_plan.py and test_family_contract.py plan every stage of the default task
@pytest.mark.parametrize("task", TASKS)
def test_every_stage_of_a_task_is_planned(task, tmp_path):
    name = "sft" if task == "full" else task
    cfg = tiny.compose("plan", "model=emoji", f"task={name}", *TASKS[task], f"path={tmp_path}")
    assert "| cache |" in tiny.call("plan", cfg)


@pytest.mark.parametrize("model", tiny.mostly_slow(["emoji", "flux2_klein_4b"], "emoji"))
@pytest.mark.parametrize("task", tiny.mostly_slow(["distill", "distill/trajectory"], "distill"))
def test_a_distillation_is_planned_before_the_teacher_has_sampled(model, task, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    prompts = ["dataset=prompts", f"dataset.path={tmp_path}/prompts.txt", "cached=true", "cache_batch_size=1"]
    plan = planned(tmp_path, f"model={model}", f"task={task}", *prompts, "task.student.num_inference_steps=2")
    assert plan.footprint.encoders == 0 < plan.footprint.activations


@pytest.mark.parametrize(
    "model", ["emoji", *(pytest.param(name, marks=pytest.mark.slow) for name in OF_EACH_PIPELINE.values())]
)
@pytest.mark.parametrize("task", tiny.mostly_slow(["reward/nft", "reward/awm", "reward/rwr"], "reward/nft"))
def test_a_reward_training_is_planned_with_what_it_samples_at_once(model, task, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    prompts = ["dataset=prompts", f"dataset.path={tmp_path}/prompts.txt", "cached=true", "cache_batch_size=1"]
    own = ["lora=lora", "task.extra_inputs=[]", *prompts]
    plans = [planned(tmp_path, f"model={model}", f"task={task}", *own, f"rollout_batch_size={size}") for size in (1, 4)]
    peaks = [next(stage.peak for stage in plan.stages if stage.name == "roll out") for plan in plans]
    assert plans[0].footprint.weights < peaks[0] < peaks[1]
    assert plans[0].footprint.activations > 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reward/nft", "reward/awm", "reward/flow_grpo"])
def test_roles_take_little_memory_beside_the_base_that_they_share(task, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red apple\n")
    prompts = ["dataset=prompts", f"dataset.path={tmp_path}/prompts.txt", "cached=true", "cache_batch_size=1"]
    plain = planned(tmp_path, "model=qwen_image", "task=sft", "cached=true", "lora.rank=32")
    rewarded = planned(tmp_path, "model=qwen_image", f"task={task}", *prompts, "lora.rank=32")
    assert rewarded.footprint.peak <= 1.15 * plain.footprint.peak


EXPERTS = {
    "miniature": next(family.overrides for family in FAMILIES if family.name == "wan22_t2v_a14b"),
    "released": ["model=wan22_t2v_a14b"],
}


@pytest.mark.parametrize("model", tiny.mostly_slow(list(EXPERTS), "miniature"))
@pytest.mark.parametrize("task", ["distill", "distill/trajectory"])
def test_a_distillation_of_two_experts_is_planned_before_the_teacher_has_sampled(model, task, tmp_path):
    write_video(tmp_path / "0.mp4", count=5)
    write_rows(tmp_path, {"video": "0.mp4", "seed": 1})
    data = ["dataset=video_folder", f"dataset.path={tmp_path}", "dataset.metadata=metadata.jsonl"]
    clip = ["dataset.num_frames=5", "dataset.height=32", "dataset.width=32", "cached=true", "cache_batch_size=1"]
    steps = ["task.student.num_inference_steps=2", "validation=none"]
    plan = planned(tmp_path, *EXPERTS[model], f"task={task}", *data, *clip, *steps)
    assert plan.footprint.encoders == 0 < plan.footprint.activations


def test_of_several_kinds_of_requests_the_one_that_takes_most_is_planned(tmp_path, monkeypatch):
    requests = [{"prompt": "a", "height": side, "width": side} for side in (32, 96)]
    monkeypatch.setattr(Validation, "one_of_each", lambda self, module: requests)
    (stage,) = planner(tmp_path, "model=emoji").sampling()
    assert stage.size == (96, 96)
