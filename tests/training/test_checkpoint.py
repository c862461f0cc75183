"""Checkpoints: what is in them, which are kept, and that one that is not what was written is never used."""

import json
import shutil
from collections.abc import Callable
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from diffsynth.core.files import digest_of
from diffsynth.diffusion.training_module import DiffusionTrainingModule
from diffsynth.training import checkpoint
from diffsynth.training.accelerator import make_accelerator
from diffsynth.training.checkpoint import INDEX, Checkpoints, DamagedCheckpoint, load_part, read_checkpoint
from diffsynth.training.ema import EMA
from diffsynth.training.state import TrainingState


class Layers(nn.ModuleDict):
    """Layers that the loop can train."""

    trained_parts, trained_at = DiffusionTrainingModule.trained_parts, DiffusionTrainingModule.trained_at
    learning_rate, lagging_parts = DiffusionTrainingModule.learning_rate, DiffusionTrainingModule.lagging_parts


def training_state(width: int = 3) -> TrainingState:
    """A frozen base with two trained layers on it."""
    torch.manual_seed(0)
    model = Layers({"base": nn.Linear(3, 3), "lora": nn.Linear(3, width), "head": nn.Linear(width, 1)})
    model["base"].requires_grad_(False)
    adam = partial(torch.optim.AdamW, lr=0.1)
    return TrainingState(make_accelerator("cpu", "float32"), model, adam, None, steps=10, ema=EMA())


def take_step(state: TrainingState) -> None:
    base, lora, head = state.model.values()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(state.step))
    state.backward(head(lora(base(x)).tanh()).square().flatten())
    state.update(None)


def weights(state: TrainingState) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in state.main.all]


@pytest.fixture
def state():
    return training_state()


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "run" / "checkpoints", every=1, keep_last=9)


@pytest.fixture
def kept(checkpoints, state):
    """Checkpoints of steps 1 and 2, and the weights of both, by step."""
    history = {}
    for step in (1, 2):
        take_step(state)
        checkpoints.save(state.accelerator, state, {}, last=False)
        history[step] = weights(state)
    return history


def folders(checkpoints: Checkpoints) -> list[str]:
    return sorted(folder.name for folder in checkpoints.path.iterdir())


def resume(checkpoints: Checkpoints, state: TrainingState | None = None) -> TrainingState:
    fresh = state or training_state()
    assert checkpoints.resume(fresh.accelerator, fresh, {})
    return fresh


# What is in one -------------------------------------------------------------------------------------------------------


def test_the_newest_is_gone_on_from(checkpoints, kept):
    fresh = resume(checkpoints)
    assert fresh.step == 2
    assert all(map(torch.equal, weights(fresh), kept[2]))


def test_weights_optimizer_average_and_counts_are_taken_up(checkpoints, kept, state):
    fresh = resume(checkpoints)
    for each in (state, fresh):
        take_step(each)
    assert all(map(torch.equal, weights(fresh), weights(state)))
    assert all(map(torch.equal, fresh.ema.average, state.ema.average))
    assert fresh.meter.state() == state.meter.state()


def test_only_what_is_trained_is_in_it(checkpoints, kept):
    folder, content = checkpoints.newest()
    assert load_part(folder, content, "weights").keys() == {"lora.weight", "lora.bias", "head.weight", "head.bias"}
    held = [name for file in content["files"] for name in load_file(folder / file)]
    assert held and not any("base" in name for name in held)


def test_nothing_to_go_on_from_is_no_mistake(checkpoints, state):
    assert not checkpoints.resume(state.accelerator, state, {})
    assert state.step == 0 and not checkpoints.path.exists()


def test_what_is_large_is_split_over_files(checkpoints, state, monkeypatch):
    take_step(state)
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 40)
    folder = checkpoints.write(1, state.trees())
    sizes = [[t.nbytes for t in load_file(path).values()] for path in sorted(folder.glob("weights-*.safetensors"))]
    assert len(sizes) > 1 and all(sum(tensors) <= 40 or len(tensors) == 1 for tensors in sizes)
    assert all(map(torch.equal, weights(resume(checkpoints)), weights(state)))


