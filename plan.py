"""Know before you run: `python plan.py model=… task=… lora.rank=…`, with whatever train.py would be told.

Memory of every stage, for every size of picture and several numbers of devices, as a table, plan.json and plan.svg;
reads no weights and needs no GPU.
"""

import inspect
import json
from collections.abc import Sequence

import hydra

from diffsynth.config import build, check, explained, run, with_arguments_of
from train import train


@with_arguments_of(train)
def plan(
    devices: Sequence[int], cp_size: int, tokens: int, cached: bool, cache_batch_size: int, path: str, **training
) -> str:
    """The plan of one training; writes it down and returns its table.

    Its signature is the schema of conf/plan.yaml's top level.
    """
    from pathlib import Path

    from diffsynth.core.files import write_text
    from diffsynth.diffusion.template.rows import required_columns
    from diffsynth.plan import Budget, Planner, Run, chart, table

    parts = {name: training[name] for name in inspect.signature(Run).parameters if name in training}
    parts["template"] = parts.get("template") and parts["template"].load_one(training.get("seed", 0))
    training["dataset"].scan(required=required_columns(training["dataset"], training["task"], parts["template"]))
    parts |= {"tokens": tokens, "cached": cached, "cache_batch_size": cache_batch_size}
    on_cuda = training.get("device", "auto") in ("auto", "cuda")  # whatever this machine has
    run = Run(**parts, processes=cp_size, cp_size=cp_size, on_cuda=on_cuda)
    planner, budgets, why = Planner(run), (None, None), ""
    if run.memory.budget is not None:
        budgets = run.memory.budgets
        choice = Budget(planner, *budgets).choose()
        planner, why = choice.planner, f"{choice.why}\n\n"
    made = planner.plan(devices)
    write_text(Path(path) / "plan.json", json.dumps(made.as_dict(), indent=1))
    write_text(Path(path) / "plan.svg", chart(made, budgets[0]))
    return f"{why}{table(made, run.estimated(made.worst.peak) if on_cuda else None)}"


@hydra.main(version_base="1.3", config_path="conf", config_name="plan")
def main(cfg) -> None:
    with explained():
        check(cfg, plan)
        print(plan(**build(cfg)))


if __name__ == "__main__":
    run(main)
