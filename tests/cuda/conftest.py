"""Tests that need a GPU are skipped where there is none; `CUDA_TESTS_ON=cpu` runs them on the CPU, to try them out."""

import on_device
import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.path.parts:
            item.add_marker(pytest.mark.cuda)


@pytest.fixture(autouse=True)
def gpu():
    if on_device.DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    yield
    torch.use_deterministic_algorithms(False)
