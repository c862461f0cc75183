"""`Rounds`: before a round's first step, sample with the policy and score; the steps then train on these samples."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor

from ...core.data.operators.picture_files import read_image
from ...core.data.operators.unread import identity
from ...core.data.order.addresses import SampleOrder, sample_seed
from ...core.files import going_on_without
from ...core.pictures import GRID_COLUMNS, save_png
from ...core.sharing import leads, own_share, turns
from ...diffusion.distillation.roles import OLD
from ...diffusion.rewards import Reward
from ...diffusion.rewards.advantages import Advantages, combined
from ..stopping import StopRequest
from .held_out import HeldOut
from .samples import RoundSamples
from .sampling import Request, decoded, sample_in_batches
from .scoring import score
from .settings import Guard, RoundSettings
from .store import Group, RoundStore
from .watch import Watch, best_and_worst, metrics_of, spreads

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ...diffusion.training_module import PipelineTrainingModule
    from ..record.numbers import LocalLogger
    from ..state import TrainingState

logger = logging.getLogger(__name__)


class Rounds:
    """The rounds of one run.

    Args:
        settings: How much is sampled.
        samples: The run's data set, which shows the current round.
        steps: Optimizer steps per round.
        rewards: The rewards that are trained for, by name.
        held_out: Evaluates the policy.
        guard: See `Watch`.
        seed: Of the choice of prompts and of the samples' noise.
    """

    def __init__(
        self,
        settings: RoundSettings,
        samples: RoundSamples,
        steps: int,
        rewards: Mapping[str, Reward],
        held_out: HeldOut,
        guard: Guard | None,
        seed: int,
    ):
        self.settings, self.samples, self.steps, self.seed = settings, samples, steps, seed
        self.rewards, self.held_out = rewards, held_out
        self.store, self.watch = RoundStore(settings.path), Watch(guard)
        self.prompts = samples.prompts

    @property
    def batch_size(self) -> int:
        """Samples that are sampled at once."""
        return min(self.settings.batch_size, self.samples.size)

    @property
    def all_rewards(self) -> list[Reward]:
        """The rewards, and those that only evaluate."""
        return [*self.held_out.rewards.values()]

    @property
    def versions(self) -> dict[str, str]:
        """What the scores of each reward depend on, by name, which a resumed run must have unchanged."""
        return {f"reward {name}": reward.version for name, reward in self.rewards.items()}

    def has_ended(self, state: "TrainingState") -> bool:
        """Whether the samples have collapsed, so that the run ends before its last step."""
        return "collapsed" in state.round

    def begin(self, accelerator: "Accelerator", state: "TrainingState", stop: StopRequest, log: "LocalLogger") -> bool:
        """Have the samples of the round that the next step belongs to; return whether that step can be trained.

        It cannot if a signal asks to stop before all is sampled, or if the samples have collapsed. All processes call
        it. What a killed process has sampled is kept.
        """
        number, within = divmod(state.step, self.steps)
        if self.samples.number == number:
            return True
        if self.samples.number is None and accelerator.is_main_process:
            log.forget(state.step, "round")  # a run that was killed in this round may have logged it
        module = accelerator.unwrap_model(state.model)
        if state.round.get("number") != number:
            self._set_policy(accelerator, module, state, number)
        if not self._sample(accelerator, module, state, stop):
            return False
        groups = [self.store.read(number, group, self._key(state, group)) for group in range(self.settings.prompts)]
        total, compared = self._advantages(groups)
        prompts = state.round["prompts"]
        self.samples.show(number, [self.prompts[n] for n in prompts], groups, module.task.advantages(total))
        state.round["spread"] = {**state.round.get("spread", {}), **spreads(prompts, groups)}
        if within == 0:
            self._report(accelerator, state, log, groups, total, compared)
        return not self.has_ended(state)

    def finish(self, accelerator: "Accelerator", state: "TrainingState", log: "LocalLogger") -> None:
        """Evaluate the final weights on held-out prompts; all processes call it."""
        values, pictures = self.held_out.evaluate(accelerator, state)
        if accelerator.is_main_process:
            log.forget(state.step, "rounds")  # a run that was killed after this may have logged it
            log.log(state.step, {"rounds": state.step / self.steps, **values}, pictures)

    # The policy

    def _set_policy(
        self, accelerator: "Accelerator", module: "PipelineTrainingModule", state: "TrainingState", number: int
    ) -> None:
        """Begin a round: let `old` follow the policy, and note in the state which weights sample."""
        decay = module.task.decay(state.step)
        if decay is not None:
            state.follow(decay)
        is_old = module.task.samples_as == OLD
        sampling = [pair.old for pair in state.lagging.values()] if is_old else state.engine.local(state.main.all)
        policy = identity(gather_object([fingerprint(sampling)]))
        state.round = {**state.round, "number": number, "policy": policy, "prompts": self._choose(state, number)}

    def _choose(self, state: "TrainingState", number: int) -> list[int]:
        """Indices of the prompts of a round; see `RoundSettings.curriculum`."""
        count = self.settings.prompts * self.settings.curriculum
        order = SampleOrder(self.prompts.size, sample_seed(self.seed, "prompts of rounds", 0, 0))
        candidates = [order.sample(number * count + place).index for place in range(count)]
        spread = state.round.get("spread", {})
        candidates.sort(key=lambda index: -spread.get(str(index), math.inf))  # equal ones stay in order
        return candidates[: self.settings.prompts]

    def _key(self, state: "TrainingState", group: int) -> str:
        """What the samples of a group depend on, as a hash."""
        number = state.round["number"]
        about = {
            "policy": state.round["policy"],
            "prompts": self.prompts.fingerprint(),
            "prompt": state.round["prompts"][group],
            "seeds": [self._seed(number, group, member) for member in range(self.settings.samples)],
            "rewards": self.versions,
        }
        return identity(about)

    # Sampling

    def _seed(self, number: int, group: int, member: int) -> int:
        """The seed of a sample's noise, below 2^63, which no other sample of the run has."""
        return sample_seed(self.seed, "sample", number, group * self.settings.samples + member) >> 1

    def _sample(
        self, accelerator: "Accelerator", module: "PipelineTrainingModule", state: "TrainingState", stop: StopRequest
    ) -> bool:
        """Sample the groups of the current round that are not on disk; return whether all are.

        Groups that form a batch are sampled together, whatever the number of processes, because rounding depends on
        the batch.
        """
        number, count = state.round["number"], self.settings.prompts
        together = max(1, self.settings.batch_size // self.settings.samples)
        chunks = [range(start, min(start + together, count)) for start in range(0, count, together)]
        found = [None]
        if accelerator.is_main_process:
            found = [[any(not self.store.holds(number, n, self._key(state, n)) for n in chunk) for chunk in chunks]]
        (missing,) = broadcast_object_list(found)
        chunks = [chunk for chunk, is_missing in zip(chunks, missing, strict=True) if is_missing]
        if chunks and state.step % self.steps and module.task.samples_as != OLD:
            raise ValueError(
                f"{self.store.folder(number)} lacks samples of the weights before step {number * self.steps + 1}, and "
                f"this run resumes at step {state.step}, whose weights are others; restore that folder, or delete the "
                "checkpoints after that step."
            )
        with state.engine.evaluating():
            mine = own_share(chunks)
            for turn in range(turns(chunks)):
                if turn < len(mine):
                    self._make(module, state, mine[turn])
                if stop.agreed(accelerator):
                    return False
        accelerator.wait_for_everyone()
        return True

    def _make(self, module: "PipelineTrainingModule", state: "TrainingState", chunk: Sequence[int]) -> None:
        """Sample, decode and score some groups, and write each."""
        number, members = state.round["number"], range(self.settings.samples)
        rows = {group: self.prompts[state.round["prompts"][group]] for group in chunk}
        seeds = {group: [self._seed(number, group, member) for member in members] for group in chunk}
        requests = [Request(rows[group], seed) for group in chunk for seed in seeds[group]]
        task, settings = module.task, module.task.sampling.settings
        kept = sample_in_batches(module, requests, task.roll_out, task.samples_as, self.settings.batch_size)
        results = decoded(module, kept["latents"])
        pictures = [module.pipe.media.thumbnail(result) for result in results]
        of_pictures = [rows[group] for group in chunk for _ in members]
        scores = score(self.rewards, pictures, of_pictures, len(members), module.pipe.device)
        for place, group in enumerate(chunk) if leads() else ():
            own = slice(place * len(members), (place + 1) * len(members))
            for member, picture in zip(members, pictures[own], strict=True):
                about = {"prompt": rows[group]["prompt"], "seed": seeds[group][member], **settings}
                save_png(picture, self.store.picture(number, group, member, ".png"), about)
            tensors, scored = ({name: each[own] for name, each in all.items()} for all in (kept, scores))
            sampled = Group(rows[group]["prompt"], seeds[group], tensors, scored)
            self.store.write(number, group, self._key(state, group), sampled)

    def _advantages(self, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Advantages]]:
        """The advantages (P, G) of all rewards together, NaN of samples without a score, and those of each reward."""
        scores = {name: torch.stack([group.scores[name] for group in groups]) for name in self.rewards}
        weights = {name: reward.weight for name, reward in self.rewards.items()}
        total, each = combined(scores, weights, self.settings.std)
        unscored = torch.stack([values.isnan() for values in scores.values()]).all(0)
        return torch.where(unscored, torch.nan, total), each

    # Reports

    def _report(
        self,
        accelerator: "Accelerator",
        state: "TrainingState",
        log: "LocalLogger",
        groups: Sequence[Group],
        total: Tensor,
        compared: Mapping[str, Advantages],
    ) -> None:
        """Log a round's metrics and picture, evaluate if that is due, look for a collapse, and delete old rounds."""
        number, pictures = state.round["number"], {}
        values = {"round": float(number), **metrics_of(groups, compared)}
        if number % self.settings.evaluate_every == 0:
            measured, pictures = self.held_out.evaluate(accelerator, state)
            values |= measured
        self.watch.look(state, values)
        if accelerator.is_main_process:
            path = self.store.folder(number).with_suffix(".png")
            with going_on_without(str(path)):
                save_png(best_and_worst(self._pictures(number), [group.prompt for group in groups], total), path)
                pictures = {**pictures, "round": path}
            log.log(state.step, values, pictures)
            rewards = ", ".join(f"{name} {values[f'reward_{name}']:.4g}" for name in self.rewards)
            logger.info("Round %d, from step %d: mean %s", number, state.step, rewards)
            self.store.prune(number, self.settings.keep_last)

    def _pictures(self, number: int) -> list[list[Image.Image]]:
        """The pictures of the first groups of a round."""
        groups, members = range(min(GRID_COLUMNS, self.settings.prompts)), range(self.settings.samples)
        paths = [[self.store.picture(number, group, member, ".png") for member in members] for group in groups]
        return [[read_image(str(path)) for path in own] for own in paths]


def fingerprint(parameters: Sequence[Tensor]) -> list[float]:
    """Two numbers that change with the values of some tensors, in double precision: their sum and that of squares."""
    doubles = [each.detach().double() for each in parameters]
    sums = torch.stack([torch.stack([each.sum(), each.square().sum()]) for each in doubles])
    return sums.flatten().tolist()
