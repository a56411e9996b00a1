"""Explanations of any model, and the metrics that judge them.

What is asked of a model is in ``network``. Only ``alignment`` knows the DAU layer itself.
"""
