"""MLflow tracking, journal first.

What a run reports is appended to ``<folder>/journal.jsonl``; one background thread brings the
journal to MLflow and keeps the number of bytes MLflow has acknowledged in
``<folder>/journal.offset``. So a server that is slow or down neither stops a training run nor fails
it, and ``sync`` sends later what is missing. MLflow's stores ignore exact repeats of (key, value,
timestamp, step): what was not acknowledged is simply sent again, so nothing is lost and nothing is
doubled.
"""

from pipeline.tracking.factory import open_tracker, tracker_of
from pipeline.tracking.names import TRAINING_NAMES
from pipeline.tracking.sender import sync
from pipeline.tracking.tracker import NullTracker, Tracker

__all__ = ["TRAINING_NAMES", "NullTracker", "Tracker", "open_tracker", "sync", "tracker_of"]
