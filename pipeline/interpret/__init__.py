"""Explanations of any model and the metrics on them; knows models by duck typing only (see
``explain.parts``).
"""
