"""Whole runs: merges from a configuration file, comparisons of methods, the tables of the papers, and their
reports.
"""
