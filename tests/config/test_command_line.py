"""What the command line does before torch starts, and before a model is built."""

import os
import sys

import kills
import pytest
import tiny

from diffsynth.config import ConfigError
from diffsynth.config.command_line import _where_it_is
from diffsynth.config.commands import configuration
from diffsynth.core.process.locks import IN_USE_STATUS

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("given, expected", [(None, "expandable_segments:True"), ("max_split_size_mb:64", None)])
def test_the_allocators_segments_may_grow_unless_it_is_told_otherwise(given, expected, monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv(NAMES[1], given)
    with pytest.raises(SystemExit):
        tiny.command_line(monkeypatch, "train.py", "--no-such-option")
    assert [os.environ.get(name) for name in NAMES] == [expected, given or expected]


@pytest.mark.parametrize("script, given", [("generate.py", "prompt=a"), ("fuse.py", "lora_path=a.safetensors")])
def test_a_folder_that_another_process_writes_is_refused_before_the_model_is_built(
    script, given, tmp_path, monkeypatch, capfd
):
    output = tmp_path / "images"
    with kills.owner(output) as process:
        assert tiny.complaint(monkeypatch, given, f"output={output}", script=script) == str(IN_USE_STATUS)
    assert f"error: {output} is in use by process {process.pid} on " in capfd.readouterr().err


def test_a_long_name_in_an_error_is_looked_for_without_another_error():
    assert _where_it_is(f"docs/{'a' * 300} is no picture") == ""


def test_a_command_that_is_not_running_is_composed_and_checked_as_its_script_would():
    script, schema, argv = tiny.ROOT / "train.py", tiny.schema("train"), list(sys.argv)
    found = configuration(script, ["lora=dora", "name=a, b", "lora.target_modules=[to_q]"], schema, checked=True)
    assert (found["name"], found["lora"]["target_modules"], found["lora"]["use_dora"]) == ("a, b", ["to_q"], True)
    for word, error in {"lora=nono": "no such option; did you mean lora=none", "lora.rank=0": "is 0"}.items():
        with pytest.raises(ConfigError, match=error):
            configuration(script, [word], schema, checked=True)
    assert sys.argv == argv
