from .augmentation import Augmentation, Choice
from .buckets import AspectBuckets
from .cached_dataset import CachedDataset, CachedRow
from .collate import collate
from .hub_rows import HubRows
from .metadata import read_metadata
from .mixed_dataset import MixedDataset
from .mixing import MixedOrder, Part
from .operators import (
    ImageCropAndResize,
    LoadImage,
    Operator,
    RouteByExtensionName,
    RouteByType,
    SequentialProcess,
    ToAbsolutePath,
    ToFloat,
    ToInt,
    ToList,
    ToStr,
)
from .order import (
    AddressedDataset,
    BatchPlan,
    BatchSampler,
    Sample,
    SampleAddress,
    SampleOrder,
    generator,
    permutation,
    sample_seed,
)
from .prompts import prompt_dataset
from .scan import SkippedRow
from .storage import EmbeddedFile, open_file
from .table import Rows, Table
from .tar_shards import read_shards
from .unified_dataset import UnifiedDataset
from .video import LoadGIF, LoadVideo

__all__ = [
    "AddressedDataset",
    "AspectBuckets",
    "Augmentation",
    "BatchPlan",
    "BatchSampler",
    "CachedDataset",
    "CachedRow",
    "EmbeddedFile",
    "HubRows",
    "Choice",
    "ImageCropAndResize",
    "LoadGIF",
    "LoadImage",
    "LoadVideo",
    "MixedDataset",
    "MixedOrder",
    "Operator",
    "Part",
    "RouteByExtensionName",
    "RouteByType",
    "Rows",
    "Sample",
    "SampleAddress",
    "SampleOrder",
    "SequentialProcess",
    "SkippedRow",
    "Table",
    "ToAbsolutePath",
    "ToFloat",
    "ToInt",
    "ToList",
    "ToStr",
    "UnifiedDataset",
    "collate",
    "generator",
    "open_file",
    "permutation",
    "prompt_dataset",
    "read_metadata",
    "read_shards",
    "sample_seed",
]
