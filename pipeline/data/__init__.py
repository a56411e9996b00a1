"""Data: sources (images and labels) -> .beton files with a manifest -> batches. The only package that imports FFCV."""
