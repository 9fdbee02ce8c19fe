"""
TRL's `DPOTrainer` with the likelihood of what people said in the place of its sigmoid, and with shared prefixes.

TRL loads models and tokenizers, wraps adapters, tokenizes, computes log-probabilities, logs and saves as before. Here
a pair has the likelihood of `disco_trl.distributions.likelihood`, in which the reward of an answer has the location
β (log π − log π_ref); the columns with judgements reach it; and policy and reference compute each prompt once.
`docs/upstream.md` lists what is overridden, and why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, concatenate_datasets
from datasets.fingerprint import Hasher
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction
from trl import DPOConfig, DPOTrainer
from trl.trainer import utils as trl_utils
from trl.trainer.utils import get_config_model_id, selective_log_softmax

from ..data.columns import JUDGEMENT_COLUMNS, OVERALL, RATING_COLUMNS, ROW_COLUMN, SCALES
from ..data.dpo_collator import DataCollatorForDiscoDPO
from ..data.judgements import Survey, check_answerable, log_readings, survey
from ..data.rankings import rankings_to_pairs
from ..data.validation import check_preferences
from ..distributions.judgements import Judgements
from ..distributions.likelihood import log_likelihood
from ..distributions.reward_distribution import RewardDistribution, get_family
from ..models.likelihood_head import difference_quantile, to_responses, width_penalty
from ..models.policy import run_on_forests
from ..models.policy_head import PolicyHead, last_states
from ..models.prefix_sharing import prepare
from .adoption import answer_settings
from .callbacks import FiniteGuard
from .dpo_config import SIGMOID, DiscoDPOConfig
from .dpo_scales import AnswerScales
from .metrics import MetricsOnDevice, pair_figures, summarize
from .shared_config import LIKELIHOOD_LEARNING_RATE
from .upstream_checks import check_overrides, upstream_error


logger = get_logger(__name__)

FUSED_SINCE = "1.15"
"""Release of TRL since which its DPO reads log-probabilities from a fused LM head, which prefix sharing needs."""
SCALE_STEP = 0.05
"""Learning rate of a learned scale, times the hidden size: where hidden states are about 1, a step of Adam changes
log σ by a twentieth at most."""
PRECOMPUTED_AT_ONCE = 2048
"""Number of pairs whose log-probabilities under the reference are computed, and then kept in a cache, at once."""
LOGGED = ("nll", "accuracy", "prob_chosen")
OVERRIDDEN = (
    *("_prepare_dataset", "_set_signature_columns_if_needed", "_precompute_ref_logps", "compute_ref_log_probs"),
    *("compute_loss", "create_optimizer", "_save", "_load_from_checkpoint", "_load_best_model"),
)
"""Methods that TRL's trainer or transformers' must have and call, as ours do their work in them."""


class DiscoDPOTrainer(MetricsOnDevice, DPOTrainer):
    """
    Trainer for Direct Preference Optimization (DPO) with the likelihood of what people said.

    The arguments are those of [`~trl.DPOTrainer`], with the same meaning. The reward of an answer y to a prompt x is a
    random variable with the location β (log π(y|x) − log π_ref(y|x)), and the loss is the negative log-likelihood of
    the judgements of a pair: votes, ties, strengths, soft labels. Of a forced choice it is −log P(chosen ≻ rejected),
    which with the default `reward_family="logistic"` is the loss of DPO (arXiv 2305.18290), TRL's
    `loss_type="sigmoid"`.

    Example:

    ```python
    from datasets import load_dataset
    from disco_trl import DiscoDPOTrainer

    trainer = DiscoDPOTrainer(
        model="Qwen/Qwen3-0.6B",
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```

    Args:
        model, ref_model, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
        optimizers, quantization_config, peft_config:
            Same as in [`~trl.DPOTrainer`]. The datasets may have the columns with judgements that
            [`DiscoRewardTrainer`] reads, other than ratings. With a `data_collator` of your own, batches are padded.
        args ([`DiscoDPOConfig`], *optional*):
            Configuration for this trainer.

    Raises:
        `ValueError`: If a row of the data cannot be used, in which case the message names row, column and fix, or if
            an option of TRL's is set that has no meaning here.
    """

    args: DiscoDPOConfig
    model: Any
    accelerator: Any
    _tag_names = ["trl", "dpo", "disco-trl"]  # noqa: RUF012 (as TRL declares it)
    _name = "Disco DPO"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DiscoDPOConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        # Args
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DiscoDPOConfig(f"{name.split('/')[-1]}-DPO")
        elif not isinstance(args, DiscoDPOConfig):
            raise TypeError(f"args must be a DiscoDPOConfig, got {type(args).__name__}; change the class name")
        check_overrides(type(self), DPOTrainer, OVERRIDDEN)
        if pictures := {"image", "images"}.intersection(getattr(train_dataset, "column_names", None) or ()):
            raise ValueError(
                f"train dataset, column '{min(pictures)}': pictures are not supported, because TRL reads such rows "
                "only when they are batched; use trl's DPOTrainer, or leave the column out to train on the texts"
            )

        # What there is to learn beside the policy
        is_dataset = isinstance(train_dataset, Dataset | IterableDataset)  # TRL refuses anything else
        self._surveyed = survey(train_dataset) if is_dataset else Survey()
        self._surveyed_dataset = train_dataset
        self._family = get_family(args.reward_family)
        self._scales = AnswerScales(args)
        self._likelihood_settings = answer_settings(args, self._surveyed)

        # Model, PEFT, data and reference, by TRL
        self._own_collator = data_collator is None
        self._is_set_up = False
        self._unread = {"train": [], "eval": []}
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._scales.forget_model()
        self._set_up()
        self._check_construction()
        self._guard = FiniteGuard(lambda: self.accelerator.scaler is not None, lambda: self.is_deepspeed_enabled)
        self.add_callback(self._guard)
        self.add_callback(_ZeroGradients(self.policy_head))
        learned = ", ".join(self.policy_head.learned)
        if learned and optimizers[0] is not None:
            raise ValueError(
                f"the optimizer passed does not hold what is learned beside the policy ({learned}); leave it out, or "
                "set these to numbers"
            )
        if learned and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"{'DeepSpeed' if self.is_deepspeed_enabled else 'FSDP'} optimizes the model's own parameters alone, "
                f"and there is more to learn ({learned}); give numbers for it (tie_width, label_noise, and "
                "strength_levels=1), leave scale_training out, or train with DDP"
            )

    # Preparation

    def _set_up(self) -> None:
        """Once the models are there: have them take forests, and make the collator. TRL's constructor needs both
        before it ends if it computes the reference in advance."""
        if self._is_set_up:
            return
        self._is_set_up = True
        self.policy_head = self._new_head().to(self.accelerator.device)
        self._wrapped_head: torch.nn.Module = self.policy_head
        if self.policy_head.learned and self.args.world_size > 1:
            self._wrapped_head = torch.nn.parallel.DistributedDataParallel(self.policy_head)
        refusal = self._share_prefixes() if self.args.prefix_sharing else None
        if refusal is not None:
            logger.warning(
                f"prefix_sharing is off: {refusal}. Batches are padded as TRL's are, which costs time and changes "
                "nothing else."
            )
        if self._own_collator:
            theirs: Any = self.data_collator
            self.data_collator = DataCollatorForDiscoDPO(
                pad_token_id=theirs.pad_token_id,
                max_length=theirs.max_length,
                truncation_mode=theirs.truncation_mode,
                pad_to_multiple_of=theirs.pad_to_multiple_of,
                share_prefixes=self.args.prefix_sharing and refusal is None,
                weigh_by=self.args.weigh_by,
                likelihood=self._likelihood_settings,
            )

    def _new_head(self) -> PolicyHead:
        """What is to be learned beside the policy."""
        scale = self._family.unit_scale if self.args.fixed_scale is None else self.args.fixed_scale
        head = PolicyHead(
            self._likelihood_settings,
            self._family,
            None if self.args.scale_training else scale,
            self.model.config.get_text_config().hidden_size,
        )
        if "strength_levels" in self._likelihood_settings:
            levels = range(self._likelihood_settings["strength_levels"] + 1)
            counts = [self._surveyed.strengths.get(level, 0) for level in levels]
            head.likelihood.init_strengths(counts, difference_quantile(self._family))
        return head

    def _check_construction(self) -> None:
        """Check that TRL's constructor has done what is relied on (its metrics, its datasets)."""
        if not {"train", "eval"} <= getattr(self, "_metrics", {}).keys():
            raise upstream_error("trl's DPOTrainer does not keep its metrics in `_metrics`, as 'train' and 'eval'")
        columns = getattr(self.train_dataset, "column_names", None)
        if columns is not None and ROW_COLUMN not in columns:
            raise upstream_error(
                "trl's DPOTrainer does not call `_prepare_dataset`, or has not kept what it returned, so the rows "
                "would not be checked"
            )

    def _share_prefixes(self) -> str | None:
        """Have policy and reference take forests, or return the reason why they cannot."""
        if not hasattr(trl_utils, "add_fused_lm_head"):
            return f"TRL reads log-probabilities from a fused LM head, which knows no padding, since {FUSED_SINCE}"
        if not self._own_collator:
            return "the batches are made by a data_collator of your own"
        if self.args.torch_compile:
            return "with torch_compile each shape of a batch would be compiled anew"
        if self.accelerator.dispatch_batches:
            return "dispatch_batches=True cuts batches apart between the sequences"
        if self.aux_loss_enabled:
            return "the loss that balances experts counts the tokens of a padded batch"
        models = (
            [self.model] if self.ref_model is None else [self.model, self.accelerator.unwrap_model(self.ref_model)]
        )
        for model in models:
            if (refusal := prepare(model)) is not None:
                return refusal
        for model in models:
            run_on_forests(model.get_base_model() if is_peft_model(model) else model)
        return None

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: DPOConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        found = self._surveyed if dataset is self._surveyed_dataset else survey(dataset)
        _refuse_what_says_nothing(found, dataset_name)
        likelihoods = {OVERALL: self._likelihood_settings}
        if dataset_name == "train":
            log_readings(dataset_name, found, likelihoods)
        tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        checked = check_preferences(dataset, tokenizer, dataset_name, num_proc=args.dataset_num_proc)
        check_answerable(dataset, dataset_name, found, likelihoods)
        pairs = rankings_to_pairs(checked, args.weigh_by, args.dataset_num_proc)  # type: ignore[attr-defined]  # our config
        pairs = self._scales.give(pairs, dataset_name)
        return super()._prepare_dataset(pairs, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer removes every other column before the collator sees it, without a word.
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        wanted = (ROW_COLUMN, *SCALES, *(name for name in JUDGEMENT_COLUMNS if name not in RATING_COLUMNS))
        columns += [name for name in wanted if name not in columns]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._set_up()
        if not isinstance(dataset, Dataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        # TRL keeps the result in a cache when it is complete. Part by part, a run that is interrupted loses one part.
        found = []
        for start in range(0, len(dataset), PRECOMPUTED_AT_ONCE):
            part = dataset.select(range(start, min(start + PRECOMPUTED_AT_ONCE, len(dataset))))
            # TRL's key of its cache names the rows and the weights, and here also how the two are put together.
            precision = (self.accelerator.mixed_precision, str(self.model.dtype))
            shares = getattr(self.data_collator, "share_prefixes", False)
            part._fingerprint = Hasher.hash((part._fingerprint, self.ld_alpha, precision, shares))
            place = f", from row {start}" if len(dataset) > PRECOMPUTED_AT_ONCE else ""
            found.append(super()._precompute_ref_logps(part, name + place, batch_size))
        return concatenate_datasets(found)

    # Training

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for module, rate in (
            (self.policy_head.likelihood, LIKELIHOOD_LEARNING_RATE),
            (self.policy_head.scale, SCALE_STEP / self.model.config.get_text_config().hidden_size),
        ):
            own = [*module.parameters()]
            if own and id(own[0]) not in held:
                optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        given = {name: value for name, value in inputs.items() if name not in OF_LOSS}
        return super().compute_ref_log_probs(model, given)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # What flows: a batch → log-probabilities of policy and reference → locations → −log likelihood. TRL runs the
        # policy, computes its other losses if there are any, and logs its metrics.
        mode = "train" if self.model.training else "eval"
        judgements = Judgements.of_batch(inputs)
        scales, ends, rows = (inputs.pop(name, None) for name in ("scales", "ends", ROW_COLUMN))
        if judgements is None and mode == "train" and self._surveyed.said:
            lacks = f"a batch lacks what the column {', '.join(sorted(self._surveyed.said))} says"
            if self._own_collator:
                raise upstream_error(f"{lacks}: transformers has removed columns that the loss is about")
            raise ValueError(
                f"{lacks}, because the data_collator passed does not read it; pass a DataCollatorForDiscoDPO "
                "(disco_trl.data.dpo_collator), or leave the column out of the data"
            )
        if "ref_chosen_logps" not in inputs:
            references = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), references, strict=True))
        backbone = self.model.get_base_model() if is_peft_model(self.model) else self.model
        policy = _Recorder(model, backbone.base_model if self.args.scale_training else None)
        with self._without_sigmoid() as weight:
            found = super().compute_loss(policy, inputs, return_outputs, num_items_in_batch)
        theirs, outputs = found if return_outputs else (found, None)
        if not policy.outputs:
            raise upstream_error("trl's DPOTrainer does not call the model that it is given")
        if isinstance(theirs, Tensor) and self.loss_types == [SIGMOID] and not self.aux_loss_enabled:
            raise upstream_error("trl's DPOTrainer does not take its losses from `loss_types`, and would add its own")

        of_policy = _log_probs(policy.outputs[0], inputs, self.ld_alpha)
        of_reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        location = self.beta * (of_policy - of_reference.to(of_policy))
        states = location.detach()[:, None]
        if self.args.scale_training:
            states = last_states(policy.states, inputs, ends)
            states = states.detach() if self.args.scale_training == "detached" else states
            if mode == "train":
                self.policy_head.scale.track(states.detach(), location.detach()[:, None], self.accelerator.gather)
        own_scales, learned = self._wrapped_head(states)
        rewards = self._rewards(location, own_scales, scales)
        count = len(of_policy) // 2
        chosen, rejected = rewards[:count], rewards[count:]
        if judgements is None:
            judgements = Judgements.forced_choices(count, of_policy.device)
        log_likelihoods = log_likelihood(chosen, rejected, judgements, to_responses(learned))
        loss = -(judgements.weight.to(log_likelihoods) * log_likelihoods).mean().to(of_policy)
        if mode == "train" and (penalty := width_penalty(learned, self._family.unit_scale)) is not None:
            # The loss is a mean over the pairs of a step, and the prior counts once in the whole run.
            pairs_per_step = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            loss = loss + penalty.to(loss) / (pairs_per_step * max(self.state.max_steps, 1))
        loss = theirs + weight * loss
        if mode == "train":
            self._guard.check_loss(loss, rows, self.args, self.state)

        with torch.no_grad():
            figures = self.accelerator.gather(pair_figures(chosen, rejected, judgements))
        metrics = summarize(figures)
        has_scales = self._scales.mean is not None or self.args.scale_training
        logged = (*LOGGED, "scale_mean", "scale_min", "scale_max") if has_scales else LOGGED
        metrics = {name: metrics[name] for name in logged}
        metrics |= {name: value[0] for name, value in learned.items() if len(value) == 1}
        self._note(mode, metrics)
        return (loss, outputs) if return_outputs else loss

    def _rewards(self, location: Tensor, scale: Tensor, scales: Tensor | None) -> RewardDistribution:
        """Rewards with these locations and scales, times what the data say of the scales."""
        names = self._family.shape_names
        shape = self._family.shape_from_raw(location.new_zeros(*location.shape, len(names))) if names else None
        scale = (scale * self._scales.relative(scales)).to(location)
        return RewardDistribution(location, scale, self._family, shape)

    @contextlib.contextmanager
    def _without_sigmoid(self) -> Iterator[float]:
        """TRL computes its other losses, from the reference that is in the batch. Yields the weight of the sigmoid."""
        kept: tuple[Any, ...] = (self.loss_types, self.loss_weights, self.precompute_ref_logps)
        losses = list(zip(self.loss_types, self.loss_weights, strict=True))
        _, weight = losses.pop(self.loss_types.index(SIGMOID))
        self.loss_types, self.loss_weights = [name for name, _ in losses], [of_loss for _, of_loss in losses]
        self.precompute_ref_logps = True
        try:
            yield weight
        finally:
            self.loss_types, self.loss_weights, self.precompute_ref_logps = kept

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self.policy_head.save(Path(str(output_dir or self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.policy_head.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.policy_head.load(Path(str(self.state.best_model_checkpoint)))


OF_LOSS = ("judgements", "rating_counts", "strength_counts", "scales", "ends", ROW_COLUMN)
"""What the collator adds to a batch for the loss, and models do not take."""


class _ZeroGradients(TrainerCallback):
    """Has no gradient of a module survive a step: transformers sets those of the model to zero, and no others."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.module.zero_grad()


class _Recorder:
    """A model that is called as the one inside, and keeps what that returns, and the last hidden states on request."""

    def __init__(self, model: Any, backbone: Any = None):
        self.model, self.backbone = model, backbone
        self.outputs: list[Any] = []
        self.states: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        handle = None if self.backbone is None else self.backbone.register_forward_hook(self._keep)
        try:
            output = self.model(*args, **kwargs)
        finally:
            if handle is not None:
                handle.remove()
        self.outputs.append(output)
        return output

    def _keep(self, _module: Any, _args: Any, output: Any) -> None:
        self.states = output[0]


def _log_probs(outputs: Any, inputs: dict[str, Any], ld_alpha: float | None) -> Tensor:
    """
    Log-probability of each answer.

    Args:
        outputs:
            What the policy returned for the batch: `log_probs` of each token, or logits.
        inputs (`dict`):
            The padded batch of 2P sequences.
        ld_alpha (`float`, *optional*):
            Weight of the tokens beyond the length of the shorter answer (LD-DPO, arXiv 2409.06411).

    Returns:
        `torch.Tensor` of shape `(2 * P,)`: In nats.
    """
    is_answer = inputs["completion_mask"][:, 1:]
    per_token = getattr(outputs, "log_probs", None)
    if per_token is None:
        # (Adapters that learn a prompt put tokens of their own before the sequence.)
        logits = outputs.logits[:, -inputs["input_ids"].shape[1] :][:, :-1]
        per_token = selective_log_softmax(logits, inputs["input_ids"][:, 1:])
    # What is not an answer may be −∞ in a model that never gives some token.
    per_token = per_token[:, -is_answer.shape[1] :].masked_fill(is_answer == 0, 0)
    if ld_alpha is None:
        return per_token.sum(dim=1)
    # Summed as TRL sums the reference, so that a policy that is the reference has the same to the last bit.
    number = is_answer.cumsum(dim=1)
    is_beyond = number > torch.minimum(*is_answer.sum(dim=1).chunk(2)).repeat(2)[:, None]
    return (per_token * ~is_beyond).sum(dim=1) + ld_alpha * (per_token * is_beyond).sum(dim=1)


def _refuse_what_says_nothing(found: Survey, dataset_name: str) -> None:
    """Refuse judgements that the difference of two rewards does not determine."""
    if rated := [name for name in RATING_COLUMNS if name in found.said]:
        raise ValueError(
            f"{dataset_name} dataset, column {' and '.join(map(repr, rated))}: the policy's reward of an answer is "
            "known up to a constant of its prompt, so that ratings of single answers say nothing about it; leave the "
            "columns out, or train a reward model on them (DiscoRewardTrainer)"
        )
    if "attribute" in found.said:
        raise ValueError(
            f"{dataset_name} dataset, column 'attribute': a policy has one reward; keep the rows about what it is to "
            "learn, and leave the column out"
        )
