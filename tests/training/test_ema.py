"""The average of the weights over the steps."""

from contextlib import contextmanager

import pytest
import tiny
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffsynth.diffusion.pipeline import networks
from diffsynth.training import ema as ema_module
from diffsynth.training.ema import EMA

START, STEPS = [1.0, -2.0], [[3.0, 1.0], [5.0, 0.5], [-4.0, 2.0]]


def parameter(values) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


def averaged(ema: EMA) -> torch.Tensor:
    """The average after the steps."""
    trained = parameter(START)
    ema.start([trained])
    for number, values in enumerate(STEPS):
        trained.data.copy_(torch.tensor(values))
        ema.update([trained], number + 1)
    return ema.average[0]


def written_out(*betas: float) -> torch.Tensor:
    """ā ← β ā + (1 - β) θ"""
    average = torch.tensor(START)
    for beta, values in zip(betas, STEPS, strict=True):
        average = beta * average + (1 - beta) * torch.tensor(values)
    return average


def test_a_constant_average_is_its_formula():
    torch.testing.assert_close(averaged(EMA(decay=0.9)), written_out(0.9, 0.9, 0.9))


def test_a_power_average_forgets_the_start_and_stops_at_its_limit():
    betas = [1 - 2**-0.75, 1 - 3**-0.75, 0.6]  # the third would be 1 - 4^-0.75 = 0.65
    torch.testing.assert_close(averaged(EMA(decay=0.6, power=0.75)), written_out(*betas))


def test_without_decay_the_average_is_the_last_step():
    assert torch.equal(averaged(EMA(decay=0.0)), torch.tensor(STEPS[-1]))


def test_the_average_starts_as_a_copy():
    trained, ema = parameter(START), EMA()
    ema.start([trained])
    trained.data.zero_()
    assert torch.equal(ema.average[0], torch.tensor(START))


def test_the_average_of_rounded_weights_is_not_rounded():
    trained, ema = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), EMA(decay=0.999)
    ema.start([trained])
    trained.data.fill_(2)
    ema.update([trained], 1)
    torch.testing.assert_close(ema.average[0], torch.full((3,), 1.001))


@pytest.mark.parametrize("fails", [False, True])
def test_the_average_takes_the_place_of_the_weights_and_they_come_back_exactly(fails):
    trained, ema = [parameter([0.1, 0.2]), parameter(START)], EMA()
    ema.average = [torch.tensor([7.0, 8.0]), torch.zeros(2)]
    with pytest.raises(KeyError) if fails else torch.no_grad(), ema.in_place(trained):
        assert all(map(torch.equal, trained, ema.average))
        if fails:
            raise KeyError
    assert torch.equal(trained[0], torch.tensor([0.1, 0.2])) and torch.equal(trained[1], torch.tensor(START))
    assert torch.equal(ema.average[0], torch.tensor([7.0, 8.0]))


@pytest.mark.parametrize("device, expected", [(None, "cpu"), ("cpu", "cpu"), ("meta", "meta")])
def test_the_average_is_kept_beside_the_weights_or_where_it_is_asked_to_be(device, expected):
    average = averaged(EMA(device=device))
    assert average.device.type == expected
    if expected == "cpu":
        assert torch.equal(average, averaged(EMA()))


@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_the_start_loses_its_influence_as_fast_if_the_average_is_updated_less_often(every):
    trained, ema = parameter([0.0]), EMA(decay=0.9, power=0.75, every=every)
    ema.start([trained])
    trained.data.fill_(1)
    start = 1.0
    for step in range(1, 16):
        ema.update([trained], step)
        start *= ema.beta(step)
        if step % every == 0:
            torch.testing.assert_close(ema.average[0], torch.tensor([1 - start]))


@pytest.mark.parametrize("device", [None, "cpu"])
def test_between_updates_the_average_is_left_alone(device):
    trained, ema = parameter(START), EMA(decay=0.9, device=device, every=3)
    ema.start([trained])
    for step, values in enumerate(STEPS, 1):
        trained.data.copy_(torch.tensor(values))
        assert torch.equal(ema.average[0], torch.tensor(START))
        ema.update([trained], step)
    torch.testing.assert_close(ema.average[0], 0.729 * torch.tensor(START) + 0.271 * torch.tensor(STEPS[-1]))


class FakeLane:
    """Notes when copies are entered, made and waited for."""

    def __init__(self, notes: list):
        self.notes = notes

    @contextmanager
    def after_computation(self):
        self.notes.append("copies")
        with Copies(self.notes):
            yield

    def finish(self):
        self.notes.append("wait")


class Copies(TorchDispatchMode):
    def __init__(self, notes: list):
        super().__init__()
        self.notes = notes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.notes.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def test_weights_are_copied_to_an_average_in_host_memory_without_a_wait_between_them(monkeypatch):
    trained, ema, notes = [parameter([float(n)]) for n in range(4)], EMA(device="cpu", every=2), []
    ema.start(trained)
    places = [copy.data_ptr() for copy in ema.staging]
    monkeypatch.setattr(ema_module, "lane", lambda device: FakeLane(notes))
    ema.update(trained, 1)
    assert notes == []
    ema.update(trained, 2)
    assert notes == ["copies", *["copy_"] * 4, "wait"]
    assert [copy.data_ptr() for copy in ema.staging] == places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_in_host_memory_is_that_beside_the_weights_and_clones_no_weights(dtype):
    trained = [nn.Parameter(torch.randn(3, 5, dtype=dtype)), nn.Parameter(torch.randn(7, dtype=dtype))]
    raw, notes = [p.detach().clone() for p in trained], []
    beside, away = EMA(), EMA(device="cpu")
    for ema in (beside, away):
        ema.start([torch.zeros_like(p) for p in trained])
        ema.update(trained, 1)
    assert all(map(torch.equal, beside.average, away.average))
    with Copies(notes), away.in_place(trained):
        assert all(torch.equal(p, a.to(dtype)) for p, a in zip(trained, away.average, strict=True))
    assert all(map(torch.equal, trained, raw)) and "clone" not in notes


@pytest.mark.parametrize("every", [0, -1])
def test_an_interval_that_is_none_is_refused(every):
    with pytest.raises(ValueError, match=rf"ema\.every is {every}; expected a whole number of at least 1"):
        EMA(every=every)


def test_an_average_that_would_never_move_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "load_weights", None)
    with pytest.raises(ValueError, match="ema.every is 3, but the run has 2 steps.*set it to 2 or less"):
        tiny.train(tmp_path, "ema=constant", "ema.every=3")


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=r"ema\.decay is .*expected a number in \[0, 1\)"):
        EMA(decay=decay)


@pytest.mark.parametrize("power", [0, -0.5, 1.5])
def test_a_power_that_is_none_is_refused(power):
    with pytest.raises(ValueError, match=rf"ema\.power is {power}; expected a number in \(0, 1\]"):
        EMA(power=power)
