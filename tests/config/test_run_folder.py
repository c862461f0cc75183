"""Which folder a run owns, and what it keeps there."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest
import tiny
from omegaconf import OmegaConf

from diffsynth import report
from diffsynth.config import ConfigError, MaskedFormatter, build, check, claim, finish, run_folder, signature
from diffsynth.config.run_folder import NewFolder, discard_refused
from diffsynth.core.process import locks
from diffsynth.report import write_report
from diffsynth.report.compare import compare
from diffsynth.training.record.numbers import LocalLogger
from diffsynth.training.record.trackers import Tracker
from diffsynth.training.run import Run


@pytest.fixture(autouse=True)
def unlocked():
    """Let no test leave a folder locked."""
    yield
    locks.release_all()


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


@pytest.mark.parametrize(
    "given, change",
    [
        ("seed=0", {"seed": 1}),
        ('validation.prompts=["${dataset.augmentation.prefix}a cat"]', {"dataset.augmentation.prefix": "red "}),
        ("name=${lr_scheduler.num_warmup_steps}", {"lr_scheduler.num_warmup_steps": 7}),
    ],
)
def test_the_folder_of_a_run_is_settled_when_it_is_claimed(given, change, tmp_path):
    cfg = tiny.compose("train", f"output_root={tmp_path}", given)
    run_dir = claim(cfg)
    for key, value in change.items():
        OmegaConf.update(cfg, key, value)
    assert cfg.run_dir == str(run_dir) and cfg.checkpoint.path == f"{run_dir}/checkpoints"
    assert build(tiny.compose("train", f"run_dir={cfg.run_dir}"))["run_dir"] == str(run_dir)
    finish(cfg, [])
    assert [path.parent for path in tmp_path.rglob("finished.json")] == [run_dir]
    assert "signature:" in (run_dir / "config.yaml").read_text()  # a replay with other settings has a folder of its own


def test_a_run_that_another_process_runs_is_refused_in_one_line(tmp_path, monkeypatch, capfd):
    overrides = tiny.train_overrides(tmp_path)
    run_dir = Path(tiny.compose("train", *overrides).run_dir)
    with kills.owner(run_dir) as process:
        (unfinished := run_dir / ".partial-1-step-000001").mkdir()
        assert tiny.complaint(monkeypatch, *overrides) == str(locks.IN_USE_STATUS)
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
        assert line.startswith(f"error: {run_dir} is in use by process {process.pid} on ")
        assert unfinished.exists() and not (run_dir / "config.yaml").exists()
    process.wait()
    assert claim(tiny.compose("train", *overrides)) == run_dir and not unfinished.exists()


def test_a_run_that_ends_in_an_error_is_unlocked(tmp_path, monkeypatch):
    arguments = ["dataset=image_folder", f"dataset.path={tmp_path}/nowhere", f"output_root={tmp_path}/outputs"]
    tiny.complaint(monkeypatch, *arguments)
    assert not locks._held and not list(tmp_path.rglob(locks.LOCK))


def test_a_run_is_marked_as_finished_only_when_its_report_is_there(tmp_path, monkeypatch):
    cfg = tiny.compose("train", f"output_root={tmp_path}")
    run_dir = claim(cfg)

    def cut(*given):
        raise tiny.PowerCut

    with monkeypatch.context() as patched, pytest.raises(tiny.PowerCut):
        patched.setattr(report, "write_text", cut)
        finish(cfg, [])
    assert not (run_dir / "finished.json").exists()
    finish(cfg, [run_dir / "weights.safetensors"])
    page = (run_dir / "report.html").read_text()
    assert "<td>finished</td>" in page and "weights.safetensors" in page
    assert not list(run_dir.glob(locks.LOCK))


def test_a_refused_run_leaves_no_folder_unless_it_had_begun(tmp_path, monkeypatch):
    arguments = ["dataset=image_folder", f"dataset.path={tmp_path}/nowhere", f"output_root={tmp_path}/outputs"]
    assert "there is no folder" in tiny.complaint(monkeypatch, *arguments)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(tmp_path)
    assert "there is no folder" in tiny.complaint(monkeypatch, *arguments[:2], "output_root=others")
    assert not (tmp_path / "others").exists()
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "metrics.jsonl").write_text("")
    tiny.complaint(monkeypatch, *arguments, f"run_dir={begun}")
    assert (begun / "metrics.jsonl").exists() and (begun / "config.yaml").exists()


@pytest.mark.parametrize(
    ("before", "new", "left"), [([], ["log"], []), (["log"], [], ["log"]), ([], ["log", "a"], ["log", "a"])]
)
def test_a_refused_command_leaves_no_log_that_it_began_in_a_folder_of_others(before, new, left, tmp_path):
    files = {name: tmp_path / name for name in ("0.png", "log", "a")}
    for name in ["0.png", *before]:
        files[name].touch()
    NewFolder().on_run_start(OmegaConf.create({"hydra": {"run": {"dir": str(tmp_path)}}}))
    for name in new:
        files[name].touch()
    discard_refused(tmp_path, "log")
    assert {path.name for path in tmp_path.iterdir()} == {"0.png", *left}


def test_a_finished_run_says_so_and_names_what_it_left(tmp_path, caplog):
    caplog.set_level("INFO")
    cfg = tiny.compose("train", f"output_root={tmp_path}")
    claim(cfg)
    finish(cfg, [Path("weights/step-300.safetensors")])
    caplog.clear()
    assert claim(cfg) is None
    assert f"{cfg.run_dir} is finished" in caplog.text and "weights/step-300.safetensors" in caplog.text


DAMAGED = ["\0", "[]", '{"artefacts": 3}', '{"artefacts": [], "length": 3}']


@pytest.mark.parametrize("text", DAMAGED, ids=lambda text: text[:30])
def test_a_run_whose_record_of_its_end_is_damaged_ends_again(text, tmp_path):
    cfg = tiny.compose("train", f"output_root={tmp_path}", "lr_scheduler=cosine")
    run_dir = claim(cfg)
    (run_dir / "finished.json").write_text(text)
    assert claim(cfg) == run_dir
    claim(
        tiny.compose("train", f"output_root={tmp_path}", "lr_scheduler=cosine", "max_steps=9")
    )  # looks at others, too


@pytest.mark.parametrize("text", ["", "\0", "a: b: c", "[1]", "3", "{name: 1}"])
def test_a_damaged_configuration_of_a_run_is_told_in_one_line(text, tmp_path):
    cfg = tiny.compose("train", f"output_root={tmp_path}")
    (claim(cfg) / "config.yaml").write_text(text)
    with pytest.raises(
        ConfigError, match=r"^.*/config\.yaml is no configuration of a run: .*; delete that file"
    ) as error:
        claim(cfg)
    assert "\n" not in str(error.value)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one committed file, in the place of the program's own."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    for name in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "run_folder.py"))
    (tmp_path / "text").write_bytes(b"before\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "text"], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    run_folder.environment.cache_clear()
    yield tmp_path
    run_folder.environment.cache_clear()


def test_a_tracked_file_that_is_not_utf_8_is_recorded_as_far_as_it_can_be(repository):
    (repository / "text").write_bytes(b"caf\xe9\n")
    found = run_folder.environment()
    assert len(found["commit"]) == 40 and "-before\n+caf\ufffd" in found["diff"]


def test_a_diff_of_any_size_is_cut_off(repository, monkeypatch):
    monkeypatch.setattr(run_folder, "DIFF_BYTES", 500)
    (repository / "text").write_bytes(b"after\n" * 100_000)
    diff = run_folder.environment()["diff"]
    assert len(diff) < 600 and diff.endswith("cut off after 500 bytes")


@pytest.mark.skipif(os.name == "nt", reason="the program is a shell script")
def test_a_git_that_does_not_answer_is_waited_for_in_vain_but_not_long(tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(run_folder, "GIT_SECONDS", 0.2)
    started = time.monotonic()
    assert run_folder._git("diff", "HEAD") is None
    assert time.monotonic() - started < 30


def test_a_run_keeps_its_resolved_configuration_commit_and_versions(tmp_path):
    run_dir = claim(tiny.compose("train", f"output_root={tmp_path}", "seed=7"))
    saved = OmegaConf.load(run_dir / "resolved.yaml")
    environment = json.loads((run_dir / "environment.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tiny.ROOT, capture_output=True, text=True).stdout.strip()
    assert (saved.seed, saved.run_dir) == (7, str(run_dir))
    assert "${" not in (run_dir / "resolved.yaml").read_text()
    assert environment["commit"] == (head or None)
    assert {"torch", "diffusers", "transformers", "hydra-core"} <= environment.keys()


# Secrets --------------------------------------------------------------------------------------------------------------

URL = "https://me:hunter2@example.org/data?token=hunter2"


class Listener(Tracker):
    """A tracker that keeps the configuration that it is sent."""

    def start(self, step, config):
        self.config = config


@pytest.fixture
def secret_run(tmp_path, monkeypatch):
    """The folder of a run whose data set's URL and table are secret, and its configuration."""
    monkeypatch.setenv("TABLE", "s3cr3t.csv")
    chosen = [f"dataset.path='{URL}'", "dataset.metadata=${oc.env:TABLE}", "task.extra_inputs=['${oc.env:NONE,a}']"]
    monkeypatch.setattr(sys, "argv", ["train.py", *chosen])
    cfg = tiny.compose("train", *chosen, f"output_root={tmp_path}")
    return claim(cfg), cfg


