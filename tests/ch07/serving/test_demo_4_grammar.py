"""The demo of masks prints what its reader is told it prints."""

from tests.readme import run

SHOWN = """\
Under a JSON schema: of 3,584 tokens, each step's mask allows
  '{"kind":"'             3  'li' 'l' 't'                                   'ts'              't'
  ok: the text is JSON, with the names of the schema in its order
  ok: every token that was taken was allowed
  ok: 27 of 42 steps left no choice
  ok: the end token was allowed in the last step, and in no other
  'no'                2  <|im_end|> ','       'ken'             ','
  ok: there and at its very end it is allowed
  the shortest answer that a model may give
    wrong: ''
    right: 'no'
"""


def test_the_demo_prints_what_is_shown():
    run("python ch07_sglang_radix/serving/demo_4_grammar.py", SHOWN)
