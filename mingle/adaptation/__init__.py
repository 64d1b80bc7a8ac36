"""Test-time adaptation: new gates learn from a few unlabelled samples, out of the way of earlier tasks."""
