"""Human body mesh recovery: bodies, data, metrics, drawing and jobs for the DropKeyMesh models."""
