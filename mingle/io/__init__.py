"""What is on disk: checkpoints in and out, a merger's folder and the hub.

Nothing is pickled, nothing is left half written.
"""
