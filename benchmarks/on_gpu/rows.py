"""The rows of the GPU benchmark, the most valuable first. A new model is a line of MODELS and its rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch

# Each released model, and the embedded model of the same classes that takes its place with `--tiny`.
MODELS = {"qwen_image": "emoji", "flux2_klein_4b": "emoji_flux2", "flux2_klein_9b": "emoji_flux2"}

MOST = {"lora.rank": 4, "memory.stream_blocks": 3}  # the most that the embedded models' widths and blocks allow


@dataclass(frozen=True, kw_only=True)
class BenchmarkRow:
    """One training to measure.

    Args:
        name: Name in the table, and of the trace.
        model: An option of the group `model`.
        overrides: Further arguments of train.py.
        pixels: Side of the square images.
        rank: Rank of the LoRA; 0 trains the network itself.
        bare: Measure the bare loop over diffusers' own network instead of ours.
        encodes: Encode image and prompt in every step (one stage), instead of reading a cache.
        limit: GiB of the card that the process may take; None is all of it.
        attention: Attention backend of diffusers; None keeps its default.
        lengths: Number of prompt lengths; more than one shows each length once in each of two epochs.
        seconds: Expected time on an H100, a guess until it is measured; `--minutes` plans by it.
    """

    name: str
    model: str
    overrides: tuple[str, ...] = ()
    pixels: int = 1024
    rank: int = 32
    bare: bool = False
    encodes: bool = False
    limit: int | None = None
    attention: str | None = None
    lengths: int = 1
    seconds: int = 30

    def arguments(self, tiny: bool) -> dict[str, str]:
        """The arguments of train.py that describe this row; `tiny` takes the embedded model in its place."""
        adapter = {"lora.rank": str(self.rank)} if self.rank else {"lora": "none"}
        given = {"model": self.model, **adapter, "batch_size": "1", "micro_batch_size": "1"}
        given |= {"memory.checkpointing": "blocks", **dict(override.split("=", 1) for override in self.overrides)}
        if tiny:
            given |= {"model": MODELS[self.model], "model.torch_dtype": "bfloat16"}
            given |= {name: str(min(most, int(given[name]))) for name, most in MOST.items() if name in given}
        return given

    @property
    def described(self) -> str:
        """The row in words: its arguments of train.py, and its conditions."""
        conditions = {
            "bare loop": self.bare,
            "no cache": self.encodes,
            f"{self.limit} GiB of the card": self.limit is not None,
            f"attention {self.attention}": self.attention is not None,
            f"{self.lengths} prompt lengths": self.lengths > 1,
        }
        named = [name for name, is_so in conditions.items() if is_so]
        arguments = [f"{name}={value}" for name, value in self.arguments(tiny=False).items()]
        return ", ".join([" ".join(arguments), f"{self.pixels} x {self.pixels} pixels", *named])

    @property
    def kind(self) -> tuple[object, ...]:
        """The row's options on a tiny model, whichever it is."""
        options = {name: value for name, value in self.arguments(tiny=True).items() if name != "model"}
        return (*sorted(options.items()), self.bare, self.encodes, self.lengths > 1)


def row(name: str, *overrides: str, **settings) -> BenchmarkRow:
    """A row whose name begins with its model and the side of its images, `<model>-<pixels>-…`."""
    model, pixels = name.split("-")[:2]
    return BenchmarkRow(name=name, model=model, overrides=overrides, pixels=int(pixels), **settings)


NONE, FEWER = "memory.checkpointing=none", "memory.checkpoint_every=2"
INT8, FP8, NF4 = "memory.storage=int8", "memory.storage=fp8", "memory.storage=nf4"
OFFLOAD, COMPILE = "memory.offload_activations=true", "memory.compile=blocks"

