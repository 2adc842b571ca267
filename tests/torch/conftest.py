"""Every replayed block is run as well, and compared, wherever that does not spoil a count."""

import pytest

from esam_torch.prefix import verified_replays

VERIFIED = (
    *("test_faults", "test_models", "test_random_configurations"),
    *("test_training_scripts", "test_twins"),
)


@pytest.fixture(autouse=True)
def _replays_are_verified(request):
    if request.module.__name__.rpartition(".")[2] not in VERIFIED:
        yield
        return
    with verified_replays():
        yield
