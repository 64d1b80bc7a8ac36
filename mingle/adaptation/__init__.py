"""Test-time adaptation: the gates of a new expert learn from a few unlabelled samples, out of the way of
earlier tasks.
"""
