"""Chooses the memory options of a run (its `MemoryRecipe`) by a budget: the fastest of those that fit, as predicted."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..core.memory.sizes import shown_size
from ..core.memory.storage import what_to_install
from .options import NOTHING_STREAMED, Option, Options, Streamed
from .plan import Plan, Planner
from .run import PlacedRun

DEVICES = (2, 4, 8, 16, 32, 64)  # numbers of devices that the message suggests where nothing fits; a guess


@dataclass(frozen=True)
class Need:
    """Bytes that an option needs on the device, and in host memory for tensors that wait there."""

    device: int
    host: int


@dataclass(frozen=True)
class BudgetChoice:
    """The chosen option, its need, the planner that rehearsed it, and the reason as text."""

    option: Option
    need: Need
    planner: Planner
    why: str


@dataclass
class Budget:
    """Searches the fastest option within `device` bytes of device memory and `host` bytes of host memory.

    Options are tried in the order of their predicted slowdown, each in three stages that take longer and longer: a
    lower bound, an estimate from rehearsals with few blocks, and a rehearsal of the full network, which decides.

    Args:
        planner: Plans the run with its configured memory options.
        device: Bytes that may be used on the device.
        host: Bytes that may be used in host memory; None sets no limit.
        between_steps: Results so far: bytes between two steps, by storage.
        estimates: Results so far: plans from few blocks, by `_passes_key`.
        planners: Planners of full rehearsals so far.
        rejected: Options that do not fit.
    """

    planner: Planner
    device: int
    host: int | None = None
    between_steps: dict[str, int] = field(default_factory=dict)
    estimates: dict[tuple, Plan] = field(default_factory=dict)
    planners: dict[tuple, Planner] = field(default_factory=dict)
    rejected: list[tuple[Option, Need]] = field(default_factory=list)

    def choose(self) -> BudgetChoice:
        """Return the fastest option that fits.

        Raises:
            ValueError: No option fits; the message says how much is missing and what would help.
        """
        for option in self.options.all():
            need = self.lower_bound(option)
            if self.fits(need):
                need = self.estimate(option)
            if self.fits(need):
                need = self.need(self.plan(option))
                if self.fits(need):
                    return BudgetChoice(option, need, self.planner_of(option), self.why(option, need))
            self.rejected.append((option, need))
        raise ValueError(self.refusal())

    @cached_property
    def options(self) -> Options:
        """The options to try."""
        return Options(self.run, self.planner.meta_modules)

    @property
    def run(self) -> PlacedRun:
        """The run that is planned."""
        return self.planner.run

    def fits(self, need: Need) -> bool:
        """Whether the budget covers a need."""
        return need.device <= self.device and (self.host is None or need.host <= self.host)

    def need(self, plan: Plan, streamed: Streamed = NOTHING_STREAMED) -> Need:
        """Return the bytes that a plan needs.

        If the plan was made without streaming, subtract the `streamed` bytes from the device and add them to the host.
        """
        training = plan.stages[0].host + streamed.host
        return Need(self.run.estimated(plan.worst.peak - streamed.spared), max(plan.host, training))

    def lower_bound(self, option: Option) -> Need:
        """Return the bytes that an option needs between two steps, without activations."""
        storage, streamed = option.recipe.storage, self.options.streamed(option.recipe)
        if storage not in self.between_steps:
            resident = replace(option.recipe, stream_blocks=0)
            footprint = self.planner.variant(resident, few_blocks=True).static_footprint
            self.between_steps[storage] = footprint.between_steps
        return Need(self.run.estimated(self.between_steps[storage] - streamed.spared), streamed.host)

    def estimate(self, option: Option) -> Need:
        """Return the bytes that an option needs, extrapolated from rehearsals with few blocks."""
        recipe, key = option.recipe, _passes_key(option)
        if key not in self.estimates:
            resident = replace(recipe, stream_blocks=0)
            planner = self.planner.variant(resident, option.micro_batch_size, few_blocks=True)
            self.estimates[key] = planner.plan(largest_only=True)
            if planner.rehearsal.is_whole:
                self.planners[(*key, 0)] = planner
        return self.need(self.estimates[key], self.options.streamed(recipe))

    def plan(self, option: Option) -> Plan:
        """Return the plan of an option, from a rehearsal of the full network."""
        return self.planner_of(option).plan(largest_only=True)

    def planner_of(self, option: Option) -> Planner:
        """Return the planner that rehearses an option with the full network."""
        key = *_passes_key(option), option.recipe.stream_blocks
        if key not in self.planners:
            self.planners[key] = self.planner.variant(option.recipe, option.micro_batch_size)
        return self.planners[key]

    # Messages

    def why(self, option: Option, need: Need) -> str:
        """Return the reason for a choice: what it needs and costs, and what faster options would have needed."""
        faster = [(other, its_need) for other, its_need in self.rejected if other.slowdown < option.slowdown]
        lines = [
            f"{option}: {shown_size(need.device)} of {shown_size(self.device)} on the device, {shown_size(need.host)} "
            f"in host memory; a step is predicted to take {option.slowdown:.2f} times as long as with memory to spare."
        ]
        for other, its_need in _nearest(faster):
            lines.append(f"{other} ({other.slowdown:.2f} times) would need at least {shown_size(its_need.device)}.")
        return "\n  ".join(lines)

    def refusal(self) -> str:
        """Return the error message where no option fits: the smallest need, the missing bytes, and remedies."""
        option, _ = min(self.rejected, key=_memory_key)
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
        """Return changes that would help: a larger budget, a package, a cache, the fewest devices of each engine."""
        shares = self.planner.shares(plan.footprint, (1, *DEVICES))
        fitting = [share for share in shares if self.run.estimated(share.device) <= self.device]
        fewest = {share.engine: share for share in reversed(fitting)}
        engines = [
            f"- {share.devices} device(s) under {name}: {shown_size(self.run.estimated(share.device))} on each, "
            f"{shown_size(share.host)} of host memory for each"
            for name, share in fewest.items()
        ]
        cache = f"- a cache (make_cache.py, then dataset=cache): {shown_size(plan.footprint.encoders)} of encoders less"
        larger = f"- memory.budget={shown_size(need.device).replace(' ', '')}"
        missing = [f"- {what_to_install(name)}" for name in self.options.missing_storages]
        return [larger, *missing, *([cache] if plan.footprint.encoders else []), *engines]


def _memory_key(rejected: tuple[Option, Need]) -> tuple:
    """Sort key that puts the option that needs the least memory first.

    Options whose weights alone do not fit have equal needs, so that batch size and offloading decide among them.
    """
    option, need = rejected
    return need.device, option.micro_batch_size, not option.recipe.offload_activations


def _passes_key(option: Option) -> tuple:
    """Return the settings on which the memory of forward and backward pass depends, apart from streaming."""
    recipe, size = option.recipe, option.micro_batch_size
    return recipe.storage, recipe.checkpointing, recipe.checkpoint_every, recipe.offload_activations, size


def _nearest(rejected: Sequence[tuple[Option, Need]], count: int = 3) -> list[tuple[Option, Need]]:
    """Return the rejected options that need the least memory."""
    return sorted(rejected, key=lambda pair: pair[1].device)[:count]
