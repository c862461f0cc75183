"""Nested state as JSON and tensors, and back."""

import copy
import json
import math
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn.functional import mse_loss

from diffsynth.core.safe_tree import join_state, split_state

# Any tree -------------------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (1,), (0,), (2, 3)]
tensors = st.builds(
    lambda dtype, shape, seed: (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype),
    st.sampled_from(DTYPES),
    st.sampled_from(SHAPES),
    st.integers(0, 9),
)
names = st.text("aé_", min_size=1, max_size=3) | st.sampled_from(["__tensor__", "__items__", "__tuple__", "1"])
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | tensors


def told_apart(tree: dict) -> bool:
    return len({str(key) for key in tree}) == len(tree)


def branches(trees):
    dicts = st.dictionaries(names | st.integers(-2, 2), trees, max_size=4).filter(told_apart)
    return dicts | st.lists(trees, max_size=3) | st.lists(trees, max_size=3).map(tuple)


def written_and_read(tree):
    """The tree after a way through files: JSON and safetensors."""
    plain, by_path = split_state(tree)
    return join_state(json.loads(json.dumps(plain)), load(save(by_path)))


def same(found, expected) -> bool:
    """Equal to the bit and in type, NaN included."""
    if type(found) is not type(expected):
        return False
    if isinstance(expected, torch.Tensor):
        bits = [tensor.reshape(-1).view(torch.uint8).tolist() for tensor in (found, expected)]
        return (found.dtype, found.shape, bits[0]) == (expected.dtype, expected.shape, bits[1])
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return len(found) == len(expected) and all(map(same, found, expected))
    return found == expected or (expected != expected and found != found)


@given(st.recursive(leaves, branches, max_leaves=12))
def test_a_tree_comes_back_as_it_was(tree):
    assert same(written_and_read(tree), tree)


def test_numbers_that_are_not_finite_come_back():
    found = written_and_read({"lr": [math.inf, -math.inf, math.nan], "d": torch.tensor([math.nan, math.inf])})
    assert same(found, {"lr": [math.inf, -math.inf, math.nan], "d": torch.tensor([math.nan, math.inf])})


def test_tensors_are_named_after_their_place():
    _, by_path = split_state({"state": {0: {"exp_avg": torch.ones(2)}}, "average": [torch.ones(3)]})
    assert {name: len(tensor) for name, tensor in by_path.items()} == {"state.0.exp_avg": 2, "average.0": 3}


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"state": {0: [1, {"hook": print}]}}, r"state\.0\.1\.hook is a builtin_function_or_method"),
        ({"groups": ({"names": {"a"}},)}, r"groups\.0\.names is a set"),
        ({"betas": {(0, 1): 2}}, r"betas\.\(0, 1\): the key \(0, 1\)"),
        ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, r"a\.b: the key 'a\.b' gives a tensor the same path"),
        ({"state": {1: torch.ones(1), "1": torch.ones(1)}}, r"state\.1: the key '1' gives a tensor the same path"),
    ],
    ids=["function", "set", "tuple as key", "dots", "number and word"],
)
def test_what_cannot_be_held_is_refused_with_its_path(tree, message):
    with pytest.raises(TypeError, match=message):
        split_state(tree)


# Optimizers -----------------------------------------------------------------------------------------------------------


def make(optimizer: str, parameters):
    """An optimizer by its dotted name; skips the test where its package is missing."""
    module, _, name = optimizer.rpartition(".")
    pytest.importorskip(module.split(".")[0])
    return getattr(import_module(module), name)(parameters, lr=0.1, weight_decay=0.01)


def set_mode(optimizer, mode: str) -> None:
    getattr(optimizer, mode, lambda: None)()  # of schedule-free ones


def take_steps(model: nn.Module, optimizer, numbers) -> None:
    set_mode(optimizer, "train")
    for number in numbers:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        mse_loss(model(x), x.roll(1, dims=1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    set_mode(optimizer, "eval")


@pytest.mark.parametrize(
    "optimizer", ["torch.optim.AdamW", "torch.optim.SGD", "prodigyopt.Prodigy", "schedulefree.AdamWScheduleFree"]
)
def test_an_optimizer_goes_on_bit_for_bit(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    ours = make(optimizer, model.parameters())
    take_steps(model, ours, range(3))

    twin = copy.deepcopy(model)
    theirs = make(optimizer, twin.parameters())
    theirs.load_state_dict(written_and_read(ours.state_dict()))
    assert same(theirs.state_dict(), ours.state_dict())

    take_steps(model, ours, range(3, 6))
    take_steps(twin, theirs, range(3, 6))
    assert same(twin.state_dict(), model.state_dict())
    assert same(theirs.state_dict(), ours.state_dict())
