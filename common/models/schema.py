"""What may stand in a config.json: the type, range, spellings and default of each key that the decoder reads.

An architecture is one entry of ARCHITECTURES, a kind of rotary scaling one entry of ROPE_TYPES; config.py makes facts
of what they read. Defaults are those of the architecture's class in transformers: whoever saved the file may have
left out what equals them. tests/common/models/test_schema.py compares each with the library.

Sizes have no upper bound here, the weight files know them (weights.py). Keys that are not listed change nothing in
what is computed, or nothing at inference (dropout), and are not read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.models.json_file import json_shown

REQUIRED = object()  # no default: without this key there is no model
MAX_POSITIONS = 1 << 22  # the rotary table has a row for each: 2 GiB at head_dim 128
MAX_THETA = 1e30  # its powers stay finite in float32


@dataclass(frozen=True)
class Field:
    """One key: which values fit, the rule in words for the error, and its value if the file does not have the key."""

    fits: Callable[[Any], bool]
    rule: str  # reads on after "key=value"
    default: Any = REQUIRED
    older: str | None = None  # an older spelling of the key; `key` wins if both have a value


def read_fields(raw: dict[str, Any], fields: dict[str, Field], where: str, what: str) -> dict[str, Any]:
    """{key: value} of every field, given or by default.

    Raises ValueError: `where`, the key, its value and what is allowed; or all keys that `what` needs and has not.
    """
    values = {}
    for key, field in fields.items():
        name, value = key, raw.get(key, REQUIRED)
        if field.older and raw.get(key) is None and raw.get(field.older) is not None:
            name, value = field.older, raw[field.older]
        if value is not REQUIRED and not field.fits(value):
            raise ValueError(f"{where}: {name}={json_shown(value)} {field.rule}")
        values[key] = field.default if value is REQUIRED else value
    missing = [key for key, value in values.items() if value is REQUIRED]
    if missing:
        raise ValueError(f"{where}: {what} needs {', '.join(missing)}")
    return values


# --- kinds of fields


def integer(default: Any = REQUIRED, low: int = 1, high: float = math.inf, null: bool = False) -> Field:
    def fits(x):
        return (null and x is None) or (type(x) is int and low <= x <= high)  # isinstance would take a bool for one

    return Field(fits, f"must be an integer of at least {low}{_at_most(high)}{_or_null(null)}", default)


def number(
    default: Any = REQUIRED,
    low: float | None = None,
    above: float | None = None,
    high: float = 1e300,
    null: bool = False,
) -> Field:
    """From `low`, or more than `above`, to `high`; never NaN, infinite, or an integer that no float can hold."""
    floor, word = (low, "of at least") if above is None else (above, "above")

    def fits(x):
        if type(x) not in (int, float):
            return null and x is None
        return (floor is None or x > floor or (x == floor and above is None)) and -1e300 <= x <= high

    bound = "that is finite" if floor is None else f"{word} {floor:g}"
    return Field(fits, f"must be a number {bound}{_at_most(high)}{_or_null(null)}", default)


def boolean(default: Any = REQUIRED) -> Field:
    return Field(lambda x: type(x) is bool, "must be true or false", default)


def texts(default: Any = REQUIRED) -> Field:
    return Field(
        lambda x: x is None or (isinstance(x, list) and all(isinstance(item, str) for item in x)),
        "must be a list of texts, or null", default,
    )  # fmt: skip


def token_ids(default: Any = REQUIRED) -> Field:
    return Field(
        lambda x: x is None or type(x) is int or (isinstance(x, list) and all(type(item) is int for item in x)),
        "must be a token id, a list of token ids, or null", default,
    )  # fmt: skip


def json_object() -> Field:
    return Field(lambda x: x is None or isinstance(x, dict), "must be an object, or null", None)


def one_of(*values: Any, default: Any, older: str | None = None) -> Field:
    """The values whose meaning is known here. Any other would change the numbers if it were passed over."""
    allowed = ", ".join(x if isinstance(x, str) else json_shown(x) for x in values)
    # True == 1 in Python, but not in a config
    fits = lambda x: any(x == y and isinstance(x, bool) == isinstance(y, bool) for y in values)  # noqa: E731
    return Field(fits, f"is not supported; supported: {allowed}", default, older)


def empty(rule: str) -> Field:
    """Missing, null, or an empty object."""
    return Field(lambda x: not x, rule, None)


def _at_most(high: float) -> str:
    return f" and at most {high if isinstance(high, int) else format(high, 'g')}" if high < 1e300 else ""


def _or_null(null: bool) -> str:
    return ", or null" if null else ""


# --- architectures


@dataclass(frozen=True)
class Architecture:
    model_type: str  # how transformers calls it; it picks the class by this, vLLM and SGLang by the architecture
    fields: dict[str, Field]
    qkv_bias: bool | None = None  # on q, k, v; None: attention_bias says so, for all four projections
    qk_norm: bool = False  # RMSNorm on each q and k head


QUANTIZED = "is not read: quantized checkpoints are not supported; use the float16, bfloat16 or float32 one"

EVERY_DECODER = {
    "vocab_size": integer(),
    "hidden_size": integer(),
    "intermediate_size": integer(),
    "num_hidden_layers": integer(),
    "num_attention_heads": integer(),
    "rms_norm_eps": number(1e-6, low=0, high=1),
    "tie_word_embeddings": boolean(False),
    "dtype": one_of("float32", "bfloat16", "float16", None, default=None, older="torch_dtype"),
    "eos_token_id": token_ids(None),
    "layer_types": texts(None),
    # rotary: what transformers 5 writes into rope_parameters stood in the other three before
    "rope_parameters": json_object(),
    "rope_scaling": json_object(),
    "rope_theta": number(10_000.0, low=1, high=MAX_THETA, null=True),
    "original_max_position_embeddings": integer(None, high=MAX_POSITIONS, null=True),
    "partial_rotary_factor": one_of(1, None, default=None),
    # keys with one meaning that is known here
    "hidden_act": one_of("silu", default="silu"),
    "mlp_bias": one_of(False, default=False),
    "is_causal": one_of(True, default=True),
    "quantization_config": empty(QUANTIZED),
    "compression_config": empty(QUANTIZED),
    "per_layer_config": empty("is not supported; the layers of this decoder are alike"),
    "transformers_weights": empty(
        "is not supported; the weights are read from model.safetensors or what its index names"
    ),
}
QWEN = {
    **EVERY_DECODER,
    "max_position_embeddings": integer(32_768, high=MAX_POSITIONS),
    "num_key_value_heads": integer(32, null=True),
    "use_sliding_window": boolean(False),
    "sliding_window": integer(4096, null=True),
    "max_window_layers": integer(28, low=0),
}
ARCHITECTURES = {
    "Qwen2ForCausalLM": Architecture("qwen2", {**QWEN, "head_dim": integer(None, null=True)}, qkv_bias=True),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", {**QWEN, "head_dim": integer(128), "attention_bias": boolean(False)}, qk_norm=True
    ),
    "LlamaForCausalLM": Architecture("llama", {
        **EVERY_DECODER,
        "max_position_embeddings": integer(2048, high=MAX_POSITIONS),
        "num_key_value_heads": integer(None, null=True),
        "head_dim": integer(None, null=True),
        "attention_bias": boolean(False),
    }),
}  # fmt: skip

# --- generation_config.json

END_TOKENS = {"eos_token_id": token_ids(None)}
SAMPLING = {
    "temperature": number(None, low=0, null=True),
    "top_p": number(None, above=0, high=1, null=True),
    "top_k": integer(None, low=-1, null=True),  # 0 (transformers) and -1 (vLLM): no limit
    "min_p": number(None, low=0, high=1, null=True),
    "repetition_penalty": number(None, above=0, null=True),
    "max_new_tokens": integer(None, null=True),
}


# --- rotary scaling

ANY_ROPE = {
    "rope_theta": number(None, low=1, high=MAX_THETA),
    "partial_rotary_factor": one_of(1, None, default=None),
}
ROPE_TYPES = {
    "default": ANY_ROPE,
    "linear": {**ANY_ROPE, "factor": number(above=0)},
    "llama3": {
        **ANY_ROPE,
        "factor": number(above=0),
        "low_freq_factor": number(above=0),
        "high_freq_factor": number(above=0),
        "original_max_position_embeddings": integer(None, high=MAX_POSITIONS),
    },
    "yarn": {
        **ANY_ROPE,
        "factor": number(above=0, null=True),  # null: max_position_embeddings / the original one
        "original_max_position_embeddings": integer(None, high=MAX_POSITIONS),
        "attention_factor": number(None, above=0, high=100, null=True),
        "beta_fast": number(None, low=0, null=True),
        "beta_slow": number(None, low=0, null=True),
        "mscale": number(None, low=0, high=100, null=True),
        "mscale_all_dim": number(None, low=0, high=100, null=True),
        "truncate": boolean(True),
    },
}
