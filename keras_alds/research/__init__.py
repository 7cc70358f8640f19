"""The methods that the paper compares ALDS with, and sweeps over methods and ratios.

The rest of the package works without this folder.
"""
