"""What can be wrong with a checkpoint folder: {name: function of the folder} for each base; the same in every run."""

import os

import torch
from safetensors.torch import save_file

from tests.common.models.damage import (
    CONFIG,
    GENERATION,
    INDEX,
    TINY,
    WEIGHTS,
    Damage,
    cut,
    drop,
    edit,
    header,
    header_length,
    header_noise,
    in_two_files,
    one_file_named,
    put,
    replaced_by,
    sparse,
    tensors,
    then,
)

POSIX = hasattr(os, "mkfifo")  # has pipes, links that anybody may make, and files with holes
VALUES = {
    "text": "4", "null": None, "list": [4], "empty list": [], "object": {"a": 1}, "negative": -1, "zero": 0, "one": 1,
    "1e30": 1e30, "NaN": float("nan"), "infinity": float("inf"), "10**12": 10**12, "10**400": 10**400, "true": True,
    "2.5": 2.5, "empty text": "", "deep": [[[[[[[[[[]]]]]]]]]], "texts": ["full_attention"], "line break": "a\nb\x1b[2J",
}  # fmt: skip
FIELDS = (
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "dtype", "torch_dtype", "eos_token_id", "layer_types", "rope_parameters", "rope_scaling",
    "rope_theta", "original_max_position_embeddings", "partial_rotary_factor", "hidden_act", "attention_bias",
    "mlp_bias", "is_causal", "use_sliding_window", "sliding_window", "max_window_layers", "quantization_config",
    "per_layer_config", "transformers_weights",
)  # fmt: skip
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip
ROPE_VALUES = (
    "text",
    "null",
    "list",
    "negative",
    "zero",
    "one",
    "1e30",
    "NaN",
    "10**12",
    "10**400",
    "true",
    "2.5",
    "deep",
)
YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
UP, Q = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"


def config_fields() -> dict[str, Damage]:
    damages: dict[str, Damage] = {}
    for field in FIELDS:
        for kind, value in VALUES.items():
            damages[f"{field} is {kind}"] = edit(CONFIG, **{field: value})
        damages[f"{field} is missing"] = drop(CONFIG, field)
    for size in ("num_hidden_layers", "num_attention_heads"):  # when nothing else in the config contradicts
        for value in (10**6, 10**9, 10**12, 10**18, 10**30):
            change = {size: value, "layer_types": None, "num_key_value_heads": 2, "head_dim": 6}
            damages[f"{size} is {value}, consistently"] = edit(CONFIG, **change)
    damages["all sizes are 10**12"] = edit(CONFIG, layer_types=None, head_dim=10**12, **{
        key: 10**12 for key in TINY if key.endswith("_size") or key.startswith("num_")})  # fmt: skip
    return damages


def of_experts(*fields: str) -> dict[str, Damage]:
    damages: dict[str, Damage] = {}
    for field in fields:
        for kind, value in VALUES.items():
            damages[f"{field} is {kind}"] = edit(CONFIG, **{field: value})
        damages[f"{field} is missing"] = drop(CONFIG, field)
    return damages


def ropes() -> dict[str, Damage]:
    damages = {}
    for kind, rope in ROPES.items():
        damages[f"rope {kind}"] = edit(CONFIG, rope_parameters=rope)
        damages[f"rope {kind} in rope_scaling"] = edit(CONFIG, rope_scaling=rope)
        damages[f"rope {kind} in rope_scaling, by type"] = edit(
            CONFIG, rope_parameters=ROPES["default"], rope_theta=500.0,
            rope_scaling={("type" if key == "rope_type" else key): value for key, value in rope.items()},
        )  # fmt: skip
        for key in (*rope, *(YARN_KEYS if kind == "yarn" else ())):
            damages[f"rope {kind} without {key}"] = edit(
                CONFIG, rope_parameters={name: value for name, value in rope.items() if name != key}
            )
            for value in ROPE_VALUES:
                damages[f"rope {kind}, {key} is {value}"] = edit(CONFIG, rope_parameters={**rope, key: VALUES[value]})
    for kind in ("dynamic", "longrope", "proportional", "mrope", "su", "no such"):
        damages[f"rope {kind}"] = edit(CONFIG, rope_parameters={"rope_type": kind, "factor": 2.0})
    damages["rope by layer type"] = edit(CONFIG, rope_parameters={"full_attention": ROPES["linear"]})
    return damages


