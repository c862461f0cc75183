"""Plan a training's memory before it runs: `python plan.py model=… task=… lora.rank=…`, with the arguments of train.py.

It computes the memory of every stage, for every image size and several numbers of devices, and writes plan.json and
plan.svg. It reads no weights and needs no GPU.
"""

from pathlib import Path

import hydra

from diffsynth.config import build, check, check_choices, explained, run_main
from diffsynth.plan.run import PlacedRun, PlanRun


def plan(run: PlanRun) -> str:
    """Plan one training, write plan.json and plan.svg, and return the plan as a table."""
    from diffsynth.core.files import write_text
    from diffsynth.core.json_text import to_json
    from diffsynth.plan.budget import Budget
    from diffsynth.plan.plan import Planner
    from diffsynth.plan.show import chart, table
    from diffsynth.training.checks import check_images, scan

    on_cuda = run.device in ("auto", "cuda")  # `auto` plans for CUDA even on a machine without it
    run = run.with_template()
    scan(run.dataset, run.media, run.task, run.template)
    check_images(run.dataset, run.task, run.model.func.__self__)
    run = PlacedRun.of(run, processes=run.cp_size, on_cuda=on_cuda)
    planner, budgets, why = Planner(run), (None, None), ""
    if run.memory.budget is None:
        planner = planner.quickest()
    else:
        budgets = run.memory.budgets
        choice = Budget(planner, *budgets).choose()
        planner, why = choice.planner, f"{choice.why}\n\n"
    made = planner.plan(run.devices)
    write_text(Path(run.path) / "plan.json", to_json(made.as_dict(), indent=1))
    write_text(Path(run.path) / "plan.svg", chart(made, budgets[0]))
    written = f"The tables are also in {run.path}/plan.json, and the chart in {run.path}/plan.svg."
    return f"{why}{table(made, run.estimated if on_cuda else None)}\n{written}"


@hydra.main(version_base="1.3", config_path="conf", config_name="plan")
def main(cfg) -> None:
    with explained():
        check_choices()
        check(cfg, PlanRun)
        print(plan(PlanRun(**build(cfg))))


if __name__ == "__main__":
    run_main(main, PlanRun)
