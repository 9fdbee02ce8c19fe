"""Train reward models that give a distribution in place of a number, with TRL's own tools.

The public names load on first use, so that `import disco_trl` costs nothing: torch and transformers come in only with
the name that needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__


__all__ = [
    "DiscoDPOConfig",
    "DiscoDPOTrainer",
    "DiscoReward",
    "DiscoRewardConfig",
    "DiscoRewardModel",
    "DiscoRewardTrainer",
    "JointRewardDistribution",
    "RemoteReward",
    "RewardDistribution",
    "best_of_n",
    "get_family",
]

_MODULE_OF = {
    "DiscoDPOConfig": "trainer.dpo_config",
    "DiscoDPOTrainer": "trainer.dpo_trainer",
    "DiscoReward": "rewards.disco_reward",
    "DiscoRewardConfig": "trainer.reward_config",
    "DiscoRewardModel": "models.modeling",
    "DiscoRewardTrainer": "trainer.reward_trainer",
    "JointRewardDistribution": "distributions.joint",
    "RemoteReward": "serving.client",
    "RewardDistribution": "distributions.reward_distribution",
    "best_of_n": "rewards.best_of_n",
    "get_family": "distributions.reward_distribution",
}

if TYPE_CHECKING:
    from .distributions.joint import JointRewardDistribution
    from .distributions.reward_distribution import RewardDistribution, get_family
    from .models.modeling import DiscoRewardModel
    from .rewards.best_of_n import best_of_n
    from .rewards.disco_reward import DiscoReward
    from .serving.client import RemoteReward
    from .trainer.dpo_config import DiscoDPOConfig
    from .trainer.dpo_trainer import DiscoDPOTrainer
    from .trainer.reward_config import DiscoRewardConfig
    from .trainer.reward_trainer import DiscoRewardTrainer


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next access is a plain one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
