"""EAGLE and EAGLE-3 in the engine: no token changes, the tree's prefixes are theirs too, and the bundled heads are worth it."""

import random
from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.models.drafters.contract import DraftOptions
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from common.tiny_qwen.corpus import LANGUAGES, ask, load_glossary
from common.tiny_qwen.phrasings import UNSEEN
from tests.ch07.test_product import cases, see, serve
from tests.common.models.drafters.eagle_files import save_head

SHAPES = {"chain": (5, 1, 6), "tree": (3, 3, 8), "more nodes run than fit": (4, 4, 5)}


@cache
def wrapper(page_size: int, pool: int, algorithm: str, path: str | None, shape: str) -> TPRadixAttentionModelWrapper:
    options = DraftOptions(algorithm, path, *SHAPES[shape])
    return TPRadixAttentionModelWrapper(None, "cpu", page_size, max_total_tokens=pool, speculative=options)


def speculate(case: dict, algorithm: str, path: str | None, shape: str) -> list:
    case = case | {"options": {**case["options"], "enable_mixed_chunk": False, "radix_bigram": True}}
    return serve(case, lambda page, pool: wrapper(page, pool, algorithm, path, shape))[0]


@pytest.fixture(scope="module")
def random_head(tmp_path_factory):
    """Heads that are nearly always wrong."""
    made = {"EAGLE": 1, "EAGLE3": 3}
    return {name: str(save_head(tmp_path_factory.mktemp(name), n, TINY_QWEN_PATH, **DEEP)) for name, n in made.items()}


DEEP = {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}}


@settings(
    max_examples=settings().max_examples // 8, deadline=None, derandomize=settings().max_examples <= 200,
    suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate),
)  # fmt: skip
@given(
    size=st.sampled_from([1] * 7 + [2] * 2 + [3]), case=cases, shape=st.sampled_from([*SHAPES]),
    algorithm=st.sampled_from(["EAGLE", "EAGLE3"]), trained=st.booleans(),
)  # fmt: skip
def test_no_guess_changes_an_answer(size, case, shape, algorithm, trained, ranks, random_head):
    how = (case, algorithm, None if trained else random_head[algorithm], shape)
    by_rank = ranks(size).run(speculate, *how) if size > 1 else [speculate(*how)]
    for answers in by_rank:
        see(answers, case)


def questions(count: int) -> list[str]:
    rng, glossary = random.Random(5), list(load_glossary().values())
    asked = [ask(rng.choice(UNSEEN[lang]), entry) for entry in rng.sample(glossary, count) for lang in LANGUAGES]
    return [f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n" for question in asked]


def served(algorithm: str, prompts: list[str], page_size: int = 4, **options) -> tuple[int, int]:
    """(tokens that came out of verify steps, verify steps of a sequence), one prompt after the other."""
    model = wrapper(page_size, 4096, algorithm, None, "chain")
    scheduler = TPScheduler(model, check=True, radix_bigram=True, **options)
    for prompt in prompts:
        scheduler.add_request(prompt, sampling_params=SamplingParams(max_new_tokens=60))
        scheduler.process_requests()
    return scheduler.speculation.tokens, scheduler.speculation.sequences


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3"])
def test_the_bundled_head_is_right_about_questions_it_has_never_seen(algorithm):
    """A chain of five gives six tokens at most, and fewer where an answer ends; 3 is what it must be worth."""
    tokens, steps = served(algorithm, questions(6))
    assert tokens / steps > 3


@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3"])
def test_a_prefix_that_is_found_or_read_in_parts_guesses_as_well_as_a_fresh_one(algorithm):
    """A prefix's pages are right for the drafter as well, and so is what it keeps between two parts of a prompt."""
    prompts = questions(2)
    _, fresh = served(algorithm, prompts, page_size=1)
    _, in_parts = served(algorithm, prompts, page_size=1, chunked_prefill_size=5)
    _, again = served(algorithm, [p for p in prompts for _ in range(2)], page_size=1)
    assert in_parts == fresh
    assert again == 2 * fresh
