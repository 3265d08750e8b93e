"""What a right answer must do: check(m) takes the module of an exercise and raises AssertionError with the reason."""
