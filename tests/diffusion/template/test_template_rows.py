"""`template_inputs` that name files: on disk they reach a template as paths, in tar shards as open files."""

import json
import re
import tarfile
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
import templates
import tiny
from PIL import Image

from diffsynth.core.data import UnifiedDataset, read_shards
from diffsynth.core.data.operators.unread import identity
from diffsynth.diffusion.template.code import read_code
from diffsynth.diffusion.template.model import load_template
from diffsynth.diffusion.template.rows import ReadTemplateInputs

PROCESSOR = """
import torch

class Model(torch.nn.Module):
    def process_inputs(self, **kwargs):
        return {}

    def forward(self, **kwargs):
        return {}

class Processor:
    def __call__(self, **inputs):
        return {"given": inputs}

TEMPLATE_MODEL = Model
TEMPLATE_MODEL_PATH = None
TEMPLATE_DATA_PROCESSOR = Processor
"""


def png(grey: int) -> bytes:
    Image.new("RGB", (32, 32), (grey,) * 3).save(file := BytesIO(), "png")
    return file.getvalue()


def write_shard(path: Path, greys: dict[str, int]) -> list[str]:
    """A shard of grey pictures with captions; returns what rows call the pictures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, grey in greys.items():
            for member, content in ((f"{name}.png", png(grey)), (f"{name}.txt", b"a cat")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                shard.addfile(info, BytesIO(content))
    return [row["image"] for row in read_shards(str(path.parent))]


def known_as(folder: Path, inputs: dict) -> str:
    """What a cache knows a row's inputs by."""
    return identity(ReadTemplateInputs(str(folder)).unread(inputs))


def template(folder: Path, text: str):
    return load_template(read_code(templates.write(folder, text)))


def test_a_file_on_disk_is_handed_over_as_a_path_and_a_picture_in_a_shard_as_an_open_file(tmp_path):
    (part,) = write_shard(tmp_path / "rows" / "a.tar", {"1": 7})
    (tmp_path / "rows" / "2.png").write_bytes(png(9))
    read = ReadTemplateInputs(str(tmp_path / "rows"))({"image": "2.png", "more": [part, "3.png"], "in": {"x": part}})
    processor = template(tmp_path / "template", PROCESSOR)
    given = processor.process_data(read)["given"]
    assert given["image"] == str(tmp_path / "rows" / "2.png") and given["more"][1] == "3.png"
    for file in (given["more"][0], given["in"]["x"]):
        assert file.read() == png(7)
        file.close()  # which a processor may do
    assert processor.process_data(read)["given"]["in"]["x"].read() == png(7)


def test_a_template_as_its_users_write_it_reads_a_picture_in_a_shard(tmp_path):
    parts = write_shard(tmp_path / "a.tar", {"1": 51, "2": 204})
    processor = template(tmp_path / "template", templates.SMALL_KLEIN)
    read = ReadTemplateInputs(str(tmp_path))
    scales = [processor.process_data(read({"image": part}))["scale"] for part in parts]
    assert scales == pytest.approx([0.2, 0.8])


def test_without_a_data_processor_the_template_is_given_the_open_file(tmp_path):
    (part,) = write_shard(tmp_path / "a.tar", {"1": 7})
    plain = template(tmp_path / "template", PROCESSOR.replace("TEMPLATE_DATA_PROCESSOR = Processor", ""))
    given = plain.process_data(ReadTemplateInputs(str(tmp_path))({"image": part, "scale": 0.5}))
    assert given["image"].read() == png(7) and given["scale"] == 0.5


def test_a_cache_knows_a_picture_in_a_shard_by_its_name_and_content(tmp_path):
    first, second = write_shard(tmp_path / "rows" / "a.tar", {"1": 7, "2": 9})
    (moved,) = write_shard(tmp_path / "other" / "b.tar", {"2": 9})
    (changed,) = write_shard(tmp_path / "changed" / "b.tar", {"2": 8})
    (tmp_path / "2.png").write_bytes(png(9))
    known = known_as(tmp_path / "rows", {"image": second})
    assert known == known_as(tmp_path / "other", {"image": moved}) == known_as(tmp_path, {"image": "2.png"})
    assert (
        len({known, known_as(tmp_path / "rows", {"image": first}), known_as(tmp_path / "changed", {"image": changed})})
        == 3
    )


def test_a_shard_that_is_not_there_is_named_with_its_row_before_anything_is_trained(tmp_path):
    (part,) = write_shard(tmp_path / "a.tar", {"1": 7})
    rows = [{"image": part, "prompt": "a cat", "template_inputs": {"image": name}} for name in (part, f"no-{part}")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = UnifiedDataset(tmp_path)
    dataset.read_column("template_inputs", ReadTemplateInputs)
    with pytest.raises(ValueError, match=r"row 2: template_inputs .*: not found \(looked in .*no-a\.tar"):
        dataset.scan()


def test_a_picture_in_a_shard_of_an_object_store_is_read(tmp_path):
    (part,) = write_shard(tmp_path / "a.tar", {"1": 7})
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/rows/a.tar", (tmp_path / "a.tar").read_bytes())
    read = ReadTemplateInputs("memory://bucket/rows")({"image": part, "style": "flat"})
    given = template(tmp_path / "template", PROCESSOR).process_data(read)["given"]
    assert given["image"].read() == png(7) and given["style"] == "flat"
    memory.rm("/bucket", recursive=True)


def test_rows_of_pictures_in_shards_are_written_as_documented(tmp_path, monkeypatch):
    parts = write_shard(tmp_path / "my_images" / "a.tar", {"1": 7, "2": 9})
    text = (tiny.ROOT / "docs" / "templates.md").read_text(encoding="utf-8")
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "read_shards" in code)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    dataset = UnifiedDataset("my_images")
    dataset.read_column("template_inputs", ReadTemplateInputs)
    assert dataset.scan(required=["image", "prompt", "template_inputs"]) == []
    assert [np.asarray(row["image"]).mean() for row in dataset] == [7, 9]
    assert [row["template_inputs"]["image"] for row in dataset] == [
        str(tmp_path / "my_images" / part) for part in parts
    ]
