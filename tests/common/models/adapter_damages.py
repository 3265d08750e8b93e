"""What can be wrong with an adapter's folder: {name: function of the folder}; the same in every run."""

import torch

from tests.common.models.damage import (
    Damage,
    cut,
    drop,
    edit,
    header,
    header_length,
    header_noise,
    put,
    replaced_by,
    tensors,
)
from tests.common.models.damages import VALUES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers.0."
QA, QB, DOWN_A = (
    f"{PREFIX}self_attn.q_proj.lora_A.weight",
    f"{PREFIX}self_attn.q_proj.lora_B.weight",
    f"{PREFIX}mlp.down_proj.lora_A.weight",
)
FIELDS = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "bias", "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save",
    "trainable_token_indices", "target_parameters", "layer_replication", "init_lora_weights", "lora_dropout", "a_new_key",
)  # fmt: skip


def config_fields() -> dict[str, Damage]:
    damages = {
        f"{field} is {kind}": edit(CONFIG, **{field: value}) for field in FIELDS for kind, value in VALUES.items()
    }
    damages |= {f"{field} is missing": drop(CONFIG, field) for field in FIELDS}
    patterns = {
        "a rank for one module": {"q_proj": 8}, "a rank of 0": {"q_proj": 0}, "a huge rank": {"q_proj": 10**9},
        "a rank of text": {"q_proj": "4"}, "a rank of a half": {"q_proj": 2.5}, "no regex": {"(": 4}, "null": {"q_proj": None},
        "NaN": {"q_proj": float("nan")}, "nobody's": {"nobody": 9}, "true": {"q_proj": True},
    }  # fmt: skip
    for name, value in patterns.items():
        damages[f"rank_pattern with {name}"] = edit(CONFIG, rank_pattern=value)
        damages[f"alpha_pattern with {name}"] = edit(CONFIG, alpha_pattern=value)
    targets = {
        "a regex": r".*\.[qv]_proj|.*down_proj", "another regex": r".*\.q_proj", "no regex": "(q_proj",
        "a slow regex": r"(.|\w)*[#!]",
        "all-linear": "all-linear", "fewer": ["q_proj"], "more": ["q_proj", "v_proj", "down_proj", "up_proj"],
        "unknown ones": ["c_attn"], "a number among them": ["q_proj", 3], "experts": ["experts"], "everything": ".*",
    }  # fmt: skip
    damages |= {f"target_modules: {name}": edit(CONFIG, target_modules=value) for name, value in targets.items()}
    for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "gaussian", "eva"):
        damages[f"begun as {init}"] = edit(CONFIG, init_lora_weights=init)
    for key in (
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "use_bdlora",
        "use_qalora",
        "ensure_weight_tying",
    ):
        damages[f"{key} is set"] = edit(CONFIG, **{key: [1]})
    damages["layers_to_transform names one layer"] = edit(CONFIG, layers_to_transform=[1])
    damages["layers_to_transform names both"] = edit(CONFIG, layers_to_transform=[0, 1])
    damages["layers_pattern is another"] = edit(CONFIG, layers_to_transform=[0, 1], layers_pattern="h")
    damages["layers_pattern is no regex"] = edit(CONFIG, layers_to_transform=[0, 1], layers_pattern="(")
    return damages


def files() -> dict[str, Damage]:
    damages: dict[str, Damage] = {}
    for file in (CONFIG, WEIGHTS):
        damages |= {
            f"{file} is missing": lambda folder, file=file: (folder / file).unlink(),
            f"{file} is empty": put(file, ""),
            f"{file} is a folder": replaced_by(file, lambda path: path.mkdir()),
            f"{file} is noise": put(file, bytes(range(256))),
            **{f"{keep:g} of {file}": cut(file, keep) for keep in (0.02, 0.3, 0.9, -1)},
        }
    damages["weights are a pickle"] = lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    damages["config is a list"] = put(CONFIG, "[]")
    damages["config is nested deeply"] = put(CONFIG, "[" * 100_000)
    damages["config has a key twice"] = put(
        CONFIG, '{"peft_type": "LORA", "r": 4, "r": 8, "target_modules": ["q_proj"]}'
    )
    damages |= {f"header of {n} bytes": header_length(n, WEIGHTS) for n in (0, 1, 10**6, 1 << 40, (1 << 64) - 1)}
    damages |= {f"header noise {seed}": header_noise(seed, WEIGHTS) for seed in range(40)}
    claims = {
        "another shape of as many": dict(shape=[24, 4]), "a negative size": dict(shape=[-4, 24]), "more rows": dict(shape=[5, 24]),
        "integers": dict(dtype="I32"), "fp8": dict(dtype="F8_E4M3"), "a type of its own": dict(dtype="F33"),
        "one dimension": dict(shape=[96]), "three": dict(shape=[4, 24, 1]), "none": dict(shape=[]),
        "10**18 rows": dict(shape=[10**18, 24]),
        "places beyond the file": dict(data_offsets=[0, 1 << 40]), "places that overlap": dict(data_offsets=[0, 384]),
    }  # fmt: skip
    return damages | {
        f"header claims {name}": header(lambda raw, change=change: raw[QA].update(change), WEIGHTS)
        for name, change in claims.items()
    }


