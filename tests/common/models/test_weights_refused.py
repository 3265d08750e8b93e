import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from common.models.checkpoint import checkpoint_files
from common.models.sizes_of_files import refuse_sizes_beyond_the_files
from common.models.weights import CheckpointTensor, load_model
from common.parallel_state import TPGroup
from tests.common.models.files import rewrite, tensors
from tests.oracle import save_random

NORM, UP, BIAS = "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.k_proj.bias"


# --- refusals: by name, and before a weight is read


class Untouchable(CheckpointTensor):
    def read(self, dim, start, stop):
        raise AssertionError(f"{self.name} was read")


def refuse(folder, error, *words):
    for rank in range(2):
        with pytest.raises(error) as caught:
            load_model(folder, TPGroup(rank, 2), source=Untouchable)
        for word in words:
            assert str(word) in str(caught.value)


def test_the_tests_below_would_notice_a_read(checkpoint):
    with pytest.raises(AssertionError, match="was read"):
        load_model(checkpoint("llama"), TPGroup(), source=Untouchable)


@pytest.mark.parametrize(
    ("name", "gone"), [("llama", NORM), ("qwen2", UP), ("qwen2", BIAS), ("llama", "lm_head.weight")]
)
def test_a_missing_tensor_is_named(copy, name, gone):
    folder = copy(name)
    rewrite(folder, lambda x: x.pop(gone))
    refuse(folder, ValueError, folder, f"tensors 1 missing: {gone};")


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "float8_e4m3fn", "complex64"])
@pytest.mark.parametrize("name", [NORM, UP, "lm_head.weight"])
def test_numbers_that_are_no_weights_are_refused_by_name_and_type(copy, name, dtype):
    folder = copy("llama")
    rewrite(folder, lambda x: x.update({name: x[name].to(getattr(torch, dtype))}))
    stored = {"int64": "I64", "uint8": "U8", "bool": "BOOL", "float8_e4m3fn": "F8_E4M3", "complex64": "C64"}[dtype]
    refuse(folder, ValueError, folder, f"tensors 1 of wrong type: {name} is {stored}, not F32, F16, BF16, F64;")


