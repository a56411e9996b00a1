"""Accuracy and loss on the validation images."""

from pipeline.evaluation.metric import Column, Metric, Result
from pipeline.evaluation.subject import Subject


def compute(subject: Subject, method: str) -> Result:
    """Mean over all images of top-1, top-5, and the binary cross entropy summed over classes."""
    loss, top1, top5 = (subject.predicted.sums / subject.loader.samples).tolist()
    return Result({"val/loss": loss, "val/top1": top1, "val/top5": top5}, [])


METRIC = Metric(
    compute,
    names={
        "val/loss": "loss, mean over the validation images",
        "val/top1": "share of validation images whose largest logit is the label's",
        "val/top5": "share of validation images whose label has one of the five largest logits",
    },
    columns={"val/top1": Column("top-1")},
)
