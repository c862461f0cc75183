"""Distil a few-step student: `python distill.py task=distill/… model=… prompts.path=…`.

Stage one: the teacher draws two sets of prompts into caches, `train` and `held_out` in `teacher_path`. Stage two is
train.py on the first, which measures on the second how near the student comes.
"""

import inspect
import logging

import hydra

from diffsynth.config import build, check, claim, explained, finish, run
from train import train


def distill(prompts, held_out, teacher_path: str, **training) -> list:
    """Draw the teacher's pictures that are not there yet, train on them, and name the files that the training left.

    Its signature, with that of `train` in the place of `training`, is the schema of conf/distill.yaml's top level.

    Args:
        prompts, held_out: Data sets of prompts, for the training and for the validation; None draws nothing.
        dataset: Opens what is trained on; called when the pictures are there.
    """
    from make_cache import make_cache

    shared = {name: training[name] for name in ("model", "task", "lora", "device") if name in training}
    if getattr(training["task"], "teacher", None) is not None:
        for name, rows in {"train": prompts, "held_out": held_out}.items():
            if rows is not None:
                report = make_cache(f"{teacher_path}/{name}", dataset=rows, **shared)
                logging.info("The teacher's pictures, %s/%s: %s", teacher_path, name, report)
    return train(**training | {"dataset": training["dataset"]()})


_own, _trains = (inspect.signature(function).parameters.values() for function in (distill, train))
distill.__signature__ = inspect.Signature([*_own][:-1] + [*_trains])
distill.__annotations__ |= train.__annotations__


@hydra.main(version_base="1.3", config_path="conf", config_name="distill")
def main(cfg) -> None:
    with explained():
        check(cfg, distill)
        if (run_dir := claim(cfg)) is not None:
            finish(run_dir, distill(**build(cfg)))


if __name__ == "__main__":
    run(main)
