"""Readers of the flags about the objective, and of the flags that one family or method alone has."""

from collections.abc import Iterator

from .lines import Differs, LeftOut, Line, Refused, Set
from .theirs import Reader, Theirs, path

TRACKERS = ("tensorboard", "wandb", "swanlab")
RATE = "The first 5 optimizer steps have the whole learning rate, theirs a third of it: torch's ConstantLR begins so."
CLIPPING = "The gradient is clipped to norm 1, theirs is not; max_grad_norm=null does not clip."
TIMESTEPS = "Timesteps are fp32, theirs are rounded to bf16; task.exact_upstream=true rounds them, too."
PRECISION = "Weights are trained in fp32, theirs in bf16."
SEED = "Samples, noise and timesteps follow from seed=0, theirs from no seed."
SHIFT = 5.0  # of the noise levels of DiffSynth-Studio's trainings of models with two experts
NEAR = 0.003  # their boundaries are rounded to three digits of the index; a guess
COUNTS = "Steps are optimizer steps; theirs are micro-batches of one process."


def task(value: str, theirs: Theirs) -> Iterator[Line]:
    if theirs.trains_template:
        yield Set("task", "template")
    elif theirs.method == "direct_distill":
        yield from [Set("task", "distill"), Set("teacher", "none")]
        yield Differs(
            "The student takes task.student.num_inference_steps; theirs reads the steps from a column of each row."
        )
    elif theirs.method == "trajectory_imitation":
        yield from _trajectory()
    elif theirs.method == "dmd2":
        yield from [Set("task", "distill/dmd2"), Set("teacher", "none")]
        yield Differs(
            "Their student learns on noised images of the data; ours on its own samples (backward simulation)."
        )
    elif theirs.method != "sft":
        yield Refused(f"there is no task {theirs.method} yet; python train.py --help lists those that there are")


def _trajectory() -> Iterator[Line]:
    """Their numbers are in their code: 50 steps of the teacher at scale 2, 8 steps of the student."""
    yield from [Set("task", "distill/trajectory"), Set("held_out", "null"), Set("validation", "none")]
    yield Set("task.student.num_inference_steps", "8")
    yield from [Set("task.teacher.num_inference_steps", "50"), Set("task.teacher.cfg_scale", "2")]
    yield Differs("Their loss has a term of LPIPS between decoded images; ours compares latents alone.")


def habits(theirs: Theirs) -> Iterator[Line]:
    """What no flag says: how theirs trains in any case."""
    yield Set("lr_scheduler", "constant")
    yield Set("export.save_steps", "null")  # unless a flag says it: they save after every epoch
    if theirs.method == "dmd2":
        yield Differs("The gradient is clipped to norm 1; theirs, of the student alone, to norm 10: max_grad_norm=10.")
    elif theirs.exact:
        yield from _exact(theirs)
    else:
        yield from [Differs(RATE), Differs(CLIPPING), *([Differs(TIMESTEPS)] if theirs.method == "sft" else [])]
    yield from [Differs(PRECISION), *([] if "seed" in theirs.flags else [Differs(SEED)]), Differs(COUNTS)]


def _exact(theirs: Theirs) -> Iterator[Line]:
    yield Set("max_grad_norm", "null")
    if theirs.method == "sft":
        yield Set("task.exact_upstream", "true")
    yield Set("lr_scheduler._target_", "torch.optim.lr_scheduler.ConstantLR")
    if theirs.processes > 1:  # accelerate steps their schedule once per process
        yield Set("+lr_scheduler.total_iters", str(-(-5 // theirs.processes)))


def boundary(which: str) -> Reader:
    """The reader of one of the two boundaries of the trained noise levels."""

    def read(value: str, theirs: Theirs) -> Iterator[Line]:
        own = {"high": "max", "low": "min"}.get(theirs.expert)
        if theirs.method == "sft" and which == own:
            yield _of_expert(float(value), theirs)
        elif theirs.method == "sft":
            yield Set(f"task.timesteps.{which}_boundary", value)
        else:
            yield Refused(f"the task {theirs.method} samples its own noise levels; leave it out")

    return read


def _of_expert(index: float, theirs: Theirs) -> Line:
    """The noise level between two experts, which is given as an index of the shifted grid, in [0, 1] from noise on.

    The level at index m is σ = k u / (1 + (k - 1) u) with u = 1 - m and the shift k.
    """
    released, u = theirs.model.node["boundary"], 1 - index
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    if abs(sigma - released) < NEAR:
        return LeftOut(f"expert={theirs.expert} trains its side of the noise level {released}, which is the same")
    return Set("model.boundary", f"{sigma:.4f}")


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


def tracker(name: str) -> Reader:
    """The reader of a flag that switches a tracker of metrics on."""

    def read(value: str, theirs: Theirs) -> Iterator[Line]:
        chosen = [each for each in TRACKERS if f"enable_{each}_log" in theirs.flags]
        yield Set("logger", f"[{','.join(chosen)}]")

    return read


def project(name: str) -> Reader:
    """The reader of a tracker's project."""

    def read(value: str, theirs: Theirs) -> Iterator[Line]:
        if f"enable_{name}_log" in theirs.flags:
            yield Set(f"logger.trackers.{name}.project", value)
        else:
            yield LeftOut(f"without --enable_{name}_log, metrics do not go there")

    return read
