"""A recipe: the dataclasses that hold every number of a run.

Nothing else in the pipeline owns a batch size, a precision or a rate.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.run_folder import RunFolder

# pixels: a stored image must fit a page of FFCV's, which is smaller than 4 GiB
MAX_RESOLUTION = 16_384
# name of the resolved recipe in a run folder and in an export
STORED = "recipe.yaml"

Metric = Literal[
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
Method = Literal["contributions", _PostHoc, "lime", "gradcam"]


@dataclass(frozen=True)
class ModelRecipe:
    """Which timm model, and the keyword arguments of ``timm.create_model`` (temperature, rank,
    conv_stages, ...).
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ProgressiveRecipe:
    """Training resolution that rises linearly from epoch to epoch, up to ``data.image_size``."""

    start_size: int
    """Of the first epoch, in pixels."""
    until: float = 0.8
    """Share of the epochs after which image_size is reached."""
    step: int = 32
    """Sizes are image_size less a multiple of this."""


@dataclass(frozen=True)
class DataRecipe:
    """Where images come from, where the ``.beton`` files go, and how training images are augmented."""

    source: str
    """A name in pipeline.data.sources.SOURCES."""
    image_size: int
    """Side in pixels of the square images that the model sees."""
    path: str | None = None
    """Folder or tar of the source, where it needs one."""
    prepared: str = "data"
    """`coda prepare` writes train.beton, val.beton and manifest.json into
    <prepared>/<source>-<size>.
    """
    write_mode: Literal["raw", "jpg", "proportion"] = "raw"
    """How images are stored; proportion: some as JPEG, the others raw."""
    compress_probability: float = 0.5
    """Share of JPEGs, for write_mode proportion only."""
    jpeg_quality: int = 90
    max_resolution: int | None = None
    """Longer side of stored images whose size varies; None: shorter side image_size x 256/224."""
    chunk_size: int = 100
    """Images that a writing process takes at a time."""
    broken_images: Literal["fail", "skip"] = "fail"
    """Whether `coda prepare` stops at an image that cannot be read, or leaves it out."""
    workers: int = 2
    """Threads of each loader; never more than the processors this process may use."""
    storage: Literal["page_cache", "stage_local"] = "page_cache"
    """Stage_local: each node reads from a copy on a disk of its own."""
    scratch: str | None = None
    """Stage_local only: folder on that disk, such as $SLURM_TMPDIR; None: the system's temporary
    folder.
    """
    shuffle_pages: int | None = None
    """Pages of the file that are shuffled at a time, where memory is short; None: the whole file.
    """
    flip: bool = False
    """Horizontal flip with probability 1/2."""
    crop_padding: int = 0
    """Random shift by up to this many pixels, zeros outside."""
    rand_augment_operations: int = 0
    """Of torchvision's RandAugment on each image."""
    rand_augment_magnitude: int = 9
    """0 to 30."""
    color_jitter: float = 0.0
    """Brightness, contrast and saturation change by up to this share."""
    random_erasing: float = 0.0
    """Probability that a rectangle of an image is erased."""
    mixup_alpha: float = 0.0
    """Images are mixed in pairs, with Beta(alpha, alpha) distributed shares; 0: not."""
    cutmix_alpha: float = 0.0
    """As mixup_alpha, by pasting a rectangle; with both, each is done half of the time."""
    progressive: ProgressiveRecipe | None = None
    """Lower resolutions in early epochs."""
    eval_size: int | None = None
    """Side in pixels of evaluated images; None: image_size."""

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
    """Optimisation. An update is one optimiser step on ``global_batch_size`` images, whatever the
    world size.
    """

    epochs: int
    global_batch_size: int
    learning_rate: float
    optimizer: Literal["adam", "adamw", "sgd", "muon"] = "adamw"
    """Sgd: with Nesterov's momentum; muon: of matrices, the rest as adamw."""
    micro_batch_size: int | None = None
    """Images per process and backward pass; None: global_batch_size / world size."""
    weight_decay: float = 0.0
    momentum: float = 0.9
    """Sgd and muon only."""
    warmup_epochs: float = 0.0
    """Linear, up to learning_rate."""
    warmup_learning_rate: float = 0.0
    """Where the warm-up starts."""
    schedule: Literal["cosine", "linear", "step"] = "cosine"
    """After the warm-up: down to 0, or divided step by step."""
    step_epochs: int = 30
    """Step only: epochs, from the first on, between two divisions."""
    step_factor: float = 10.0
    """Step only: by which the rate is divided."""
    weight_average: float = 0.0
    """Decay, per update, of an average of the weights that is evaluated and exported; 0: no
    average.
    """
    clip_grad_norm: float = 0.0
    """0: no clipping."""
    loss: Literal["bce", "cross_entropy"] = "bce"
    label_smoothing: float = 0.0
    """Share of a target that is spread evenly over all classes."""
    weight_penalty: float = 0.0
    """Lambda of the official regulariser, mean |W| of the CoDA part's linear map to a class."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Bf16: autocast, parameters stay fp32."""
    zero_stage: int = 0
    checkpoint_every_updates: int | None = None
    """Beside the checkpoint at the end of every epoch."""


