"""An adapter's folder is written by others: it gives what peft computes with it, or one line that says why not."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import AutoModelForCausalLM

from common.layers.lora import ALL_TARGETS
from common.models.adapter_files import PASSED_OVER, READ, AdapterConfig, read_adapter
from common.models.config import ModelConfig
from common.models.decoder import CausalLM
from common.models.lora_manager import modules_of
from common.parallel_state import TPGroup
from tests.adapters import save_adapter
from tests.common.models.adapter_damages import ADAPTER_DAMAGES, CONFIG, WEIGHTS
from tests.common.models.damage import edit, save_base, tensors
from tests.common.models.test_damaged_folders import bounded_memory

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base("qwen2", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def original(base, tmp_path_factory):
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), target_modules=TARGETS)


@pytest.fixture
def adapter(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "adapter"))


def shapes_of(base: Path) -> dict[str, tuple[int, int]]:
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_folder(base), TPGroup())
    return {name: layer.weight.shard_shapes[shard] for name, layer, shard in modules_of(model)}


def read(folder, base, max_rank=8, targets=ALL_TARGETS):
    shapes = shapes_of(base)
    return read_adapter(folder, shapes, [name for name in shapes if name.rpartition(".")[2] in targets], max_rank, base)


def of_peft(folder, base) -> dict[str, torch.Tensor] | None:
    """{module: s B A} as peft loads it, or None if it does not, or says that something is missing."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(model, folder)
    except Exception:  # it may raise anything
        return None
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def assert_alike(adapter, theirs) -> None:
    assert adapter.modules.keys() == theirs.keys()
    for name, (a, b, scale) in adapter.modules.items():
        mine = scale * b.float() @ a.float()
        torch.testing.assert_close(
            mine.t() if name == "model.embed_tokens" else mine, theirs[name], rtol=1e-5, atol=1e-6
        )


@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTER_DAMAGES)
def test_a_damaged_folder_gives_what_peft_computes_or_one_line(adapter, base, name):
    ADAPTER_DAMAGES[name](adapter)
    try:
        with bounded_memory():
            got = read(adapter, base)
    except (ValueError, FileNotFoundError) as error:
        text = str(error)
        assert text.isprintable(), text
        assert str(adapter) in text, text
        assert len(text) < 2000, text
        return
    theirs = of_peft(adapter, base)
    if theirs is not None:
        assert_alike(got, theirs)


def test_there_are_many_of_them():
    assert len(ADAPTER_DAMAGES) >= 500


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"r": 8, "lora_alpha": 3, "use_rslora": True},
        {"rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.down_proj": 7}, "alpha_pattern": {r".*\.1\..*": 5, "q_proj": 3}},
        {"target_modules": r"model\.layers\.1\..*(q|up)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": None},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": r".*\.0\.mlp.*"},
        {"target_modules": ["q_proj", "gate_proj"], "exclude_modules": ["layers.0.mlp.gate_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["model.layers.0.self_attn.o_proj"]},
    ],
    ids=str,
)  # fmt: skip
def test_what_peft_saves_is_read_as_peft_means_it(base, tmp_path, config):
    folder = save_adapter(base, tmp_path, **{"target_modules": TARGETS} | config)
    assert_alike(read(folder, base), of_peft(folder, base))


def test_every_setting_of_peft_is_read_or_known_to_change_nothing():
    """A new peft brings new ones: look at what they do, and put them where they belong."""
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert known == (READ.keys() | PASSED_OVER) & known
    assert not READ.keys() & PASSED_OVER
    assert READ.keys() | PASSED_OVER == known


names = st.builds(
    "model.layers.{}.{}".format,
    st.integers(0, 12),
    st.sampled_from(["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj"]),
) | st.sampled_from(["lm_head", "model.embed_tokens"])
some = st.lists(
    st.sampled_from(["q_proj", "proj", "mlp.up_proj", "lm_head", "layers.1.mlp.up_proj", "model"]), min_size=1
)
patterns = st.sampled_from([r".*q_proj", r"model\.layers\.\d\..*", "lm_head", r".*(1|3)\.mlp.*", "q_proj"])


