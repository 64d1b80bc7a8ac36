"""Whole merges: cases, contenders, whether they agree, their times, and how cost grows."""
