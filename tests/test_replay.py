import pytest
import torch

from clipscale.data.replay import chunks, pin

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 3, 7, 10, 11, 100])
def test_chunks_are_the_inputs_in_order(size):
    inputs = torch.arange(20).view(10, 2)
    found = list(chunks(inputs, size, CPU))
    assert [start for start, _ in found] == list(range(0, 10, size))
    assert torch.equal(torch.cat([chunk for _, chunk in found]), inputs)
    assert all(len(chunk) == size for _, chunk in found[:-1])


def test_no_inputs_no_chunks():
    assert list(chunks(torch.empty(0, 3), 4, CPU)) == []


def test_without_a_gpu_nothing_is_pinned():
    tensor = torch.zeros(3)
    assert pin(tensor, None) is tensor
    assert pin(tensor, CPU) is tensor


@pytest.mark.gpu
def test_on_a_gpu_chunks_come_from_pinned_memory():
    device = torch.device("cuda")
    inputs = pin(torch.arange(1000, dtype=torch.uint8), device)
    assert inputs.is_pinned()
    assert torch.equal(torch.cat([chunk for _, chunk in chunks(inputs, 64, device)]).cpu(), inputs)
