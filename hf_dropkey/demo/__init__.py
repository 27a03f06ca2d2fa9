"""A page to try saved models in a browser: `hf-dropkey demo`, and the Space that `hf-dropkey push --space` uploads."""
