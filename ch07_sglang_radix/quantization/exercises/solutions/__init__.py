"""One answer to each exercise."""
