"""Every option of every group composes, and options add up to what they say."""

import re
from importlib.metadata import requires
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import pytest
import tiny
import yaml
from conf_folder import CONF, ENTRIES, groups, options
from omegaconf import OmegaConf

from diffsynth.config import ConfigError, check
from diffsynth.diffusion.pipeline.video_media import VideoMedia


def belongs(entry: str, group: str, option: str) -> bool:
    """Whether an entry is to compose with an option; what train.py has need not be composed with others again."""
    if group == "experiment":
        return entry in ("train", "distill") and option.startswith("emoji_distill/") == (entry == "distill")
    if entry == "plan":
        return group == "task"
    if entry == "reward":
        return group == "reward" or (group == "task" and option.startswith("reward/"))
    return (
        entry != "distill"
        or group in ("student", "teacher", "discriminator")
        or (group == "task" and option.startswith("distill"))
    )


def rows(entry: str) -> list[list[str]]:
    """All options of an entry, in as few rows as groups allow: an experiment chooses options of other groups itself."""
    choices = {g: [f"{g}={option}" for option in options(g) if belongs(entry, g, option)] for g in groups(entry)}
    alone = [[choice] for group in ("experiment", "debug") for choice in choices.pop(group, [])]
    of_the_task = [
        choices.pop(g) for g in ("timesteps", "weighting", "student", "teacher", "discriminator") if g in choices
    ]
    together = [*zip_longest(*of_the_task), *zip_longest(*choices.values())]
    return [*alone, *([choice for choice in row if choice] for row in together)]


def compose_and_check(entry: str, *choices: str) -> None:
    cfg = tiny.compose(entry, *choices)
    for key in OmegaConf.missing_keys(cfg):  # what only the user knows, such as dataset.path
        OmegaConf.update(cfg, key, "given")
    check(cfg, tiny.schema(entry))


@pytest.mark.parametrize("entry, row", [(entry, row) for entry in ENTRIES for row in rows(entry)])
def test_every_option_of_every_group_composes_and_passes_the_check(entry, row):
    try:
        compose_and_check(entry, *row)
    except Exception:  # one of them, which is found out here; or they don't go together
        for choice in row:
            try:
                compose_and_check(entry, choice)
            except ConfigError as error:
                assert_names_the_extra(str(error))


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_help_names_every_option_with_a_phrase_and_marks_the_chosen(entry, monkeypatch, capsys):
    tiny.command_line(monkeypatch, f"{entry}.py", "model=qwen_image", "--help")
    shown = capsys.readouterr().out
    sections = {section.split("\n")[0]: section for section in shown.split("\n\n")}
    for group in groups(entry):
        phrases = dict(re.findall(r"^  [ *] (\S+)  +(\S.*)$", sections[group], re.MULTILINE))
        assert sorted(phrases) == options(group)
    assert f"choose it: python {entry}.py " in shown
    assert "* qwen_image" in sections["model"] and "* emoji" not in sections["model"]
    assert yaml.safe_load(shown.split("Configuration\n")[1])["model"]["height"] == 1328


def test_the_help_explains_keys_by_the_comments_of_the_chosen_files(monkeypatch, capsys):
    tiny.command_line(monkeypatch, "train.py", "lora=dora", "model=qwen_image", "optimizer=prodigy", "--help")
    shown = capsys.readouterr().out
    for key, file in (("rank", "lora/_adapter"), ("preset", "lora/_adapter"), ("height", "model/qwen_image")):
        (comment,) = re.findall(rf"^ *{key}: .*(  # .*)$", (CONF / f"{file}.yaml").read_text(), re.MULTILINE)
        assert re.search(rf"^  {key}: .*{re.escape(comment)}$", shown, re.MULTILINE)
    keys = (CONF / "training.yaml").read_text().split("\nname: ")[1].split("\nhydra:")[0]
    comments = [line.partition("  # ")[2] for line in keys.splitlines()]
    assert all(comment in shown for comment in comments)


def test_the_help_says_how_to_list_the_keys_of_an_option_that_is_not_chosen(monkeypatch, capsys):
    tiny.command_line(monkeypatch, "train.py", "--help")
    command = "python train.py ema=power --help"
    shown = capsys.readouterr().out
    assert f"To list those of another, choose it: {command}." in shown
    assert f"ema: {{}}  # this option has no keys; those of another: {command}" in shown
    tiny.command_line(monkeypatch, *command.split()[1:])
    assert "  decay: 0.9999  # " in capsys.readouterr().out


