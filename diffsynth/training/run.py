"""The configuration of a training run: one dataclass whose fields are the top level of conf/training.yaml."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..cache.run import ModelRun
from ..core.ranges import BatchSize, PositiveFloat, PositiveInt, Seed, check_fields
from .absent import NoCheckpoints, NoDataReport, NoEMA, NoLogger, NoProfile, NoRounds, NoValidation


@dataclass(kw_only=True)
class LoopSettings:
    """The part of a run that the training loop reads. Optional parts that are None become null objects (`absent`).

    Args:
        dataset: The training data (`core.data.TrainingData`).
        optimizer: Called as `optimizer(parameters)`.
        lr_scheduler: Called as `lr_scheduler(optimizer)`; stepped once per optimizer step.
        export: Saves weights for inference (`diffusion.logger.ModelLogger`).
        ema: The moving average of the weights (`training.ema.EMA`).
        checkpoint: Saves the state to resume from (`training.checkpoint.Checkpoints`).
        logger: Writes the metrics (`training.record.numbers.LocalLogger`).
        validation: What to evaluate, and when (`training.validation.Validation`).
        profile: Writes a trace of a few steps (`training.profile.Profile`).
        rounds: Samples what is trained on (`training.rounds.Rounds`); None trains on the data set as it is.
        max_steps: Number of optimizer steps; None counts `num_epochs` instead.
        num_epochs: Number of epochs; each shows every sample `repeat` times.
        samples: Number of samples to train on, from the beginning of the data set; None trains on all.
        batch_size: Samples per optimizer step, summed over all devices.
        micro_batch_size: Samples per forward pass on one device; None takes the device's whole share of the batch.
        max_grad_norm: The gradient's norm is clipped to this; None does not clip.
        seed: Seed of all random numbers.
    """

    dataset: Any
    optimizer: Any
    export: Any
    lr_scheduler: Any = None
    ema: Any = None
    checkpoint: Any = None
    logger: Any = None
    validation: Any = None
    profile: Any = None
    rounds: Any = None
    max_steps: PositiveInt | None = None
    num_epochs: PositiveFloat = 1
    samples: PositiveInt | None = None
    batch_size: BatchSize = 1
    micro_batch_size: BatchSize | None = None
    max_grad_norm: PositiveFloat | None = None
    seed: Seed = 0

    def __post_init__(self):
        self.ema = self.ema or NoEMA()
        self.checkpoint = self.checkpoint or NoCheckpoints()
        self.logger = self.logger or NoLogger()
        self.validation = self.validation or NoValidation()
        self.profile = self.profile or NoProfile()
        self.rounds = self.rounds or NoRounds()
        check_fields(self)


@dataclass(kw_only=True)
class Run(LoopSettings, ModelRun):
    """One training run, its parts built by the configuration; its fields are the top level of conf/training.yaml.

    Args:
        name: Name of the run.
        output_root, run_dir: Folder of all runs, and the folder of this run in it.
        memory: Options that save memory at the cost of time or precision (`core.memory.MemoryRecipe`).
        deterministic: Use kernels whose results do not depend on the order in which threads end.
        max_bad_steps: The run ends after this many steps in a row whose gradient is not finite.
        data_report: Describes the data set before the first step (`training.record.data_report.DataReport`).

    The other arguments are those of `LoopSettings` and `ModelRun`.
    """

    name: str
    output_root: str
    run_dir: str
    memory: Any
    data_report: Any
    deterministic: bool = False
    max_bad_steps: PositiveInt = 10

    def __post_init__(self):
        super().__post_init__()
        self.data_report = self.data_report or NoDataReport()

    @property
    def data(self) -> dict[str, Any]:
        """The data sets that the result depends on (`core.data.TrainingData`), by what messages call them."""
        return {"data set": self.dataset}


@dataclass(kw_only=True)
class DistillRun(Run):
    """A distillation in two stages; its fields are the top level of conf/distill.yaml.

    Args:
        prompts, held_out: Data sets of prompts that the teacher samples images for: to train on, and to validate on.
            None samples no images.
        teacher_path: Folder of two caches of the teacher's images, `train` and `held_out`.
        dataset: Opens the training data; called after the teacher's images have been sampled.
    """

    prompts: Any
    held_out: Any
    teacher_path: str

    @property
    def data(self) -> dict[str, Any]:
        return super().data | ({"prompts": self.prompts} if self.prompts else {})


@dataclass(kw_only=True)
class RewardRun(Run):
    """A reward training; its fields are the top level of conf/reward.yaml.

    Args:
        reward: The rewards that are trained for, by name (`diffusion.rewards.Reward`).
        evaluation_reward: Rewards that are measured on held-out prompts only, by name, so that hacking shows.
        prompts, held_out: Data sets of prompts: to train on, and to evaluate on; None evaluates on none.
        prompts_path: Folder of two caches of the encoded prompts, `train` and `held_out`.
        rounds: How much is sampled (`training.rounds.RoundSettings`); `reward.py` makes `Rounds` of it.
        guard: When a run whose samples collapse is ended (`training.rounds.Guard`); None never ends one.
        dataset: None; the samples of each round are the data set.
    """

    prompts: Any
    prompts_path: str
    reward: Mapping[str, Any] = field(default_factory=dict)
    evaluation_reward: Mapping[str, Any] = field(default_factory=dict)
    held_out: Any = None
    guard: Any = None
    dataset: Any = None

    @property
    def data(self) -> dict[str, Any]:
        return super().data | {"prompts": self.prompts}