def json_files() -> dict[str, Damage]:
    damages: dict[str, Damage] = {}
    for file in (CONFIG, GENERATION):
        for share in (0, 0.01, 0.3, 0.7, -1):
            damages[f"{file} cut at {share}"] = cut(file, share)
        for kind, content in {
            "a list": "[]", "null": "null", "a number": "5", "two objects": "{}{}", "HTML": "<html>", "empty object": "{}",
            "not UTF-8": b'{"a": "\xff"}', "UTF-16": "{}".encode("utf-16"), "zeros": bytes(1000),
            "deep lists": '{"a": ' + "[" * 10_000 + "]" * 10_000 + "}", "deep objects": '{"a":' * 10_000 + "1" + "}" * 10_000,
            "900 deep": '{"vocab_size": ' + "[" * 900 + "]" * 900 + "}", "long number": '{"vocab_size": ' + "9" * 5000 + "}",
            "6 MB of lists": '{"a": [' + "[]," * (2 << 20) + "[]]}", "6 MB of text": '{"vocab_size": "' + "a" * (6 << 20) + '"}',
            "a key twice": '{"vocab_size": 1, "vocab_size": 2}', "surrogate": '{"vocab_size": "\\ud800"}',
        }.items():  # fmt: skip
            damages[f"{file} is {kind}"] = put(file, content)
        damages[f"{file} is a folder"] = replaced_by(file, lambda path: path.mkdir())
        damages[f"{file} is gone"] = lambda folder, file=file: (folder / file).unlink()
        if POSIX:
            damages[f"{file} is 1 TB of nothing"] = sparse(file, 1 << 40)
            damages[f"{file} links to itself"] = replaced_by(file, lambda path: path.symlink_to(path))
            damages[f"{file} links to nothing"] = replaced_by(file, lambda path: path.symlink_to("nowhere"))
            damages[f"{file} is a pipe"] = replaced_by(file, os.mkfifo)
            damages[f"{file} is /dev/zero"] = replaced_by(file, lambda path: path.symlink_to("/dev/zero"))
    for kind, value in VALUES.items():
        damages[f"generation eos_token_id is {kind}"] = edit(GENERATION, eos_token_id=value)
    damages["eos_token_ids outside of the vocabulary"] = edit(GENERATION, eos_token_id=[-1, 7, 61, 10**12])
    return damages


