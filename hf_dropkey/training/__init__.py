"""What every training script does, once."""
