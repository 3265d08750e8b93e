"""Which tokens a grammar leaves, against definitions of our own; what becomes of the logits; what is refused, and when."""

import json
import threading

import numpy as np
import pytest
import regex
import torch

from common.sampling import grammar as module
from common.sampling.batch import SamplingBatch
from common.sampling.grammar import MAX_BYTES, GrammarCompiler, GrammarMask, check_grammar, forbid_unset
from common.sampling.params import SamplingParams
from common.sampling.sampler import ALL_FORBIDDEN, sample
from common.text.tokenizer import Tokenizer
from common.tiny_qwen import TINY_QWEN_PATH
from tests.common.sampling.rows import row

TOKENS = 3584  # of the bundled model
VOCABULARY = TOKENS + 21  # as a model's whose embedding is padded, and no multiple of 32
END = 3583


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TINY_QWEN_PATH)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer.hf, VOCABULARY, [END])


@pytest.fixture(scope="module")
def texts(tokenizer):
    """{token: its text} of all tokens that have one: whole characters, and not special."""
    every = {token: tokenizer.decode([token], False) for token in range(TOKENS)}
    return {t: s for t, s in every.items() if "\ufffd" not in s and not tokenizer.special_text(t)}


@pytest.fixture
def mask(compiler):
    def make(kind, written, after_thinking=False):
        return compiler.mask(compiler.start(kind, written).result(30), after_thinking)

    return make


def allowed(*masks):
    """[the tokens that may follow] of each, bit by bit."""
    return [
        {32 * w + i for w, word in enumerate(bits.tolist()) for i in range(32) if word >> i & 1}
        for bits in GrammarMask.fill(masks, VOCABULARY)
    ]


def logits_after(mask, output=(), **params):
    """What is left of logits that are all 0."""
    one = row(SamplingParams(max_new_tokens=99, **params), output=output, end_ids=[END], edits=[mask])
    return SamplingBatch([one]).edited(torch.zeros(1, VOCABULARY))[0]


# --- which tokens may follow

PATTERN = r'(yes|no|maybe), [0-9]{2,3}(\.5)?( "?[a-z ]+"?)?'
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cache", "cat", "c"]}, "hit": {"type": "boolean"}, "page": {"enum": [1, 16, 160]}},
    "required": ["kind", "hit", "page"],
    "additionalProperties": False,
}
EVERY_JSON = [
    json.dumps({"kind": kind, "hit": hit, "page": page}, separators=(",", ":"))
    for kind in SCHEMA["properties"]["kind"]["enum"] for hit in (True, False) for page in (1, 16, 160)
]  # fmt: skip
LARK = """
start: greeting " " NAME ("!" | "?")?
greeting: "hello" | "hi"
NAME: "Ann" | "Annabel" | "Bo"
"""
GBNF = 'root ::= greeting " " name [!?]?\ngreeting ::= "hello" | "hi"\nname ::= "Ann" | "Annabel" | "Bo"\n'
EVERY_GREETING = [f"{g} {n}{e}" for g in ("hello", "hi") for n in ("Ann", "Annabel", "Bo") for e in ("", "!", "?")]


def walk(mask, tokenizer, texts, answer, may_follow, complete):
    """Along an answer, after each of its tokens."""
    sofar, output = "", []
    for token in [*tokenizer.encode_bare(answer), None]:
        want = {t for t, text in texts.items() if may_follow(sofar + text)} | ({END} if complete(sofar) else set())
        (got,) = allowed(mask)
        if got != want:  # one text alone can follow: its token is the tokenizer's own, not one of a shorter beginning
            stretch = max((texts[t] for t in want), key=len)
            assert all(stretch.startswith(texts[t]) for t in want), sofar
            assert got == {tokenizer.encode_bare(stretch)[0]}, sofar
        if token is not None:
            output.append(token)
            mask.read(output)
            sofar += tokenizer.decode([token])
    assert sofar == answer


@pytest.mark.parametrize("answer", ["yes, 123", "maybe, 99.5", 'no, 10 "if it fits"'])
def test_a_regex_allows_what_may_still_become_a_match(mask, tokenizer, texts, answer):
    def may(text):
        return regex.fullmatch(PATTERN, text, partial=True)

    walk(mask("regex", PATTERN), tokenizer, texts, answer, may, lambda text: regex.fullmatch(PATTERN, text))