def test_no_file_of_a_run_holds_a_secret_and_the_run_is_found_again(secret_run, caplog):
    run_dir, cfg = secret_run
    finish(cfg, [])
    files = {path.name: path.read_text(encoding="utf-8") for path in run_dir.iterdir()}
    del files["environment.json"]  # the changes of this repository, which may be in this very file
    assert files.keys() >= {"config.yaml", "resolved.yaml", "command.json", "report.html"}
    assert [name for name, text in files.items() if "hunter2" in text or "s3cr3t" in text] == []
    for name in ("config.yaml", "resolved.yaml"):
        saved = OmegaConf.to_container(OmegaConf.create(files[name]), resolve=False)
        assert saved["dataset"]["path"] == "https://***@example.org/data?token=***"
        assert saved["dataset"]["metadata"] == "${oc.env:TABLE}"
        assert saved["task"]["extra_inputs"] == ["${oc.env:NONE,a}"]
    assert cfg.dataset.metadata == "s3cr3t.csv"  # the run itself still reads the variable
    assert claim(cfg) is None and signature(OmegaConf.load(run_dir / "config.yaml")) == signature(cfg)


def test_no_character_of_a_password_ends_it_early(tmp_path, monkeypatch):
    url = "https://me:hé'\\\"hunter2@example.org/data?token=hé'\\\"hunter2"
    cfg = tiny.compose("train", f"output_root={tmp_path}")
    cfg.dataset.path = url
    monkeypatch.setattr(sys, "argv", ["train.py", f"dataset.path={url}"])
    run_dir = claim(cfg)
    for name in ("config.yaml", "resolved.yaml"):
        assert OmegaConf.load(run_dir / name).dataset.path == "https://***@example.org/data?token=***"
    command = json.loads((run_dir / "command.json").read_text())
    assert command[1] == "dataset.path=https://***@example.org/data?token=***"
    assert signature(OmegaConf.load(run_dir / "config.yaml")) == signature(cfg)


