"""Every task of every released architecture is planned at its own size: its code holds for the whole model."""

from itertools import product

import pytest
import tiny

from diffsynth.plan.plan import Plan, Planner
from diffsynth.plan.run import PlacedRun
from diffsynth.training.checks import scan

MODELS = ["qwen_image", "qwen_image_edit_2511", "flux2_klein_4b", "flux2_dev"]
GIVEN = ["teacher=none"]  # the data set's images take the place of the teacher's
TASKS = {
    "sft": [],
    "full": ["lora=none"],
    "distill/dmd2": GIVEN,
    "distill/add": GIVEN,
    "distill/hyper_sd": GIVEN,
    "distill/lcm": GIVEN,
}


def planned(tmp_path, *overrides: str) -> Plan:
    """A plan of the largest size, from few blocks of each network."""
    cfg = tiny.compose("plan", *overrides, f"output_root={tmp_path}")
    run = PlacedRun(**tiny.build(cfg), on_cuda=True)
    scan(run.dataset, run.media, run.task, None)
    return Planner(run, few_blocks=True).plan(largest_only=True)


@pytest.mark.slow  # test_slowdown.py rehearses a released model by default
@pytest.mark.parametrize("model, task", list(product(MODELS, TASKS)))
def test_a_released_model_is_planned(model, task, tmp_path):
    name = "sft" if task == "full" else task
    plan = planned(tmp_path, f"model={model}", f"task={name}", *TASKS[task])
    assert plan.worst.peak > plan.footprint.weights > 2e9
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
