"""Semantic segmentation: arguments, data, scenes, transform, model, metrics, figures, job, prediction."""
