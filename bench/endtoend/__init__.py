"""The end-to-end benchmark, run as ``python bench/e2e.py``.

`cases` names what is merged, `contenders` are the ways to do it, `clock` splits their time into stages,
`agreement` refuses wrong gates, `whole` times whole merges, `staged` what a CPU can bear of large ones,
`growth` how cost grows, `judge` holds all of it against the targets, and `show` and `plots` present it.
"""
