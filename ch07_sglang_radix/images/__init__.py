"""A picture in the prompt. The tour is in README.md.

What a rank computes (the vision towers, M-RoPE, the store of encoded pictures) is in `common/vision/`, so that every engine has it.
Here is what decides: where pictures come from, when they are sent to the ranks, what is refused; and the walk through all of it.
"""
