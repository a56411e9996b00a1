"""Data: sources (images and labels) -> .beton files with a manifest -> batches."""
