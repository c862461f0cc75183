from .collate import collate
from .metadata import read_metadata
from .operators import (
    ImageCropAndResize,
    LoadImage,
    Operator,
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
from .unified_dataset import SkippedRow, UnifiedDataset

__all__ = [
    "AddressedDataset",
    "BatchPlan",
    "BatchSampler",
    "ImageCropAndResize",
    "LoadImage",
    "Operator",
    "RouteByType",
    "Sample",
    "SampleAddress",
    "SampleOrder",
    "SequentialProcess",
    "SkippedRow",
    "ToAbsolutePath",
    "ToFloat",
    "ToInt",
    "ToList",
    "ToStr",
    "UnifiedDataset",
    "collate",
    "generator",
    "permutation",
    "read_metadata",
    "sample_seed",
]
