"""Whole continual merges, run as ``python bench/e2e.py``.

`cases` names what is merged, `contenders` are the ways to do it, `published` the published one, `stopwatch` splits their time into
stages, `agreement` refuses wrong gates, `whole` times whole merges, `staged` what a CPU can bear of large ones, `growth` how cost
grows.
"""
