"""What docs/environment.md says of the environment is what the environment does."""

import re
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import yaml

import envs  # noqa: F401  (as the page says)
from agents import evaluate, train
from agents.evaluate import EvaluateConfig
from agents.tasks import TasksConfig
from agents.train import TrainConfig
from benchmarks import make_family
from envs.rewards import REWARDS
from envs.spaces import action_table, observation_table
from ssdkd import run
from ssdkd.config import build, read_yaml
from ssdkd.devices import threads_given_back

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")


def test_both_tables_are_todays() -> None:
    assert action_table() in PAGE
    assert observation_table() in PAGE


def test_every_reward_is_explained() -> None:
    assert set(REWARDS) == set(re.findall(r"^\| `(\w+)` \| ", PAGE, re.MULTILINE)) - {"reward"}


def test_the_examples_run() -> None:
    first, own_policy = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    found: dict[str, Any] = {}
    exec(first, found)
    assert found["terminated"] is False
    assert isinstance(found["env"], gymnasium.Env)
    with threads_given_back():
        exec(own_policy.replace('"rounds": 40', '"rounds": 4, "inversion": {"warmup": 2}'), found)
    efforts = [line["effort"] for line in found["result"].history]
    assert efforts[0] == pytest.approx(2.0)
    assert efforts[0] > efforts[1] > 0.5, "the schedule decides, not the policy that the configuration names"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"configs/([\w-]+)\.yaml", PAGE))))
def test_the_configs_named_are_valid(name: str) -> None:
    values = read_yaml(name)
    if "algorithm" in values[0]:
        build(TrainConfig, [values])
    else:
        build(TasksConfig, [values])
        build(EvaluateConfig, [values])
    assert yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) == values[0]


def test_every_flag_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (run.main, train.main, evaluate.main, make_family.run):
        with pytest.raises(SystemExit):
            command(["--help"])
    assert set(re.findall(r"--([a-z][\w-]+)", PAGE)) <= set(re.findall(r"--([a-z][\w-]+)", capsys.readouterr().out))