ROWS = (
    # The figures that others publish, and what our loop adds to the bare one.
    row("qwen_image-1024-blocks", seconds=50),
    row("qwen_image-1024-blocks-bare", bare=True, seconds=50),
    row("flux2_klein_4b-1024-blocks"),
    row("flux2_klein_4b-1024-blocks-bare", bare=True),
    row("flux2_klein_9b-1024-blocks", seconds=40),
    row("flux2_klein_9b-1024-blocks-bare", bare=True, seconds=40),
    row("flux2_klein_4b-1024-none", NONE),
    row("qwen_image-1024-int8", INT8, seconds=60),
    row("qwen_image-1024-compile", COMPILE, seconds=150),
    # Small cards, with what memory.budget=24GiB, 16GiB and 12GiB choose for them.
    row("qwen_image-1024-24gb", INT8, "memory.stream_blocks=12", limit=24, seconds=100),
    row("qwen_image-1024-16gb", INT8, "memory.stream_blocks=36", limit=16, seconds=100),
    row("qwen_image-1024-12gb", INT8, "memory.stream_blocks=48", limit=12, seconds=100),
    row("flux2_klein_9b-1024-16gb", "memory.stream_blocks=16", limit=16, seconds=50),
    row("flux2_klein_9b-1024-12gb", INT8, "memory.stream_blocks=13", limit=12, seconds=60),
    row("flux2_klein_4b-1024-12gb", limit=12),
    # Other checkpointing, offloading and storage.
    row("qwen_image-1024-none", NONE, seconds=50),
    row("qwen_image-1024-every_2nd", FEWER, seconds=50),
    row("qwen_image-1024-offload", OFFLOAD, seconds=60),
    row("qwen_image-1024-fp8", FP8, seconds=60),
    row("qwen_image-1024-nf4", NF4, seconds=70),
    row("qwen_image-1024-stream_48", "memory.stream_blocks=48", seconds=120),
    row("flux2_klein_9b-1024-none", NONE, seconds=40),
    row("flux2_klein_4b-1024-compile", COMPILE, seconds=120),
    row("flux2_klein_4b-1024-none_compile", NONE, COMPILE, seconds=120),
    # Full training, batches, and one stage instead of two.
    row("flux2_klein_4b-1024-full", rank=0, seconds=60),
    row("flux2_klein_4b-1024-full_bf16", "memory.trained_dtype=bfloat16", rank=0, seconds=60),
    row("flux2_klein_4b-1024-batch_4", "batch_size=4", "micro_batch_size=4", seconds=50),
    row("flux2_klein_4b-1024-encode", encodes=True, seconds=50),
    row("flux2_klein_4b-1024-encode-remembered", "memory.remember=1", encodes=True, seconds=50),
    # What is beside the step: the average, evaluations, checkpoints. "slowest" is the step that waited for them.
    row("flux2_klein_4b-1024-ema", "ema=power"),
    row("flux2_klein_4b-1024-ema_on_host", "ema=power", "ema.device=cpu"),
    row("flux2_klein_4b-1024-checkpoint", "checkpoint.every=10", "checkpoint.keep_last=1", seconds=40),
    row(
        "flux2_klein_4b-1024-validation",
        "validation=base",
        "validation.prompts=[a,b]",
        "validation.every=10",
        "validation.options.num_inference_steps=4",
        "validation.options.cfg_scale=1",
        seconds=60,
    ),
    # Small images, where the CPU that launches kernels may be the limit.
    row("qwen_image-512-blocks", seconds=40),
    row("qwen_image-512-compile", COMPILE, seconds=140),
    row("flux2_klein_4b-512-blocks"),
    row("flux2_klein_4b-512-none", NONE),
    row("flux2_klein_9b-512-blocks", seconds=40),
    # Attention: every backend that needs no further package, and prompts of many lengths, for which cuDNN plans anew.
    row("flux2_klein_4b-1024-attention-flash", attention="_native_flash"),
    row("flux2_klein_4b-1024-attention-cudnn", attention="_native_cudnn"),
    row("flux2_klein_4b-1024-attention-efficient", attention="_native_efficient"),
    row("qwen_image-1024-lengths", lengths=40, seconds=110),
    row("qwen_image-1024-lengths-cudnn", attention="_native_cudnn", lengths=40, seconds=110),
)


def matching(pattern: str) -> list[BenchmarkRow]:
    """The rows whose names match a pattern of the shell.

    Raises:
        SystemExit: None does.
    """
    found = [each for each in ROWS if fnmatch(each.name, pattern)]
    if not found:
        nearest = get_close_matches(pattern, [each.name for each in ROWS], 1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ";"
        raise SystemExit(f"no row has a name like {pattern!r}{hint} `python benchmarks/gpu.py --list` lists all.")
    return found


def fitting(rows: Sequence[BenchmarkRow], seconds: float) -> list[BenchmarkRow]:
    """The rows that fit into this time, each earlier one before the later ones."""
    fit = []
    for each in rows:
        if each.seconds <= seconds:
            seconds -= each.seconds
            fit.append(each)
    return fit


def distinct(rows: Sequence[BenchmarkRow]) -> list[BenchmarkRow]:
    """The first row of each model, and one of all rows whose options are equal on tiny models.

    Attention backends are those of GPUs.
    """
    models = {MODELS[row.model]: row for row in reversed(rows)}
    kinds = {row.kind: row for row in reversed(rows)}
    return [row for row in rows if row in models.values() or row in kinds.values()]
