"""A picture in the prompt: from pixels to rows that stand among those of the tokens. The tour is in ch07_sglang_radix/images/."""
