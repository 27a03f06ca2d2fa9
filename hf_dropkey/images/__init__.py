"""What every image task shares: checks, augmentation, sources of data."""