@settings(max_examples=300)
@given(
    names, some | patterns, st.none() | some | patterns, st.none() | st.integers(0, 3) | st.lists(st.integers(0, 12)),
    st.none() | st.sampled_from(["layers", "h", ["h", "layers"], ""]),
    st.dictionaries(patterns, st.integers(1, 64), max_size=3), st.dictionaries(patterns, st.integers(1, 64), max_size=3),
)  # fmt: skip
def test_targets_ranks_and_factors_are_those_that_peft_finds(name, targets, excluded, layers, pattern, ranks, alphas):
    raw = dict(
        r=16, lora_alpha=24, target_modules=targets, exclude_modules=excluded, layers_to_transform=layers, layers_pattern=pattern,
        rank_pattern=ranks, alpha_pattern=alphas,
    )  # fmt: skip
    read = {key: field.default for key, field in READ.items()} | raw
    mine = AdapterConfig("here", read)

    class Theirs:
        modules_to_save = target_parameters = None

    for key, value in raw.items():
        setattr(Theirs, key, value)
    assert mine.targets(name) == bool(
        check_target_module_exists(Theirs, name)
    )  # a match, or what is false and says `excluded`
    rank = ranks.get(get_pattern_key(ranks.keys(), name), 16)
    assert mine.rank(name) == rank
    assert mine.scale(name) == alphas.get(get_pattern_key(alphas.keys(), name), 24) / rank


@pytest.mark.parametrize("write", [
    lambda name: name,
    lambda name: name.removeprefix("base_model.model."),
    lambda name: name.replace("_A.weight", "_A.default.weight").replace("_B.weight", "_B.default.weight"),
    lambda name: name.removeprefix("base_model.model.").replace(".weight", ".default.weight"),
])  # fmt: skip
def test_both_ways_to_write_a_name_are_read(original, adapter, base, write):
    tensors(lambda content: [content.update({write(n): content.pop(n)}) for n in list(content)], WEIGHTS)(adapter)
    want = read(original, base)
    got = read(adapter, base)
    assert list(got.modules) == list(want.modules)
    assert all(torch.equal(got.modules[name].a, thin.a) for name, thin in want.modules.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora=true is not supported"),
        ({"bias": "all"}, 'bias=.all. is not supported; supported: none'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* whole modules in place of the base's"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=true is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=.pissa. is not supported"),
        ({"peft_type": "IA3"}, "peft_type=.IA3. is not supported; supported: LORA"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication=.* computed several times"),
        ({"r": 3}, r"q_proj.lora_A.weight is \[4, 24\], not \[3, 24\]"),
        ({"a_new_key": 1}, "a_new_key=1 is not known here"),
        ({"target_modules": ["q_proj"]}, "4 not in target_modules: model.layers.0.self_attn.v_proj"),
        ({"target_modules": [*TARGETS, "o_proj"]}, "4 missing: model.layers.0.self_attn.o_proj.lora_A"),
        ({"target_modules": r"(.|\w)*[#!]"}, "not decided within"),
    ],
)  # fmt: skip
def test_a_refusal_names_key_value_and_reason(adapter, base, change, says):
    edit(CONFIG, **change)(adapter)
    with pytest.raises(ValueError, match=says) as error:
        read(adapter, base)
    assert "\n" not in str(error.value)


def test_what_there_is_no_room_for_is_refused_with_the_flag(adapter, base):
    with pytest.raises(ValueError, match="rank 4, more than max_lora_rank=3; start with max_lora_rank=4"):
        read(adapter, base, max_rank=3)
    with pytest.raises(
        ValueError,
        match=r"no room for 2 of its modules: .*down_proj; start with lora_target_modules that name down_proj",
    ):
        read(adapter, base, targets=["q_proj", "v_proj"])


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral"])
def test_attention_of_a_mixture_has_adapters_and_its_experts_have_not(tmp_path, kind):
    mixture = save_base(kind, tmp_path / "base")
    folder = save_adapter(mixture, tmp_path / "adapter", target_modules=["q_proj", "o_proj"])
    assert_alike(read(folder, mixture), of_peft(folder, mixture))
    name = "base_model.model.model.layers.1.mlp.experts.0.gate_proj.lora_A.weight"
    tensors(lambda content: content.update({name: torch.zeros(4, 24)}), WEIGHTS)(folder)
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.lora_A\.weight is of an expert"):
        read(folder, mixture)


@pytest.mark.filterwarnings("ignore")
def test_a_copy_of_the_embedding_must_be_the_model_s(base, tmp_path):
    """peft saves it beside its adapter; one that was trained, too, is another model."""
    folder = save_adapter(base, tmp_path, target_modules=["embed_tokens"])
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    assert "model.embed_tokens" in read(folder, base).modules
    tensors(lambda content: content[name][3].add_(1e-3), WEIGHTS)(folder)
    with pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight is not the model's own"):
        read(folder, base)


def test_a_pickle_is_never_read(adapter, base):
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin beside it is a pickle and is not read"):
        read(adapter, base)


def test_the_config_alone_says_rank_and_targets(adapter):
    raw = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    config = AdapterConfig.from_folder(adapter)
    assert config.highest_rank == raw["r"] == 4
    assert config.targets("model.layers.1.mlp.down_proj")
    assert not config.targets("model.layers.1.mlp.up_proj")
