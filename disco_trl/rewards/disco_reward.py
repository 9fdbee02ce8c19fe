"""The hand-off: a reward model in the place where a policy is optimized.

A `RewardFunction` is what TRL calls in GRPO, RLOO and wherever else it takes one. It turns the distribution of each
row's reward into one number by a transform (`disco_trl.distributions.transforms`), by default `"mean"`, the location.
`DiscoReward` has its model at hand; `disco_trl.serving.client.RemoteReward` has it behind a server. `best_of_n` picks
an answer.

What flows: prompts and completions → location, scale and traits of each row → the same of all processes' rows, in the
order of the processes → groups of equal prompts → metrics and rewards → this process's own.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.tokenization import SpecialTokens, chat_template_arguments, tokenize
from ..data.values import shown
from ..distributions.reward_distribution import RewardDistribution
from ..distributions.transforms import get_transform
from ..models.distributed import process_state
from ..models.inference import TOKENS_PER_BATCH, load_trained, run_in_batches
from ..models.modeling import DiscoRewardModel
from ..models.scale_head import ScaleHead
from .annotate import Annotator, map_dataset
from .reward_function import Content, RewardFunction


logger = logging.getLogger(__name__)

FAR = 3.0
"""Standard deviations of the training rows beyond which the mean of a batch is not like them any more."""


class DiscoReward(RewardFunction):
    """A disco reward model as a TRL reward function: ``reward(prompts, completions, **columns) -> list[float]``.

    Texts are tokenized exactly as in training: a plain text gets the end-of-text token, a conversation goes through
    the chat template, with the row's `tools` and `chat_template_kwargs` where the dataset has such columns; other
    columns are ignored. (TRL's own path for a model in `reward_funcs` gives plain texts neither that token nor the
    beginning-of-text token of tokenizers that have one, which makes another reward; for conversations the two agree.)
    Nothing is truncated; what is longer than the model has positions for is an error. The model runs in evaluation
    mode and without gradients, whatever the policy is doing.

    Beside the metrics of `RewardFunction` it reports how the answers compare with those that the model was trained on:

    - ``scale/drift``: mean log(σ / u), whose mean over the training rows is 0; in nats;
    - ``shift/location``, ``shift/scale``, ``shift/distance``: how far the batch's mean location, log scale and
      distance (see `ScaleHead.traits`) are from the training rows', in their standard deviations.

    The first time that a shift exceeds 3 it warns: the model is asked about answers unlike those it was trained on,
    and its rewards, and its scales too, are guesses there.

    Args:
        model: a path or Hub id, loaded onto this process's device; or a live disco model or `PeftModel` around one,
            left where it is. Of several adapters the active one is asked.
        processing_class: tokenizer; by default the one saved with the checkpoint at that path, or at the path that a
            live model was loaded from. Pass the one of training for a model that was trained or merged in this
            process, and for any live `PeftModel`: these only know the path of their base model, whose chat template
            may be another.
        transform: `"mean"`, `"lower_bound"`, `"quantile"`, `"certainty_equivalent"`, `"win_rate"` or `"sample"`.
        dtype: of a model that is loaded; by default the checkpoint's.
        device: where to move the model.
        tokens_per_batch: tokens that go through the model at once, padding counted.
        name: as for `RewardFunction`.
        **options: of the transform: `k`, `q`, `beta` or `seed`, and `total`.

    Raises:
        ValueError: if a transform or option is unknown or out of its domain, or does not exist for the model's family;
            if the path holds a language model without a reward head; or if no tokenizer is passed or found.
        TypeError: if the model is not a disco model.

    Example:
        >>> from disco_trl import DiscoReward
        >>> reward = DiscoReward("my-reward-model", transform="lower_bound", k=1.0)
        >>> trainer = GRPOTrainer(model=policy, reward_funcs=reward, args=args, train_dataset=prompts)
    """

    def __init__(
        self,
        model: Any,
        processing_class: PreTrainedTokenizerBase | None = None,
        transform: str = "mean",
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        name: str | None = None,
        **options: Any,
    ):
        reward_transform = get_transform(transform, **options)  # before a model is loaded
        if isinstance(model, str | os.PathLike):
            if processing_class is None:
                processing_class = _saved_tokenizer(os.fspath(model))
            model = load_trained(os.fspath(model), dtype=dtype).to(device or process_state().device)
        elif device is not None:
            model = model.to(device)
        inner: Any = model.get_base_model() if is_peft_model(model) else model
        if not isinstance(inner, DiscoRewardModel):
            raise TypeError(
                f"DiscoReward takes a disco model or its path, got {type(inner).__name__}; load it with "
                "DiscoRewardModel.from_pretrained(...), which also takes scalar reward models"
            )
        if processing_class is None:
            if is_peft_model(model):
                raise ValueError(
                    "a live PeftModel does not know the directory that its adapter came from, and its base model's "
                    "tokenizer may have another chat template; pass "
                    "processing_class=AutoTokenizer.from_pretrained(ADAPTER_DIRECTORY)"
                )
            processing_class = _saved_tokenizer(inner.config._name_or_path)
        super().__init__(inner.config.disco["reward_family"], reward_transform, name)
        self.model: Any = model
        self.processing_class = processing_class
        self.tokens_per_batch = tokens_per_batch
        if inner.config.get_text_config().pad_token_id is None:
            # Texts are padded with it, and the stock code looks for it from the right to find the last token.
            inner.config.get_text_config().pad_token_id = _pad_token_id(processing_class)

    def tokenize(self, prompts: Sequence[Content], completions: Sequence[Content], **columns: Any) -> list[list[int]]:
        """Token ids of each prompt with its completion; arguments and errors are those of `distribution`."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; they go together row by row")
        read = {name: columns[name] for name in ("tools", "chat_template_kwargs") if columns.get(name) is not None}
        for name, values in read.items():
            if len(values) != len(prompts):
                raise ValueError(f"{len(values)} {name} but {len(prompts)} prompts; they go together row by row")
        sequences = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if type(prompt) is not type(completion) or not isinstance(prompt, str | list):
                raise ValueError(
                    f"row {row}: the prompt is a {type(prompt).__name__} and the completion a "
                    f"{type(completion).__name__}; both must be texts, or both lists of messages"
                )
            content: Any = prompt + completion  # type: ignore[operator]
            if isinstance(content, list):
                _check_messages(content, row)
            try:
                arguments = chat_template_arguments({name: values[row] for name, values in read.items()})
                sequences.append(tokenize(self.processing_class, content, **arguments))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"row {row}: {error}") from error
            self._warn_of_special_token(content, row)
        return sequences

    @cached_property
    def _special_tokens(self) -> SpecialTokens:
        return SpecialTokens(self.processing_class)

    def _warn_of_special_token(self, content: Content, row: int) -> None:
        if "special token" in self._warned:
            return
        token = self._special_tokens.find(content)
        if token is not None:
            self._warn_once(
                "special token",
                f"row {row}: the text holds {token!r}, which the tokenizer takes for the special token, as TRL does: "
                "whoever wrote it can end a turn, or begin another, and be rewarded for that. Unless you rendered the "
                "text yourself, look at it, and take it out. No further row is named",
            )

    def map(self, dataset: Any, prefix: str = "") -> Any:
        """A `datasets.Dataset` or `IterableDataset` with columns added that say what its answers are worth.

        For one answer to a row they are ``location``, ``scale`` and ``reward_TRANSFORM``; for a pair each of these for
        both, as in ``location_chosen``, and ``prob_chosen``, P(chosen ≻ rejected). A stream is scored as it is read.

        Args:
            dataset: of any type with answers that TRL documents: preference, unpaired preference, prompt-completion,
                language modeling, tokenized pairs.
            prefix: put before the names of the new columns.

        Raises:
            ValueError: if the dataset has no answers, something is wrong with a row, a column of a new name is there
                already, or the transform needs all the answers to a prompt at once.
        """
        return map_dataset(dataset, Annotator(self, prefix=prefix))

    def _rewards_and_traits(
        self, prompts: Sequence[Content], completions: Sequence[Content], columns: dict[str, Any]
    ) -> tuple[RewardDistribution, Tensor]:
        """Distributions `[B]` and `ScaleHead.traits` `[B, 3]`."""
        sequences = self.tokenize(prompts, completions, **columns)
        order: list[int] = []
        parts = []
        traits = torch.full((len(sequences), 3), math.nan)
        head, knows_training_rows = self._scale_head, self._knows_training_rows()
        for indices, output in run_in_batches(self.model, sequences, self.tokens_per_batch):
            order += indices
            parts.append(self._inner.rewards_of(output).map(lambda tensor: tensor.float().cpu()))
            if knows_training_rows:
                traits[indices] = head.traits(output.pooled_hidden_state, output.logits, output.scale).cpu()
        if not parts:
            none = torch.empty(0)
            shape = torch.empty(0, len(self.family.shape_names)) if self.family.shape_names else None
            return RewardDistribution(none, none, self.family.name, shape), traits
        rewards = RewardDistribution.cat(parts)[torch.tensor(order).argsort()]
        bad = torch.nonzero(~(rewards.location.isfinite() & rewards.scale.isfinite())).flatten().tolist()
        if bad:
            worst = rewards[bad[0]]
            raise FloatingPointError(
                f"row {bad[0]}: the reward is {worst.location.item()} ± {worst.scale.item()} ({len(bad)} such "
                "rows), and TRL would take nan for no reward at all; load the reward model in bfloat16 or float32 "
                "instead of float16"
            )
        return rewards, traits

    def _report_shift(self, traits: Tensor) -> dict[str, Tensor]:
        if not self._knows_training_rows():
            return {}
        head = self._scale_head
        mean, std = head.mean_traits.cpu(), head.var_traits.cpu().sqrt().clamp_min(1e-6)
        metrics = {"scale/drift": traits[:, 1].mean()}
        for name, shift in zip(("location", "scale", "distance"), (traits.mean(dim=0) - mean) / std, strict=True):
            metrics[f"shift/{name}"] = shift
            if abs(shift) > FAR:
                self._warn_once(
                    "far",
                    f"the {name} of these answers lies {shift.item():+.1f} standard deviations from that of the "
                    "answers that the reward model was trained on. Rewards and scales are guesses out there: look "
                    "at the completions for reward hacking, hold the policy closer to its reference (beta), or "
                    "collect preferences on such answers",
                )
        return metrics

    @property
    def has_location_error(self) -> bool:
        """Whether the model's rewards have a `location_error`."""
        return self._inner.has_location_error

    @property
    def _inner(self) -> DiscoRewardModel:
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    @property
    def _scale_head(self) -> ScaleHead:
        # Looked up each time: of a PeftModel another adapter may have become the active one.
        return self._inner.scale_head

    def _knows_training_rows(self) -> bool:
        return self._scale_head.fixed_scale is None and self._scale_head.rows_seen.item() > 0


def _saved_tokenizer(path: str) -> PreTrainedTokenizerBase:
    if not path:
        raise ValueError("this model was not loaded from a path; pass processing_class, the tokenizer of its training")
    try:
        # Not None, the default: with it a tokenizer with code of its own asks at the terminal whether to run it.
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no tokenizer that can be loaded; pass the one of its training as processing_class "
            f"({type(error).__name__}: {error})"
        ) from error


def _check_messages(messages: list[Any], row: int) -> None:
    """Raise a `ValueError` for what most chat templates would write out as Python prints it."""
    for turn, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"row {row}: turn {turn} is {shown(message)}, not a message; write it as "
                '{"role": ..., "content": ...}'
            )
        content = message.get("content")
        if isinstance(content, list) and not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content
        ):
            raise ValueError(f"row {row}: a message holds more than text, and a reward model reads text only")
        if not isinstance(content, str | list | None):
            raise ValueError(
                f"row {row}: turn {turn} has {shown(content)} for its content, where a text should be; write it as one"
            )


def _pad_token_id(processing_class: PreTrainedTokenizerBase) -> int:
    pad_token_id = processing_class.pad_token_id
    if pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set processing_class.pad_token to the one used in training")
    return pad_token_id
