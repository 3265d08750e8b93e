"""One solution to each exercise of chapter 7."""
