"""What a configuration may say, what a wrong one is told, and which folder a run owns."""

import json
import re
import shlex
import subprocess
from fnmatch import fnmatch
from importlib.metadata import requires
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import pytest
import tiny
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from diffsynth.config import ConfigError, check, claim, finish, signature
from make_cache import COMMANDS

CONF = tiny.ROOT / "conf"
ENTRIES = sorted(path.stem for path in CONF.glob("*.yaml") if (tiny.ROOT / f"{path.stem}.py").exists())


# Everything that can be chosen ----------------------------------------------------------------------------------------


def groups(file: str) -> list[str]:
    """The config groups in a file's list of defaults, and in the files and the task that this names."""
    defaults = yaml.safe_load((CONF / f"{file}.yaml").read_text()).get("defaults", [])
    named = {
        name.removeprefix("/"): option for item in defaults if isinstance(item, dict) for name, option in item.items()
    }
    files = [item for item in defaults if isinstance(item, str) and item != "_self_"]
    files += [f"task/{named['task']}"] if "task" in named else []
    return [name for file in files for name in groups(file)] + [name for name in named if (CONF / name).is_dir()]


def options(group: str) -> list[str]:
    folder = CONF / group
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")]
    return sorted(name for name in names if not name.startswith("_"))


def belongs(entry: str, group: str, option: str) -> bool:
    """Whether an entry is to compose with an option; what train.py has need not be composed with others again."""
    if group == "experiment":
        return entry != "plan" and option.startswith("emoji_distill/") == (entry == "distill")
    if entry == "plan":
        return group == "task"
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
    assert "* qwen_image" in sections["model"] and "* emoji" not in sections["model"]
    assert yaml.safe_load(shown.split("Configuration\n")[1])["model"]["height"] == 1328


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


def replacements() -> list[list[str]]:
    """What may replace options that an experiment of train.py chooses: every debug, and a word for each group."""
    return [*([f"debug={name}"] for name in options("debug")), ["validation=none", "lr_scheduler=constant"]]


@pytest.mark.parametrize("experiment", [name for name in options("experiment") if belongs("train", "experiment", name)])
def test_an_experiment_leaves_nothing_behind_where_its_options_are_replaced(experiment):
    for replacement in replacements():
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
    assert list(cfg.task.extra_inputs) == list(cfg.dataset.data_file_keys[1:])
    assert bool(cfg.task.extra_inputs) == ("edit" in model)
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


# The documentation ----------------------------------------------------------------------------------------------------


