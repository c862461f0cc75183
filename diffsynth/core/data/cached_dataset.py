"""A data set that was made by `make_cache.py`: what frozen networks made of every sample, read from disk."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .cache import FORMAT, CacheIndex, DamagedCache
from .dataset import Row, TrainingData
from .operators.augmentation import Augmentation, AugmentationChoice
from .operators.unread import Unread
from .order.addresses import SampleAddress
from .order.mixing import WeightedRows, exact


class CachedDataset(TrainingData):
    """The samples of a cache, `repeat` times over, in batches of one size.

    Args:
        path: The cache's folder.
        height, width: What all samples must have, in pixels; None takes what there is.
        repeat: Passes over the samples that make one epoch.
        num_workers: Processes that should load it.
        augmentation: What is left to chance; the cache must hold every variant of it.

    Raises:
        DamagedCache: There is no finished cache.
        ValueError: Samples have another size, captions other words, or variants are missing.
    """

    needs_encoders = False

    def __init__(
        self,
        path: str,
        height: int | None = None,
        width: int | None = None,
        repeat: int = 1,
        num_workers: int = 0,
        augmentation: Augmentation | None = None,
    ):
        self.index, self.metadata_path, self.repeat, self.num_workers = CacheIndex(path), path, repeat, num_workers
        self.augmentation = augmentation or Augmentation()
        self.index.require_finished()
        self.size, self.about = len(self.index), self.index.about
        if self.about.get("format") != FORMAT:
            raise DamagedCache(f"{path} is of another version of this program; delete it and make it again.")
        if (height, width) != (None, None):
            self._check_sizes(height, width)
        self._check_captions()
        self._check_variants()
        self.index.close()  # a connection may not be handed on to other processes

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of a data set of {len(self)}")
        return self._load(self.index.record(index % self.size), AugmentationChoice())

    def sample(self, address: SampleAddress, seed: int) -> tuple[Row, str | None]:
        """The sample at an address of a run, in the variant that chance gives it there, and its name."""
        record = self.index.record(address.index)
        choice = self.augmentation.choose(record["weights"], seed, address)
        return self._load(record, choice), choice.variant

    def rows_in_buckets(self) -> dict[tuple[int, int] | None, list[WeightedRows]]:
        """What each size has from each data set that was mixed; None where each sample has its own size, as there."""
        sizes = self.index.sizes()
        if len(sizes) > 1 and not self.about["by_size"]:
            sizes = {None: range(self.size)}
        counts, shares = zip(*self.about["parts"], strict=True)
        ends = np.cumsum(counts)[:-1]
        buckets = {}
        for size, numbers in sizes.items():
            each = np.split(np.array(numbers), np.searchsorted(numbers, ends))
            own = [(rows, share) for rows, share in zip(each, shares, strict=True) if len(rows)]
            buckets[size] = [WeightedRows(rows, exact(share) * self.repeat) for rows, share in own]
        return buckets

    def _load(self, record: dict, choice: AugmentationChoice) -> Row:
        variant = record["variants"][choice.variant]
        made: dict[str, dict] = {"shared": {}, "posi": {}, "nega": {}}
        keys, sides = zip(*variant["runs"], strict=True)
        for side, entry in zip(sides, self.index.entries(keys), strict=True):
            made[side] |= entry
        return Row({name: _restored(value) for name, value in variant["row"].items()}, made)

    def scan(self, required: Sequence[str] = ()) -> list:
        """Refuse a cache of which files are missing, or whose samples have not the `required` columns.

        Raises:
            DamagedCache: Names the files, and what mends it.
            ValueError: Names the column.
        """
        missing = [shard.path.name for shard in self.index.shards.values() if not shard.path.is_file()]
        if missing:
            raise DamagedCache(
                f"{self.metadata_path} lacks {len(missing)} shards ({missing[0]}); run make_cache.py again."
            )
        absent = sorted(set(required) - self.index.record(0)["variants"][""]["row"].keys())
        if absent:
            raise ValueError(
                f"{self.metadata_path} holds no {absent[0]}; make the cache of rows that have it, with this task."
            )
        return []

    def fingerprint(self) -> str:
        """16 hex digits that change with the samples, their order and what they were made of."""
        return self.about["samples"]

    def check_made_for(self, expected: Mapping[str, Any]) -> None:
        """Refuse a cache that another pipeline, other weights or other code made.

        Raises:
            ValueError: Names every difference.
        """
        lines = differences(self.about["made_of"], expected)
        if lines:
            raise ValueError(
                f"{self.metadata_path} was not made for this training:\n  " + "\n  ".join(lines) + "\n"
                "Choose the model, task and lora that it was made with, or run make_cache.py again with these."
            )

    def _check_sizes(self, height: int | None, width: int | None) -> None:
        for size in self.index.sizes():
            for name, found, wanted in zip(("width", "height"), size, (width, height), strict=True):
                if wanted not in (None, found):
                    raise ValueError(
                        f"{self.metadata_path} has samples of {size[0]} x {size[1]} pixels, dataset.{name}={wanted}; "
                        "leave that null, or make the cache at that size."
                    )

    def _check_captions(self) -> None:
        """What is said here of captions must be so in all that was cached; what is not said is as it was there."""
        wanted, unsaid = captions_of(self.augmentation), captions_of(Augmentation())
        for name in [name for name in wanted if wanted[name] != unsaid[name]]:
            others = [made[name] for made in self.about["captions"] if made[name] != wanted[name]]
            if others:
                raise ValueError(
                    f"{self.metadata_path} was made with dataset.augmentation.{name}={others[0]!r}, not "
                    f"{wanted[name]!r}; leave it out here, or make the cache with it."
                )

    def _check_variants(self) -> None:
        for weights, names in self.about["variants"]:
            missing = sorted({choice.variant for choice in self.augmentation.choices(weights)} - set(names))
            if missing:
                raise ValueError(
                    f"{self.metadata_path} holds no variant {missing[0]!r} of its samples, which dataset.augmentation "
                    "may choose; run make_cache.py with the same augmentation."
                )


def captions_of(augmentation: Augmentation) -> dict[str, Any]:
    """What of an augmentation is in the texts themselves, so that a cache cannot take another."""
    return {"captions": dict(augmentation.captions), "prefix": augmentation.prefix, "suffix": augmentation.suffix}


def _restored(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"unread"}:
        return Unread(tuple(value["unread"][:2]), _absent, _absent)
    return value


def _absent() -> None:
    raise ValueError("A cache does not hold the images themselves.")


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What a cache was made of (`CacheKeys.about`) and what a training would make it of, where they differ."""
    if found["pipeline"] != expected["pipeline"]:
        return [f"it is {found['pipeline']}'s, not {expected['pipeline']}'s"]
    lines = []
    for name, unit in expected["units"].items():
        made_of = found["units"].get(name)
        if made_of is None:
            lines.append(f"it holds nothing of {name}")
            continue
        changed = [key for key in unit if key != "weights" and made_of.get(key) != unit[key]]
        lines += [f"{name}: another {key} ({_found(made_of.get(key), unit[key])})" for key in changed]
        weights = [model for model, now in unit["weights"].items() if now not in (None, made_of["weights"].get(model))]
        lines += [f"{name}: another {model} ({made_of['weights'].get(model)})" for model in weights]
    absent = sorted(set(expected["inputs"]) - set(found["inputs"]))
    return lines + [f"it holds no {name}" for name in absent]


def _found(found: Any, expected: Any) -> str:
    """What was found instead; of settings, each of which is JSON, those that differ and what they are here."""
    if not isinstance(found, dict):
        return str(found)
    then, now = (_by_name({name: json.loads(text) for name, text in each.items()}) for each in (found, expected))
    differing = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
    return "; ".join(f"{name} {then.get(name)!r}, here {now.get(name)!r}" for name in differing)


def _by_name(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings within settings by their dotted names."""
    values = {}
    for name, value in settings.items():
        values |= _by_name(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values
