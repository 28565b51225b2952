"""Lightning data modules, with augmentation that only depends on seed, epoch and sample."""

from luna_vision.data.base import ImageDataModule
from luna_vision.data.canvas import Canvas, CanvasDataset, CanvasSpec, make_canvas
from luna_vision.data.canvas_dense import CanvasDetectionDataModule, CanvasSegmentationDataModule
from luna_vision.data.canvas_module import CanvasDataModule
from luna_vision.data.canvas_sequence import CanvasSequenceDataModule, CropSequence, crop_sequence
from luna_vision.data.datasets import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
)
from luna_vision.data.detection import DetectionDataModule
from luna_vision.data.folders import ImageFolderDataModule
from luna_vision.data.gpu import GpuDataModule
from luna_vision.data.litdata_module import LitDataDataModule
from luna_vision.data.multilabel import MultiLabelDataModule
from luna_vision.data.sampling import EpochSampler, sample_seed
from luna_vision.data.segmentation import SegmentationDataModule
from luna_vision.data.slides import SlideDataModule
from luna_vision.data.timm_module import TimmDataModule
from luna_vision.data.transforms import AUGMENTATIONS, train_transform
from luna_vision.data.unlabelled import UnlabelledDataModule
from luna_vision.data.webdataset_module import WebDatasetDataModule
from luna_vision.images import find_images
from luna_vision.images.decode import SampleError, read_image
from luna_vision.images.transforms import eval_transform

__all__ = [
    "AUGMENTATIONS",
    "CIFAR100DataModule",
    "CIFAR10DataModule",
    "Canvas",
    "CanvasDataModule",
    "CanvasDataset",
    "CanvasDetectionDataModule",
    "CanvasSegmentationDataModule",
    "CanvasSequenceDataModule",
    "CanvasSpec",
    "CropSequence",
    "DetectionDataModule",
    "DigitsDataModule",
    "EpochSampler",
    "FashionMNISTDataModule",
    "GpuDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "LitDataDataModule",
    "MultiLabelDataModule",
    "SampleError",
    "SegmentationDataModule",
    "SlideDataModule",
    "TimmDataModule",
    "UnlabelledDataModule",
    "WebDatasetDataModule",
    "crop_sequence",
    "eval_transform",
    "find_images",
    "make_canvas",
    "read_image",
    "sample_seed",
    "train_transform",
]