# Which are kept -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_every, expected", [(None, [5, 6]), (2, [2, 4, 5, 6])])
def test_the_last_are_kept_and_every_so_many(keep_every, expected, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=keep_every)
    for step in range(1, 7):
        checkpoints.write(step, {"weights": {"a": torch.ones(1)}})
    assert sorted(checkpoints.steps()) == expected


@settings(max_examples=30)
@given(
    every=st.none() | st.integers(1, 4),
    keep_last=st.integers(1, 3),
    keep_every=st.none() | st.integers(1, 4),
    steps=st.integers(1, 9),
)
def test_no_run_has_more_than_are_expected(every, keep_last, keep_every, steps):
    with TemporaryDirectory() as folder:
        checkpoints, most = Checkpoints(folder, every, keep_last, keep_every), 0
        for step in range(1, steps + 1):
            if checkpoints.due(step) or step == steps:
                most = max(most, len(checkpoints.steps()) + 1)  # while it is written
                checkpoints.write(step, {})
        assert most <= checkpoints.most(steps) <= most + len(range(0, steps, keep_every or steps)) + 1


def test_the_one_just_saved_outlives_those_of_later_steps_that_were_passed_over(checkpoints, kept):
    cut_off(checkpoints.path / "step-000002")
    fresh = resume(checkpoints)
    again = Checkpoints(checkpoints.path, keep_last=1)
    again.write(1, fresh.trees())
    assert again.newest()[0].name == "step-000001"


@pytest.mark.parametrize("every, expected", [(None, []), (2, [2, 4])])
def test_they_are_due_every_so_many_steps(every, expected, tmp_path):
    assert [step for step in range(5) if Checkpoints(tmp_path, every=every).due(step)] == expected


@pytest.mark.parametrize("name", ["every", "keep_last", "keep_every"])
def test_numbers_below_one_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=rf"checkpoint\.{name} is 0; expected a whole number of at least 1"):
        Checkpoints(tmp_path, **{name: 0})


# Damage ---------------------------------------------------------------------------------------------------------------


def flip_a_bit(folder):
    path = folder / "optimizer-00000.safetensors"
    *content, last = path.read_bytes()
    path.write_bytes(bytes([*content, last ^ 1]))


def cut_off(folder):
    path = folder / "weights-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def delete_a_file(folder):
    (folder / "ema-00000.safetensors").unlink()


def alter_the_index(folder):
    index = json.loads((folder / INDEX).read_text())
    index["content"]["parts"]["counters"]["step"] = 7
    (folder / INDEX).write_text(json.dumps(index))


def cut_off_the_index(folder):
    (folder / INDEX).write_text((folder / INDEX).read_text()[:-9])


def delete_the_index(folder):
    (folder / INDEX).unlink()


DAMAGES = [flip_a_bit, cut_off, delete_a_file, alter_the_index, cut_off_the_index, delete_the_index]


def with_index(text: str) -> Callable[[Path], None]:
    """Replaces the index by a text."""
    return lambda folder: (folder / INDEX).write_text(text)


