"""Training, evaluation and prediction with Lightning."""

from .callbacks import EMA, ImagesPerSecond
from .checkpoints import BestCheckpoint, LastCheckpoint
from .classification import ClassificationTask
from .dense import DetectionTask, SegmentationTask
from .distillation import DistillationTask
from .guard import NonFiniteGuard, NonFiniteLossError
from .mixing import StepMixup
from .multilabel import MultiLabelTask
from .nested import NestedMemory
from .reporting import EpochLines, ExportBest, PredictionWriter, export_weights
from .sequence import SequenceTask
from .sequence_parallel import SequenceParallelStrategy
from .sharding import FSDP2Strategy

__all__ = [
    "EMA",
    "BestCheckpoint",
    "ClassificationTask",
    "DetectionTask",
    "DistillationTask",
    "EpochLines",
    "ExportBest",
    "FSDP2Strategy",
    "ImagesPerSecond",
    "LastCheckpoint",
    "MultiLabelTask",
    "NestedMemory",
    "NonFiniteGuard",
    "NonFiniteLossError",
    "PredictionWriter",
    "SegmentationTask",
    "SequenceTask",
    "SequenceParallelStrategy",
    "StepMixup",
    "export_weights",
]
