"""Kernels that a run computes with."""

import os

import pytest
import torch

from diffsynth.core.devices import set_kernels


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