def nodes_in_full() -> list[Path]:
    """The files that list every tunable of something; others change a few keys, and say why in their first line."""
    deltas = ("accelerate", "hydra", "experiment", "debug", "distillation_defaults", "local", "model")
    files = [path for path in sorted(CONF.rglob("*.yaml")) if path.relative_to(CONF).parts[0] not in deltas]
    return [path for path in files if "_target_: " in path.read_text() and not path.stem.startswith("emoji")]


@pytest.mark.parametrize("path", nodes_in_full(), ids=lambda path: str(path.relative_to(CONF)))
def test_every_tunable_says_what_it_does(path):
    """In a comment on its line, or on the line above for a pair such as height and width."""
    lines = path.read_text().split("\nhydra:")[0].splitlines()
    tunable = re.compile(r" *(?!_target_|_partial_|defaults|origin_file_pattern)\w+: (?!\$\{|\{\})\S")
    pairs = zip(lines, lines[1:], strict=False)
    assert [line for above, line in pairs if tunable.match(line) and "#" not in line + above] == []


def lines_of_model(name: str) -> list[str]:
    """The lines of a model's file, after those of the files that it extends."""
    text = (CONF / "model" / f"{name}.yaml").read_text()
    extended = [item for item in yaml.safe_load(text).get("defaults", []) if "@" not in item]
    return [line for item in extended for line in lines_of_model(item)] + text.splitlines()


@pytest.mark.parametrize("name", options("model"))
def test_every_setting_of_a_model_says_what_it_does(name):
    """In its file or in one that this extends; `_network.yaml` explains the components."""
    lines = [line for line in lines_of_model(name) if re.match(r"(?!_target_|_partial_|defaults)\w+: (?!\{)", line)]
    explained = {line.split(":")[0] for line in lines if "  # " in line}
    assert {line.split(":")[0] for line in lines} == explained


EXPERIMENTS = [name for name in options("experiment") if belongs("train", "experiment", name)]
DEBUGS = options("debug")


@pytest.mark.parametrize("number, experiment", list(enumerate(EXPERIMENTS)))
def test_an_experiment_leaves_nothing_behind_where_its_options_are_replaced(number, experiment):
    """By a word for each group, and by one debug: the experiments take turns."""
    for replacement in (["validation=none", "lr_scheduler=constant"], [f"debug={DEBUGS[number % len(DEBUGS)]}"]):
        compose_and_check("train", f"experiment={experiment}", *replacement)


def assert_names_the_extra(message: str):
    """A target may be missing only with its package, and only if an extra of this project installs that."""
    target = re.search(r"_target_ is '(\S+)'", message).group(1)
    extra = re.search(r'pip install "diffsynth-hydra\[(\w+)\]"', message).group(1)
    package = target.split(".")[0]
    assert find_spec(package) is None
    listed = re.compile(rf'{package}\b.*extra == "{extra}"')
    assert any(map(listed.match, requires("diffsynth-hydra")))


def test_options_of_memory_add_up():
    memory = tiny.compose("train", "memory=[checkpointing,fp8]").memory
    assert (memory.checkpointing, memory.storage) == ("blocks", "fp8")
    plain = tiny.compose("train", "memory=fp8").memory
    assert (plain.checkpointing, plain.storage) == ("none", "fp8")


def test_options_of_an_experiment_are_replaced_by_those_of_the_command_line(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /memory: [checkpointing, fp8]\n  - override /logger: wandb\n"
    )
    mine = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine"]
    chosen, replaced = tiny.compose("train", *mine), tiny.compose("train", *mine, "memory=int8")
    assert (chosen.memory.checkpointing, chosen.memory.storage) == ("blocks", "fp8")
    assert (replaced.memory.checkpointing, replaced.memory.storage) == ("none", "int8")
    assert list(chosen.logger.trackers) == ["wandb"]


def test_metrics_and_a_data_sets_own_validation_add_up():
    both = tiny.compose("train", "validation=[emoji,clip_score]").validation
    assert (list(both.metrics), list(both.datasets)) == (["retrieval", "clip_score"], ["trained", "held_out"])
    alone = tiny.compose("train", "validation=clip_score").validation
    assert (list(alone.metrics), list(alone.datasets)) == (["clip_score"], [])


def test_a_data_set_of_ones_own_is_one_file(tmp_path):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text("defaults: [image_folder]\npath: my_images\nheight: 512\n")
    cfg = tiny.compose("train", f"hydra.searchpath=[file://{tmp_path}]", "dataset=mine")
    check(cfg, tiny.schema("train"))
    assert (cfg.dataset.path, cfg.validation.options.height, cfg.validation.prompts) == ("my_images", 512, [])


