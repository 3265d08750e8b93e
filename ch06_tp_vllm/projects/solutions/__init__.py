"""One answer to each project. Look after you have tried."""
