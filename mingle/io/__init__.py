"""What is on disk: checkpoints in and out, the folder a merger lives in, the hub; nothing is pickled, nothing
is left half written.
"""
