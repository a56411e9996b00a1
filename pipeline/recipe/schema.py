# Long: every key of a recipe stands here, with the text of its reference.
"""The recipe's sections as dataclasses, which hold every number of a run.

Nothing else in the pipeline owns a batch size, a precision or a rate. docs/recipe.md is made from
the annotations and docstrings of the fields here (``pipeline.recipe.page``), so they are written
for users.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pipeline.errors import UserError
from pipeline.recipe.optimisers import OPTIMISERS
from pipeline.recipe.ranges import (
    AtLeast,
    Between,
    FolderName,
    NameIn,
    NotEmpty,
    OneOf,
    Positive,
    Share,
    Unquoted,
)
from pipeline.recipe.schedules import SCHEDULES
from pipeline.run_folder import RunFolder

# Pixels: a stored image must fit a page of FFCV's, which is smaller than 4 GiB.
MAX_RESOLUTION = 16_384

Count = Annotated[int, AtLeast(1)]
Probability = Annotated[float, Share()]

MetricName = Literal[
    "accuracy",
    "completeness",
    "alignment",
    "localisation",
    "localisation_2x2",
    "pixel_removal",
    "depth",
]
_PostHoc = Literal[
    "gradient",
    "input_x_gradient",
    "integrated_gradients",
    "guided_backprop",
    "deep_lift",
    "occlusion_5",
    "occlusion_9",
]
MethodName = Literal["contributions", _PostHoc, "lime", "gradcam"]


@dataclass(frozen=True)
class ModelRecipe:
    """The network: any model that timm knows, those of this project included."""

    name: str
    """Name of a timm model, such as coda_resnet50 or resnet50; `coda models` lists ours."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `timm.create_model`, such as temperature, rank or conv_stages."""


@dataclass(frozen=True)
class ProgressiveRecipe:
    """A training resolution that rises linearly from epoch to epoch, up to `data.image_size`."""

    start_size: Count
    """Side in pixels of the training images of the first epoch, at most `data.image_size`."""
    until: Annotated[float, Share(above_zero=True)] = 0.8
    """Share of the epochs after which `data.image_size` is reached."""
    step: Count = 32
    """Every size is `data.image_size` less a multiple of this many pixels."""


@dataclass(frozen=True)
class DataRecipe:
    """The images: their source, their prepared files, and what is done to training images."""

    source: str
    """Name of the data set (docs/data.md), such as digits, cifar10, imagenet or imagefolder."""
    image_size: Count
    """Side in pixels of the square images that the model sees."""
    path: str | None = None
    """Folder or tar of the source. Null: it needs none, or is downloaded."""
    prepared: str = "data"
    """Folder in which `coda prepare` makes the folder `<source>-<image_size>`.

    That folder holds train.beton, val.beton and manifest.json, and serves every run on the same
    source and size.
    """
    write_mode: Literal["raw", "jpg", "proportion"] = "raw"
    """How images are stored: as pixels, as JPEG, or some as JPEG and the others as pixels."""
    compress_probability: Probability = 0.5
    """Share of the images that are stored as JPEG; for `write_mode: proportion` only."""
    jpeg_quality: Annotated[int, Between(1, 100)] = 90
    """Quality of stored JPEGs; 100 is the best."""
    max_resolution: Annotated[int, Between(1, MAX_RESOLUTION)] | None = None
    """Longer side in pixels of stored images, for sources whose sizes vary.

    Null: their shorter side is `image_size` x 256/224.
    """
    chunk_size: Annotated[int, Between(1, 10_000)] = 100
    """Images that a process of `coda prepare` takes at a time."""
    broken_images: Literal["fail", "skip"] = "fail"
    """Whether `coda prepare` stops at an image that cannot be read, or leaves it out."""
    workers: Count = 2
    """Threads of each loader, and processes of `coda prepare`.

    Never more than the processors that the job may use.
    """
    storage: Literal["page_cache", "stage_local"] = "page_cache"
    """Where the prepared files are read: in place, or from a copy on a disk of each node."""
    scratch: str | None = None
    """Folder on that disk, such as `$SLURM_TMPDIR`; for `storage: stage_local` only.

    Null: the system's temporary folder.
    """
    shuffle_pages: Count | None = None
    """Pages of the file that are shuffled at a time, where memory is short.

    Null: all images are shuffled together.
    """
    flip: bool = False
    """Whether training images are flipped horizontally with probability 1/2."""
    crop_padding: Annotated[int, AtLeast(0, off=True)] = 0
    """Largest random shift in pixels at `image_size`, with zeros outside; smaller than that."""
    rand_augment_operations: Annotated[int, Between(0, 16)] = 0
    """Operations of torchvision's RandAugment on each training image; 0: none."""
    rand_augment_magnitude: Annotated[int, Between(0, 30)] = 9
    """Strength of RandAugment's operations; 30 is the strongest."""
    color_jitter: Probability = 0.0
    """Share by which brightness, contrast and saturation change at most; 0: they do not."""
    random_erasing: Probability = 0.0
    """Probability that a rectangle of a training image is erased; 0: never."""
    mixup_alpha: Annotated[float, AtLeast(0, below=1000, off=True)] = 0.0
    """Mix training images in pairs, with shares drawn from Beta(alpha, alpha)."""
    cutmix_alpha: Annotated[float, AtLeast(0, below=1000, off=True)] = 0.0
    """As `mixup_alpha`, by pasting a rectangle. With both, each is done half of the time."""
    progressive: ProgressiveRecipe | None = None
    """Lower resolutions in early epochs. Null: `image_size` in all."""
    eval_size: Count | None = None
    """Side in pixels of the images in evaluations, explanations and exports.

    Null: `image_size`.
    """

    @property
    def evaluated_size(self) -> int:
        """Side in pixels of the images that evaluation, export and explanations show the model."""
        return self.eval_size or self.image_size

    @property
    def folder(self) -> Path:
        """Folder of the prepared files, shared by every run on the same source and size."""
        return Path(self.prepared) / f"{self.source}-{self.image_size}"


