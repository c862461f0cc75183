"""Every number of the configuration has a range: what is outside is answered in one line that names its key."""

import inspect
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence

import pytest
import tiny
from conf_folder import CONF
from families import FAMILIES
from hydra.utils import get_object
from omegaconf import OmegaConf

from diffsynth.config import ConfigError, check
from diffsynth.diffusion.pipeline.request import check_numbers

YAML = "\n".join(file.read_text(encoding="utf-8") for file in sorted(CONF.rglob("*.yaml")))
WRITTEN = set(re.findall(r"^ *(\w+):", YAML, re.MULTILINE))  # every key
FOREIGN = {"bitsandbytes", "prodigyopt", "schedulefree", "hydra_plugins"}  # are absent, or not checked
TARGETS = [name for name in sorted(set(re.findall(r"_target_: ([\w.]+)", YAML))) if name.split(".")[0] not in FOREIGN]
ENTRIES = ("train", "distill", "plan", "make_cache", "generate", "fuse", "controlnet")

# What these numbers mean below the others' ranges, their comments say; everything else is refused.
MEANINGFUL = {
    -1: {"mean", "mu", "lora_scale", "decompose_factor", "exponential_shift_mu"},
    0: {
        *("caption_dropout", "flip", "keep_tags", "captions", "num_workers", "scan_rows", "dropout", "remember"),
        *("first_seed", "seed", "stream_blocks", "rows", "pictures", "row_samples", "lora_scale", "mean", "mu"),
        *("learning_rate", "full_learning_rate", "lr", "weight_decay", "betas", "decay", "min_boundary", "seeds"),
        *(
            "cfg_scale",
            "cfg_scale_2",
            "guidance",
            "distillation_weight",
            "adversarial_weight",
            "kl_weight",
            "kl",
            "kl_old",
            "anchor_weight",
            "diversity",
            "inpaint_blur_sigma",
        ),
        *("num_warmup_steps", "num_decay_steps", "eps", "exponential_shift_mu", "embedded_guidance"),
        *("low", "high", "blur", "strokes", "boxes", "objects", "whole", "inside", "outside"),
        *(
            "vace_scale",
            "given_probability",
            "controlnet_scale",
            "controlnet_start",
            "controlnet_end",
            "controlnet_mode",
        ),
    },
}
# Of rewards; a weight of another node is above 0.
MEANINGFUL_OF_REWARDS = {
    -1: {"weight", "lowest", "highest"},
    0: {"target", "lowest", "highest", "retries"},
}
WRONG = [-1, 0, 1e30, 10**30, math.nan, math.inf, "high", True]


def kinds(hint: object) -> set:
    """The types that an annotation names, at any depth; those of a function's arguments left out."""
    if isinstance(hint, list):
        return set()
    return {hint, typing.get_origin(hint)}.union(*map(kinds, typing.get_args(hint)))


def numbers_of(target: Callable) -> dict[str, set]:
    """The parameters of a constructor or function that are numbers, with the types in their annotations."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    found = {name: kinds(hint) for name, hint in hints.items() if name != "return"}
    return {name: types for name, types in found.items() if types & {int, float}}


def wrapped(value: object, types: set) -> object:
    """A number as an item of the list or mapping that a parameter takes."""
    return [value] * 2 if types & {Sequence, tuple} else {"x": value} if Mapping in types else value


def answer(entry: Callable, cfg: dict) -> str:
    """What `check` says to a configuration; empty if it complains of nothing but an unknown key."""
    with pytest.raises(ConfigError) as refused:
        check(OmegaConf.create({**cfg, "unknown": 1}), entry)
    return "" if str(refused.value).startswith("unknown:") else str(refused.value)


def assert_in_range(name: str, types: set, say: Callable[[object], str], meaningful: Mapping = MEANINGFUL) -> None:
    for value in WRONG:
        message = say(wrapped(value, types))
        is_meant = value is not True and name in meaningful.get(value, ())
        is_factor = float in types and value in (1e30, 10**30)  # has no upper end, or one below
        is_amount = str in types and value == "high"  # such as 24GiB, which the constructor reads
        if is_meant:
            assert message == ""
        elif message or not (is_factor or is_amount):
            assert re.search(rf"\b{name}\S* is ", message) and "\n" not in message, f"{name}={value}: {message!r}"


@pytest.mark.parametrize("target", TARGETS)
def test_every_number_of_a_constructor_has_a_range(target):
    def entry(node: typing.Any = None, optimizer: typing.Any = None): ...

    is_ours = target.startswith("diffsynth.")
    numbers = {name: types for name, types in numbers_of(get_object(target)).items() if is_ours or name in WRITTEN}
    key = "node" if is_ours else "optimizer"
    meaningful = MEANINGFUL_OF_REWARDS if ".rewards." in target else MEANINGFUL
    for name, types in numbers.items():
        node = {"_target_": target, "_partial_": True}

        def say(value: object, name: str = name, node: dict = node) -> str:
            return answer(entry, {key: node | {name: value}})

        assert_in_range(name, types, say, meaningful)


class Own:
    """A class of a user's own, whose numbers are its own affair."""

    def __init__(self, eps: float): ...


