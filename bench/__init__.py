"""The microbenchmark suite: ``make bench`` (see bench/NOTES.md)."""
