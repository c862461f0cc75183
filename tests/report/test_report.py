"""One page about a run, and what differs between two."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import tiny
from PIL import Image

from diffsynth.report import write_report
from diffsynth.report.compare import compare
from diffsynth.report.sweep import about

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run that sampled its prompts three times, with a warning in its log."""
    options = ["validation=base", "validation.prompts=[a red apple,a rocket]", "validation.every=1"]
    small = ["validation.options.num_inference_steps=2", "validation.options.height=32", "validation.options.width=32"]
    run_dir = tiny.train(tmp_path_factory.mktemp("report"), *options, *small, "data_report.pictures=4")
    (run_dir / "train.log").write_text("2026-01-01 WARNING row 3 is <odd>\n2026-01-01 INFO fine\n", encoding="utf-8")
    return run_dir


def page_data(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_every_number_and_picture_of_the_run(run_dir):
    page = write_report(run_dir).read_text(encoding="utf-8")
    charts = {name: points for chart in page_data(page)["charts"] for name, points in chart["series"].items()}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "lr", "grad_norm", "samples_per_second", "memory_gb"):
        assert charts[name] == [[line["step"], line[name]] for line in lines if name in line] != []
    assert [picture["step"] for picture in page_data(page)["pictures"]] == [0, 1, 2]
    assert '<img src="data:image/webp;base64,' in page and (run_dir / "data_report.png").exists()


def test_the_page_says_what_ran_and_what_was_wrong(run_dir):
    page = write_report(run_dir).read_text(encoding="utf-8")
    assert "row 3 is &lt;odd&gt;" in page and "INFO fine" not in page
    assert "<td>finished</td>" in page and "max_steps: 2" in page and str(tiny.dataset()) in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # it needs no other file


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not the folder of a run"):
        write_report(tmp_path)


def test_a_run_without_numbers_or_pictures_has_a_page(run_dir, tmp_path):
    shutil.copy(run_dir / "resolved.yaml", tmp_path)
    assert page_data(write_report(tmp_path).read_text(encoding="utf-8")) == {"charts": [], "pictures": []}


def test_a_page_is_written_without_the_pictures_that_cannot_be_read(run_dir, tmp_path, caplog):
    shutil.copy(run_dir / "resolved.yaml", tmp_path)
    (tmp_path / "data_report.png").mkdir()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "step-000001.png").write_bytes(b"no picture")
    assert page_data(write_report(tmp_path).read_text(encoding="utf-8"))["pictures"] == []
    assert "data_report.png is left out of the report" in caplog.text and "step-000001.png is left out" in caplog.text


def test_metrics_that_are_no_file_are_named(run_dir, tmp_path):
    shutil.copy(run_dir / "resolved.yaml", tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match="metrics.jsonl is a folder; expected a file"):
        write_report(tmp_path)


def chromium(page, folder, width: int, *options: str) -> subprocess.CompletedProcess:
    command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={folder / 'profile'}", f"--window-size={width},1600"]
    return subprocess.run(
        [*command, "--enable-logging=stderr", *options, page.as_uri()], capture_output=True, timeout=120
    )


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_renders_the_page_without_complaint(run_dir, tmp_path, width):
    shot = tmp_path / "shot.png"
    done = chromium(write_report(run_dir), tmp_path, width, "--hide-scrollbars", f"--screenshot={shot}")
    assert b"CONSOLE" not in done.stderr
    pixels = np.array(Image.open(shot).convert("RGB"), dtype=int)
    assert pixels.shape[1] == width and (pixels != pixels[0, 0]).any(2).mean() > 0.02


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_of_the_page_hangs_over_its_edge(run_dir, tmp_path, width):
    measured = tmp_path / "measured.html"
    script = "<script>document.title = 'over by ' + (document.documentElement.scrollWidth - innerWidth)</script>"
    measured.write_text(write_report(run_dir).read_text(encoding="utf-8") + script, encoding="utf-8")
    dom = chromium(measured, tmp_path, width, "--dump-dom").stdout.decode()
    assert int(re.search(r"over by (-?\d+)", dom)[1]) <= 0
    assert dom.count("<polyline") >= 5 and '<h2>Samples after <output id="step">2</output>' in dom


# Files that a power cut or a full disk damaged ------------------------------------------------------------------------


@pytest.fixture
def damaged(run_dir, tmp_path):
    """A copy of the run, for a test to damage."""
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path / "run"


def no_constant(name: str):
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_are_not_finite_are_gaps_in_charts_and_torn_lines_are_left_out(damaged, caplog):
    lines = ['{"step": 1, "loss": NaN, "grad_norm": 1}', '{"step": 2, "loss": 1e400}', '{"step": 5, "lo{"step": 5}']
    (damaged / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "loss": 0.5}', '{"step": 4, "lo']))
    page = write_report(damaged).read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1], parse_constant=no_constant)
    charts = {name: points for chart in data["charts"] for name, points in chart["series"].items()}
    assert charts == {"loss": [[1, None], [2, None], [3, 0.5]], "grad_norm": [[1, 1]]}
    assert f"{damaged}/metrics.jsonl: 2 of its lines cannot be read" in caplog.text
    assert compare(damaged, damaged) == []
    row = about(damaged, [])
    assert (row["loss"], row["state"]) == (0.5, "finished")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_the_parts_of_a_curve_that_has_gaps(damaged, tmp_path):
    losses = [None, 1.0, 0.9, None, 0.8, 0.7, None]
    lines = [json.dumps({"step": step, "loss": loss, "other": None}) for step, loss in enumerate(losses)]
    (damaged / "metrics.jsonl").write_text("\n".join(lines))
    done = chromium(write_report(damaged), tmp_path, 400, "--dump-dom")
    assert b"CONSOLE" not in done.stderr
    dom = done.stdout.decode()
    assert dom.count("<polyline") == 2 and "loss not finite" in dom


@pytest.mark.parametrize("text", ["", "\0\0", "[", "7", '{"a": 3}', "[" * 100_000], ids=lambda text: text[:3])
@pytest.mark.parametrize(
    "name", ["environment.json", "command.json", "finished.json", "data_report.json", "bad_steps.jsonl", "train.log"]
)
def test_a_damaged_file_of_a_run_is_left_out_of_its_page(name, text, damaged):
    (damaged / name).write_text(text)
    assert write_report(damaged).exists()


@pytest.mark.parametrize("text", ["", "\0\0", "[", "- 1", "a: b: c", "[" * 1500], ids=lambda text: text[:3])
def test_a_damaged_configuration_is_told_in_one_line(text, damaged):
    (damaged / "resolved.yaml").write_text(text)
    for read in (write_report, lambda run: compare(run, run)):
        with pytest.raises(ValueError, match=r"^.*resolved\.yaml is no configuration; .*$"):
            read(damaged)


def test_a_run_and_its_repetition_do_not_differ(run_dir, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    assert compare(run_dir, again) == []


def test_each_difference_between_two_runs_has_a_line(run_dir, tmp_path):
    other = tiny.train(tmp_path, "lora.rank=2", "validation=none")
    (other / "data.json").write_text(json.dumps({"fingerprint": "other", "rows": 8}))
    lines = compare(run_dir, other)
    assert "config   lora.rank: 4 | 2" in lines
    assert any(line.startswith("data     fingerprint: ") and line.endswith("| other") for line in lines)
    assert any(line.startswith("curve    loss: from step 2 on") for line in lines)
    assert not any("samples_per_second" in line for line in lines)
