"""A recipe that fits: of all whose plan fits a budget, the one that is predicted to cost the least time."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..core.memory.sizes import shown_size
from .options import NOTHING_STREAMED, Option, Options, Streamed
from .plan import Plan, Planner
from .run import PlanRun

DEVICES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Need:
    """Bytes that an option needs on the device, and in host memory beside what the process is itself."""

    device: int
    host: int


@dataclass(frozen=True)
class BudgetChoice:
    """The option that was chosen, what it needs, whose rehearsal decided, and why it was chosen."""

    option: Option
    need: Need
    planner: Planner
    why: str


@dataclass
class Budget:
    """The search for a recipe within `device` bytes on the device and `host` bytes of host memory, if that is limited.

    Options are looked at in the order of their predicted slowdown. What each needs is reckoned from rehearsals with few
    blocks; if that would fit, it is rehearsed as a whole, which decides.
    """

    planner: Planner
    device: int
    host: int | None = None
    at_rest: dict[str, int] = field(default_factory=dict)
    reckoned: dict[tuple, Plan] = field(default_factory=dict)
    planners: dict[tuple, Planner] = field(default_factory=dict)
    passed_over: list[tuple[Option, Need]] = field(default_factory=list)

    def choose(self) -> BudgetChoice:
        """The fastest option that fits.

        Raises:
            ValueError: None does; names what is missing and the smallest changes that would do.
        """
        for option in self.options.all():
            need = self.at_least(option)
            if self.fits(need):
                need = self.about(option)
            if self.fits(need):
                need = self.need(self.plan(option))
                if self.fits(need):
                    return BudgetChoice(option, need, self.planner_of(option), self.why(option, need))
            self.passed_over.append((option, need))
        raise ValueError(self.missing())

    @cached_property
    def options(self) -> Options:
        return Options(self.run, self.planner.meta_modules)

    @property
    def run(self) -> PlanRun:
        return self.planner.run

    def fits(self, need: Need) -> bool:
        return need.device <= self.device and (self.host is None or need.host <= self.host)

    def need(self, plan: Plan, streamed: Streamed = NOTHING_STREAMED) -> Need:
        training = plan.stages[0].host + streamed.host
        return Need(self.run.estimated(plan.worst.peak - streamed.spared), max(plan.host, training))

    def at_least(self, option: Option) -> Need:
        """For what is held between two steps."""
        storage, streamed = option.recipe.storage, self.options.streamed(option.recipe)
        if storage not in self.at_rest:
            plain = replace(option.recipe, stream_blocks=0)
            self.at_rest[storage] = self.planner.variant(plain, few_blocks=True).kept.between_steps
        return Need(self.run.estimated(self.at_rest[storage] - streamed.spared), streamed.host)

    def about(self, option: Option) -> Need:
        """As few blocks tell."""
        recipe, key = option.recipe, _passing(option)
        if key not in self.reckoned:
            plain = replace(recipe, stream_blocks=0)
            planner = self.planner.variant(plain, option.micro_batch_size, few_blocks=True)
            self.reckoned[key] = planner.plan(largest_only=True)
            if planner.rehearsal.is_whole:
                self.planners[*key, 0] = planner
        return self.need(self.reckoned[key], self.options.streamed(recipe))

    def plan(self, option: Option) -> Plan:
        """As a rehearsal of the whole tells."""
        return self.planner_of(option).plan(largest_only=True)

    def planner_of(self, option: Option) -> Planner:
        key = *_passing(option), option.recipe.stream_blocks
        if key not in self.planners:
            self.planners[key] = self.planner.variant(option.recipe, option.micro_batch_size)
        return self.planners[key]

    # What is said

    def why(self, option: Option, need: Need) -> str:
        faster = [(o, n) for o, n in self.passed_over if o.slowdown < option.slowdown]
        lines = [
            f"{option}: {shown_size(need.device)} of {shown_size(self.device)} on the device, {shown_size(need.host)} "
            f"in host memory; a step is predicted to take {option.slowdown:.2f} times as long as with memory to spare."
        ]
        for other, missed in _nearest(faster):
            lines.append(f"{other} ({other.slowdown:.2f} times) would need at least {shown_size(missed.device)}.")
        return "\n  ".join(lines)

    def missing(self) -> str:
        option, _ = min(self.passed_over, key=_thrift)
        plan = self.plan(option)
        need = self.need(plan)
        lines = [
            f"Nothing fits memory.budget={shown_size(self.device)}; the least is {shown_size(need.device)}:",
            f"{option}.",
            f"{shown_size(need.device - self.device)} are missing on the device."
            if need.device > self.device
            else f"{shown_size(need.host - self.host)} of host memory are missing.",
        ]
        return "\n  ".join([*lines, "What would help:", *self.remedies(plan, need)])

    def remedies(self, plan: Plan, need: Need) -> Sequence[str]:
        told = self.planner.shares(plan.footprint, (1, *DEVICES))
        spread = [share for share in told if self.run.estimated(share.device) <= self.device]
        first = {share.engine: share for share in reversed(spread)}
        on = [
            f"- {share.devices} device(s) under {name}: {shown_size(self.run.estimated(share.device))} on each, "
            f"{shown_size(share.host)} of host memory for each"
            for name, share in first.items()
        ]
        cache = f"- a cache (make_cache.py, then dataset=cache): {shown_size(plan.footprint.encoders)} of encoders less"
        larger = f"- memory.budget={shown_size(need.device).replace(' ', '')}"
        return [larger, *([cache] if plan.footprint.encoders else []), *on]


def _thrift(passed: tuple[Option, Need]) -> tuple:
    """The smaller, the less memory; what even its weights do not fit is known by these alone."""
    option, need = passed
    return need.device, option.micro_batch_size, not option.recipe.offload_activations


def _passing(option: Option) -> tuple:
    """What the two passes' memory depends on."""
    recipe, size = option.recipe, option.micro_batch_size
    return recipe.storage, recipe.checkpointing, recipe.checkpoint_every, recipe.offload_activations, size


def _nearest(passed: Sequence[tuple[Option, Need]], count: int = 3) -> list[tuple[Option, Need]]:
    """Of the options that would have been faster, those that came nearest."""
    return sorted(passed, key=lambda pair: pair[1].device)[:count]
