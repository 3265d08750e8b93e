"""Exercise 1: What B (A x) is multiplied by (15 minutes).

Read  "Two thin matrices" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.adapters.exercises.check 1

An adapter's adapter_config.json has a rank `r` and a number `lora_alpha`, and the factor of B (A x) is lora_alpha / r; with
"use_rslora": true it is lora_alpha / sqrt(r), so that a larger rank does not make the factor as small. Some modules may have
another rank or another alpha: "rank_pattern" and "alpha_pattern" are objects {pattern: number}. A pattern is a regular
expression that the end of the module's name must match, at a dot or as a whole: "q_proj" is for layers.0.q_proj and not for
layers.0.aq_proj; "0\\.q_proj" is for layer 0 alone, and not for layers.10.q_proj. Of several that match, the first one counts.
The rank that a module has is the one that it is divided by.

    config   a dict; "use_rslora", "rank_pattern" and "alpha_pattern" may be missing
    module   a name, such as "layers.0.q_proj"
    returns  a float

    scale({"r": 4, "lora_alpha": 8}, "layers.0.q_proj")                                ->  2.0
    scale({"r": 4, "lora_alpha": 8, "use_rslora": True}, "layers.0.q_proj")            ->  4.0
    scale({"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 16}}, "layers.0.q_proj")  ->  0.5
"""


def scale(config: dict, module: str) -> float:
    raise NotImplementedError  # your turn