def test_full_training_has_a_rate_of_its_own():
    def rate(*overrides: str) -> float:
        cfg = tiny.compose("train", "model=qwen_image", *overrides)
        check(cfg, tiny.schema("train"))
        return cfg.optimizer.lr

    adapter, full = 1e-4, 1e-5
    assert (rate(), rate("lora=dora"), rate("optimizer=schedule_free")) == (adapter, adapter, adapter)
    assert (rate("lora=none"), rate("task=autoencoder", "lora=none")) == (full, full)
    assert rate("task=template") == adapter  # small and new, as an adapter is
    assert (rate("lora=none", "model.training.full_learning_rate=1e-6"), rate("lora=none", "optimizer.lr=1")) == (
        1e-6,
        1,
    )


@pytest.mark.parametrize("model", options("model"))
def test_a_model_brings_data_that_it_can_be_trained_on(model):
    """The embedded ones the embedded emoji, the others their examples: of their size, with what they read."""
    cfg = tiny.compose("train", f"model={model}")
    own = (cfg.dataset.height, cfg.dataset.width) == (cfg.model.height, cfg.model.width)
    assert own and cfg.dataset.path.startswith("data/emoji" if model.startswith("emoji") else "data/diffsynth_example")
    of_files = [column for column in cfg.task.extra_inputs if column not in VideoMedia.derived]
    assert of_files == list(cfg.dataset.data_file_keys[1:])
    read_images = ("edit", "kontext", "fill", "controlnet", "layered", "vace")
    assert bool(of_files) == any(kind in model for kind in read_images)
    assert cfg.validation.datasets.trained.path == cfg.dataset.path
    assert tiny.compose("make_cache", f"model={model}").dataset == cfg.dataset


@pytest.mark.parametrize("model", options("model"))
def test_the_revision_and_the_config_of_every_network_are_set_without_a_plus(model):
    networks = [name for name, node in tiny.compose("fuse", f"model={model}").model.items() if "model_id" in str(node)]
    settings = [f"model.{name}.{key}=main" for name in networks for key in ("revision", "config")]
    chosen = tiny.compose("fuse", f"model={model}", "lora_path=x", *settings)
    check(chosen, tiny.schema("fuse"))
    assert len(networks) >= 4 and {chosen.model[name].revision for name in networks} == {"main"}


@pytest.mark.parametrize("entry, task", [("train", "sft"), ("train", "template"), ("distill", "distill/add")])
def test_noise_levels_are_chosen_by_a_word_in_every_task_that_trains_some(entry, task):
    cfg = tiny.compose(entry, f"task={task}", "timesteps=logit_normal", "task.timesteps.mean=0.5")
    check(cfg, tiny.schema(entry))
    assert (cfg.task.timesteps._target_.split(".")[-1], cfg.task.timesteps.mean) == ("LogitNormalTimesteps", 0.5)


@pytest.mark.parametrize("task", ["distill", *(f"distill/{method}" for method in options("task/distill"))])
def test_a_student_and_the_lack_of_a_teacher_are_chosen_by_a_word_in_every_distillation(task):
    cfg = tiny.compose("distill", f"task={task}", "student=renoise", "teacher=none")
    check(cfg, tiny.schema("distill"))
    assert cfg.task.student.renoise and cfg.task.teacher is None


def test_a_discriminator_is_chosen_by_a_word_in_the_distillations_that_have_one():
    plain, chosen = (tiny.compose("distill", "task=distill/dmd2", *word).task for word in ([], ["discriminator=heads"]))
    assert (
        plain.discriminator is None
        and chosen.discriminator == tiny.compose("distill", "task=distill/add").task.discriminator
    )
    check(tiny.compose("distill", "task=distill/dmd2", "discriminator=heads"), tiny.schema("distill"))
    with pytest.raises(ConfigError, match="task.discriminator is None .*expected Discriminator"):
        check(tiny.compose("distill", "task=distill/add", "discriminator=none"), tiny.schema("distill"))


@pytest.mark.parametrize("experiment", options("experiment"))
def test_an_experiment_says_at_its_top_how_it_is_run(experiment):
    head = (CONF / "experiment" / f"{experiment}.yaml").read_text().split("\ndefaults:")[0]
    (command,) = re.findall(r"^# +(?:accelerate launch .* |python )(\w+)\.py experiment=(\S+)$", head, re.MULTILINE)
    assert command == ("distill" if experiment.startswith("emoji_distill/") else "train", experiment)


def test_a_machines_own_paths_come_after_an_experiment_and_before_the_command_line(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "mine.yaml").write_text("# @package _global_\noutput_root: /data\nname: here\n")
    mine = [f"hydra.searchpath=[file://{tmp_path}]", "local=mine", "experiment=emoji/pretrain"]
    cfg = tiny.compose("train", *mine)
    assert (cfg.output_root, cfg.name, cfg.max_steps) == ("/data", "here", 2000)
    assert tiny.compose("train", *mine, "name=there").name == "there"