def of_tensors() -> dict[str, Damage]:
    def replaced(name: str, change) -> Damage:
        return tensors(lambda content: content.update({name: change(content[name]).contiguous()}), WEIGHTS)

    def renamed(change) -> Damage:
        def all_of(content):
            for name in list(content):
                content[change(name)] = content.pop(name)

        return tensors(all_of, WEIGHTS)

    def more(name: str, *shape: int) -> Damage:
        return tensors(lambda content: content.update({name: torch.zeros(*shape)}), WEIGHTS)

    layer = "base_model.model.model.layers."
    extras = {
        "of another layer": (f"{layer}7.self_attn.q_proj.lora_A.weight", (4, 24)),
        "DoRA's": (f"{PREFIX}self_attn.q_proj.lora_magnitude_vector", (24,)),
        "a bias of B": (f"{PREFIX}self_attn.q_proj.lora_B.bias", (24,)),
        "an expert's": (f"{PREFIX}mlp.experts.0.gate_proj.lora_A.weight", (4, 24)),
        "a whole module": ("base_model.model.lm_head.modules_to_save.weight", (61, 24)),
        "a bias of the base": (f"{PREFIX}self_attn.q_proj.bias", (24,)),
        "another adapter's": (f"{PREFIX}self_attn.q_proj.lora_A.second.weight", (4, 24)),
        "with a line break": ("a\nb\x1b[2J", (1,)),
        "of a name without end": ("a" * 5000, (1,)),
        "the embedding": ("base_model.model.model.embed_tokens.base_layer.weight", (61, 24)),
        "an A twice": (f"{PREFIX}self_attn.q_proj.lora_A.default.weight", (4, 24)),
        "a norm's": (f"{PREFIX}input_layernorm.lora_A.weight", (4, 24)),
        "without prefix": ("model.layers.0.self_attn.q_proj.lora_A.weight", (4, 24)),
    }  # fmt: skip
    damages = {f"one tensor more, {kind}": more(name, *shape) for kind, (name, shape) in extras.items()}
    for name in (QA, QB, DOWN_A):
        short = name.removeprefix(PREFIX).removesuffix(".weight")
        damages |= {
            f"{short} is missing": tensors(lambda content, name=name: content.pop(name), WEIGHTS),
            f"{short} is transposed": replaced(name, lambda x: x.t()),
            f"{short} has a row less": replaced(name, lambda x: x[1:]),
            f"{short} has a column more": replaced(name, lambda x: torch.cat((x, x[:, :1]), 1)),
            f"{short} has NaN": replaced(name, lambda x: x * torch.nan),
            f"{short} has infinity": replaced(name, lambda x: x / 0),
            f"{short} is of integers": replaced(name, lambda x: x.int()),
            f"{short} is float64": replaced(name, lambda x: x.double()),
            f"{short} is bfloat16": replaced(name, lambda x: x.bfloat16()),
            f"{short} is empty": replaced(name, lambda x: x[:0]),
        }
    damages |= {
        "all tensors are float16": tensors(lambda content: content.update({n: x.half() for n, x in content.items()}), WEIGHTS),
        "no prefix": renamed(lambda name: name.removeprefix("base_model.model.")),
        "prefix twice": renamed(lambda name: f"base_model.model.{name}"),
        "adapter's name in every tensor": renamed(lambda name: name.replace(".weight", ".default.weight")),
        "another spelling": renamed(lambda name: name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")),
        "no tensor": tensors(lambda content: content.clear(), WEIGHTS),
        "A and B are swapped": renamed(lambda name: name.translate(str.maketrans("AB", "BA"))),
        "one layer less": tensors(
            lambda content: [content.pop(name) for name in list(content) if ".layers.1." in name], WEIGHTS
        ),
    }  # fmt: skip
    return damages


ADAPTER_DAMAGES = {**config_fields(), **files(), **of_tensors()}
