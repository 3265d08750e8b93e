"""generation_config.json: how its makers want a model to be sampled from."""

import os
from pathlib import Path
from typing import Any

from common.models.fields import read_fields
from common.models.json_file import read_json
from common.models.schema import SAMPLING


def sampling_defaults(folder: str | Path) -> dict[str, Any]:
    """The sampling values that the folder names, {} if it names none. What is null there is not named.

    Raises ValueError, naming the file and the key, for a value of a wrong kind.
    """
    path = Path(folder) / "generation_config.json"
    if not os.path.lexists(path):
        return {}
    read = read_fields(read_json(path), SAMPLING, str(path), "a generation config")
    return {name: value for name, value in read.items() if value is not None}
