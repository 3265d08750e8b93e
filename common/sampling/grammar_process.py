"""The process that tries a grammar out first (started by grammar.py): a line of JSON in, a line of JSON out.

Imports nothing but llguidance. It does what the engine does afterwards with the same tokens, so that whatever comes to its
end here comes to its end there.
"""

from typing import Any

import llguidance

from common.bounded.answer_lines import answer_lines

MESSAGE = 300  # characters of an error
COMPACT = {"whitespace_flexible": False}  # JSON without spaces; a schema's own "x-guidance" may say otherwise

_tokens: list[llguidance.LLTokenizer] = []


def make_tokens(tokenizer: str, vocab_size: int, end_ids: list[int]) -> llguidance.LLTokenizer:
    """All tokens as a trie of bytes. tokenizer: that of Hugging Face's Rust library, as JSON."""
    return llguidance.LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=end_ids)


def written_for_llguidance(kind: str, written: str) -> str:
    """A grammar in the form that a matcher takes. Raises for JSON and GBNF that are none."""
    if kind == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(written, defaults=COMPACT)
    return llguidance.grammar_from(kind, written)


def new_matcher(tokens: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """With its first mask computed, which takes longer than all others. It never raises, but may have an error."""
    limits = llguidance.LLParserLimits(verbose_errors=False)
    matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


def one_line(message: str) -> str:
    """What can be printed in one line, whatever of a grammar it quotes."""
    message = message.replace("<non-verbose/>", "")  # llguidance's mark of what verbose_errors=False leaves out
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split())[:MESSAGE])


def answer(**request: Any) -> dict[str, Any]:
    """{"kind", "written"} -> {"grammar": the form that a matcher takes} or {"error": why there is none}.

    The first request is another one: make_tokens' arguments.
    """
    if not _tokens:
        try:
            _tokens.append(make_tokens(**request))
        except Exception as error:
            return {"error": f"this checkpoint's tokenizer cannot follow a grammar: {one_line(str(error))}"}
        return {}
    kind = request["kind"]
    try:
        grammar = written_for_llguidance(**request)
        error = new_matcher(_tokens[0], grammar).get_error()
    except (Exception, RecursionError) as failure:
        grammar, error = "", str(failure) or type(failure).__name__
    return {"error": f"{kind} cannot be compiled: {one_line(error)}"} if error else {"grammar": grammar}


def serve() -> None:
    """Until nobody writes any more."""
    answer_lines(answer)
