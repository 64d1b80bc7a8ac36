"""Whole runs: merges from a file, comparisons of methods, the papers' tables, and reports of all of them."""
