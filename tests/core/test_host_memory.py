"""Host memory that a GPU copies from: every buffer on memory pages of its own, as CUDA registers a page only once."""

import mmap

import pytest
import torch

from diffsynth.core import host_memory


@pytest.mark.parametrize("sizes", [(1, 1), (100, 5000)])
def test_two_buffers_share_no_page(sizes):
    buffers = [host_memory.own_pages(size) for size in sizes]
    pages = [set(_pages(buffer)) for buffer in buffers]
    assert [len(buffer) for buffer in buffers] == list(sizes)
    assert all(buffer.data_ptr() % mmap.PAGESIZE == 0 for buffer in buffers) and not pages[0] & pages[1]


def _pages(buffer: torch.Tensor) -> range:
    start = buffer.data_ptr() // mmap.PAGESIZE
    return range(start, start + -(-buffer.nbytes // mmap.PAGESIZE))


def test_a_buffer_may_be_written_and_lives_as_long_as_its_tensor():
    buffer = host_memory.own_pages(10)
    view = buffer[4:8].view(torch.float32)
    view.fill_(3)
    del buffer
    assert view.item() == 3


class Mark:
    """An event that notes that it was waited for."""

    def __init__(self, waited: list, number: int):
        self.waited, self.number = waited, number

    def synchronize(self) -> None:
        self.waited.append(self.number)


def test_the_oldest_copies_are_waited_for_before_more_memory_than_allowed_is_leaving(monkeypatch):
    waited, numbers = [], iter(range(9))
    lane = host_memory.Lane(torch.device("cpu"))
    monkeypatch.setattr(lane, "mark", lambda: Mark(waited, next(numbers)))
    monkeypatch.setattr(host_memory, "MOST_LEAVING", 100)
    for size in (60, 40, 30, 90, 1):
        lane.keep(torch.empty(size, dtype=torch.uint8))
        assert sum(tensor.nbytes for _, tensor in lane.leaving) <= 100
    assert waited == [0, 1, 2]  # 60 before 30, then 40 and 30 before 90
    lane.let_go()
    assert waited == [0, 1, 2, 3, 4] and not lane.leaving