@pytest.mark.parametrize("extra", ["model.layers.3.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "lora"])
def test_an_unexpected_tensor_is_named(copy, extra):
    folder = copy("llama")
    rewrite(folder, lambda x: x.update({extra: torch.ones(2)}))
    refuse(folder, ValueError, folder, f"tensors 1 unexpected: {extra};")


@pytest.mark.parametrize(
    ("name", "wrong", "shape", "want"),
    [
        ("llama", NORM, [127], [128]),
        ("llama", "lm_head.weight", [1000, 128], [1009, 128]),
        ("qwen2", UP, [112, 151], [151, 112]),
        ("qwen2", BIAS, [112], [16]),
        ("qwen2", "model.layers.0.self_attn.v_proj.weight", [16, 112, 1], [16, 112]),
    ],
)
def test_a_wrong_shape_is_named_with_the_right_one(copy, name, wrong, shape, want):
    folder = copy(name)
    rewrite(folder, lambda x: x.update({wrong: torch.ones(shape)}))
    refuse(folder, ValueError, folder, f"tensors 1 of wrong shape: {wrong} is {shape}, not {want};")


def test_all_that_is_wrong_is_said_at_once(copy):
    folder = copy("llama")

    def change(x):
        del x[NORM]
        x["lora"] = torch.ones(1)
        x[UP] = torch.ones(1, 1)

    rewrite(folder, change)
    refuse(folder, ValueError, f"1 missing: {NORM}; 1 unexpected: lora; 1 of wrong shape: {UP} is [1, 1]")


def test_many_names_are_counted_and_cut_short(copy):
    folder = copy("qwen2")
    biases = [key for key in tensors(folder) if key.endswith("bias")]
    rewrite(folder, lambda x: [x.pop(key) for key in biases])
    refuse(folder, ValueError, f"{len(biases)} missing: ", ", ...")


def test_the_config_of_another_model_is_refused(copy, checkpoint):
    folder = copy("qwen2")
    shutil.copy(checkpoint("qwen3") / "config.json", folder)
    refuse(
        folder, ValueError, "do not fit Qwen3ForCausalLM as config.json describes it", "is [1009, 112], not [1009, 96]"
    )


@pytest.mark.parametrize("kept", [0, 4, 100, 20_000])
def test_a_truncated_file_is_named_with_its_size(copy, kept):
    folder = copy("llama")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refuse(folder, ValueError, f"{path} ({kept} bytes) is truncated or damaged: ", "fetch it again")


def test_the_truncated_one_of_several_files_is_named(tmp_path):
    folder = save_random("llama", tmp_path, max_shard_size="200KB")
    path = checkpoint_files(folder)[3]
    path.write_bytes(path.read_bytes()[:-1])
    refuse(folder, ValueError, f"{path} ({path.stat().st_size} bytes) is truncated or damaged")


def test_missing_files_of_the_index_are_named(tmp_path):
    folder = save_random("llama", tmp_path, max_shard_size="200KB")
    files = checkpoint_files(folder)
    for path in files[1:3]:
        path.unlink()
    names = f"{files[1].name}, {files[2].name}"
    refuse(
        folder, FileNotFoundError, f"2 of {len(files)} weight files", folder, f"are missing: {names}; fetch them again"
    )


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_index_is_named(tmp_path, text):
    folder = save_random("llama", tmp_path, max_shard_size="200KB")
    (folder / "model.safetensors.index.json").write_text(text)
    refuse(folder, ValueError, folder / "model.safetensors.index.json")


def test_a_folder_without_weights_is_refused(copy):
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse(folder, FileNotFoundError, f"{folder} holds no *.safetensors; other weight formats are not read")


def test_a_tensor_in_two_files_is_named(copy):
    folder = copy("llama")
    (folder / "model.safetensors").rename(folder / "all.safetensors")
    save_file({NORM: torch.ones(128)}, folder / "more.safetensors")
    refuse(folder, ValueError, f"{NORM} stands in two files of {folder}")


def test_a_folder_without_config_is_refused_first(copy):
    folder = copy("llama")
    (folder / "config.json").unlink()
    refuse(folder, FileNotFoundError, f"{folder / 'config.json'} is missing")


# --- sizes that no file has


@pytest.mark.parametrize(
    ("change", "says", "have"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000", "have 3 layers"),
        ({"num_attention_heads": 10**12}, "num_attention_heads * head_dim=16000000000000", "longer than 1009"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000", "longer than 1009"),
        ({"hidden_size": 10**12}, "hidden_size=1000000000000", "longer than 1009"),
        ({"intermediate_size": 10**12}, "intermediate_size=1000000000000", "longer than 1009"),
    ],
)
def test_a_size_without_end_is_refused_before_anything_is_built(copy, change, says, have, monkeypatch):
    folder = copy("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    monkeypatch.setattr("common.models.weights.CausalLM", None)
    refuse(folder, ValueError, f"{folder}: config.json says {says}, but the weight files ", have)


def test_a_size_is_believed_if_a_tensor_is_as_long_on_its_longest_side():
    def claims(shape, **sizes):
        small = {
            "vocab_size": 8,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "head_dim": 4,
            "num_layers": 1,
        }
        none = dict.fromkeys(("mixture", "latent", "vision"))
        refuse_sizes_beyond_the_files(
            SimpleNamespace(**none | small | sizes), {"a": SimpleNamespace(shape=shape)}, "here"
        )

    for shape in ((100_000, 8), (8, 100_000)):
        claims(shape, vocab_size=100_000, num_heads=1000, head_dim=100)
        with pytest.raises(
            ValueError, match="vocab_size=100001, but the weight files have no tensor longer than 100000"
        ):
            claims(shape, vocab_size=100_001)
        with pytest.raises(ValueError, match=r"num_attention_heads \* head_dim=101000, but the weight files have"):
            claims(shape, num_heads=1000, head_dim=101)
    with pytest.raises(ValueError, match="have no tensor longer than 0"):
        claims((0, 100_000), hidden_size=100_000)  # a tensor without numbers can say anything
    with pytest.raises(ValueError, match="num_hidden_layers=2, but the weight files have 0 layers"):
        claims((8, 8), num_layers=2)


def test_nothing_is_allocated_for_a_model_that_does_not_fit(copy, monkeypatch):
    folder = copy("llama")
    rewrite(folder, lambda x: x.pop(NORM))
    monkeypatch.setattr("common.models.weights._build", None)
    refuse(folder, ValueError, f"1 missing: {NORM}")


# --- numbers that are no numbers


def spoil(folder, *values, name=UP):
    def change(x):
        x[name].view(-1)[100 : 100 + len(values)] = torch.tensor(values)

    rewrite(folder, change)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [0, 1])
def test_nan_and_infinity_are_named_on_request_by_every_rank(copy, value, rank):
    folder = copy("llama")
    spoil(folder, value, value)
    with pytest.raises(ValueError, match="NaN or infinity as float32 in 1 tensors") as error:
        load_model(folder, TPGroup(rank, 2), check_finite=True)
    assert f"{UP} (2 of {176 * 128})" in str(error.value)
    load_model(folder, TPGroup(rank, 2))


def test_a_number_too_large_for_the_dtype_counts_too(copy):
    folder = copy("llama")
    spoil(folder, 1e30)
    load_model(folder, TPGroup(), torch.bfloat16, check_finite=True)
    with pytest.raises(ValueError, match="NaN or infinity as float16 in 1 tensors"):
        load_model(folder, TPGroup(), torch.float16, check_finite=True)


def test_looking_for_them_is_one_pass_and_changes_nothing(checkpoint):
    model, report = load_model(checkpoint("llama"), TPGroup(1, 2), check_finite=True)
    want, want_report = load_model(checkpoint("llama"), TPGroup(1, 2))
    total = sum(x.nbytes for x in tensors(checkpoint("llama")).values())
    assert report.bytes_read == want_report.bytes_read + total
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want.parameters(), strict=True))
