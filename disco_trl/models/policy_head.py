"""What DPO learns beside the policy: how people answer, and on request the scale of an answer's reward.

What flows: the policy's last hidden state of each answer `(S, H)` → its scale `(S,)`, and the few numbers of the
likelihood. It is saved in a file beside the policy, which no other tool reads or needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..distributions.reward_distribution import Family
from .likelihood_head import LikelihoodHead
from .scale_head import ScaleHead


LEARNED_FILE, SETTINGS_FILE = "disco_likelihood.safetensors", "disco_likelihood.json"


class PolicyHead(nn.Module):
    """
    What is learned beside a policy whose log-probabilities are the locations of rewards.

    The geometric mean of the scales is the unit of the family, whatever is learned (see [`ScaleHead`]), because a free
    mean would only be another β.

    Args:
        settings (`Mapping[str, Any]`):
            The quantities of the likelihood, see [`LikelihoodHead`].
        family ([`~disco_trl.distributions.families.Family`]):
            Family of the rewards.
        scale (`float`, *optional*):
            Scale of every reward. If `None`, the scale is learned.
        hidden_size (`int`):
            Size H of the policy's hidden states.
    """

    def __init__(self, settings: Mapping[str, Any], family: Family, scale: float | None, hidden_size: int):
        super().__init__()
        self.family_name = family.name
        self.likelihood = LikelihoodHead(dict(settings), family.unit_scale, device=None)
        self.scale = ScaleHead(hidden_size, family.unit_scale, scale, device=None)
        self.likelihood.init_weights()
        self.scale.init_weights()

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of what is learned; there may be nothing."""
        return tuple(name for name, _ in self.named_parameters())

    def forward(self, states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """
        Compute scales, and read what is known of how people answer.

        Args:
            states (`torch.Tensor` of shape `(S, H)`):
                The policy's last hidden state of each answer. If the scale is fixed, only shape and device matter.

        Returns:
            `tuple[torch.Tensor, dict[str, torch.Tensor]]`: Scales of shape `(S,)`, in reward units, and
            [`LikelihoodHead.values`].
        """
        learned = {name: value[0] for name, value in self.likelihood(states[:1].float()).items()}
        return self.scale(states.float())[:, 0], learned

    def save(self, folder: Path) -> None:
        """Write what is learned to a folder, and nothing if nothing is."""
        if not self.learned:
            return
        save_file({name: tensor.cpu() for name, tensor in self.state_dict().items()}, folder / LEARNED_FILE)
        scale = self.scale.fixed_scale if self.scale.fixed_scale is not None else "learned"
        settings = {"reward_family": self.family_name, "scale": scale, **self.likelihood.settings}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """
        Read back what [`PolicyHead.save`] has written.

        Raises:
            `ValueError`: If something is learned, and the folder does not have it.
        """
        if not self.learned:
            return
        path = folder / LEARNED_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {LEARNED_FILE}, in which {', '.join(self.learned)} would be; resume from a "
                "checkpoint of DiscoDPOTrainer, or begin anew"
            )
        found = load_file(path)
        if missing := sorted(self.state_dict().keys() ^ found.keys()):
            raise ValueError(
                f"{path} was written by a run that learned other things ({', '.join(missing)} differ); resume with "
                "the configuration and the columns of that run"
            )
        self.load_state_dict(found)


def last_states(states: Tensor, batch: Mapping[str, Tensor], ends: Tensor | None) -> Tensor:
    """
    Take the state at the end of each sequence.

    Args:
        states (`torch.Tensor` of shape `(1, T, H)` or `(S, L, H)`):
            What the backbone returned for a forest or for a padded batch.
        batch (`Mapping[str, torch.Tensor]`):
            The padded batch of S sequences.
        ends (`torch.Tensor` of shape `(S,)`, *optional*):
            Places of the last tokens in the row of a forest. If `None`, the batch was padded.

    Returns:
        `torch.Tensor` of shape `(S, H)`: The states.
    """
    if ends is not None:
        return states[0, ends]
    mask = batch["attention_mask"]
    # Adapters that learn a prompt put tokens of their own before the sequence.
    last = states.shape[1] - 1 - mask.flip(dims=(1,)).int().argmax(dim=1)
    return states[torch.arange(len(states), device=states.device), last]
