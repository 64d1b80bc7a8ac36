"""Packages and package data; everything else is in ``pyproject.toml``.  Needs no torch in the build environment."""

from setuptools import setup

setup(
    # ``kernels`` stands at the top of the repository but is installed as ``mingle.kernels``: a top-level package of that name would
    # shadow Hugging Face's ``kernels``, which transformers imports.  ``bench`` likewise, without its results and one-off scripts.
    packages=[
        "mingle",
        "mingle.bench",
        "mingle.bench.peers",
        "mingle.kernels",
        "mingle.methods",
        "mingle.ops",
        "mingle.suites",
        "mingle.suites.glyphs",
        "mingle.tasks",
    ],
    package_dir={"mingle.bench": "bench", "mingle.kernels": "kernels"},
    package_data={
        "mingle": ["py.typed"],
        "mingle.suites.glyphs": ["data/*.json", "data/base/*", "data/experts/*/*"],
    },
)
