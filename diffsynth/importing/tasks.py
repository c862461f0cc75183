"""Readers of the flags about the objective, and of those that one family or method alone has."""

from collections.abc import Iterator

from .lines import Differs, LeftOut, Line, Refused, Set
from .theirs import Theirs, path

TRACKERS = ("tensorboard", "wandb", "swanlab")


def task(value: str, theirs: Theirs) -> Iterator[Line]:
    if theirs.trains_template:
        yield Set("task", "template")
    elif theirs.method == "direct_distill":
        yield from [Set("task", "distill"), Set("teacher", "none")]
        yield Differs("The student samples as task.student says, in 4 steps by default; their rows have a column for it.")
    elif theirs.method == "trajectory_imitation":
        yield from _trajectory()
    elif theirs.method == "dmd2":
        yield from [Set("task", "distill/dmd2"), Set("teacher", "none")]
        yield Differs("Their student learns on noised images of the data; ours on its own samples (backward simulation).")
    elif theirs.method != "sft":
        yield Refused(f"there is no task {theirs.method} yet; python train.py --help lists those that there are")


def _trajectory() -> Iterator[Line]:
    """Their numbers are in their code: 50 steps of the teacher at scale 2, 8 steps of the student."""
    yield from [Set("task", "distill/trajectory"), Set("held_out", "null"), Set("validation", "none")]
    yield Set("task.student.num_inference_steps", "8")
    yield from [Set("task.teacher.num_inference_steps", "50"), Set("task.teacher.cfg_scale", "2")]
    yield Differs("Their loss has a term of LPIPS between decoded images; ours compares latents alone.")


def boundary(which: str):
    """The reader of one of the two boundaries of the trained noise levels."""

    def read(value: str, theirs: Theirs) -> Iterator[Line]:
        if theirs.method == "sft":
            yield Set(f"task.timesteps.{which}_boundary", value)
        else:
            yield Refused(f"the task {theirs.method} samples its own noise levels; leave it out")

    return read


def template(value: str, theirs: Theirs) -> Iterator[Line]:
    model_id, colon, _ = value.partition(":")
    if not colon:
        yield Set("template.path", path(value))
        return
    yield Set("template.model_id", model_id)
    yield Differs(
        f"The code of {model_id} runs on this machine: read it, then add template.revision=<its commit> "
        "template.trust_remote_code=true to the command."
    )


def tracker(name: str):
    """The reader of a flag that switches a tracker of metrics on."""

    def read(value: str, theirs: Theirs) -> Iterator[Line]:
        chosen = [each for each in TRACKERS if f"enable_{each}_log" in theirs.flags]
        yield Set("logger", f"[{','.join(chosen)}]")

    return read


def project(name: str):
    """The reader of a tracker's project."""

    def read(value: str, theirs: Theirs) -> Iterator[Line]:
        if f"enable_{name}_log" in theirs.flags:
            yield Set(f"logger.trackers.{name}.project", value)
        else:
            yield LeftOut(f"without --enable_{name}_log, metrics do not go there")

    return read
