"""Kernels that a run computes with, and the memory that it may take."""

import os
from types import SimpleNamespace

import psutil
import pytest
import torch

from diffsynth.core.devices import free_host_memory, set_kernels


@pytest.fixture(autouse=True)
def as_before():
    yield
    set_kernels(deterministic=False)


def test_results_repeat_where_they_are_wanted_to_and_the_next_run_chooses_anew(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_kernels(deterministic=True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    set_kernels(deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()


def test_32_bits_are_32_bits_in_products_and_in_convolutions():
    set_kernels(deterministic=False)
    assert not (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)


GIB = 2**30
VERSIONS = {
    "v1": ("4:memory:/job/step", "memory/", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    "v2": ("0::/job/step", "", ("memory.max", "memory.current", "inactive_file")),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "limits, free",
    [
        ({"job/step": 2}, 1.25),
        ({"job": 2, "job/step": 9}, 1.25),  # that of the parent
        ({"": 2}, 1.25),  # in a container, whose root group is the container's
        ({"job": "max", "job/step": "max"}, 64),
        ({}, 64),
    ],
)
def test_a_container_has_no_more_memory_than_its_control_groups_leave(version, limits, free, tmp_path, monkeypatch):
    """Each group has used 1 GiB, of which a quarter is cached files, which the kernel takes back."""
    line, start, (limit, usage, cache) = VERSIONS[version]
    (tmp_path / "own").write_text(f"1:cpu,cpuacct:/\n{line}\n")
    for name, gigabytes in limits.items():
        folder = tmp_path / "groups" / start / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / limit).write_text(f"{gigabytes if gigabytes == 'max' else gigabytes * GIB}\n")
        (folder / usage).write_text(f"{GIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{cache} {GIB // 4}\n")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    assert free_host_memory(tmp_path / "groups", tmp_path / "own") == free * GIB


def test_where_there_are_no_control_groups_the_machines_memory_counts(tmp_path):
    assert 0 < free_host_memory(tmp_path, tmp_path / "none") <= psutil.virtual_memory().total
