"""A day's work each: a reader's file in the place of a part of the engine, graded by transformers' tokens and a number."""
