"""generation_config.json: how its makers want a model to be sampled from."""

from pathlib import Path
from typing import Any

from common.models.config import read_json

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


def sampling_defaults(folder: str | Path) -> dict[str, Any]:
    """The sampling values that the folder names, {} if it names none. What is null there is not named."""
    path = Path(folder) / "generation_config.json"
    if not path.is_file():
        return {}
    raw = read_json(path)
    return {name: raw[name] for name in SAMPLING if raw.get(name) is not None}
