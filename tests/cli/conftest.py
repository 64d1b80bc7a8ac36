from stub_suite import stub  # noqa: F401
