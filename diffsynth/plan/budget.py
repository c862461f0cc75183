"""A recipe that fits: of all whose plan fits a budget, the one that is predicted to cost the least time."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..core.memory.sizes import shown_size
from .engines import shares
from .held import Held
from .options import Option, Options
from .plan import Plan, Run

DEVICES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Need:
    """Bytes that an option needs on the device, and in host memory beside what the process is itself."""

    device: int
    host: int


@dataclass(frozen=True)
class Choice:
    """The option that was chosen, what it needs, and why it was chosen."""

    option: Option
    need: Need
    why: str


@dataclass
class Budget:
    """The search for a recipe within `device` bytes on the device and `host` bytes of host memory, if that is limited.

    Options are looked at in the order of their predicted slowdown. A sum of what was rehearsed of others tells whether
    one is worth being rehearsed as a whole, which decides.
    """

    run: Run
    device: int
    host: int | None = None
    at_rest: dict[str, Held] = field(default_factory=dict)
    plans: dict[tuple, Plan] = field(default_factory=dict)
    passed_over: list[tuple[Option, Need]] = field(default_factory=list)

    def choose(self) -> Choice:
        """The fastest option that fits.

        Raises:
            ValueError: None does; names what is missing and the smallest changes that would do.
        """
        self.run = replace(self.run, sizes=self.run.largest and [self.run.largest])
        self.options = Options(self.run)
        for option in self.options.all():
            need = self.at_least(option)
            if self.fits(need):
                need = self.need(self.plan(option))
            if self.fits(need):
                return Choice(option, need, self.why(option, need))
            self.passed_over.append((option, need))
        raise ValueError(self.missing())

    def fits(self, need: Need) -> bool:
        return need.device <= self.device and (self.host is None or need.host <= self.host)

    def need(self, plan: Plan) -> Need:
        return Need(self.run.estimated(plan.worst.peak), plan.host)

    # What is known without rehearsing the option itself

    def at_least(self, option: Option) -> Need:
        """Weights and optimizer; and the passes, where an option with the same ones was rehearsed."""
        recipe = option.recipe
        streamed, count = self.options.streamed_bytes(recipe), recipe.stream_blocks
        saved = streamed * (count - recipe.stream_buffers) // count if count else 0
        kept, passes = self.kept(recipe.storage), self.passes(option)
        held = replace(kept, frozen=kept.frozen - saved, working=passes.working if passes else 0)
        return Need(self.run.estimated(held.peak), streamed)

    def kept(self, storage: str) -> Held:
        """What is held whatever the passes take."""
        if storage not in self.at_rest:
            plain = replace(self.run.memory, storage=storage, stream_blocks=0)
            self.at_rest[storage] = self.run.variant(plain).kept
        return self.at_rest[storage]

    def passes(self, option: Option) -> Held | None:
        plan = self.plans.get(_passing(option))
        return plan and plan.held

    def plan(self, option: Option) -> Plan:
        plan = self.run.variant(option.recipe, option.micro_batch_size).plan(caching=False)
        self.plans.setdefault(_passing(option), plan)
        return plan

    # What is said

    def why(self, option: Option, need: Need) -> str:
        faster = [(o, n) for o, n in self.passed_over if o.slowdown < option.slowdown]
        lines = [
            f"{option}: {shown_size(need.device)} of {shown_size(self.device)} on the device, {shown_size(need.host)} "
            f"in host memory; a step is predicted to take {option.slowdown:.2f} times as long as with memory to spare."
        ]
        for other, missed in _nearest(faster):
            lines.append(f"{other} ({other.slowdown:.2f} times) would need {shown_size(missed.device)}.")
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
        spread = [s for n in (1, *DEVICES) for s in shares(plan.held, n) if self.run.estimated(s.device) <= self.device]
        first = {share.engine: share for share in reversed(spread)}
        on = [
            f"- {share.devices} device(s) under {name}: {shown_size(self.run.estimated(share.device))} on each, "
            f"{shown_size(share.host)} of host memory for each"
            for name, share in first.items()
        ]
        cache = f"- a cache (make_cache.py, then dataset=cache): {shown_size(plan.held.encoders)} of encoders less"
        larger = f"- memory.budget={shown_size(need.device).replace(' ', '')}"
        return [larger, *([cache] if plan.held.encoders else []), *on]


def _thrift(passed: tuple[Option, Need]) -> tuple:
    """The smaller, the less memory; what was not rehearsed is known by its weights and optimizer alone."""
    option, need = passed
    return need.device, option.micro_batch_size, not option.recipe.offload_activations


def _passing(option: Option) -> tuple:
    """What the two passes' memory depends on."""
    recipe = option.recipe
    return recipe.checkpointing, recipe.checkpoint_every, recipe.offload_activations, option.micro_batch_size


def _nearest(passed: Sequence[tuple[Option, Need]], count: int = 3) -> list[tuple[Option, Need]]:
    """Of the options that would have been faster, those that came nearest."""
    return sorted(passed, key=lambda pair: pair[1].device)[:count]
