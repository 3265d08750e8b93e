"""The tool that writes quantized checkpoints: what it writes is loaded, and holds what was chosen."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.quantization import make
from common.quantization.config import QuantizationConfig
from common.quantization.methods import METHODS
from common.quantization.rounding import round_to_nearest
from common.tiny_qwen import TINY_QWEN_PATH

pytestmark = pytest.mark.filterwarnings("ignore:.*dequantised as they are read")
MIXTURE = TINY_QWEN_PATH / "mixture"
ONE = "model.layers.1.mlp.down_proj"
CASES = [
    *((name, {}) for name in ("fp8", "fp8-block", "w8a8_fp8", "w8a8_int8", "fp8-dynamic", "w8a8", "mxfp4")),
    ("w4a16", {"group_size": 32}), ("w4a16", {"bits": 8, "group_size": 64, "zero_points": True}), ("w4a16", {"group_size": -1}),
    ("gptq", {"group_size": 32}), ("gptq", {"bits": 3, "group_size": 64, "zero_points": True}),
    ("gptq", {"bits": 2, "group_size": 16, "zero_points": True, "checkpoint_format": "gptq_v2"}),
    ("awq", {"group_size": 32}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values()))
)
def test_what_is_written_loads_as_what_was_rounded(tmp_path, name, options):
    said = make.config_of(name, **options)
    make.make(TINY_QWEN_PATH, tmp_path / "out", said)
    model, report = load_model(tmp_path / "out", TPGroup())
    plain = load_file(TINY_QWEN_PATH / "model.safetensors")
    scheme = QuantizationConfig.from_checkpoint({"quantization_config": said}, "here").scheme_of(ONE)
    rounded = round_to_nearest(plain[f"{ONE}.weight"], scheme, METHODS[scheme.method].stored).dequantise()
    assert torch.equal(model.get_parameter(f"{ONE}.weight"), rounded)
    assert (rounded - plain[f"{ONE}.weight"].float()).abs().max() > 0
    assert torch.equal(model.model.embed_tokens.weight, plain["model.embed_tokens.weight"].float())
    assert report.bytes_read < 5_803_000


def test_experts_have_4_bits_and_the_rest_8(tmp_path):
    make.make(MIXTURE, tmp_path / "out", make.config_of("w4afp8", group_size=32))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.0.mlp.experts.3.down_proj.weight"].shape == (224, 68)
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gptq", "w4a16", "mxfp4"])
def test_a_head_of_its_own_is_quantized_if_asked_for(tmp_path, checkpoint, name):
    make.make(checkpoint("llama"), tmp_path / "out", make.config_of(name, lm_head=True))
    plain = load_file(checkpoint("llama") / "model.safetensors")["lm_head.weight"]
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    scheme = QuantizationConfig.from_checkpoint(
        json.loads((tmp_path / "out" / "config.json").read_text()), "h"
    ).scheme_of("lm_head")
    want = round_to_nearest(plain, scheme, METHODS[scheme.method].stored).dequantise()
    for rank in range(2):
        model, _ = load_model(tmp_path / "out", TPGroup(rank, 2))
        have = model.lm_head.weight
        assert torch.equal(have[: len(want) - rank * len(have)], want[rank * len(have) :][: len(have)])


def test_a_head_that_is_the_embedding_is_not_quantized(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"its LM head is the embedding \(tie_word_embeddings\), which stays plain; leave out --lm-head",
    ):
        make.make(TINY_QWEN_PATH, tmp_path / "out", make.config_of("gptq", lm_head=True))
    with pytest.raises(ValueError, match="format awq has no lm_head"):
        make.config_of("awq", lm_head=True)
    assert not (tmp_path / "out").exists()


def test_experts_are_written_as_gpt_oss_writes_its_own(tmp_path):
    make.make(MIXTURE, tmp_path / "out", make.config_of("gpt-oss"))
    make.make(MIXTURE, tmp_path / "each", make.config_of("mxfp4"))
    tensors, each = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "each"))
    experts = "model.layers.1.mlp.experts"
    shapes = {
        name.removeprefix(f"{experts}."): tuple(x.shape) for name, x in tensors.items() if name.startswith(experts)
    }
    assert shapes == {
        "gate_up_proj_blocks": (8, 272, 7, 16), "gate_up_proj_scales": (8, 272, 7),
        "down_proj_blocks": (8, 224, 5, 16), "down_proj_scales": (8, 224, 5),
    }  # fmt: skip
    assert tensors["model.layers.1.self_attn.q_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.mlp.shared_expert.up_proj.weight"].dtype == torch.bfloat16
    blocks = tensors[f"{experts}.gate_up_proj_blocks"][3]
    both = torch.cat([each[f"{experts}.3.{which}_proj.weight_packed"] for which in ("gate", "up")])
    assert torch.equal(blocks.flatten(1), both)
    for rank in range(2):
        (a, _), (b, _) = (load_model(tmp_path / name, TPGroup(rank, 2)) for name in ("out", "each"))
        for name, x in a.named_parameters():
            if ".experts." in name:
                assert torch.equal(x, b.get_parameter(name)), name


def test_several_files_stay_several(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    tensors = load_file(TINY_QWEN_PATH / "model.safetensors")
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (i > 20)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in names if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    for file in ("config.json", "tokenizer.json"):
        (folder / file).write_bytes((TINY_QWEN_PATH / file).read_bytes())
    said = make.config_of("awq", group_size=32)
    make.make(folder, tmp_path / "out", said)
    make.make(TINY_QWEN_PATH, tmp_path / "one", said)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == sorted(set(where.values()))
    (a, _), (b, _) = (load_model(tmp_path / name, TPGroup()) for name in ("out", "one"))
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="format fp8 has no bits, group_size; it has no options"):
        make.config_of("fp8", bits=8, group_size=32)
    make.make(TINY_QWEN_PATH, tmp_path / "one", make.config_of("fp8"))
    with pytest.raises(ValueError, match="quantized already"):
        make.make(tmp_path / "one", tmp_path / "two", make.config_of("fp8"))
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        make.make(TINY_QWEN_PATH, tmp_path / "one", make.config_of("awq"))
    with pytest.raises(
        ValueError, match="GPTQ rounds to integers with scales of groups or rows, not to fp8 float8 tensor"
    ):
        make.make(TINY_QWEN_PATH, tmp_path / "two", make.config_of("fp8"), "gptq")
    assert not (tmp_path / "two").exists()


@torch.no_grad()
def test_gptq_calibrates_layer_by_layer_and_is_nearer_on_other_text(tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415, seconds

    base = ["make", "--format", "gptq", "--bits", "3", "--group-size", "32", "--desc-act"]
    for name, more in (("nearest", []), ("gptq", ["--algorithm", "gptq"])):
        monkeypatch.setattr(sys, "argv", [*base, "--out", str(tmp_path / name), *more])
        make.main()
    assert "28 by GPTQ" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN_PATH)
    ids = tokenizer("<|im_start|>user\nWhat is a KV cache?<|im_end|>\n", return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32)
    want = plain(ids).logits.log_softmax(-1)
    off = {}
    for name in ("nearest", "gptq"):
        model, _ = load_model(tmp_path / name, TPGroup())
        plain.load_state_dict(_as_transformers(model, plain.state_dict()))
        off[name] = float((want.exp() * (want - plain(ids).logits.log_softmax(-1))).sum(-1).mean())
    assert off["gptq"] < 0.7 * off["nearest"]


def _as_transformers(model, names):
    """Our merged parameters, cut apart into the names that transformers has."""
    ours, found = model.state_dict(), {}
    merged = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
              "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # fmt: skip
    for name in names:
        last = name.split(".")[-2]
        if last in merged:
            into, part = merged[last]
            sizes = model.get_submodule(name.replace(last, into).rpartition(".")[0]).sizes
            found[name] = ours[name.replace(last, into)].split(sizes)[part]
        else:
            found[name] = ours.get(name, ours["model.embed_tokens.weight"])
    return found
