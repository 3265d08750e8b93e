"""One answer to the project. Look after you have tried."""
