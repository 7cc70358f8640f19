"""What the paper compares ALDS with: its baselines and ablations, and sweeps over methods.

The package works without this folder.
"""
