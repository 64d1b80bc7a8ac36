from tiny_merge import models  # noqa: F401
