"""What a right answer must do: check(m) takes the module of an exercise and raises AssertionError with the reason.

Where it can be, the answer takes the place of the real function: in the tree, or in an engine that runs the bundled
tiny model and counts its pages after every step.
"""