@pytest.mark.parametrize(
    ("kind", "written", "every"),
    [("json_schema", json.dumps(SCHEMA), EVERY_JSON), ("ebnf", LARK, EVERY_GREETING), ("ebnf", GBNF, EVERY_GREETING)],
    ids=["json", "lark", "gbnf"],
)
def test_a_token_is_allowed_if_a_valid_text_begins_so(mask, tokenizer, texts, kind, written, every):
    beginnings = {text[:n] for text in every for n in range(len(text) + 1)}
    for answer in every[::5]:
        walk(mask(kind, written), tokenizer, texts, answer, beginnings.__contains__, every.__contains__)


def test_where_nothing_may_follow_the_end_token_is_the_only_one(mask, tokenizer):
    one = mask("regex", "ab|abc")
    assert END not in allowed(one)[0]
    one.read(tokenizer.encode_bare("abc"))
    assert allowed(one) == [{END}]


def test_every_end_token_of_the_model_may_end_it(tokenizer):
    several = GrammarCompiler(tokenizer.hf, VOCABULARY, [END, END - 2])
    one = several.mask(several.start("regex", "a").result(30), False)
    assert not allowed(one)[0] & {END, END - 2}
    one.read(tokenizer.encode_bare("a"))
    assert allowed(one) == [{END, END - 2}]
    one.read([*tokenizer.encode_bare("a"), END - 2])
    assert not one.error


def test_a_model_without_end_tokens_takes_the_tokenizer_s(tokenizer):
    assert GrammarCompiler(tokenizer.hf, TOKENS, ()).end_ids == (END,)
    assert GrammarCompiler(tokenizer.hf, END, ()).end_ids == (), "a token that the model has not"
    with pytest.raises(ValueError, match="no end token"):
        GrammarCompiler(tokenizer.hf, END, ()).start("regex", "a").result(30)


def test_ids_that_only_pad_the_vocabulary_are_never_allowed(mask):
    anything = mask("regex", r"(?s:.*)")
    assert max(allowed(anything)[0]) == END
    assert logits_after(anything)[TOKENS:].tolist() == [-torch.inf] * (VOCABULARY - TOKENS)


def test_answers_of_one_grammar_are_in_different_places_of_it(mask, tokenizer):
    first, second = mask("regex", "ab+"), mask("regex", "ab+")
    first.read(tokenizer.encode_bare("ab"))
    assert allowed(second, first) == [*allowed(mask("regex", "ab+")), *allowed(mask("regex", "b*"))]
    assert allowed(first) != allowed(second)


