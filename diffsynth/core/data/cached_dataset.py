"""The data set that `make_cache.py` writes: the outputs of frozen networks for every sample, read from disk."""

import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from ..input_files import InputFile
from ..json_text import fits, parse
from ..ranges import Repeat, Side, Workers
from .cache import CacheIndex, DamagedCache
from .dataset import REGULARISATION, Row, TrainingData
from .operators.augmentation import Augmentation, AugmentationChoice
from .operators.unread import Unread
from .order.addresses import SampleAddress
from .order.buckets import Size
from .order.mixing import WeightedRows, exact
from .scan import SkippedRow
from .sources.studio_cache import refuse_studio_cache

UNIT = {"settings": {str: str}, "weights": {str: str | None}}
# What an index says of its cache (see `CacheMaker.about`); other entries are those of other versions.
ABOUT = {
    "made_of": {"pipeline": str, "units": {str: UNIT}, "inputs": [str]},
    "captions": [{"captions": {str: int | float}, "prefix": str, "suffix": str}],
    "variants": [([int | float], [str])],
    "by_size": bool,
    "parts": [(int, str)],
    "samples": str,
}

WEIGHT = re.compile(r"\d+(\.\d+)?(/[1-9]\d*)?")  # of a part, a decimal number or a fraction

COMPARED = 256  # samples whose keys are compared with their rows before a training, evenly spread; a guess


