"""What the tests of this room share."""

import pytest

from common.quantization import linear_methods
from common.quantization.packed_codes import CodesInMemory


@pytest.fixture
def keeps_codes(monkeypatch):
    """weight_only is the plain form of the kernels: it takes every scheme, and its numbers are those of the file."""
    monkeypatch.setitem(linear_methods.LINEAR_METHODS, "weight_only", (CodesInMemory,))