@pytest.mark.parametrize("target", [f"{__name__}.Own", "torch.optim.AdamW"])
def test_an_eps_of_0_is_left_to_classes_of_others(target):
    def entry(own: typing.Any = None, optimizer: typing.Any = None): ...

    key = "optimizer" if target.startswith("torch.") else "own"
    check(OmegaConf.create({key: {"_target_": target, "_partial_": True, "eps": 0.0}}), entry)


@pytest.mark.parametrize(
    "value, said",
    [
        ({"any": [1, 2, 3]}, ""),
        ({"two": [1, "x"]}, ""),
        ({"any": ["x"]}, "any[0] is 'x' (str); expected int."),
        ({"two": ["x", "x"]}, "two[0] is 'x' (str); expected int."),
        ({"two": [1]}, "two is [1] (list); expected a list of 2: int, str."),
        ({"any": 1}, "any is 1 (int); expected a list, each int."),
    ],
)
def test_the_items_of_a_tuple_are_checked_by_their_places(value, said):
    def entry(any: tuple[int, ...] = (), two: tuple[int, str] = (1, "x")): ...

    assert answer(entry, value) == said


@pytest.mark.parametrize("entry", ENTRIES)
def test_every_number_of_a_script_has_a_range(entry):
    schema = tiny.schema(entry)
    for name, types in numbers_of(schema).items():
        assert_in_range(name, types, lambda value, n=name: answer(schema, {n: value}))


def test_of_two_wrong_numbers_the_first_field_is_named():
    request = FAMILIES[0].pipeline.request
    wrong = [name for name in numbers_of(request) if name in ("height", "width", "cfg_scale", "num_inference_steps")]
    with pytest.raises(ValueError, match=f"^options.{wrong[0]} is -1;"):
        check_numbers(request, dict.fromkeys(reversed(wrong), -1), "options.")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_number_of_a_request_has_a_range(family):
    request = family.pipeline.request

    def say(name: str, value: object) -> str:
        try:
            check_numbers(request, {name: value})
        except ValueError as error:
            return str(error)
        return ""

    for name, types in numbers_of(request).items():
        assert_in_range(name, types, lambda value, n=name: say(n, value))


@pytest.mark.parametrize(
    "override, answer",
    [
        ("seed=18446744073709551616", "seed is 18446744073709551616 (int); expected a number of at most"),
        ("lora.alpha=0", "lora.alpha is 0 (int); expected a number above 0, or null."),
        ("max_grad_norm=nan", "max_grad_norm is nan (float); expected a number above 0, or null."),
        (
            "optimizer.betas=[0.9]",
            "optimizer.betas is [0.9] (list); expected a list of 2, each a number in [0, 1).",
        ),
        ("optimizer.betas=[0.9,1]", "optimizer.betas[1] is 1 (int); expected a number in [0, 1)."),
        ("max_steps=true", "max_steps is True (bool); expected a whole number of at least 1, or null."),
        ("dataset.augmentation.captions={prompt:-1}", "dataset.augmentation.captions.prompt is -1 (int)"),
    ],
)
def test_an_answer_names_the_key_the_value_and_the_range(override, answer):
    with pytest.raises(ConfigError) as refused:
        check(tiny.compose("train", override), tiny.schema("train"))
    assert answer in str(refused.value)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"alpha": 0}, {"alpha": math.nan}, {"dropout": 1}, {"rank": True}])
def test_python_code_is_held_to_the_ranges_too(wrong):
    from diffsynth.diffusion.adapters.lora import LoRA

    with pytest.raises(ValueError, match=rf"lora\.{next(iter(wrong))} is .*; expected "):
        LoRA(**wrong)