def test_what_an_older_version_saved_is_masked_on_its_way_out(secret_run):
    run_dir, cfg = secret_run
    (run_dir / "resolved.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True), encoding="utf-8")
    (run_dir / "command.json").write_text(json.dumps(sys.argv), encoding="utf-8")
    (run_dir / "train.log").write_text(f"2026-01-01 WARNING {URL}\n", encoding="utf-8")
    tracker = Listener()
    LocalLogger(run_dir, trackers={"it": tracker}).start(0, resumed=False)
    assert tracker.config["dataset"]["path"] == "https://***@example.org/data?token=***"
    assert "hunter2" not in write_report(run_dir).read_text(encoding="utf-8")
    other = claim(tiny.compose("train", f"output_root={cfg.output_root}", "name=other"))
    assert "hunter2" not in "".join(compare(run_dir, other))


def test_a_new_token_is_no_new_run():
    def folder(token: str) -> str:
        return tiny.compose("train", f"dataset.path='https://me:{token}@h/x?X-Amz-Date=1&sig={token}'").run_dir

    assert folder("one") == folder("two")


def test_a_replay_of_a_masked_url_says_what_to_set(secret_run):
    with pytest.raises(
        ConfigError, match=r"dataset\.path is 'https://\*{3}@\S+', whose credentials were masked .* set d"
    ):
        check(OmegaConf.load(secret_run[0] / "config.yaml"), Run)


def test_logs_and_errors_mask_credentials(tmp_path, monkeypatch):
    try:
        raise OSError(f"{URL} does not answer")
    except OSError:
        record = logging.LogRecord("a", logging.ERROR, __file__, 1, "cannot read %s", (URL,), sys.exc_info())
    assert "hunter2" not in MaskedFormatter("%(message)s").format(record)
    options = [
        "dataset=image_folder",
        f"dataset.path='{tmp_path}/nowhere?token=hunter2'",
        f"output_root={tmp_path}/out",
    ]
    said = tiny.complaint(monkeypatch, *options)
    assert "there is no folder" in said and "nowhere?token=***" in said
    layout = OmegaConf.load(tiny.ROOT / "conf/hydra/job_logging/rank_zero.yaml")
    assert {each["class"] for each in layout.formatters.values()} == {"diffsynth.config.MaskedFormatter"}
