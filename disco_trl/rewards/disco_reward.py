"""The hand-off: a reward model as the reward function of a policy trainer.

TRL calls a [`~disco_trl.rewards.reward_function.RewardFunction`] in GRPO, RLOO and every other trainer that accepts
one. It maps the distribution of each row's reward to a number by a transform (`disco_trl.distributions.transforms`),
by default `"mean"`, the location. [`DiscoReward`] runs the model in this process.
[`disco_trl.serving.client.RemoteReward`] queries a server.

What flows: prompts and completions → location, scale and traits of each row → the rows of all processes, in the order
of the processes → groups of equal prompts → metrics and rewards → the rewards of this process's rows.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.contents import message_problem
from ..data.tokenization import Content, SpecialTokens, chat_template_arguments, tokenize
from ..distributions.transforms import get_transform
from ..models.distributed import process_state
from ..models.inference import TOKENS_PER_BATCH, check_pad_token, load_trained, run_in_batches
from ..models.loading import check_found
from ..models.modeling import DiscoRewardModel
from ..models.reward_view import RewardsByAttribute, RewardView
from ..models.scale_head import MEMORY_OF_ROWS, ScaleHead
from .annotate import Annotator, map_dataset
from .reward_function import RewardFunction, Scored


logger = logging.getLogger(__name__)

FAR = 3.0
"""Distance of a batch's mean from the mean of the training data, in standard deviations of the training data, beyond
which a warning is logged, if the distance exceeds it by `STANDARD_ERRORS`."""
STANDARD_ERRORS = 3.0
"""How many standard errors of a distance count as chance: that of the mean of n answers is 1/√n standard deviations of
the training data, and that of the mean of the training data accordingly."""
LEAST_TRAINING_ROWS = 100
"""Smallest number of training rows whose spread is trusted, at which the standard error of the spread is 7 %. The
moments of fewer rows are mostly of a head that had hardly begun to learn."""


class DiscoReward(RewardFunction):
    """Disco reward model as a TRL reward function: `reward(prompts, completions, **columns) -> list[float]`.

    Texts are tokenized exactly as in training. A plain text gets the end-of-text token. A conversation goes through
    the chat template, with the `chat_template_kwargs` of the trainer's config, and the row's `tools` and
    `chat_template_kwargs` if the dataset has these columns. Other columns are ignored. TRL's own path for a model in
    `reward_funcs` adds neither the end-of-text token nor, where the tokenizer has one, the beginning-of-text token to
    a plain text, which changes its reward, and it does not read the two columns. For conversations without them both
    agree.

    Nothing is truncated: a text that is longer than the number of the model's positions is an error. The model runs in
    evaluation mode and without gradients, whatever the mode of the policy.

    In addition to the metrics of [`~disco_trl.rewards.reward_function.RewardFunction`], the batch is compared with the
    training data:

    - `scale/drift`: the mean of log(σ / u) in nats, which is 0 on the training data.
    - `shift/location`, `shift/scale`, `shift/distance`: the distance of the batch's mean location, log scale and
      distance (see `ScaleHead.traits`) from those of the training data, in standard deviations of the training data.

    If a shift exceeds 3 by more than chance explains (a standard deviation of the mean of one answer is that of the
    training data, that of n answers √n times less), a warning is logged once: the answers are unlike those that the
    model was trained on, and its rewards and scales are unreliable there. No warning is given if the model has seen
    fewer than 100 training rows.

    Args:
        model (`str`, `os.PathLike`, [`DiscoRewardModel`] or [`~peft.PeftModel`]):
            Path or Hub id of a reward model, which is loaded onto this process's device, or a live disco model, which
            stays where it is. If a `PeftModel` has several adapters, the active one is used.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*, defaults to `None`):
            Tokenizer of the training. If `None`, it is loaded from the checkpoint, or from the path that a live model
            was loaded from. It has to be passed for a model that was trained or merged in this process and for a live
            `PeftModel`, which only know the path of their base model, whose chat template may differ.
        transform (`str`, *optional*, defaults to `"mean"`):
            One of `"mean"`, `"lower_bound"`, `"quantile"`, `"certainty_equivalent"`, `"win_rate"` and `"sample"`.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype in which a model is loaded. `"auto"` is the dtype of the checkpoint.
        device (`str` or `torch.device`, *optional*, defaults to `None`):
            Device to move the model to.
        tokens_per_batch (`int`, *optional*, defaults to `TOKENS_PER_BATCH`):
            Maximum number of tokens in one batch, padding included.
        name (`str`, *optional*, defaults to `None`):
            Name in TRL's logs. If `None`, `disco_` followed by the name of the transform.
        attribute (`str`, *optional*, defaults to `None`):
            Attribute whose reward is taken, of a model that knows several. By default the overall reward.
        weights (`Mapping[str, float]`, *optional*, defaults to `None`):
            Weights of attributes, of whose rewards the weighted sum is taken in its place.
        minimum, min_probability, floor:
            Constraints on attributes, see [`~disco_trl.models.reward_view.RewardView`]: an answer that too few people
            would rate at least the `minimum` gets at most the `floor`.
        **options:
            Options of the transform: `k`, `q`, `beta` or `seed`, and `total`.

    Raises:
        `ValueError`: If the transform or an option is unknown, out of its domain, or undefined for the model's family,
        if the path contains a language model without a reward head, if no tokenizer is passed or found, or if the
        model does not know the padding token.
        `TypeError`: If the model is not a disco model.

    Example:

    ```python
    >>> from disco_trl import DiscoReward

    >>> reward = DiscoReward("my-reward-model", transform="lower_bound", k=1.0)
    >>> trainer = GRPOTrainer(model=policy, reward_funcs=reward, args=args, train_dataset=prompts)
    ```
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
        attribute: str | None = None,
        weights: Mapping[str, float] | None = None,
        minimum: Mapping[str, float] | None = None,
        min_probability: float = 0.5,
        floor: float | None = None,
        **options: Any,
    ):
        # Options are validated before a model is loaded, which may take minutes.
        reward_transform = get_transform(transform, **options)
        self.view = RewardView(attribute, weights, minimum, min_probability, floor)
        if isinstance(model, str | os.PathLike):
            check_found(os.fspath(model))
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
            # Batches are padded with it, and transformers' pooling searches for it from the right to find the last
            # token of each text.
            inner.config.get_text_config().pad_token_id = _pad_token_id(processing_class)
        check_pad_token(inner, inner.config.get_text_config().pad_token_id)
        self.view.of_nothing(inner)

    def tokenize(self, prompts: Sequence[Content], completions: Sequence[Content], **columns: Any) -> list[list[int]]:
        """Token ids of each prompt with its completion.

        Args:
            prompts (`Sequence`):
                `B` texts or `B` lists of messages.
            completions (`Sequence`):
                `B` texts or `B` lists of messages, of the same kind as `prompts`.
            **columns:
                Lists of `B` values. `tools` and `chat_template_kwargs` are read, the others are ignored.

        Returns:
            `list[list[int]]`: `B` sequences of token ids.

        Raises:
            `ValueError`: If prompts and completions do not match, or a row cannot be tokenized. The message contains
            the row.
        """
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
        # The search reads every text, so it ends with the first find.
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

    def map(self, dataset: Any, prefix: str = "", all_attributes: bool = False) -> Any:
        """Adds columns with the rewards of its answers to a dataset.

        A row with one answer gets the columns `location`, `scale` and `reward_TRANSFORM`. A pair gets each of them for
        both answers, as in `location_chosen`, and `prob_chosen`, P(chosen ≻ rejected). A stream is scored as it is
        read.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
                Dataset with answers, of any type that TRL documents: preference, unpaired preference,
                prompt-completion, language modeling, or tokenized pairs.
            prefix (`str`, *optional*, defaults to `""`):
                Prefix of the names of the new columns.
            all_attributes (`bool`, *optional*, defaults to `False`):
                Whether to add `location_NAME` and `scale_NAME` for each attribute that the model knows.

        Returns:
            [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset with the new columns.

        Raises:
            `ValueError`: If the dataset has no answers, a row is invalid, a new column exists already, the transform
            needs all answers to a prompt at once, or the model knows no attributes and all are asked for.
        """
        return map_dataset(dataset, Annotator(self, prefix=prefix, all_attributes=all_attributes))

    def _score(self, prompts: Sequence[Content], completions: Sequence[Content], columns: dict[str, Any]) -> Scored:
        """Rewards of `B` answers, with `ScaleHead.traits` of shape `(B, 3)`."""
        sequences = self.tokenize(prompts, completions, **columns)
        order: list[int] = []
        parts = []
        # NaN for models that have no statistics of their training data. `_report_shift` does not read them then.
        traits = torch.full((len(sequences), 3), math.nan)
        head, knows_training_rows = self._scale_head, self._knows_training_rows()
        for indices, output in run_in_batches(self.model, sequences, self.tokens_per_batch):
            order += indices
            parts.append(RewardsByAttribute.of_output(self._inner, output).to("cpu", torch.float32))
            if knows_training_rows:
                traits[indices] = head.traits(output.scale_state, output.logits, output.scale).cpu()
        if not parts:
            # An empty batch has the same tensors as that of every other process, which `gather` relies on.
            parts.append(RewardsByAttribute.of_nothing(self._inner).to("cpu", torch.float32))
        # `run_in_batches` sorts the rows by length; here they return to the order of the arguments.
        found = RewardsByAttribute.cat(parts)[torch.tensor(order, dtype=torch.long).argsort()]
        rewards = self.view.read(self._inner, found)
        bad = torch.nonzero(~(rewards.location.isfinite() & rewards.scale.isfinite())).flatten().tolist()
        if bad:
            worst = rewards[bad[0]]
            raise FloatingPointError(
                f"row {bad[0]}: the reward is {worst.location.item()} ± {worst.scale.item()} ({len(bad)} such "
                "rows), and TRL would take nan for no reward at all; load the reward model in bfloat16 or float32 "
                "instead of float16"
            )
        locations = {name: of_attribute.location for name, of_attribute in found.of_attributes().items()}
        return Scored(rewards, traits, locations)

    def _report_shift(self, traits: Tensor) -> dict[str, Tensor]:
        if not self._knows_training_rows():
            return {}
        head = self._scale_head
        # The variance of a trait is 0 if the training data were alike in it; the bound keeps the division finite.
        mean, std = head.mean_traits.cpu(), head.var_traits.cpu().sqrt().clamp_min(1e-6)
        metrics = {"scale/drift": traits[:, 1].mean()}
        # The running moments stand for at most twice the rows of their memory.
        rows = min(head.rows_seen.item(), 2 * MEMORY_OF_ROWS)
        chance = STANDARD_ERRORS * math.sqrt(1 / len(traits) + 1 / rows)
        for name, shift in zip(("location", "scale", "distance"), (traits.mean(dim=0) - mean) / std, strict=True):
            metrics[f"shift/{name}"] = shift
            if rows >= LEAST_TRAINING_ROWS and abs(shift) > FAR + chance:
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
        """Whether the rewards have a `location_error`, the epistemic uncertainty of the location."""
        return self.view.of_nothing(self._inner).location_error is not None

    @property
    def _inner(self) -> DiscoRewardModel:
        return self.model.get_base_model() if is_peft_model(self.model) else self.model

    @property
    def _scale_head(self) -> ScaleHead:
        # Looked up at each use, because another adapter of a PeftModel may have become the active one.
        return self._inner.scale_head

    def _knows_training_rows(self) -> bool:
        return self._scale_head.fixed_scale is None and self._scale_head.rows_seen.item() > 0


def _saved_tokenizer(path: str) -> PreTrainedTokenizerBase:
    if not path:
        raise ValueError("this model was not loaded from a path; pass processing_class, the tokenizer of its training")
    try:
        # With None, the default, transformers asks at the terminal whether to run a tokenizer's custom code.
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no tokenizer that can be loaded; pass the one of its training as processing_class "
            f"({type(error).__name__}: {error})"
        ) from error


def _check_messages(messages: list[Any], row: int) -> None:
    """Raises a `ValueError` for messages that most chat templates would render as Python prints them."""
    if not messages:
        raise ValueError(f"row {row}: no messages; leave the row out")
    for turn, message in enumerate(messages):
        problem = message_problem("", turn, message, needs_content=False)
        if problem is not None:
            raise ValueError(f"row {row}: {problem.wrong}; {problem.fix}")


def _pad_token_id(processing_class: PreTrainedTokenizerBase) -> int:
    pad_token_id = processing_class.pad_token_id
    if pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set processing_class.pad_token to the one used in training")
    return pad_token_id
