"""More than one token a step: guesses, verified in one forward pass. The tour is in README.md.

What a rank computes (the verify step, the rules of acceptance, draft models and heads) is in `common/`, so that every engine
has it. Here is what decides: who guesses from text alone, and when guessing stops paying; and the walk through all of it.
"""
