"""Solution of exercise 1: What B (A x) is multiplied by."""

import re
from math import sqrt


def scale(config: dict, module: str) -> float:
    rank = _of(config.get("rank_pattern", {}), module, config["r"])
    alpha = _of(config.get("alpha_pattern", {}), module, config["lora_alpha"])
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _of(patterns: dict, module: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), default)
