"""Shared by all image tasks: checks, augmentation, sources of data."""