def documents() -> list[Path]:
    return [file for file in (tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").rglob("*.md"))) if file.exists()]


def documented(find) -> list:
    """What `find` finds in each document, with the document's name."""
    return [(file.name, found) for file in documents() for found in find(file.read_text(encoding="utf-8"))]


BLOCK = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
ANSWERED = r"\$ python (.*)\n(error: .*)"
COMMAND = rf"[ $]*(\w+=\S+ +)*(\S*python3?|accelerate|torchrun|srun|deepspeed) (.* )?({'|'.join(ENTRIES)})\.py( |$)"


def commands_in(markdown: str) -> list[str]:
    """The command lines of entry scripts in a document's code blocks and code spans, but for those shown to fail."""
    blocks = [re.sub(ANSWERED, "", block) for block in BLOCK.findall(markdown)]
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", BLOCK.sub("", markdown))
    lines = "\n".join([*blocks, *spans]).replace("\\\n", " ").splitlines()
    return [line.strip(" $") for line in lines if re.match(COMMAND, line)]


def errors_in(markdown: str) -> list[tuple[str, str]]:
    """The command lines that a document shows to fail, each with the error below it."""
    return re.findall(ANSWERED, "\n".join(BLOCK.findall(markdown)))


def filled_in(word: str) -> str:
    """A word of a command line, its `…` replaced by a value: an option if its key is a group, else a text."""
    group, _, option = word.partition("=")
    if "…" in option and (CONF / group).is_dir():
        return f"{group}={next(name for name in options(group) if fnmatch(name, option.replace('…', '*')))}"
    return word.replace("…", "x")


def jobs(line: str) -> list[tuple[str, list[str]]]:
    """The (entry, overrides) that a command line runs, a sweep several; `…` stands for what the reader puts there."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    start, entry = next((n, w.removesuffix(".py")) for n, w in enumerate(words) if w in [f"{e}.py" for e in ENTRIES])
    end = next((n for n, word in enumerate(words) if n > start and set(word) <= set("();<>|&")), len(words))
    given = [filled_in(word) for word in words[start + 1 : end] if word not in ("…", "...")]
    given = [f"command={word}" if entry == "make_cache" and word in COMMANDS else word for word in given]
    arguments = get_args_parser().parse_args(given)
    overrides = OverridesParser.create().parse_overrides(arguments.overrides)
    if not arguments.multirun:
        return [(entry, [override.input_line for override in overrides])]
    (batch,) = BasicSweeper.split_arguments(overrides, None)
    return [(entry, overrides) for overrides in batch]


@pytest.mark.parametrize("file, line", documented(commands_in))
def test_every_documented_command_composes_and_passes_the_check(file, line):
    for entry, overrides in jobs(line):
        check(tiny.compose(entry, *overrides), tiny.schema(entry))


@pytest.mark.parametrize("file, shown", documented(errors_in))
def test_every_documented_error_is_what_the_command_line_answers(file, shown, monkeypatch, tmp_path):
    line, error = shown
    script, *arguments = shlex.split(line, comments=True)
    elsewhere = [f"output_root={tmp_path}"] if script == "train.py" else []
    assert complaint(monkeypatch, *arguments, *elsewhere, script=script).startswith(error)


DOCUMENT = """
Say `python train.py lora.rank=2`, not `train.py`.

```bash
# python train.py commented=out
$ python train.py                                  # the default
python train.py -m lora.rank=4,8 'optimizer.lr=1e-4,2e-4'
accelerate launch --num_processes 2 train.py \\
    model=qwen_image "dataset.path=my pictures" > log
CUDA_VISIBLE_DEVICES=0 torchrun --nproc_per_node 2 train.py device=cpu && python generate.py seed=[1,2]
```

```
train.py generate.py   # 40 lines each
python train.py model=… optimizer.lr=1e-4 …
accelerate launch examples/qwen_image/model_training/train.py --of another
python generate.py lora_path=outputs/sft-…
$ python train.py lora.rnak=8
error: no such key
```
"""


def test_commands_are_found_in_documents():
    found = [jobs(line) for line in commands_in(DOCUMENT)]
    assert found == [
        [("train", [])],
        [("train", [f"lora.rank={r}", f"optimizer.lr={lr}"]) for r in (4, 8) for lr in ("0.0001", "0.0002")],
        [("train", ["model=qwen_image", "dataset.path=my pictures"])],
        [("train", ["device=cpu"])],
        [("train", ["model=emoji", "optimizer.lr=1e-4"])],
        [("generate", ["lora_path=outputs/sft-x"])],
        [("train", ["lora.rank=2"])],
    ]
    assert errors_in(DOCUMENT) == [("train.py lora.rnak=8", "error: no such key")]


# Mistakes -------------------------------------------------------------------------------------------------------------


def complaint(monkeypatch, *arguments: str, script: str = "train.py") -> str:
    """What the command line says when it gives up."""
    with pytest.raises(SystemExit) as exit:
        tiny.command_line(monkeypatch, script, *arguments)
    return str(exit.value)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Says what the command line answers to an experiment of this content."""

    def answer(content: str) -> str:
        (tmp_path / "experiment").mkdir()
        (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\n" + content)
        return complaint(monkeypatch, "--config-dir", str(tmp_path), "experiment=mine", f"output_root={tmp_path}")

    return answer


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_a_misspelt_key_on_the_command_line_is_answered_with_the_nearest(prefix, monkeypatch, tmp_path):
    message = complaint(monkeypatch, f"{prefix}lora.rnak=8", f"output_root={tmp_path}")
    assert "lora.rnak" in message and "'rnak'" in message and "did you mean lora.rank?" in message


def test_a_misspelt_key_in_an_experiment_is_answered_with_the_nearest(experiment):
    message = experiment("lora: {rnak: 8}")
    assert "lora.rnak" in message and "'rnak'" in message and "did you mean lora.rank?" in message


def test_a_misspelt_key_at_the_top_of_an_experiment_is_answered_with_the_nearest(experiment):
    assert "the configuration has no option 'batchsize'; did you mean batch_size?" in experiment("batchsize: 8")


@pytest.mark.parametrize(
    "removed, answer",
    [
        ("~data_report", "data_report is missing: add `data_report: …` to the YAML file of the experiment."),
        (
            "~export.output_path",
            "and ModelLogger requires it: add `output_path: …` to the YAML file of export.",
        ),
    ],
)
def test_a_key_that_is_missing_is_answered_with_the_line_to_add(removed, answer, monkeypatch, tmp_path):
    assert answer in complaint(monkeypatch, removed, f"output_root={tmp_path}")


def test_the_first_of_several_misspelt_keys_is_answered(monkeypatch):
    assert "did you mean lora.rank?" in complaint(monkeypatch, "-m", "lora.rnak=8", "optimiser.lr=1", "lora=dora,lora")


@pytest.mark.parametrize(
    "script, key",
    [
        ("train.py", "output_root"),
        ("distill.py", "output_root"),
        ("make_cache.py", "path"),
        ("plan.py", "path"),
        ("generate.py", "output"),
        ("fuse.py", "output"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_answered_with_its_key(script, key, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("where a folder should be")
    message = complaint(monkeypatch, f"{key}={tmp_path}/file/folder", script=script)
    assert f"{tmp_path}/file" in message and f"; set {key}=… to a folder that can be written to." in message


def test_what_is_no_override_is_answered_in_one_line(monkeypatch):
    assert "name=[1" in complaint(monkeypatch, "name=[1")


def test_a_key_below_one_that_is_not_there_is_answered_for_that_one(monkeypatch):
    assert "template: no such key 'template'; there are [" in complaint(monkeypatch, "template.path=somewhere")


def test_a_misspelt_group_is_answered_with_the_nearest(monkeypatch):
    assert "did you mean model?" in complaint(monkeypatch, "modle=emoji")


@pytest.mark.parametrize(
    "chosen, answer",
    [
        (["memory=[none,checkpointing]"], ["memory=checkpointing and memory=none", "memory.checkpointing is blocks"]),
        (["memory=[fp8,streaming,int8]"], ["memory=fp8 and memory=int8", "memory.storage is fp8"]),
        (["timesteps=logit_normal", "task=autoencoder"], ["task=autoencoder has no group timesteps", "sft"]),
        (["teacher=none"], ["task=sft has no group teacher", "distill/dmd2"]),
        (["validation=[none,lpips]"], ["validation=none and validation=lpips contradict each other"]),
        (["validation=[emoji,none]"], ["validation=none and validation=emoji contradict each other"]),
        (["memory=null"], ["memory=null names no option", "--help"]),
        (["experiment=[emoji_distill/add]"], ["an experiment of distill.py, not of train.py"]),
    ],
)
def test_choices_that_contradict_each_other_are_named(chosen, answer, monkeypatch, tmp_path):
    message = complaint(monkeypatch, *chosen, f"output_root={tmp_path}")
    assert all(part in message for part in answer), message


def test_options_of_an_experiment_that_contradict_each_other_are_named(experiment):
    message = experiment("defaults:\n  - override /memory: [fp8, int8]\n")
    assert "memory=fp8 and memory=int8 contradict each other" in message


@pytest.mark.parametrize(
    "script, experiment, other",
    [
        ("train.py", "emoji_distill/dmd2", "distill.py"),
        ("distill.py", "emoji/pretrain", "train.py"),
        ("plan.py", "emoji_distill/lcm", "distill.py"),
    ],
)
def test_an_experiment_refuses_the_wrong_script_and_names_the_right_one(script, experiment, other, monkeypatch):
    message = complaint(monkeypatch, f"experiment={experiment}", script=script)
    assert message == (
        f"error: experiment={experiment} is an experiment of {other}, not of {script}; run python {other} "
        f"experiment={experiment}"
    )


@pytest.mark.parametrize("experiment", options("experiment"))
def test_an_experiment_says_at_its_top_how_it_is_run(experiment):
    head = (CONF / "experiment" / f"{experiment}.yaml").read_text().split("\ndefaults:")[0]
    (command,) = re.findall(r"^# +(?:accelerate launch .* |python )(\w+)\.py experiment=(\S+)$", head, re.MULTILINE)
    assert command == ("distill" if experiment.startswith("emoji_distill/") else "train", experiment)


def test_a_machines_own_file_that_is_not_there_is_named(monkeypatch):
    assert "nowhere.yaml does not exist" in complaint(monkeypatch, "local=nowhere")


def test_a_machines_own_paths_come_after_an_experiment_and_before_the_command_line(tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "mine.yaml").write_text("# @package _global_\noutput_root: /data\nname: here\n")
    mine = [f"hydra.searchpath=[file://{tmp_path}]", "local=mine", "experiment=emoji/pretrain"]
    cfg = tiny.compose("train", *mine)
    assert (cfg.output_root, cfg.name, cfg.max_steps) == ("/data", "here", 2000)
    assert tiny.compose("train", *mine, "name=there").name == "there"


def test_a_group_that_a_script_has_not_is_answered_with_those_it_has(monkeypatch):
    message = complaint(monkeypatch, "dataset=emoji", script="generate.py")
    assert "dataset: generate.py has no such group; it has model." in message


def test_a_misspelt_option_is_answered_with_those_there_are(monkeypatch):
    message = complaint(monkeypatch, "lora=dara")
    assert "lora/dara" in message and "dora" in message


@pytest.mark.parametrize("target", ["torch.optim.AdamV", "torhc.optim.Adam", "torch.optim"])
def test_a_target_that_is_none_is_named(target, monkeypatch, tmp_path):
    message = complaint(monkeypatch, f"optimizer._target_={target}", f"output_root={tmp_path}")
    assert f"optimizer._target_ is '{target}'" in message


def test_a_target_of_a_package_that_is_not_installed_is_answered_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    message = complaint(monkeypatch, "optimizer=adamw_8bit", f"output_root={tmp_path}")
    assert 'pip install "diffsynth-hydra[optimizers]"' in message


@pytest.mark.parametrize(
    "override, expected",
    [
        ("max_steps=ten", "max_steps is 'ten' (str); expected int"),
        ("lora.rank=high", "lora.rank is 'high' (str); expected int"),
        ("seed=1.5", "seed is 1.5 (float); expected int"),
        ("batch_size=null", "batch_size is None (NoneType); expected int"),
        ("task.timesteps=uniform", "task.timesteps is 'uniform' (str); expected UniformTimesteps"),
    ],
)
def test_a_value_of_the_wrong_type_is_answered_with_the_right_one(override, expected, monkeypatch, tmp_path):
    assert expected in complaint(monkeypatch, override, f"output_root={tmp_path}")


@pytest.mark.parametrize(
    "override, expected",
    [
        (
            "+validation.datasets.mine.metadata=mine.csv",
            r"validation.datasets.mine has no _target_.*\(metadata\).*builds TrainingData",
        ),
        ("+validation.metrics.mine.batch_size=2", r"validation.metrics.mine has no _target_.*builds Metric"),
        ("~task.timesteps._target_", r"task.timesteps has no _target_.*builds UniformTimesteps"),
    ],
)
def test_keys_that_would_build_nothing_are_named(override, expected, monkeypatch, tmp_path):
    assert re.search(expected, complaint(monkeypatch, override, f"output_root={tmp_path}"))


def test_a_value_that_others_refer_to_and_that_is_gone_is_named(monkeypatch, tmp_path):
    message = complaint(monkeypatch, "~model.training", f"output_root={tmp_path}")
    first, *others = message.splitlines()
    assert "Interpolation key 'model.training" in first and "DIFFSYNTH_TRACEBACK" in "".join(others)


def test_a_value_that_nobody_gave_is_asked_for(monkeypatch, tmp_path):
    message = complaint(monkeypatch, "dataset=image_folder", f"output_root={tmp_path}")
    assert "dataset.path" in message and "command line" in message


def test_other_scripts_answer_the_same(monkeypatch):
    assert "did you mean lora_path?" in complaint(monkeypatch, "lorapath=x.safetensors", script="generate.py")


@pytest.mark.parametrize("script", ["distill.py", "plan.py"])
def test_scripts_that_hand_arguments_on_to_a_training_know_what_these_may_be(script, monkeypatch, tmp_path):
    folder = f"output_root={tmp_path}"
    assert "max_steps is 'ten' (str); expected int" in complaint(monkeypatch, "max_steps=ten", folder, script=script)
    assert "did you mean max_steps?" in complaint(monkeypatch, "+max_step=10", folder, script=script)


# Run folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override", ["lora.rank=8", "seed=1", "max_steps=3", "dataset.repeat=2", "lora=none", "memory.checkpointing=blocks"]
)
def test_what_changes_the_results_changes_the_folder(override):
    assert signature(tiny.compose("train", override)) != signature(tiny.compose("train"))


@pytest.mark.parametrize(
    "override",
    [
        *(
            "device=cpu",
            "logger.every=1",
            "dataset.num_workers=4",
            "micro_batch_size=2",
            "name=other",
            "output_root=there",
        ),
        *("validation=none", "validation.prompts=[a cat]", "validation=[emoji,lpips]", "data_report.rows=0"),
        *("export.save_steps=null", "logger=wandb", "checkpoint.every=1"),
        *("memory.check=false", "memory.remember=0"),
    ],
)
def test_what_does_not_change_the_results_does_not_change_the_folder(override):
    assert signature(tiny.compose("train", override)) == signature(tiny.compose("train"))


@pytest.mark.parametrize(
    "choice, counts",
    [
        ("lr_scheduler=constant", False),
        ("lr_scheduler=constant_with_warmup", False),
        ("lr_scheduler=warmup_stable_decay", False),
        ("lr_scheduler=linear", True),
        ("lr_scheduler=cosine", True),
    ],
)
def test_the_length_of_a_run_counts_where_its_rate_depends_on_it(choice, counts):
    short, long = (signature(tiny.compose("train", choice, length)) for length in ("max_steps=600", "max_steps=1200"))
    passes = signature(tiny.compose("train", choice, "max_steps=null", "num_epochs=5"))
    assert (short != long, short != passes) == (counts, counts)


def test_the_length_of_a_run_counts_where_its_task_changes_on_the_way():
    hyper_sd = ["task=distill/hyper_sd", "lr_scheduler=constant"]
    short, long = (signature(tiny.compose("distill", *hyper_sd, f"max_steps={steps}")) for steps in (600, 1200))
    assert short != long


def test_the_folder_is_named_after_the_name_and_the_signature():
    cfg = tiny.compose("train", "name=mine", "output_root=there")
    assert cfg.run_dir == f"there/mine-{signature(cfg)}"


def test_a_folder_of_another_experiment_is_refused(tmp_path):
    claim(tiny.compose("train", f"run_dir={tmp_path}/mine", "seed=0"))
    with pytest.raises(ConfigError, match=r"mine holds a different experiment; set name="):
        claim(tiny.compose("train", f"run_dir={tmp_path}/mine", "seed=1"))


def test_a_folder_of_the_same_experiment_is_taken_up_again(tmp_path):
    cfg = tiny.compose("train", f"output_root={tmp_path}")
    assert claim(cfg) == claim(cfg) == Path(cfg.run_dir)


def test_a_finished_run_says_so_and_names_what_it_left(tmp_path, caplog):
    caplog.set_level("INFO")
    cfg = tiny.compose("train", f"output_root={tmp_path}")
    claim(cfg)
    finish(cfg, [Path("weights/step-300.safetensors")])
    caplog.clear()
    assert claim(cfg) is None
    assert f"{cfg.run_dir} is finished" in caplog.text and "weights/step-300.safetensors" in caplog.text


def test_a_run_keeps_its_resolved_configuration_commit_and_versions(tmp_path):
    run_dir = claim(tiny.compose("train", f"output_root={tmp_path}", "seed=7"))
    saved = OmegaConf.load(run_dir / "resolved.yaml")
    environment = json.loads((run_dir / "environment.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tiny.ROOT, capture_output=True, text=True).stdout.strip()
    assert (saved.seed, saved.run_dir) == (7, str(run_dir))
    assert "${" not in (run_dir / "resolved.yaml").read_text()
    assert environment["commit"] == (head or None)
    assert {"torch", "diffusers", "transformers", "hydra-core"} <= environment.keys()