def with_content(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Changes what the index says, and its checksum with it."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())["content"]
        change(content)
        (folder / INDEX).write_text(json.dumps({"digest": checkpoint._digest_of(content), "content": content}))

    return damage


def with_tensors(part: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Changes the tensors of a part, and the checksum of their file with them."""

    def damage(folder: Path) -> None:
        name = f"{part}-00000.safetensors"
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name)
        with_content(lambda content: content["files"].update({name: digest_of(folder / name)}))(folder)

    return damage


def deep(levels: int) -> list:
    return reduce(lambda inner, _: [inner], range(levels), [])


def reshaped(key: str) -> Callable[[dict], object]:
    return lambda tensors: tensors.update({key: torch.zeros(7)})


def setting(*path, value) -> Callable[[dict], object]:
    """Sets one value in nested dicts and lists."""
    return lambda content: reduce(getitem, path[:-1], content).__setitem__(path[-1], value)


ITEMS = ("parts", "optimizer", "state", "__items__")
CRAFTED = {
    "a list": with_index("[]"),
    "a number": with_index("9" * 5000),
    "deep": with_index("[" * 100_000),
    "not UTF-8": lambda folder: (folder / INDEX).write_bytes(b"\xff"),
    "content is a list": with_index('{"digest": "", "content": []}'),
    "a file elsewhere": with_content(lambda content: content["files"].update({"../weights-0.safetensors": "00"})),
    "an absolute file": with_content(lambda content: content["files"].update({"/etc/passwd": "00"})),
    "files are numbers": with_content(setting("files", value=3)),
    "step is a text": with_content(setting("step", value="2")),
    "no parts": with_content(setting("parts", value={})),
    "counters are numbers": with_content(setting("parts", "counters", value=3)),
    "counted steps are negative": with_content(setting("parts", "counters", "step", value=-1)),
    "counted steps are a text": with_content(setting("parts", "counters", "skipped_in_a_row", value="0")),
    "a metric is a text": with_content(setting("parts", "counters", "measured", value={"loss": "0"})),
    "the meter is a list": with_content(setting("parts", "counters", "meter", value=[1])),
    "a sum is a text": with_content(setting("parts", "counters", "meter", "model", "grad_norm", value="0")),
    "weights are a number": with_content(setting("parts", "weights", value=3)),
    "weights are deep": with_content(setting("parts", "weights", value=deep(500))),
    "a weight is a text": with_content(setting("parts", "weights", "head.bias", value="0")),
    "a weight is gone": with_tensors("weights", lambda tensors: tensors.pop("head.bias")),
    "a weight is whole": with_tensors("weights", lambda tensors: tensors.update({"head.bias": torch.ones(1).int()})),
    "the optimizer is a list": with_content(setting("parts", "optimizer", value=[])),
    "the rate is a text": with_content(setting("parts", "optimizer", "param_groups", 0, "lr", value="0")),
    "other parameters": with_content(setting("parts", "optimizer", "param_groups", 0, "params", value=[0, 1])),
    "a key is a list": with_content(setting(*ITEMS, 0, 0, value=[0])),
    "a moment's shape": with_tensors("optimizer", reshaped("state.0.exp_avg")),
    "an average's shape": with_tensors("ema", reshaped("0")),
    "the average is one tensor": with_content(setting("parts", "ema", value={"__tensor__": "0"})),
    "the average is short": with_content(lambda content: content["parts"]["ema"].pop()),
}
DAMAGES += [pytest.param(damage, id=name) for name, damage in CRAFTED.items()]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over_for_the_one_before(damage, checkpoints, kept, caplog):
    damage(checkpoints.path / "step-000002")
    fresh = resume(checkpoints)
    assert fresh.step == 1
    assert all(map(torch.equal, weights(fresh), kept[1]))
    (line,) = [record.message for record in caplog.records if "damaged" in record.message]
    assert "step-000002" in line and "\n" not in line and len(line) < 600


def test_an_altered_index_is_said_to_be_damaged(checkpoints, kept):
    alter_the_index(checkpoints.path / "step-000002")
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint\.json is damaged: its checksum differs\.$"):
        checkpoint.read_checkpoint(checkpoints.path / "step-000002")


PLACES = st.lists(st.integers(0, 9), min_size=1, max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


def put(tree, place: list[int], value) -> None:
    """Set a value somewhere in nested dicts and lists; each number chooses a branch."""
    first, *others = place
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    if keys:
        key = keys[first % len(keys)]
        is_branch = isinstance(tree[key], (dict, list))
        put(tree[key], others, value) if others and is_branch else tree.__setitem__(key, value)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=PLACES, value=VALUES)
def test_a_checkpoint_of_any_content_is_loaded_or_passed_over(place, value, checkpoints, kept, tmp_path_factory):
    copy = Checkpoints(tmp_path_factory.mktemp("copy") / "checkpoints", keep_last=9)
    shutil.copytree(checkpoints.path, copy.path)
    with_content(lambda content: put(content, place, value))(copy.path / "step-000002")
    fresh = training_state()
    try:
        copy.resume(fresh.accelerator, fresh, {})
    except ValueError as error:  # such as weights of other names
        assert "another model" in str(error) or "fingerprint" in str(error) or "steps" in str(error)
    else:
        assert all(map(torch.equal, weights(fresh), kept[1])) or fresh.step != 1
        take_step(fresh)


def test_a_part_that_is_not_there_is_told_by_name(checkpoints, kept):
    folder, content = checkpoints.newest()
    with pytest.raises(DamagedCheckpoint, match="step-000002 has no other"):
        load_part(folder, content, "other")


def test_without_a_whole_one_the_run_starts_anew(checkpoints, kept, state):
    for folder in checkpoints.path.iterdir():
        cut_off(folder)
    assert not checkpoints.resume(state.accelerator, training_state(), {})


def test_what_a_killed_process_left_half_written_is_removed(checkpoints, kept):
    shutil.copytree(checkpoints.path / "step-000002", checkpoints.path / ".partial-1-step-000003")
    (checkpoints.path / ".partial-1-notes").write_text("half a wo")
    assert resume(checkpoints).step == 2
    assert folders(checkpoints) == ["step-000001", "step-000002"]


def test_a_save_that_fails_half_way_leaves_nothing_and_loses_nothing(checkpoints, kept, monkeypatch):
    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(checkpoint, "write_text", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        checkpoints.write(2, {"weights": {"a": torch.ones(1)}})
    assert folders(checkpoints) == ["step-000001", "step-000002"]
    assert read_checkpoint(checkpoints.path / "step-000002")["parts"].keys() > {"weights", "optimizer"}


# No room --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))


def test_no_room_is_told_in_numbers_and_loses_nothing(checkpoints, kept, full_disk):
    with pytest.raises(OSError) as error:
        checkpoints.write(3, {"weights": {"a": torch.ones(10**8, device="meta")}})
    assert "0.467 GB" in str(error.value) and "0.003 GB" in str(error.value)  # 0.4 and a reserve; what is free
    assert str(checkpoints.path) in str(error.value) and "of step 2, is kept" in str(error.value)
    assert folders(checkpoints) == ["step-000001", "step-000002"]


def test_a_state_in_a_row_of_bad_steps_replaces_none(checkpoints, kept, state):
    state.skipped_in_a_row = 1
    state.step += 1
    Checkpoints(checkpoints.path, keep_last=1).save(state.accelerator, state, {}, last=True)
    assert folders(checkpoints) == ["step-000001", "step-000002", "step-000003"]


def test_without_room_a_run_goes_on_but_does_not_end_as_if_it_were_saved(checkpoints, kept, state, full_disk, caplog):
    take_step(state)
    checkpoints.save(state.accelerator, state, {}, last=False)
    assert "The checkpoint of step 3 is not saved: " in caplog.text and "make room" in caplog.text
    with pytest.raises(OSError, match="make room"):
        checkpoints.save(state.accelerator, state, {}, last=True)


# Other runs -----------------------------------------------------------------------------------------------------------


def test_another_data_set_is_refused_by_name(checkpoints, state):
    checkpoints.write(1, state.trees(), {"data set": "aaaa"})
    with pytest.raises(
        ValueError, match=r"step-000001 .*another data set: its fingerprint was aaaa and is bbbb now.*set name="
    ):
        checkpoints.resume(state.accelerator, state, {"data set": "bbbb"})


def test_the_weights_of_another_model_are_refused_by_name(checkpoints, kept):
    other = training_state(width=5)
    before = weights(other)
    with pytest.raises(
        ValueError, match=r"another model: the shape of head\.weight is \(1, 3\) in the checkpoint and \(1, 5\) in"
    ):
        checkpoints.resume(other.accelerator, other, {})
    assert all(map(torch.equal, weights(other), before))
