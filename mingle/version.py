"""The version, in one place: ``pyproject.toml`` reads this file too."""

__version__ = "0.1.0"