@dataclass(frozen=True)
class TrainingRecipe:
    """Optimisation. An update is one step of the optimiser on `global_batch_size` images."""

    epochs: Count
    """Passes over the training images."""
    global_batch_size: Count
    """Images of an update, over all processes together, however many there are."""
    learning_rate: Annotated[float, Positive()]
    """The rate after the warm-up, the highest one."""
    optimizer: Annotated[str, NameIn(OPTIMISERS, "pipeline/recipe/optimisers.py")] = "adamw"
    """The optimiser. sgd has Nesterov's momentum; muon is for matrices, the rest takes adamw.

    With muon `zero_stage` must be 0, as shards are not whole matrices.
    """
    micro_batch_size: Count | None = None
    """Images of a process in one backward pass; smaller ones need less memory.

    `global_batch_size` must be a multiple of this times the number of processes. Null:
    `global_batch_size` / number of processes, so that an update is one backward pass.
    """
    weight_decay: Annotated[float, AtLeast(0, off=True)] = 0.0
    """Weight decay of the optimiser; biases and normalisation are spared."""
    momentum: Annotated[float, Share(below_one=True)] = 0.9
    """Momentum of sgd and muon; the others ignore it."""
    warmup_epochs: Annotated[float, AtLeast(0, off=True)] = 0.0
    """Epochs in which the rate rises linearly to `learning_rate`; at most `epochs`."""
    warmup_learning_rate: Annotated[float, AtLeast(0)] = 0.0
    """Rate from which the warm-up rises; at most `learning_rate`."""
    schedule: Annotated[str, NameIn(SCHEDULES, "pipeline/recipe/schedules.py")] = "cosine"
    """The rate after the warm-up: down to 0 along half a cosine or a straight line, or in steps.

    step divides it by `step_factor` each `step_epochs`.
    """
    step_epochs: Count = 30
    """Epochs, counted from the first one, between two divisions; for `schedule: step` only."""
    step_factor: Annotated[float, AtLeast(1, below=float("inf"))] = 10.0
    """What the rate is divided by; for `schedule: step` only."""
    weight_average: Annotated[float, Share(below_one=True)] = 0.0
    """Decay per update of a moving average of the weights, which is evaluated and exported.

    0: no average.
    """
    clip_grad_norm: Annotated[float, AtLeast(0, off=True)] = 0.0
    """Norm of the gradient of all parameters, above which it is scaled down to that norm."""
    loss: Literal["bce", "cross_entropy"] = "bce"
    """Binary cross entropy, summed over the classes, or cross entropy of the softmax."""
    label_smoothing: Annotated[float, Share(below_one=True)] = 0.0
    """Share of a target that is spread evenly over all classes; 0: none."""
    weight_penalty: Annotated[float, AtLeast(0, below=float("inf"), off=True)] = 0.0
    """Lambda of the official regulariser: mean |W| of the CoDA part's linear map to a class."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the computation; with bf16 (autocast) the parameters stay fp32."""
    zero_stage: Annotated[
        int,
        OneOf(
            (0, 1, 2),
            "stage 3 shards the parameters themselves, which models of this size do not need",
        ),
    ] = 0
    """What DeepSpeed's ZeRO spreads over the processes.

    0: nothing; 1: the optimiser's state; 2: the gradients, too.
    """
    checkpoint_every_updates: Count | None = None
    """Updates between two checkpoints. Null: only the one at the end of every epoch."""


