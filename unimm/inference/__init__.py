"""Sampling and the one generation loop."""
