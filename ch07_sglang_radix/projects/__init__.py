"""A day's work: a reader's file in the place of a part of the engine, graded by tests, transformers' tokens and a number."""
