"""Where a quantization computes, by the name that a user gives."""

import pytest
import torch

from kernelgraft_transformers.process_group import choose_device, process_group


def test_without_a_launcher_a_process_is_alone_and_leads():
    with process_group("cpu") as place:
        assert (place.device, place.leads) == (torch.device("cpu"), True)
        assert not torch.distributed.is_initialized()


def test_auto_is_a_gpu_where_there_is_one(monkeypatch):
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto") == torch.device(kind)


REFUSED = [
    ("gpu", "device 'gpu' is not one that PyTorch knows"),
    ("cuda:99", r"device 'cuda:99' is not there: PyTorch sees \d+ CUDA devices"),
    ("meta", "device 'meta' is not one that models are quantized on; those are auto, cpu and cuda"),
    ("mps", "device 'mps' is not one that models are quantized on"),
]


@pytest.mark.parametrize(("name", "message"), REFUSED)
def test_other_devices_are_refused_by_name(name, message):
    with pytest.raises(ValueError, match=message):
        choose_device(name)
