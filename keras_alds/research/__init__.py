"""For comparison: the methods that the paper compares with, and sweeps over methods and ratios.

The package works without this folder.
"""