@dataclass(frozen=True)
class EvaluationRecipe:
    """Which metrics are computed during training and, in full, at its end (docs/method.md)."""

    every_epochs: Count = 1
    """Epochs between two evaluations during training."""
    metrics: tuple[MetricName, ...] = ("accuracy",)
    """Metrics of these evaluations."""
    final_metrics: tuple[MetricName, ...] = ("accuracy", "completeness", "alignment", "depth")
    """Metrics of the evaluation after the last epoch; depth includes localisation."""
    methods: Annotated[tuple[MethodName, ...], NotEmpty()] = ("contributions",)
    """Explanation methods that the final localisation, pixel removal and depth judge."""
    batch_size: Count = 128
    """Images that the model sees at a time in an evaluation."""
    grid_size: Annotated[int, AtLeast(2)] = 3
    """Images along a side of a grid in the grid pointing game."""
    grids: Count = 100
    """Grids of the localisation metrics."""
    completeness_images: Count = 128
    """Images of the completeness metric."""
    alignment_images: Count = 128
    """Images of the alignment metric."""
    removal_images: Count = 1024
    """Images of the pixel removal metric."""


@dataclass(frozen=True)
class TrackingRecipe:
    """Where metrics are logged (docs/mlflow.md)."""

    uri: str | None = None
    """MLflow's tracking URI. Null: the SQLite file mlflow.db in the folder `runs`."""
    experiment: str = "coda"
    """MLflow's experiment."""
    parent: Annotated[str, Unquoted()] | None = None
    """Name of the sweep that the run belongs to: MLflow shows its runs below a parent run.

    Null: the run belongs to none.
    """
    system_metrics: bool = False
    """Whether to log processor, memory, disk, network and GPU of every node each 10 seconds."""
    log_every_updates: Count = 10
    """Updates between two logged values of the loss, the rate and the speed."""


@dataclass(frozen=True)
class Recipe:
    """One run. Its folder is `<runs>/<name>`."""

    name: Annotated[str, FolderName()]
    """Name of the run."""
    model: ModelRecipe
    """The network."""
    data: DataRecipe
    """The images."""
    training: TrainingRecipe
    """Optimisation."""
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    """Metrics."""
    tracking: TrackingRecipe = field(default_factory=TrackingRecipe)
    """Logging."""
    seed: Annotated[int, Between(0, 2**32 - 1)] = 0
    """Seed of everything random: first weights, order, augmentation, evaluated images."""
    runs: str = "runs"
    """Folder of the run folders."""

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(Path(self.runs) / self.name)

    @property
    def tracking_uri(self) -> str:
        """MLflow's tracking URI, with the default filled in."""
        return self.folder.tracking_uri(self.tracking.uri)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and scalars, ready for YAML or JSON."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}

    def identity(self) -> dict[str, Any]:
        """The values that decide the weights, by dotted key.

        A run is resumed only with the same ones.
        """
        data = ("path", "prepared", "workers", "storage", "scratch", "chunk_size", "broken_images")
        free = {"runs", "evaluation", "tracking", *(f"data.{key}" for key in data)}
        free |= {"training.micro_batch_size", "training.checkpoint_every_updates"}
        keys = flatten(self.to_dict())
        return {
            key: value
            for key, value in keys.items()
            if key not in free and key.partition(".")[0] not in free
        }

    def micro_batch(self, world_size: int) -> tuple[int, int]:
        """Images per process and backward pass, and backward passes per update.

        Raises:
            UserError: the global batch is not a whole number of micro batches of all processes.
        """
        batch = self.training.global_batch_size
        micro = self.training.micro_batch_size or max(batch // world_size, 1)
        if batch % (micro * world_size):
            raise UserError(
                f"training.global_batch_size {batch} is not a multiple of "
                f"micro batch {micro} x {world_size} processes: "
                "choose training.micro_batch_size or the number of processes so that it is"
            )
        return micro, batch // (micro * world_size)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
