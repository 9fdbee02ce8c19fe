"""Train reward models that give a distribution in place of a number, with TRL's own tools.

The public names load on first use, so that `import disco_trl` costs nothing: torch and transformers come in only with
the name that needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

__all__ = [
    "DiscoReward",
    "DiscoRewardConfig",
    "DiscoRewardModel",
    "DiscoRewardTrainer",
    "RemoteReward",
    "RewardDistribution",
    "best_of_n",
    "get_family",
]

_MODULE_OF = {
    "DiscoReward": "reward",
    "DiscoRewardConfig": "config",
    "DiscoRewardModel": "modeling",
    "DiscoRewardTrainer": "trainer",
    "RemoteReward": "client",
    "RewardDistribution": "distributions",
    "best_of_n": "reward",
    "get_family": "distributions",
}

if TYPE_CHECKING:
    from .client import RemoteReward
    from .config import DiscoRewardConfig
    from .distributions import RewardDistribution, get_family
    from .modeling import DiscoRewardModel
    from .reward import DiscoReward, best_of_n
    from .trainer import DiscoRewardTrainer


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next access is a plain one
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
