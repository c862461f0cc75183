"""Data sets: rows of tables, operators that load their files, the order of samples, batches and caches."""

from .cached_dataset import CachedDataset
from .collate import collate
from .conditions.base import Condition
from .dataset import PlainData, Row, TrainingData
from .mixed_dataset import MixedDataset
from .operators.augmentation import Augmentation
from .operators.base import (
    Operator,
    RouteByExtensionName,
    RouteByType,
    SequencialProcess,
    SequentialProcess,
    ToAbsolutePath,
    ToFloat,
    ToInt,
    ToList,
    ToStr,
)
from .operators.images import ImageCropAndResize, LoadImage
from .operators.video import LoadGIF, LoadVideo
from .order.addresses import (
    AddressedDataset,
    BatchLayout,
    BatchSampler,
    Sample,
    SampleAddress,
    SampleOrder,
    generator,
    permutation,
    sample_seed,
)
from .order.buckets import AspectBuckets
from .order.mixing import MixedOrder, WeightedRows
from .prompt_dataset import prompt_dataset
from .scan import SkippedRow
from .sources.example import read_example
from .sources.hub_rows import HubRows
from .sources.metadata import read_metadata
from .sources.storage import EmbeddedFile, open_file
from .sources.table import Rows, Table
from .sources.tar_shards import read_shards
from .unified_dataset import UnifiedDataset
from .video_dataset import VideoDataset, is_video_column

__all__ = [
    "AddressedDataset",
    "AspectBuckets",
    "Augmentation",
    "BatchLayout",
    "BatchSampler",
    "CachedDataset",
    "Condition",
    "EmbeddedFile",
    "HubRows",
    "ImageCropAndResize",
    "LoadGIF",
    "LoadImage",
    "LoadVideo",
    "MixedDataset",
    "MixedOrder",
    "Operator",
    "PlainData",
    "WeightedRows",
    "RouteByExtensionName",
    "RouteByType",
    "Row",
    "Rows",
    "Sample",
    "SampleAddress",
    "SampleOrder",
    "SequencialProcess",
    "SequentialProcess",
    "SkippedRow",
    "Table",
    "ToAbsolutePath",
    "TrainingData",
    "ToFloat",
    "ToInt",
    "ToList",
    "ToStr",
    "UnifiedDataset",
    "VideoDataset",
    "collate",
    "generator",
    "is_video_column",
    "open_file",
    "permutation",
    "prompt_dataset",
    "read_example",
    "read_metadata",
    "read_shards",
    "sample_seed",
]