# --- what becomes of the logits


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 1000])
def test_a_bit_that_is_not_set_forbids_its_token(vocabulary, device):
    rng = np.random.default_rng(vocabulary)
    bits = rng.integers(-(1 << 31), 1 << 31, (2, -(-vocabulary // 32)), dtype=np.int64).astype(np.int32)
    before = torch.randn(4, vocabulary)
    after = before.to(device, copy=True)
    forbid_unset(after, [3, 1], bits)
    want = before.clone()
    for i, r in enumerate((3, 1)):
        for token in range(vocabulary):
            if not int(bits[i, token // 32]) >> token % 32 & 1:
                want[r, token] = -torch.inf
    assert torch.equal(after.cpu(), want)


def test_the_grammar_s_row_is_the_only_one_that_changes(mask):
    logits = torch.randn(3, VOCABULARY)
    rows = [row(SamplingParams()), row(SamplingParams(), edits=[mask("regex", "yes|no")]), row(SamplingParams())]
    batch = SamplingBatch(rows)
    assert batch.needs_last_token
    after = batch.edited(logits)
    assert torch.equal(after[[0, 2]], logits[[0, 2]])
    assert set(after[1].isfinite().nonzero().flatten().tolist()) == allowed(mask("regex", "yes|no"))[0]


def test_a_bias_does_not_bring_back_what_a_grammar_forbids(mask):
    left = logits_after(mask("regex", "[ab]"), logit_bias={END: 100})
    assert left[END] == -torch.inf


def test_min_new_tokens_holds_the_end_back_and_the_grammar_goes_on(mask, tokenizer):
    digits = mask("regex", "[0-9]+")
    output = tokenizer.encode_bare("1")
    assert logits_after(digits, output, min_new_tokens=2)[END] == -torch.inf
    assert logits_after(digits, output, min_new_tokens=1)[END] == 0
    assert logits_after(digits, output, min_new_tokens=2).isfinite().any()


def test_a_grammar_that_ends_before_min_new_tokens_leaves_no_token(mask, tokenizer):
    output = tokenizer.encode_bare("a")
    one = row(SamplingParams(min_new_tokens=9), output=output, end_ids=[END], edits=[mask("regex", "a")])
    assert sample(torch.zeros(1, VOCABULARY), [one]).drawn.tolist() == [ALL_FORBIDDEN]


def test_a_dead_matcher_has_an_error_and_forbids_all_to_its_own_row(mask, tokenizer):
    dead, well = mask("regex", "yes|no"), mask("regex", "yes|no")
    wrong = tokenizer.encode_bare("x")
    rows = [row(SamplingParams(), output=wrong, edits=[dead]), row(SamplingParams(), edits=[well])]
    drawn = sample(torch.zeros(2, VOCABULARY), rows).drawn.tolist()
    assert drawn[0] == ALL_FORBIDDEN
    assert drawn[1] in allowed(well)[0]
    assert dead.error.startswith("the grammar of this request has come to a dead end")
    assert dead.error.isprintable()
    assert not well.error
    dead.read([*wrong, *tokenizer.encode_bare("yes")])
    assert allowed(dead) == [set()], "it stays dead"


def test_a_token_is_read_once(mask, tokenizer):
    one, output = mask("regex", "abab"), []
    for letter in "ab":
        output += tokenizer.encode_bare(letter)
        one.read(output)
        one.read(output)  # as after a retraction
    assert allowed(one) == allowed(mask("regex", "ab"))


def test_a_branch_goes_its_own_way_from_where_its_mask_has_read_to(mask, tokenizer):
    one, (a, b) = mask("regex", "ab(ab|ba)"), (tokenizer.encode_bare(letter) for letter in "ab")
    left, right = (one.branch(a + b) for _ in range(2))
    left.read(a + b + a)
    right.read(a + b + b)
    assert allowed(left) == allowed(mask("regex", "b"))
    assert allowed(right) == allowed(mask("regex", "a"))
    assert allowed(one) == allowed(mask("regex", "ab|ba")), "it has read them, for all branches that are still to come"


# --- behind a thought


@pytest.mark.parametrize("thought", ["<think>hm, yes</think>", "</think>", "</thi</think>", "a < b</think>"])
def test_the_grammar_holds_from_behind_the_thought_on(mask, tokenizer, thought):
    one, output = mask("regex", "yes|no", after_thinking=True), tokenizer.encode_bare(thought)
    for n in range(len(output)):
        one.read(output[:n])
        assert not one.holds
        assert logits_after(one, output[:n]).isfinite().all()
    one.read(output)
    assert one.holds
    assert allowed(one) == allowed(mask("regex", "yes|no"))
    assert set(logits_after(one, output).isfinite().nonzero().flatten().tolist()) == allowed(one)[0]


# --- what is refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("json", "{}"), "must be a kind"),
        (("regex", 5), "regex=5 must be a text"),
        (("regex", ""), "empty text"),
        ("regex", "must be a kind"),
        (("regex", "a", "b"), "must be a kind"),
        (("json_schema", "{"), "is no JSON"),
        (("json_schema", "[]"), "must be a JSON object"),
        (("json_schema", "true"), "must be a JSON object"),
        (("json_schema", "[" * 50_000), "nested too deeply"),
        (("json_schema", json.dumps({"const": "a" * (1 << 20)})), "1,048,589 bytes, and may have 65,536"),
        (("regex", "ä" * MAX_BYTES), "bytes"),
        (("regex", "a\ud800"), "surrogate"),
    ],
    ids=str,
)
def test_what_can_be_seen_to_be_wrong_is_a_value_error_at_once(given, message):
    with pytest.raises(ValueError, match=message) as error:
        SamplingParams(grammar=given)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


def test_what_is_right_is_kept_as_it_was_written():
    assert check_grammar(["regex", "(a)"]) == ("regex", "(a)")
    assert check_grammar(None) is None


@pytest.mark.parametrize(
    ("kind", "written", "message"),
    [
        ("json_schema", '{"if": {"type": "string"}}', "json_schema cannot be compiled: Unimplemented keys"),
        ("json_schema", '{"type": "what"}', "json_schema cannot be compiled"),
        ("json_schema", '{"$ref": "#/nowhere"}', "json_schema cannot be compiled"),
        ("json_schema", '{"$ref": "file:///etc/passwd"}', "json_schema cannot be compiled"),
        ("regex", "(", "regex cannot be compiled"),
        ("regex", "(?=a)b", "regex cannot be compiled"),
        ("regex", "(" * 9999, "regex cannot be compiled"),
        ("json_schema", '{"items": ' * 200 + "{}" + "}" * 200, "json_schema cannot be compiled"),
        ("ebnf", f"start: {'(' * 999}", "ebnf cannot be compiled: .*too deeply nested"),
        ("ebnf", "start: nothing", "ebnf cannot be compiled"),
        ("ebnf", 'begin: "a"', "ebnf cannot be compiled"),
        ("ebnf", "\x00\u202e", "ebnf cannot be compiled"),
    ],
)
def test_what_only_compiling_finds_out_is_a_value_error_of_the_future(compiler, kind, written, message):
    check_grammar((kind, written))
    with pytest.raises(ValueError, match=message) as error:
        compiler.start(kind, written).result(30)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


# --- compiling


def test_a_grammar_is_compiled_once(compiler):
    assert compiler.start("regex", "once") is compiler.start("regex", "once")
    assert compiler.start("regex", "once") is not compiler.start("ebnf", "once")


def test_the_grammars_asked_for_last_stay_compiled(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "CACHED", 2)
    few = GrammarCompiler(tokenizer.hf, TOKENS, [END])
    first, second = few.start("regex", "1"), few.start("regex", "2")
    few.start("regex", "1")
    third = few.start("regex", "3")
    assert few.start("regex", "1") is first
    assert few.start("regex", "3") is third
    assert few.start("regex", "2") is not second
    assert second.result(30), "who waits for one that is forgotten still gets it"


def test_many_ask_at_once_and_each_grammar_is_compiled_once(tokenizer):
    compiled, lock = [], threading.Lock()

    class Noted(GrammarCompiler):
        def _compile(self, kind, written, seconds):
            assert lock.acquire(blocking=False), "one at a time"
            compiled.append(written)
            matcher = super()._compile(kind, written, seconds)
            lock.release()
            return matcher

    compiler = Noted(tokenizer.hf, TOKENS, [END])
    futures = [compiler.start("regex", f"a{i % 9}") for i in range(30)]
    assert all(f.result(30) is futures[i % 9].result(30) for i, f in enumerate(futures))
    assert compiled == [f"a{i}" for i in range(9)]
    assert compiler.start("regex", "later").result(30), "the thread that has gone is started again"


# --- what is no grammar but an attack


CHAIN = "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(5000)) + 'a5000: "x"\n'


@pytest.mark.parametrize(
    ("kind", "written", "message"),
    [
        ("json_schema", '{"type": "integer", "multipleOf": 123456789}', "compiling it takes more than"),
        (
            "ebnf",
            'start: "n=" %json {"type": "integer", "multipl\\u0065Of": 123456789}',
            "compiling it takes more than",
        ),
        ("ebnf", "start: " + "a{" * 20_000, "ebnf cannot be compiled|ended the process that tries it out"),
    ],
)
def test_a_grammar_that_would_take_the_engine_with_it_takes_a_small_process(
    compiler, monkeypatch, kind, written, message
):
    monkeypatch.setattr(module, "TRIAL_SECONDS", 1.0)
    check_grammar((kind, written))
    with pytest.raises(ValueError, match=message) as error:
        compiler.compiled(kind, written)
    assert str(error.value).isprintable()
    assert compiler.compiled("regex", f"the next one after {message}"), "it goes on"


def test_those_that_never_end_let_the_others_pass(compiler, monkeypatch):
    monkeypatch.setattr(module, "QUICK_SECONDS", 0.1)
    monkeypatch.setattr(module, "TRIAL_SECONDS", 0.2)
    hostile = [compiler.start("json_schema", json.dumps({"multipleOf": 123456789 + i})) for i in range(3)]
    assert compiler.start("regex", "a quick one behind three that never end").result(30)
    assert not any(future.done() for future in hostile), "each has been tried once, and waits for its second trial"
    assert all("takes more than 0.2 s" in str(future.exception(30)) for future in hostile)


def test_a_slow_one_is_compiled_when_nobody_else_is_in_line(compiler, monkeypatch):
    monkeypatch.setattr(module, "QUICK_SECONDS", 0.0)
    futures = [compiler.start("regex", f"slow {i}") for i in range(3)]
    assert all(future.result(30) for future in futures)


def test_what_the_small_process_could_compile_the_engine_can(compiler):
    """A chain of rules is compiled by calls within calls, as deep as it is long."""
    error = compiler.start("ebnf", CHAIN).exception(30)
    assert error is None or "ended the process that tries it out" in str(error)
