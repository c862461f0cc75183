"""The options of the group `reward`: they add up, build rewards, and are metrics of a validation."""

import pytest
import tiny
import yaml

from diffsynth.config import build, check
from diffsynth.core.loader import ModelConfig
from diffsynth.diffusion.rewards import Reward

OPTIONS = sorted(path.stem for path in (tiny.ROOT / "conf" / "reward").glob("*.yaml") if path.stem != "none")
METRICS = [name for name in OPTIONS if (tiny.ROOT / "conf" / "validation" / f"{name}.yaml").exists()]
GIVEN = {"http": ["reward.http.url=http://localhost:8000"], "judge": ["reward.judge.model=vlm"]}


def entry(reward: dict[str, Reward] | None = None, evaluation_reward: dict[str, Reward] | None = None): ...


def composed(*overrides: str, keys=("reward",)):
    cfg = tiny.compose("train", *overrides)
    return type(cfg)({key: cfg[key] for key in keys})


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_builds_a_reward_of_its_name(name):
    cfg = composed(f"+reward=[{name}]", *GIVEN.get(name, []))
    check(cfg, entry)
    (key, reward), *others = build(cfg)["reward"].items()
    assert (key, others) == (name, []) and isinstance(reward, Reward) and reward.weight == 1


def test_options_add_up_and_one_can_be_measured_alone():
    cfg = composed(
        "+reward=[jpeg_size,brightness]",
        "+reward@evaluation_reward=[text_match,colour]",
        "reward.jpeg_size.weight=-1",
        "evaluation_reward.colour.colour=blue",
        keys=("reward", "evaluation_reward"),
    )
    check(cfg, entry)
    built = build(cfg)
    assert {key: list(rewards) for key, rewards in built.items()} == {
        "reward": ["jpeg_size", "brightness"],
        "evaluation_reward": ["text_match", "colour"],
    }
    assert built["reward"]["jpeg_size"].weight == -1 and built["evaluation_reward"]["colour"].rgb == (0, 0, 255)


@pytest.mark.parametrize("name", ["clip_score", "pick_score", "aesthetic", "hps_v2"])
def test_no_hub_is_asked_for_files_that_are_on_disk(name, tmp_path, monkeypatch):
    (reward,) = build(composed(f"+reward=[{name}]"))["reward"].values()
    configs = [value for value in vars(reward).values() if isinstance(value, ModelConfig)]
    monkeypatch.setattr(ModelConfig, "_download", lambda self, pattern: pytest.fail(f"{pattern} is asked for"))
    for config in configs:
        config.local_model_path, patterns = str(tmp_path), config.origin_file_pattern
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            file = config.folder / pattern.replace("*", "config")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        assert config.resolve()
    assert len(configs) == {"pick_score": 2, "aesthetic": 2}.get(name, 1)


def test_options_without_a_server_are_metrics_with_the_same_settings():
    assert set(OPTIONS) - set(METRICS) == {"http", "judge", "symmetry"}
    cfg = tiny.compose("train", f"validation=[{','.join(METRICS)}]")
    check(cfg, tiny.schema("train"))
    for name in METRICS:
        file = yaml.safe_load((tiny.ROOT / "conf" / "reward" / f"{name}.yaml").read_text())
        assert cfg.validation.metrics[name] == file[name]
