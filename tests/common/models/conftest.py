import shutil
from pathlib import Path

import pytest


@pytest.fixture
def copy(checkpoint, tmp_path):
    """copy(name) -> a copy of that checkpoint, to be changed."""
    return lambda name: Path(shutil.copytree(checkpoint(name), tmp_path / name))
