import re
from math import sqrt

from ch07_sglang_radix.adapters.exercises.solutions.ex1_scale import scale


def by(matches, first=lambda found: found[0]):
    """The solution, with another way to find a pattern's number."""

    def scaled(config, module):
        def of(name, default):
            found = [value for key, value in config.get(name, {}).items() if matches(key, module)]
            return first(found) if found else default

        rank, alpha = of("rank_pattern", config["r"]), of("alpha_pattern", config["lora_alpha"])
        return alpha / (sqrt(rank) if config.get("use_rslora") else rank)

    return scaled


def anywhere(key, module):
    return re.search(key, module)


def at_the_end(key, module):
    return re.search(rf"{key}$", module)


def as_written(key, module):
    return module.endswith(f".{key}") or module == key


def whole_names(key, module):
    return re.fullmatch(rf"(.*\.)?({key})", module)


def rank_of_the_config(config, module):  # alpha is another one for it, and is divided by the rank of all
    return scale(config | {"rank_pattern": {}}, module)


WRONG = [
    ({"scale": lambda config, module: config["lora_alpha"] / config["r"]}, "use_rslora"),
    ({"scale": lambda config, module: scale(config | {"use_rslora": True}, module)}, "scale("),
    ({"scale": lambda config, module: scale(config | {"use_rslora": False}, module)}, "use_rslora"),
    ({"scale": rank_of_the_config}, "rank_pattern"),
    ({"scale": lambda config, module: scale(config | {"alpha_pattern": {}}, module)}, "alpha_pattern"),
    ({"scale": by(anywhere)}, "rank_pattern"),
    ({"scale": by(at_the_end)}, "aq_proj"),
    ({"scale": by(as_written)}, "layers.1.up_proj"),
    ({"scale": by(whole_names, first=lambda found: found[-1])}, "layers.1.up_proj"),
    ({"scale": lambda config, module: 1 / scale(config, module)}, "scale("),
]