class CachedDataset(TrainingData):
    """The samples of a cache, in batches of one size.

    Args:
        path: Folder of the cache.
        height, width: Size in pixels that all samples must have; None accepts any.
        repeat: How often an epoch shows each sample; the weights of a cached mixture multiply this.
        num_workers: See `TrainingData`.
        augmentation: Random choices about each sample; the cache must hold all variants that they may select.

    Raises:
        DamagedCache: The folder holds no finished cache.
        ValueError: The folder is a cache of DiffSynth-Studio, samples have another size, captions were cached with
            other options, or variants are missing.
    """

    needs_encoders = False

    def __init__(
        self,
        path: str,
        height: Side | None = None,
        width: Side | None = None,
        repeat: Repeat = 1,
        num_workers: Workers | None = None,
        augmentation: Augmentation | None = None,
    ):
        refuse_studio_cache(path)
        self.index, self.metadata_path, self.repeat, self.num_workers = CacheIndex(path), path, repeat, num_workers
        self.augmentation = augmentation or Augmentation()
        self.index.require_finished()
        self.size, self.about = len(self.index), self.index.about
        self._check_about()
        if (height, width) != (None, None):
            self._check_sizes(height, width)
        self._check_captions()
        self._check_variants()
        self.index.close()  # SQLite connections must not be shared with other processes

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)}")
        return self._load(self.index.record(index % self.size), AugmentationChoice())

    def sample(self, address: SampleAddress, seed: int) -> tuple[Row, str | None]:
        """The sample at an address of a run in a randomly chosen variant, and the variant's name."""
        record = self.index.record(address.index)
        choice = self.augmentation.choose(record["weights"], seed, address)
        return self._load(record, choice), choice.variant

    @property
    def has_regularisation(self) -> bool:
        return REGULARISATION in self._variant(self.index.record(0), "")["row"]  # all rows have it, or none

    @property
    def own_sizes(self) -> set[Size]:
        return set() if self.about["by_size"] else set(self.index.sizes())

    def rows_in_buckets(self) -> dict[Size | None, list[WeightedRows]]:
        """The samples of each size from each mixed data set; the key None is for samples with sizes of their own."""
        sizes = self.index.sizes()
        if len(sizes) > 1 and not self.about["by_size"]:
            sizes = {None: range(self.size)}
        counts, weights = zip(*self.about["parts"], strict=True)
        ends = np.cumsum(counts)[:-1]
        buckets = {}
        for size, numbers in sizes.items():
            parts = np.split(np.array(numbers), np.searchsorted(numbers, ends))
            present = [(rows, weight) for rows, weight in zip(parts, weights, strict=True) if len(rows)]
            buckets[size] = [WeightedRows(rows, exact(weight) * self.repeat) for rows, weight in present]
        return buckets

    def _load(self, record: dict, choice: AugmentationChoice) -> Row:
        variant = self._variant(record, choice.variant)
        made: dict[str, dict] = {"shared": {}, "posi": {}, "nega": {}}
        keys, sides = zip(*variant["runs"], strict=True)
        for side, entry in zip(sides, self.index.entries(keys), strict=True):
            made[side] |= entry
        return Row({name: _restored(value) for name, value in variant["row"].items()}, made)

    def _variant(self, record: dict, name: str) -> dict:
        variant = record["variants"].get(name)
        if variant is None or not {side for _, side in variant["runs"]} <= {"shared", "posi", "nega"}:
            raise DamagedCache(f"{self.index.path} lacks the variant {name!r} of a sample; run make_cache.py again.")
        return variant

    def scan(self, required: Sequence[str] = ()) -> list[SkippedRow]:
        """Check that all files of the cache are there and that samples have the `required` columns; skips no row.

        Raises:
            DamagedCache: Files are missing.
            ValueError: A column is missing.
        """
        missing = [shard.path.name for shard in self.index.shards.values() if not shard.path.is_file()]
        if missing:
            raise DamagedCache(
                f"{self.metadata_path} lacks {len(missing)} shards ({missing[0]}); run make_cache.py again."
            )
        absent = sorted(set(required) - self._variant(self.index.record(0), "")["row"].keys())
        if absent:
            raise ValueError(
                f"{self.metadata_path} holds no {absent[0]}, which this task needs; add the column to the data "
                "set and run make_cache.py again with this task."
            )
        return []

    def fingerprint(self) -> str:
        """A hash (16 hex digits) of the samples, their order and the keys of their cache entries."""
        return self.about["samples"]

    def input_files(self) -> dict[str, InputFile]:
        """The index, which is compared by the hash of its samples."""
        return {self.index.path.name: InputFile(str(self.index.path))}

    def check_made_for(
        self, expected: Callable[[], Mapping[str, Any]], keys_of: Callable[..., Set[tuple[str, str]]] | None = None
    ) -> None:
        """Check that the cache was made by the networks and code that `expected()` returns, for the rows that it names.

        Args:
            keys_of: Returns key and side of the entries of a row (`CacheKeys.of`), which are compared for `COMPARED`
                samples; None compares none.

        Raises:
            ValueError: It was not; names every difference.
        """
        lines = differences(self.about["made_of"], expected())
        if lines:
            raise ValueError(
                f"{self.metadata_path} was not made for this training:\n  " + "\n  ".join(lines) + "\n"
                "Choose the model, task and lora that it was made with, or run make_cache.py again with these."
            )

        units = self.about["made_of"]["units"]
        for number in range(0, self.size, -(-self.size // COMPARED)) if keys_of else ():
            for name, variant in self.index.record(number)["variants"].items():
                row = Row(_undecoded(variant["row"]))
                if not keys_of(row, units) <= {tuple(run) for run in variant["runs"]}:
                    raise DamagedCache(
                        f"{self.metadata_path} does not fit together: the entries of sample {number}"
                        f"{f' ({name})' if name else ''} are those of another image or caption; delete "
                        f"{self.index.path} and run make_cache.py again."
                    )

    def _check_about(self) -> None:
        wrong = [name for name, shape in ABOUT.items() if not fits(self.about.get(name), shape)]
        if not wrong:
            counts = sum(count for count, _ in self.about["parts"])
            weights = [weight for _, weight in self.about["parts"]]
            wrong = [] if counts == self.size and all(map(WEIGHT.fullmatch, weights)) else ["parts"]
        if wrong:
            raise DamagedCache(
                f"{self.index.path} says nothing of the cache's {wrong[0]} that this program can read; run "
                "make_cache.py again with the same options."
            )

    def _check_sizes(self, height: int | None, width: int | None) -> None:
        for size in self.index.sizes():
            for name, found, wanted in zip(("width", "height"), size[:2], (width, height), strict=True):
                if wanted not in (None, found):
                    raise ValueError(
                        f"{self.metadata_path} has samples of {size[0]} x {size[1]} pixels, but "
                        f"dataset.{name}={wanted}; set dataset.{name}=null, or run make_cache.py again at that size."
                    )

    def _check_captions(self) -> None:
        """Check that caption options set here equal those of the cache; unset ones are taken from the cache."""
        wanted, defaults = captions_of(self.augmentation), captions_of(Augmentation())
        for name in [name for name in wanted if wanted[name] != defaults[name]]:
            others = [cached[name] for cached in self.about["captions"] if cached[name] != wanted[name]]
            if others:
                raise ValueError(
                    f"{self.metadata_path} was made with dataset.augmentation.{name}={others[0]!r}, not "
                    f"{wanted[name]!r}; leave that option out, or run make_cache.py again with it."
                )

    def _check_variants(self) -> None:
        for weights, names in self.about["variants"]:
            missing = sorted({choice.variant for choice in self.augmentation.choices(weights)} - set(names))
            if missing:
                raise ValueError(
                    f"{self.metadata_path} holds no variant {missing[0]!r} of its samples, which dataset.augmentation "
                    "may select; run make_cache.py again with this dataset.augmentation."
                )


def captions_of(augmentation: Augmentation) -> dict[str, Any]:
    """The options of an augmentation that change the text of captions, which a cache holds only encoded."""
    return {"captions": dict(augmentation.captions), "prefix": augmentation.prefix, "suffix": augmentation.suffix}


def _restored(value: Any) -> Any:
    """A value of a cached row. An image becomes an `Unread`, because the cache knows only its size."""
    if isinstance(value, dict) and value.keys() == {"unread"}:
        return Unread(tuple(value["unread"][:-1]), _refuse, _refuse)
    return [_restored(element) for element in value] if isinstance(value, list) else value


def _undecoded(value: Any) -> Any:
    """A value of a cached row in which every image is an `Unread` that knows its identity, from which keys follow."""
    if isinstance(value, dict) and value.keys() == {"unread"}:
        *size, identity = value["unread"]
        image = Unread(tuple(size), _refuse, _refuse)
        image.identity = identity
        return image
    if isinstance(value, dict):
        return {name: _undecoded(element) for name, element in value.items()}
    return [_undecoded(element) for element in value] if isinstance(value, list) else value


def _refuse() -> None:
    raise ValueError("A cache does not hold the images themselves; use the data set that it was made of.")


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The differences, one line each, between two results of `CacheKeys.about`: a cache's and the current run's."""
    if found["pipeline"] != expected["pipeline"]:
        return [_difference("pipeline", found["pipeline"], expected["pipeline"])]
    lines = []
    for name, unit in expected["units"].items():
        if name in found["units"]:
            lines += [f"{name}: {line}" for line in _unit_differences(found["units"][name], unit)]
        else:
            lines.append(f"{name}: the cache holds none of its outputs, which this run reads")
    absent = sorted(set(expected["inputs"]) - set(found["inputs"]))
    return lines + [f"the cache holds no {name}, which this run reads" for name in absent]


def _unit_differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The differences between two results of `unit_identity`; models that the current run lacks do not count."""
    cached, current = _settings(found), _settings(expected)
    pairs = {name: (cached.get(name, "None"), current.get(name, "None")) for name in sorted({*cached, *current})}
    pairs |= {key: (found.get(key), expected[key]) for key in expected if key not in ("settings", "weights")}
    models = {name: weights for name, weights in expected["weights"].items() if weights is not None}
    pairs |= {name: (found["weights"].get(name), weights) for name, weights in models.items()}
    return [_difference(name, old, new) for name, (old, new) in pairs.items() if old != new]


def _difference(name: str, found: Any, expected: Any) -> str:
    return f"the cache was made with {name} {found}, this run has {expected}"


def _settings(unit: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a unit, which are JSON texts, by dotted names; texts in quotes."""
    values = _by_dotted_name({name: parse(text) for name, text in unit["settings"].items()})
    return {name: repr(value) for name, value in values.items()}


def _by_dotted_name(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict by dotted names."""
    values = {}
    for name, value in settings.items():
        values |= _by_dotted_name(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values
