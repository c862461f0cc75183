"""Values of text keys arrive as they are typed, whatever Hydra's grammar would make of them."""

import shlex

import pytest
import tiny
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from diffsynth.config.launch_with_signals import IS_SWEEP_JOB
from diffsynth.config.texts import as_typed


@pytest.fixture
def shown(monkeypatch, capsys):
    """`shown("train.py", "name=x")`: the configuration that a command line makes."""

    def configuration(script: str, *arguments: str) -> dict:
        tiny.command_line(monkeypatch, script, *arguments, "--cfg", "job")
        return yaml.safe_load(capsys.readouterr().out)

    return configuration


@pytest.fixture
def typed(monkeypatch):
    """`typed("generate", "prompt=it's")`: the command line that Hydra gets."""

    def arguments(entry: str, *arguments: str) -> list[str]:
        monkeypatch.setattr("sys.argv", [str(tiny.ROOT / f"{entry}.py"), *arguments])
        given = as_typed(arguments, tiny.schema(entry))
        assert as_typed(given, tiny.schema(entry)) == given  # as a saved command line replays
        return given

    return arguments


@pytest.mark.parametrize(
    "texts",
    [
        {
            "prompt": "a cat, sitting",
            "negative_prompt": "[bad:1.2], (worse)",
            "output": "out/a=b",
            "input_image": "007",
        },
        {"prompt": "it's", "negative_prompt": "{a|b}", "output": "a (cute) one", "input_image": "a cat = dog"},
        {"prompt": "50% #1", "negative_prompt": " 猫 ", "output": "C:\\it's\\", "input_image": 'a "b", c'},
        {
            "prompt": "[red] cat, [blue] dog",
            "negative_prompt": "choice(a,b)",
            "output": "a\tb\nc",
            "input_image": "'a' b",
        },
    ],
)
def test_a_text_arrives_as_it_is_typed(texts, shown):
    config = shown("generate.py", *(f"{key}={text}" for key, text in texts.items()))
    assert {key: config[key] for key in texts} == texts


def test_texts_of_nested_keys_arrive_as_they_are_typed(shown, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    keys = {
        "dataset.augmentation.prefix": "sks ",
        "dataset.path": "~/a=b, c",
        "dataset.metadata": "2024",
        "validation.prompts": '[it\'s,a (cute) cat, "a cat, sitting"]',
        "lora.target_modules": "to_(q|k)",
        "name": "1e3",
    }
    config = OmegaConf.create(
        shown("train.py", "dataset=image_folder", *(f"{key}={value}" for key, value in keys.items()))
    )
    expected = {
        **keys,
        "dataset.path": str(tmp_path / "a=b, c"),
        "validation.prompts": ["it's", "a (cute) cat", "a cat, sitting"],
    }
    assert {key: OmegaConf.select(config, key) for key in keys} == expected


@pytest.mark.parametrize(
    "argument, value",
    [
        ("prompt=[a cat, sitting, a dog]", ["a cat", "sitting", "a dog"]),
        ('prompt=["a cat, sitting", "a dog"]', ["a cat, sitting", "a dog"]),
        ("prompt=[it's,1984]", ["it's", "1984"]),
        ("prompt=[]", []),
        (r"prompt=saber\(fate\)", r"saber\(fate\)"),
        (r"prompt=saber \(fate\)", r"saber \(fate\)"),
        (r"prompt=[saber\(fate\),b]", [r"saber\(fate\)", "b"]),
        (r"prompt=a\,b", r"a\,b"),
        ("prompt=a" + 2 * "\\", "a" + 2 * "\\"),
        (r"prompt=[a\]", ["a\\"]),
        ("prompt=[a,'']", ["a", ""]),
        ("prompt='a, b'", "a, b"),
        ('prompt="it\'s"', "it's"),
        ("prompt=null", None),
        ("prompt=", ""),
        ("+prompt=a, b", "a, b"),
        ("++prompt=a, b", "a, b"),
        ("prompt=${model.height}, b", "${model.height}, b"),
        ("seed=[0,1]", [0, 1]),
        ("batch_size=8", 8),
        ("template_inputs=[{scale: 0.6}]", [{"scale": 0.6}]),
        ("template.path=[a=b,c d]", ["a=b", "c d"]),
    ],
)
def test_lists_quotes_and_other_values_mean_what_they_did(argument, value, typed):
    (override,) = OverridesParser.create().parse_overrides(typed("generate", argument))
    assert override.value() == value


@pytest.mark.parametrize(
    "argument, jobs",
    [
        ("prompt=a cat,it's", ["a cat", "it's"]),
        ("prompt='a cat, sitting',a (b) dog", ["a cat, sitting", "a (b) dog"]),
        ("prompt=[a,b],[c=d]", [["a", "b"], ["c=d"]]),
        ("prompt=a (b) cat", ["a (b) cat"]),
        ("prompt=[a cat, a dog]", [["a cat", "a dog"]]),
        ("prompt=choice(a,b)", ["a", "b"]),
        ("seed=0,1", [0, 1]),
        (r"prompt=saber\(fate\),b", [r"saber\(fate\)", "b"]),
    ],
)
def test_a_comma_in_a_sweep_separates_jobs_unless_it_is_in_quotes(argument, jobs, typed, monkeypatch):
    flag, *overrides = typed("generate", argument, "-m")
    assert flag == "-m"
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), None)
    parsed = [OverridesParser.create().parse_override(override).value() for (override,) in batch]
    assert parsed == jobs
    monkeypatch.setenv(IS_SWEEP_JOB, "1")
    for (override,) in batch:  # as the launcher of a cluster hands it on
        assert typed("generate", override) == [override]


def test_a_quote_that_is_not_closed_is_answered_with_the_spelling(monkeypatch):
    message = tiny.complaint(monkeypatch, "prompt=['tis the season, a dog]", script="generate.py")
    assert "prompt: 'tis the season begins with a quote" in message and "\n" not in message


@pytest.mark.parametrize("value", ["[,]", "[a,]"])
def test_a_comma_without_a_text_is_answered_in_one_line(value, monkeypatch):
    message = tiny.complaint(monkeypatch, f"prompt={value}", script="generate.py")
    assert f"prompt: {value} has a comma without a text" in message and "\n" not in message


def test_overrides_after_a_flag_count(shown):
    assert shown("generate.py", "prompt=a, b", "--resolve", "seed=3")["seed"] == 3


def test_a_saved_command_line_is_typed_in_a_shell_as_it_was(typed):
    (word,) = typed("generate", "prompt=it's, a cat")
    assert typed("generate", *shlex.split(shlex.join([word]))) == [word]