def weights() -> dict[str, Damage]:
    damages: dict[str, Damage] = {}
    for dtype in ("int64", "int8", "uint8", "bool", "float8_e4m3fn", "complex64", "float64", "bfloat16", "float16"):
        for name in (EMBEDDING, NORM, UP):
            damages[f"{name} is {dtype}"] = tensors(
                lambda x, name=name, dtype=dtype: x.update({name: x[name].to(getattr(torch, dtype))})
            )
    for name in (EMBEDDING, NORM, UP, Q):
        damages[f"{name} is missing"] = tensors(lambda x, name=name: x.pop(name))
        damages[f"{name} is transposed"] = tensors(lambda x, name=name: x.update({name: x[name][None].mT.contiguous()}))
        damages[f"{name} is a number"] = tensors(lambda x, name=name: x.update({name: torch.ones(())}))
        damages[f"{name} has no rows"] = tensors(lambda x, name=name: x.update({name: torch.ones(0, 10**12)}))
        damages[f"{name} is one row short"] = tensors(lambda x, name=name: x.update({name: x[name][:-1].clone()}))
    for extra in ("lora", "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "a\nb", "",
                  "x" * 100_000, "model.layers.99999999999999999999.x"):  # fmt: skip
        damages[f"{extra[:40]!r} is there too"] = tensors(lambda x, extra=extra: x.update({extra: torch.ones(2)}))
    damages["an equal lm_head"] = tensors(lambda x: x.update({HEAD: x[EMBEDDING].clone()}))
    damages["another lm_head"] = tensors(lambda x: x.update({HEAD: x[EMBEDDING].flip(0).contiguous()}))
    damages["an lm_head of bfloat16"] = tensors(lambda x: x.update({HEAD: x[EMBEDDING].bfloat16()}))
    damages["an lm_head of int64"] = tensors(lambda x: x.update({HEAD: x[EMBEDDING].long()}))
    damages["an lm_head of one row"] = tensors(lambda x: x.update({HEAD: x[EMBEDDING][:1].clone()}))
    damages["an equal lm_head, both fp4"] = then(
        damages["an equal lm_head"],
        header(lambda claims: [claims[name].update(dtype="F4", shape=[61, 192]) for name in (EMBEDDING, HEAD)]),
    )
    damages["the lm_head alone"] = tensors(lambda x: x.update({HEAD: x.pop(EMBEDDING)}))
    damages["neither embedding nor lm_head"] = tensors(lambda x: [x.pop(EMBEDDING), x.pop(HEAD, None)])
    damages["a tensor without rows that seems long, and as many heads"] = then(
        damages[f"{NORM} has no rows"],
        edit(CONFIG, num_attention_heads=10**12, num_key_value_heads=10**12, head_dim=2, layer_types=None),
    )
    damages["no tensor"] = tensors(lambda x: x.clear())
    damages["a layer less"] = tensors(lambda x: [x.pop(name) for name in list(x) if ".layers.1." in name])
    damages["names without model."] = tensors(
        lambda x: [x.update({name.removeprefix("model."): x.pop(name)}) for name in list(x)]
    )
    return damages