@dataclass(frozen=True)
class EvaluationRecipe:
    """Which metrics are computed after every ``every_epochs`` epochs and, in full, after the last."""

    every_epochs: int = 1
    metrics: tuple[Metric, ...] = ("accuracy",)
    """While training."""
    final_metrics: tuple[Metric, ...] = ("accuracy", "completeness", "alignment", "depth")
    """Depth includes localisation."""
    methods: tuple[Method, ...] = ("contributions",)
    """Whose maps the final localisation, pixel removal and depth judge."""
    batch_size: int = 128
    grid_size: int = 3
    """N of the n x n grid pointing game."""
    grids: int = 100
    """Grids of the localisation metrics."""
    completeness_images: int = 128
    """Images of the completeness metric."""
    alignment_images: int = 128
    """Images of the alignment metric."""
    removal_images: int = 1024
    """Images of the pixel removal metric."""


@dataclass(frozen=True)
class TrackingRecipe:
    """Where metrics go. ``uri: null`` is an SQLite file beside the runs."""

    uri: str | None = None
    experiment: str = "coda"
    parent: str | None = None
    """Name of the sweep that this run belongs to: MLflow shows its runs below a parent run."""
    system_metrics: bool = False
    """Processor, memory, disk, network and GPU of every node, every 10 seconds."""
    log_every_updates: int = 10


@dataclass(frozen=True)
class Recipe:
    """One run. Its folder is ``<runs>/<name>``."""

    name: str
    model: ModelRecipe
    data: DataRecipe
    training: TrainingRecipe
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    tracking: TrackingRecipe = field(default_factory=TrackingRecipe)
    seed: int = 0
    runs: str = "runs"

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
        return _plain(dataclasses.asdict(self))

    def identity(self) -> dict[str, Any]:
        """The values that decide the weights, by dotted key: a run is resumed only with the same
        ones.
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
                f"training.global_batch_size {batch} is not a multiple of micro batch {micro} x {world_size} processes: "
                "choose training.micro_batch_size or the number of processes so that it is"
            )
        return micro, batch // (micro * world_size)


def training_size(data: DataRecipe, epoch: int, epochs: int) -> int:
    """Side in pixels of the training images of ``epoch``: rises linearly, in steps, where the
    recipe asks for that.
    """
    if data.progressive is None:
        return data.image_size
    missing = (data.image_size - data.progressive.start_size) * max(
        0.0, 1 - epoch / (data.progressive.until * epochs)
    )
    return data.image_size - round(missing / data.progressive.step) * data.progressive.step


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {f"{prefix}{key}": value}
        )
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
