"""Passes are compared to the bit, which is what portable kernels give."""

import pytest


@pytest.fixture(autouse=True)
def portable_passes(portable: None) -> None:
    """Every test of a pass runs on the portable kernels."""
