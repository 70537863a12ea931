"""A real launch line's checks without training: every rank tells what would stop this run."""
