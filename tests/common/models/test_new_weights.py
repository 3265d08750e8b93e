"""New numbers for a model that runs: equal to those of a fresh load, in the same memory, in whichever form matrices lie."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.executor import Executor
from common.layers.cpu_linear import choose_forms, packs
from common.layers.moe import AUTO
from common.models.held_weights import checksums, own_part, shape_of, whole_tensor
from common.models.new_weights import stage_checkpoint, stage_tensors
from common.models.weights import load_model
from common.parallel_state import TPGroup

FORMS = ["row-major", "column-major", *(["packed"] if packs(torch.float32) else [])]
# a dense family, one with experts and one with latent attention in every form, every other family in one
FAMILIES = {
    "qwen2": FORMS, "qwen3": ["column-major"], "qwen2_moe": FORMS[::-1], "llama": FORMS[-1:], "deepseek_v3": FORMS,
    "mixtral": ["row-major"], "deepseek_v2_lite": ["column-major"],
}  # fmt: skip
each_family = pytest.mark.parametrize(("name", "form"), [(name, form) for name in FAMILIES for form in FAMILIES[name]])
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def executor_of(folder: Path, form: str = "row-major", tp: TPGroup | None = None) -> Executor:
    executor = Executor(str(folder), "cpu", max_total_tokens=256, tp=tp)
    choose_forms(executor.model, form)
    return executor


def changed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: 1.5 * x + 0.01 for name, x in tensors.items()}


def new_folder(copy, name: str) -> Path:
    folder = copy(name)
    save_file(changed(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def roots(executor: Executor) -> list[torch.Tensor]:
    """What norms have made of their weights."""
    return [module.root_weight for module in executor.model.modules() if hasattr(module, "root_weight")]


def places(executor: Executor) -> dict[str, tuple[int, int]]:
    return {name: (id(p), 0 if p.is_mkldnn else p.data_ptr()) for name, p in executor.model.named_parameters()}


def write_all(executor: Executor, folder: Path) -> None:
    stage_checkpoint(executor.model, folder, executor.dtype, executor.stage, executor.moe).write()


def write_some(executor: Executor, tensors: dict[str, torch.Tensor]) -> None:
    stage_tensors(executor.model, tensors, executor.dtype, executor.moe, "new weights").write()


def whole(executor: Executor, name: str) -> torch.Tensor:
    return whole_tensor(executor.model, name, shape_of(executor.model, name), executor.moe, executor.tp)


@each_family
def test_a_checkpoint_is_written_as_a_fresh_load_would_have_it(checkpoint, copy, name, form):
    executor, new = executor_of(checkpoint(name), form), new_folder(copy, name)
    before = places(executor)
    write_all(executor, new)
    fresh = executor_of(new, form)
    assert checksums(executor.model) == checksums(fresh.model)
    assert all(map(torch.equal, roots(executor), roots(fresh)))
    assert places(executor) == before, "CUDA graphs have recorded these addresses"


@each_family
def test_some_tensors_are_written_and_all_others_stay(checkpoint, name, form):
    """Every third one: of q, k and v, of gate and up, and of the experts some and not all."""
    executor, old = executor_of(checkpoint(name), form), load_file(checkpoint(name) / "model.safetensors")
    some = dict(list(changed(old).items())[::3])
    before = places(executor)
    write_some(executor, some)
    for tensor, x in old.items():
        assert torch.equal(whole(executor, tensor), some.get(tensor, x)), tensor
    assert places(executor) == before


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_writes_and_tells_its_own_part(checkpoint, name, ranks):
    """Two and three ranks, played one after the other: what they hold is the whole tensor, and equal where both hold it."""
    old = load_file(checkpoint(name) / "model.safetensors")
    new = changed(old)
    found = {tensor: torch.full(x.shape, torch.nan) for tensor, x in new.items()}
    for rank in range(ranks):
        tp = TPGroup(rank, ranks)
        executor = _a_rank(checkpoint(name), tp)
        write_some(executor, new)
        for tensor, x in new.items():
            part, known = own_part(executor.model, tensor, tuple(x.shape), executor.moe)
            here = known.bool()
            assert torch.equal(part[here], x[here])
            found[tensor][here] = part[here]
    assert all(torch.equal(found[tensor], x) for tensor, x in new.items())


def _a_rank(folder: Path, tp: TPGroup):
    """What of an executor is needed here: making one of several ranks asks the others how much memory they have."""
    model, _ = load_model(folder, tp)
    choose_forms(model, "row-major")
    return SimpleNamespace(model=model, moe=AUTO, dtype=torch.float32, tp=tp)


def test_an_expert_is_written_where_it_lies_now(checkpoint):
    old = load_file(checkpoint("qwen3_moe") / "model.safetensors")
    executor = executor_of(checkpoint("qwen3_moe"))
    turned = torch.arange(7).roll(2).expand(3, -1)
    executor.move_experts(turned)
    for tensor in (name for name in old if ".experts." in name):
        assert torch.equal(whole(executor, tensor), old[tensor]), "it is told by its number, not by its slot"
    write_some(executor, changed(old))
    for tensor, x in changed(old).items():
        assert torch.equal(whole(executor, tensor), x)
    assert torch.equal(executor.placement.physical_to_logical, turned)


def test_an_embedding_whose_new_rows_bfloat16_does_not_hold_gets_wider(checkpoint, copy):
    """With a head of its own form it only gives out rows, and those were exact in two bytes before."""
    if "packed" not in FORMS:
        pytest.skip("no other form for the head here")
    folder = copy("qwen2")
    rounded = {name: x.bfloat16().float() for name, x in load_file(folder / "model.safetensors").items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    executor = executor_of(folder, "packed")
    model = executor.model
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    write_some(executor, {EMBEDDING: 2 * rounded[EMBEDDING]})
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16, "exact again"
    fine = rounded[EMBEDDING] + 1e-4
    write_some(executor, {EMBEDDING: fine})
    assert torch.equal(model.model.embed_tokens.weight, fine)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    x = torch.randn(3, 112)
    torch.testing.assert_close(model.compute_logits(x), x @ fine.t())


def test_a_tied_head_that_is_sent_is_its_embedding(checkpoint):
    executor, old = executor_of(checkpoint("qwen2")), load_file(checkpoint("qwen2") / "model.safetensors")
    write_some(executor, {HEAD: 3 * old[EMBEDDING]})
    assert torch.equal(whole(executor, EMBEDDING), 3 * old[EMBEDDING])
    assert torch.equal(whole(executor, HEAD), 3 * old[EMBEDDING])
    with pytest.raises(ValueError, match=r"lm_head.weight is not model.embed_tokens.weight, .* send one of them"):
        write_some(executor, {HEAD: old[EMBEDDING], EMBEDDING: 3 * old[EMBEDDING]})


def test_staging_touches_nothing(checkpoint, copy):
    executor, new = executor_of(checkpoint("qwen2")), new_folder(copy, "qwen2")
    before = checksums(executor.model)
    staged = stage_checkpoint(executor.model, new, executor.dtype, executor.stage, executor.moe)
    assert checksums(executor.model) == before
    assert staged.tensors == len(load_file(new / "model.safetensors"))


def test_the_digest_is_that_of_the_numbers(checkpoint, copy):
    executor, new = executor_of(checkpoint("qwen2")), new_folder(copy, "qwen2")

    def digest(folder: Path) -> str:
        return stage_checkpoint(executor.model, folder, executor.dtype, executor.stage, executor.moe).digest

    assert digest(checkpoint("qwen2")) == digest(checkpoint("qwen2")) != digest(new)


def test_a_checkpoint_whose_head_is_not_its_embedding_is_another_model(checkpoint, copy):
    executor, folder = executor_of(checkpoint("qwen2")), copy("qwen2")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {HEAD: 2 * tensors[EMBEDDING]}, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match="both are used"), pytest.raises(ValueError, match="are two there and one in"):
        stage_checkpoint(executor.model, folder, executor.dtype, executor.stage, executor.moe)


def test_ranks_that_hold_different_numbers_are_found(checkpoint, monkeypatch):
    executor = executor_of(checkpoint("qwen2"))
    two = lambda x, tp, label: [x, x + 1 if x.dtype == torch.float32 else x]  # noqa: E731
    monkeypatch.setattr("common.models.held_weights.gather", two)
    with pytest.raises(ValueError, match=r"model.norm.weight: two ranks hold different numbers for it"):
        whole(executor, "model.norm.weight")


def test_a_name_that_no_checkpoint_has_is_none(checkpoint):
    model = executor_of(checkpoint("deepseek_v3")).model
    assert shape_of(model, "model.layers.0.self_attn.k_proj.weight") is None
    assert shape_of(model, "model.layers.0.self_attn.kv_b_proj.weight") == (7 * 19, 24)
