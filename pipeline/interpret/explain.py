"""The former place of ``pipeline.interpret.contributions``, kept for users' code."""

from pipeline.interpret.contributions import contributions, explanation_mode

__all__ = ["contributions", "explanation_mode"]
