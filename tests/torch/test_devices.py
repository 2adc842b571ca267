"""Devices."""

import torch

from esam_torch.devices import default_device


def test_the_default_device():
    assert default_device().type == "cpu"
    with torch.device("meta"):
        assert default_device().type == "meta"
    for given, found in (("meta", "meta"), ("cpu", "cpu"), (None, "cpu")):
        torch.set_default_device(given)
        try:
            assert default_device().type == found
        finally:
            torch.set_default_device(None)
