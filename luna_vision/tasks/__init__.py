"""Training, evaluation and prediction with Lightning."""

from .budget import TimeBudget
from .callbacks import EMA, ImagesPerSecond
from .checkpoints import BestCheckpoint, LastCheckpoint
from .classification import ClassificationTask
from .conversion import ConversionTask
from .dense import DetectionTask, SegmentationTask
from .distillation import DistillationTask
from .feature_distillation import FeatureDistillationTask
from .guard import NonFiniteGuard, NonFiniteLossError
from .lejepa import LeJEPATask
from .mixing import StepMixup
from .multilabel import MultiLabelTask
from .nested import NestedMemory
from .online_probe import OnlineProbe
from .pictures import LogPictures
from .report import Report
from .reporting import EpochLines, ExportBest, PredictionWriter, export_weights
from .sequence import SequenceTask
from .sequence_parallel import SequenceParallelStrategy
from .sharding import FSDP2Strategy
from .slides import SlideTask

__all__ = [
    "EMA",
    "BestCheckpoint",
    "ClassificationTask",
    "ConversionTask",
    "DetectionTask",
    "DistillationTask",
    "EpochLines",
    "ExportBest",
    "FSDP2Strategy",
    "FeatureDistillationTask",
    "ImagesPerSecond",
    "LastCheckpoint",
    "LeJEPATask",
    "LogPictures",
    "MultiLabelTask",
    "NestedMemory",
    "NonFiniteGuard",
    "NonFiniteLossError",
    "OnlineProbe",
    "PredictionWriter",
    "Report",
    "SegmentationTask",
    "SequenceTask",
    "SequenceParallelStrategy",
    "SlideTask",
    "StepMixup",
    "TimeBudget",
    "export_weights",
]
