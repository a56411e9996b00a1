"""The names of what a training run logs, with what each means and what its steps count.

Those of the evaluation stand with the metrics (``pipeline.evaluation.metrics``). Runs with other
batch sizes and GPU counts line up, since no step counts updates.
"""

_IMAGES = "images seen"

TRAINING_NAMES = {
    "train/loss": ("loss of the last update, mean over its images", _IMAGES),
    "train/learning_rate": ("learning rate of the last update", _IMAGES),
    "speed/images_per_second": ("training images per second, all processes together", _IMAGES),
    "speed/device_hours": (
        "hours x processes so far, evaluations included, "
        "summed over all attempts as far as they were logged",
        _IMAGES,
    ),
}
"""Name -> (meaning, what its steps count)."""