def weight_files() -> dict[str, Damage]:
    damages: dict[str, Damage] = {}
    for share in (0, 0.0001, 0.01, 0.1, 0.5, 0.99, -1):
        damages[f"weights cut at {share}"] = cut(WEIGHTS, share)
    for n in (0, 1, 7, 100, 10**6, 10**8, 2**31, 2**32, 2**62, 2**63, 2**64 - 1):
        damages[f"header of {n} bytes"] = header_length(n)
    for seed in range(40):
        damages[f"header noise {seed}"] = header_noise(seed)

    def claim(**changes):
        return header(lambda claims: claims[UP].update(changes))

    claims = {
        "overlap": claim(data_offsets=[0, 36 * 24 * 4]),
        "backwards": claim(data_offsets=[400, 0]),
        "empty": claim(data_offsets=[0, 0]),
        "beyond the file": claim(data_offsets=[0, 10**12]),
        "negative": claim(data_offsets=[-4, 0]),
        "null": claim(data_offsets=None),
        "one number": claim(data_offsets=[4]),
        "halves": claim(data_offsets=[0.5, 1.5]),
        "shape of text": claim(shape="36"),
        "shape of 10**12": claim(shape=[10**12, 24]),
        "shape that overflows": claim(shape=[2**62, 4, 24]),
        "negative shape": claim(shape=[-36, 24]),
        "no such dtype": claim(dtype="F5"),
        "dtype of half the size": claim(dtype="F16"),
        "dtype null": claim(dtype=None),
        "integers": claim(dtype="I32"),
        "fp4": claim(dtype="F4", shape=[36, 192]),
        "another key": claim(extra=1),
    }
    damages |= {f"header claims {kind}": change for kind, change in claims.items()}
    damages["header of an empty object"] = header(lambda claims: claims.clear())
    damages["header with metadata of numbers"] = header(lambda claims: claims.update(__metadata__={"format": 5}))
    damages["header with metadata of text"] = header(lambda claims: claims.update(__metadata__="pt"))
    damages["weights are a folder"] = replaced_by(WEIGHTS, lambda path: path.mkdir())
    damages["weights are gone"] = lambda folder: (folder / WEIGHTS).unlink()
    damages["weights are a text"] = put(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    damages["weights in another format"] = lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    if POSIX:
        damages["weights and 1 TB of nothing"] = sparse(WEIGHTS, 1 << 40)
        damages["weights are a pipe"] = replaced_by(WEIGHTS, os.mkfifo)
        damages["weights are /dev/zero"] = replaced_by(WEIGHTS, lambda path: path.symlink_to("/dev/zero"))
        damages["weights are a link"] = then(
            lambda folder: (folder / WEIGHTS).rename(folder / "blob"),
            lambda folder: (folder / WEIGHTS).symlink_to("blob"),
        )
    for stray in ("adapter_model", "consolidated", "consolidated.00", "other"):
        file = f"{stray}.safetensors"
        damages[f"{file} beside"] = lambda folder, file=file: save_file({NORM: torch.ones(1)}, folder / file)
        damages[f"{file} beside two files"] = then(in_two_files(), damages[f"{file} beside"])
        damages[f"{file} that is damaged"] = put(file, "damaged")
        damages[f"{file} alone"] = lambda folder, file=file: (folder / WEIGHTS).rename(folder / file)
    return damages


def indices() -> dict[str, Damage]:
    damages: dict[str, Damage] = {"two files and an index": in_two_files()}
    for name in (
        "../outside.safetensors", "/etc/passwd", "/tmp/outside.safetensors", "sub/../../outside.safetensors",
        "..\\outside.safetensors", "c:\\outside.safetensors", "c:outside.safetensors", "\\\\host\\share\\x.safetensors",
        "no_such.safetensors", "", ".", "..", "config.json", "./a.safetensors", "a.safetensors/x.safetensors",
        "a\0b.safetensors", "a\nb.safetensors", "\ud800.safetensors", "x" * 10_000 + ".safetensors",
        5, None, ["a.safetensors"], {"a": 1}, True,
    ):  # fmt: skip
        damages[f"index names {ascii(name)[:40]}"] = one_file_named(name)
    for kind, value in VALUES.items():
        damages[f"weight_map is {kind}"] = in_two_files(lambda index, value=value: index.update(weight_map=value))
    damages["no weight_map"] = in_two_files(lambda index: index.pop("weight_map"))
    damages["index without b"] = in_two_files(
        lambda index: index.update(weight_map={k: v for k, v in index["weight_map"].items() if v == "a.safetensors"})
    )
    damages["index that swaps the files"] = in_two_files(
        lambda index: index["weight_map"].update(
            {k: "b.safetensors" if v == "a.safetensors" else "a.safetensors" for k, v in index["weight_map"].items()}
        )
    )
    damages["index is not JSON"] = then(in_two_files(), put(INDEX, "{"))
    damages["index is deep"] = then(in_two_files(), put(INDEX, "[" * 10_000))
    damages["index is a folder"] = then(in_two_files(), replaced_by(INDEX, lambda path: path.mkdir()))
    if POSIX:
        damages["index is 1 TB of nothing"] = then(in_two_files(), sparse(INDEX, 1 << 40))
    damages["index is gone"] = then(in_two_files(), lambda folder: (folder / INDEX).unlink())
    damages["a file is gone"] = then(in_two_files(), lambda folder: (folder / "b.safetensors").unlink())
    damages["a file is damaged"] = then(in_two_files(), cut("b.safetensors", 0.5))
    damages["the same tensors in both files"] = then(
        in_two_files(), lambda folder: (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    )  # fmt: skip
    damages["index beside one file"] = put(INDEX, '{"weight_map": {"model.norm.weight": "../outside.safetensors"}}')
    return damages


DAMAGES: dict[str, dict[str, Damage]] = {
    "qwen2": config_fields() | json_files() | weights() | weight_files() | indices(),
    "qwen3": {
        name: config_fields()[name] for name in config_fields() if name.startswith(("head_dim", "num_key", "attention"))
    },
    "llama": ropes() | weights(),
    "qwen2_moe": of_experts(
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "norm_topk_prob",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "decoder_sparse_step",
        "mlp_only_layers",
        "qkv_bias",
        "use_sliding_window",
    ),
    "qwen3_moe": of_experts("num_local_experts", "norm_topk_prob", "head_dim", "num_key_value_heads"),
    "mixtral": of_experts("num_local_experts", "n_routed_experts", "num_experts_per_tok", "sliding_window", "head_dim"),
}
