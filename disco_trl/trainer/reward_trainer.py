"""
TRL's `RewardTrainer` with a distribution in the place of a number.

TRL loads tokenizers, wraps adapters, prepares datasets, logs, evaluates and saves as before. The class here gives it a
model with a scale, replaces the loss by the exact −log P(chosen ≻ rejected), tracks the mean hidden state that fixes
the unit of reward, and checks the data. `docs/upstream.md` lists what is overridden, and why.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import is_peft_model, parse_flag_from_env
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction, TrainOutput
from trl import RewardConfig, RewardTrainer
from trl.trainer.utils import get_config_model_id

from ..data.collator import ANSWERS, BY_RATER, OF_ATTRIBUTES, DataCollatorForDiscoPreference
from ..data.columns import JUDGEMENT_COLUMNS, OVERALL, RANKED_IDS, ROW_COLUMN
from ..data.judgements import Survey, check_answerable, log_readings, survey
from ..data.preparation import check_token_ids, finish_preferences, prepare_preferences
from ..data.samplers import group_stream
from ..distributions.judgements import Judgements
from ..distributions.likelihood import Responses, log_likelihood, split_log_likelihood
from ..distributions.reward_distribution import RewardDistribution
from ..models.adapters import keep_to_one_family
from ..models.distributed import check_parallelism, keep_head_apart
from ..models.inference import check_pad_token, vocabulary_size
from ..models.likelihood_head import width_penalty
from ..models.model_card import make_model_card
from ..models.modeling import DiscoRewardModel
from ..models.prefix_sharing import prepare
from .adoption import Adoption, attribute_settings, likelihood_settings, warn_of_idle_margins
from .batching import PairBatching
from .callbacks import FiniteGuard, FoldAttributes, PushWithSettings, SamplerEpoch
from .checkpoints import WholeCheckpoints
from .head_fits import HeadFits
from .metrics import FIGURES, EvaluationMetrics, pair_figures, summarize_all
from .predictions import PredictionMemory
from .reward_config import DiscoRewardConfig
from .search import SearchFromHere
from .shared_config import LIKELIHOOD_LEARNING_RATE
from .unseen_pairs import UnseenPairs
from .upstream_checks import UpstreamChecks, hook


logger = get_logger(__name__)


class DiscoRewardTrainer(
    PairBatching, WholeCheckpoints, UnseenPairs, EvaluationMetrics, SearchFromHere, RewardTrainer
):
    """
    Trainer for distributional reward models.

    The arguments are those of [`~trl.RewardTrainer`], with the same meaning. The reward of an answer is a random
    variable with a location and a scale, and the loss is −log P(chosen ≻ rejected), where P is the exact probability
    that one random reward exceeds the other. The model goes back to Thurstone (1927), with a learned scale for every
    answer. For its use in reward models see Distributional Preference Learning (arXiv 2312.08358) and PURM
    (arXiv 2503.22480). With a `margin` m in the data, the loss is −log F((Δ − m) / s). Metrics do not count m.

    Example:

    ```python
    from datasets import load_dataset
    from disco_trl import DiscoRewardTrainer

    trainer = DiscoRewardTrainer(
        model="Qwen/Qwen3-0.6B",
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained. Can be either:

            - A Hub id or a directory of a base language model, a scalar reward model, a disco checkpoint or a PEFT
              adapter.
            - A sequence classifier with one label, or a [`~peft.PeftModel`] around one. It is upgraded in place: it
              keeps its weights and gains a scale.
        args ([`DiscoRewardConfig`], *optional*):
            Configuration for this trainer.
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. The reward head is trained, kept in float32 and saved with the
            adapter even if neither `task_type` nor `modules_to_save` is set. The object passed is not changed.
        data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers,
        optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config:
            Same as in [`~trl.RewardTrainer`].

    Raises:
        `ValueError`: If a row of the data cannot be used, in which case the message names row, column and fix; if the
            model cannot carry a reward distribution; or if its checkpoint contradicts `args`.
        `FloatingPointError`: If a loss or a gradient is not finite during training. The message names the rows of the
            batch.
    """

    args: DiscoRewardConfig
    model: Any  # a `DiscoRewardModel`, or a `PeftModel` around one
    data_collator: Any
    _reward_model: DiscoRewardModel  # the model, or what is inside the `PeftModel`

    _tag_names = ["trl", "reward-trainer", "disco-trl"]  # noqa: RUF012 (as TRL declares it)
    _name = "Disco Reward"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: DiscoRewardConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
    ):
        # Args
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DiscoRewardConfig(f"{name.split('/')[-1]}-Reward")
        elif not isinstance(args, DiscoRewardConfig):
            raise TypeError(f"args must be a DiscoRewardConfig, got {type(args).__name__}; change the class name")
        _check_streams(args, train_dataset, eval_dataset)
        _check_processes(args)
        self._upstream = UpstreamChecks(type(self))

        # What there is to learn beside the rewards
        is_dataset = isinstance(train_dataset, Dataset | IterableDataset)  # TRL refuses anything else
        self._surveyed = survey(train_dataset) if is_dataset else Survey()
        self._surveyed_dataset = train_dataset
        likelihood = likelihood_settings(args, self._surveyed)
        attributes = attribute_settings(args, self._surveyed)

        # Model, PEFT and data, by TRL
        self._adoption = Adoption(args, likelihood, attributes, self._surveyed, peft_config)
        with self._adoption.in_constructor(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
                quantization_config=quantization_config,
                peft_config=self._adoption.peft_config,
            )
        self._upstream.after_construction(self)
        self.add_callback(self._upstream)
        self._adoption.restore_heads()
        self._reward_model = self._adoption.model
        self._family = self._reward_model.family
        warn_of_idle_margins(train_dataset, self._family, self._likelihoods[OVERALL])
        if is_peft_model(self.model):
            keep_to_one_family(self.model)

        # Optimizer
        if optimizers[0] is not None:
            self._check_optimizer(optimizers[0])

        # Data collator
        if data_collator is None:
            self.data_collator = self._make_collator()

        # What is fitted when training ends, to the predictions that it has made
        learns_scale = self._reward_model.scale_head.fixed_scale is None
        wants_calibration = args.calibrate is not False and learns_scale
        if args.calibrate is False and args.scale_training == "at_end" and learns_scale:
            logger.warning(
                "The scale will be the same for every answer: calibrate=False turns off what fits it when training "
                "ends. Set scale_training='joint' to train it with the rest, which nothing checks then."
            )
        refusal = None
        if wants_calibration and self._passes > 1 and self._head_stays_whole:
            refusal = self._set_pairs_aside(self._passes, self._data_seed)
        self._calibrates = wants_calibration and refusal is None
        # The first process keeps them and fits; the others receive the result, for all to have the same head.
        learns_attributes = bool(self._reward_model.attributes)
        keeps = (self._calibrates or args.epistemic or learns_attributes) and args.process_index == 0
        self._memory = self._make_memory() if keeps else None
        predict_unseen = self._predict_unseen if self._unseen is not None else None
        if learns_attributes:
            if self._head_is_in_shards:
                raise ValueError(
                    "the training data rate or compare attributes, whose rows make up that of the overall reward, and "
                    "the head would be in shards; train with replicas (DDP, ZeRO-1 or ZeRO-2), or leave them out"
                )
            self.add_callback(FoldAttributes(self._reward_model.reward_head))
        self._head_fits = HeadFits(
            self._reward_model, args, self._memory, self.log, wants_calibration, refusal, predict_unseen
        )
        self.add_callback(self._head_fits)

        # Which pairs go into a batch
        if args.groups_by_length and isinstance(self.train_dataset, IterableDataset):
            self.train_dataset = group_stream(self.train_dataset, self._pairs_per_step, self._data_seed)
        self.add_callback(SamplerEpoch())

        # Figures of an evaluation's pairs, and a guard against losses and gradients that are not finite
        self._evaluated: list[torch.Tensor] = []
        self._unread = {"train": [], "eval": []}
        self._guard = FiniteGuard(lambda: self.accelerator.scaler is not None, lambda: self.is_deepspeed_enabled)
        self.add_callback(self._guard)
        self.add_callback(PushWithSettings())

    @property
    def _head_stays_whole(self) -> bool:
        """Whether the head can be fitted when training ends, as far as it is known before it begins."""
        return not (self.args.load_best_model_at_end or self._head_is_in_shards)

    @property
    def _head_is_in_shards(self) -> bool:
        """Whether no process holds the whole head while it is trained."""
        return self.is_fsdp_enabled or getattr(self.args.deepspeed_plugin, "zero_stage", None) == 3

    def _make_memory(self) -> PredictionMemory:
        known = self._likelihoods
        ratings = {name: len(of_name.get("rating_values", ())) for name, of_name in known.items()}
        strengths = {name: of_name.get("strength_levels", 0) for name, of_name in known.items()}
        return PredictionMemory(ratings, strengths, keeps_hidden_states=self.args.epistemic)

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that was made before the model had a scale: the scale would stay as it starts."""
        optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        if not optimized.issuperset(self._reward_model.scale_head.parameters()):
            raise ValueError(
                "the optimizer passed does not hold the parameters of the scale, which this model has only now; "
                "make the optimizer from those of DiscoRewardModel.from_pretrained(...), or pass "
                "optimizer_cls_and_kwargs instead"
            )

    def _make_collator(self) -> DataCollatorForDiscoPreference:
        """TRL's collator, with row numbers for error messages and, where the model supports it, shared prefixes."""
        args = self.args
        refusal = self._why_no_prefix_sharing() if args.prefix_sharing else None
        if refusal is not None:
            logger.warning(
                f"prefix_sharing is off for this {type(self._reward_model).__name__}: {refusal}. Batches are "
                "padded as TRL's are, which costs time and changes nothing else."
            )
        pairs_of_rows = self._surveyed.pairs_of_rows
        return DataCollatorForDiscoPreference(
            pad_token_id=self.data_collator.pad_token_id,
            pad_to_multiple_of=self.data_collator.pad_to_multiple_of,
            share_prefixes=args.prefix_sharing and refusal is None,
            weigh_by=args.weigh_by,
            likelihoods=self._likelihoods,
            # Processes gather their figures for the metrics, which needs the same number of pairs in each.
            pairs_per_row=max(pairs_of_rows) if args.world_size > 1 and len(pairs_of_rows) > 1 else None,
        )

    @property
    def _likelihoods(self) -> dict[str, dict[str, Any]]:
        """What the model learns of how people answer, by attribute: of its training data, and before that."""
        return self._adoption.model.likelihoods

    @hook
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Once more, as a model can bring tensor parallelism with it.
        check_parallelism(parallelism=getattr(self.accelerator, "parallelism_config", None))
        keep_head_apart(self.accelerator)

    def _why_no_prefix_sharing(self) -> str | None:
        """Reason why batches are padded instead, or `None`."""
        if self.args.torch_compile:
            return "with torch_compile each shape of a batch would be compiled anew"
        if self.args.n_gpu > 1:
            return "a batch of one row cannot be split among the devices of one process (use accelerate launch)"
        if self.accelerator.dispatch_batches:
            return "dispatch_batches=True cuts batches apart between the sequences"
        return prepare(self.model)

    @hook
    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        # TRL calls this for each dataset of its constructor, with the model in place, and for those of `evaluate`.
        check_pad_token(self._adoption.model, processing_class.pad_token_id)
        found = self._surveyed if dataset is self._surveyed_dataset else survey(dataset)
        if dataset_name == "train":  # before a row is refused for what a column of another meaning holds
            log_readings(dataset_name, found, self._likelihoods)
        prepared = prepare_preferences(dataset, processing_class, dataset_name, num_proc=args.dataset_num_proc)
        # TRL tokenizes what is not tokenized yet, a stream say. Its own length filter is turned off, because it would
        # read the dataset row by row once more.
        unfiltered = copy.copy(args)
        unfiltered.max_length = None
        prepared = super()._prepare_dataset(prepared, processing_class, unfiltered, dataset_name)
        prepared = finish_preferences(prepared, dataset_name, max_length=args.max_length)
        check_answerable(dataset, dataset_name, found, self._likelihoods, args.attributes)  # type: ignore[attr-defined]  # our config
        return check_token_ids(prepared, dataset_name, vocabulary_size(self._adoption.model))

    @hook
    def _set_signature_columns_if_needed(self):
        # The Trainer removes every other column before the collator sees it, without a word.
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in (ROW_COLUMN, RANKED_IDS, "ranks", *JUDGEMENT_COLUMNS) if name not in columns]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is not None:  # the caller's own
            return super().create_optimizer(*args, **kwargs)
        optimizer = super().create_optimizer(*args, **kwargs)
        # What the likelihood learns beside the rewards are a few numbers in units of reward, or logarithms. A learning
        # rate that suits a language model would hardly move them.
        few = (".likelihood.", ".attributes.raw_weight")
        learned = {id(p) for name, p in self.model.named_parameters() if any(part in name for part in few)}
        own = [p for group in optimizer.param_groups for p in group["params"] if id(p) in learned]
        if own:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in learned]
            optimizer.add_param_group({"params": own, "lr": LIKELIHOOD_LEARNING_RATE, "weight_decay": 0.0})
        return optimizer

    def _judgements_of(self, inputs: dict[str, Any]) -> dict[str, Judgements]:
        of_attributes = inputs.pop(OF_ATTRIBUTES, {})
        said = {OVERALL: Judgements.of_batch(inputs)}
        said |= {name: Judgements.of_batch(of_attributes.get(name, {})) for name in self._reward_model.attributes}
        rows: torch.Tensor = inputs["read_at"] if "read_at" in inputs else inputs["input_ids"]
        count, device = len(rows) // 2, rows.device
        return {
            # Without columns that say more, the chosen sides were preferred overall.
            name: Judgements.forced_choices(count, device, inputs.get("margin"), said=float(name == OVERALL))
            if judgements is None
            else judgements
            for name, judgements in said.items()
        }

    def _log_likelihoods(
        self, chosen: RewardDistribution, rejected: RewardDistribution, said: Judgements, responses: Responses
    ) -> torch.Tensor:
        """Log-likelihood of what was said about each pair `(P,)`, with the gradient that it is trained by."""
        if self.args.scale_training == "joint":
            return log_likelihood(chosen, rejected, said, responses)
        # The scale stays as it is until training ends. Its gradient is 0 and not missing, as DDP waits for all.
        chosen, rejected = (side.replace(scale=side.scale.detach() + 0 * side.scale) for side in (chosen, rejected))
        return split_log_likelihood(chosen, rejected, said, responses)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # What flows: a batch → TRL's forward and metrics → distributions → −log likelihood → figures of each pair,
        # gathered from all processes → metrics; and, in training, running moments of the heads and the memory. All of
        # it once for the overall reward, and once for each attribute.
        mode = "train" if self.model.training else "eval"
        self._upstream.check_batch(mode, inputs)
        rows = inputs.pop(ROW_COLUMN, None)
        answers, by_rater = (inputs.pop(name, None) for name in (ANSWERS, BY_RATER))
        judgements = self._judgements_of(inputs)

        # TRL's method runs the model and logs its metrics of the rewards, which are the locations here. Its loss is
        # not used: it is a sum from which the Bradley–Terry term cannot be taken out again.
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        # accelerate repeats rows to even out the last batches. In training they count, as in every other trainer.
        count = len(outputs.logits) // 2
        real = slice(None) if mode == "train" else slice(self._real_pairs(count, process=True) or None)
        losses, figures = [], []
        metrics: dict[str, torch.Tensor] = {}
        for (name, said), output in zip(judgements.items(), outputs.by_attribute(), strict=True):
            rewards = self._reward_model.rewards_of(outputs, name)
            responses = self._reward_model.responses_of(outputs, name)
            chosen, rejected = rewards[:count], rewards[count:]
            log_likelihoods = self._log_likelihoods(chosen, rejected, said, responses)
            loss = -(said.weight.to(log_likelihoods) * log_likelihoods)[real].mean().to(rewards.location)
            if name == OVERALL and self.args.center_rewards_coefficient is not None:
                center = torch.mean((chosen.location + rejected.location)[real] ** 2)
                loss = loss + self.args.center_rewards_coefficient * center
            quantities = {key: value[0] for key, value in (output.likelihood or {}).items()}
            penalty = width_penalty(quantities, self._family.unit_scale)
            if mode == "train" and penalty is not None:
                # The loss is a mean over the pairs of a step, and the prior counts once in the whole run.
                loss = loss + penalty / (self._pairs_per_step * max(self.state.max_steps, 1))
            losses.append(loss)
            with torch.no_grad():
                figures.append(pair_figures(chosen, rejected, said))
            metrics |= {
                key if name == OVERALL else f"{key}/{name}": value.detach().mean()
                for key, value in {"location_error": rewards.location_error, **vars(responses)}.items()
                if value is not None and key not in ("thresholds", "strength_boundaries")
            }
        loss = sum(losses[1:], losses[0])
        if mode == "train" and self._pairs_per_batch is not None:
            # The Trainer averages the losses of batches whatever their size, and a pair must weigh the same in each.
            loss = loss * (count / self._pairs_per_batch)

        with torch.no_grad():
            gathered = self.accelerator.gather(torch.cat(figures, dim=1))
            self._upstream.check_layout(self, mode, *gathered[:, FIGURES - 2 : FIGURES].T)
            gathered = gathered[: self._real_pairs(len(gathered))]
            if mode == "train":
                metrics |= summarize_all(gathered, [*judgements])
            else:
                self._evaluated.append(gathered)  # summarized in `log`, over the whole evaluation
        # TRL's accuracy counts pairs in which the chosen side is ahead, even if the rejected side won the votes, or if
        # nobody compared the two.
        self._metrics[mode]["accuracy"].pop()
        if not self._metrics[mode]["accuracy"]:
            del self._metrics[mode]["accuracy"]  # TRL divides by the number of entries.
        self._note(mode, metrics)

        if mode == "train":
            is_finite = self._guard.check_loss(loss, rows, self.args, self.state)
            heads = self._reward_model.reward_head.by_attribute().values()
            for head, part in zip(heads, outputs.by_attribute(), strict=True):
                if head.scale.fixed_scale is None:
                    # A run that is about to be stopped leaves the moments finite.
                    state, location = (seen.where(is_finite, 0) for seen in (outputs.scale_state, part.location))
                    head.scale.track(state, location, gather=self.accelerator.gather)
            # Only in the first pass are predictions made in advance, which calibration needs. A posterior uses all.
            in_advance = (self.state.epoch or 0) < 1
            keeps_all = self.args.epistemic or self._reward_model.attributes
            if self._memory is not None and (in_advance or keeps_all):
                self._memory.add_output(outputs, judgements, answers, in_advance, by_rater)
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._unseen_memory = None  # of an earlier run
        output = super().train(*args, **kwargs)
        # The last evaluation was of the head as it was before it was fitted, and is what the model card quotes.
        if self._head_fits.changed and self.args.eval_strategy != "no" and self.eval_dataset is not None:
            metrics = self.evaluate()
            if self.hp_search_backend is not None:
                self.objective = self.compute_objective(metrics)
        return output

    @hook
    def _prepare_input(self, data: Any) -> Any:
        # With DeepSpeed the Trainer casts floating-point inputs to the dtype of the weights. Here those are margins,
        # weights and soft labels, which the model never sees and bfloat16 would round.
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        # In the place of the card that PEFT writes
        card = self._make_model_card(model_name=self._output_dir.name)
        card.save(Path(output_dir or self._output_dir) / "README.md")

    def create_model_card(  # type: ignore[override]  # TRL's signature, which is not transformers' own
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """
        Writes a model card that says what the rewards are and how to load them.

        Args:
            model_name (`str`, *optional*):
                Name of the model.
            dataset_name (`str`, *optional*):
                Name of the dataset used for training.
            tags (`str` or `list[str]`, *optional*):
                Tags to be associated with the model card.
        """
        if self.is_world_process_zero():
            self._make_model_card(model_name, dataset_name, tags).save(self._output_dir / "README.md")

    def _make_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> ModelCard:
        # The last evaluation of each eval set
        evaluated = [entry for entry in self.state.log_history if any(key.startswith("eval_") for key in entry)]
        metrics = {key: value for entry in evaluated for key, value in entry.items() if key != "epoch"}
        return make_model_card(
            self.model,
            model_name=model_name,
            hub_model_id=self.hub_model_id,
            dataset_name=dataset_name,
            tags={*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])},
            metrics=metrics,
            calibration_factor=self._head_fits.calibration_factor,
        )


def _check_streams(args: DiscoRewardConfig, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse options that a stream cannot have, and set for evaluation streams what TRL sets for training streams."""
    if args.max_tokens_per_batch is not None and isinstance(train_dataset, IterableDataset):
        raise ValueError(
            "max_tokens_per_batch needs the length of every pair before the first batch, and train_dataset is a "
            "stream; set per_device_train_batch_size instead, or load the dataset without streaming=True"
        )
    evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    accelerator_config: Any = args.accelerator_config
    if accelerator_config.dispatch_batches is None and any(
        isinstance(dataset, IterableDataset) for dataset in evaluated
    ):
        # accelerate's default for a stream. TRL (1.12 to 1.16) turns it off where the training data are one.
        accelerator_config.dispatch_batches = False


def _check_processes(args: DiscoRewardConfig) -> None:
    """Refuse ways of dividing work among processes that would give wrong rewards, before a model is loaded."""
    accelerator_config: Any = args.accelerator_config
    from_launcher = parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG")  # what the Accelerator looks at
    check_parallelism(
        args.world_size,
        getattr(args, "parallelism_config", None) or (ParallelismConfig() if from_launcher else None),
        getattr(args.deepspeed_plugin, "deepspeed_config", None),
        accelerator_config.dispatch_batches,
    )
