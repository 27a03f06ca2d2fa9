"""Human-object interaction detection: data, scores, training and prediction."""
