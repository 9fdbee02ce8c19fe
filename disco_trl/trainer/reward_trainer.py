"""The trainer: TRL's `RewardTrainer` with a distribution where it has a number.

TRL keeps doing what it does: it loads tokenizers, wraps adapters, prepares datasets, pools, logs, evaluates and saves.
This class lends it a model with a scale, replaces the loss by the exact -log P(chosen ≻ rejected), keeps up the mean
that fixes the unit of reward, and checks what goes in.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import is_peft_model, parse_flag_from_env
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from huggingface_hub import ModelCard
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader, SequentialSampler
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.trainer_utils import EvalPrediction, TrainOutput
from trl import RewardConfig, RewardTrainer
from trl.trainer import reward_trainer as trl_reward_trainer
from trl.trainer.utils import get_config_model_id

from ..data.collator import ANSWERS, DataCollatorForDiscoPreference
from ..data.columns import JUDGEMENT_COLUMNS, RANKED_IDS, ROW_COLUMN
from ..data.judgements import Survey, check_answerable, survey
from ..data.preparation import check_token_ids, finish_preferences, prepare_preferences
from ..data.samplers import LengthGroupedSampler, TokenBudgetBatchSampler, group_stream, pair_lengths, with_batches
from ..distributions.judgements import Judgements
from ..distributions.likelihood import log_likelihood
from ..distributions.reward_distribution import get_family
from ..models.adapters import keep_to_one_family, save_reward_head
from ..models.distributed import check_parallelism, keep_head_apart
from ..models.inference import vocabulary_size
from ..models.model_card import make_model_card
from ..models.modeling import DiscoRewardModel, upgrade
from ..models.prefix_sharing import prepare
from .calibration import MEMORY_FILE, Calibration, HeadMemory
from .callbacks import FiniteGuard, PushWithSettings, SamplerEpoch
from .checkpoints import last_whole_checkpoint, why_torn
from .epistemic import MOST_DIRECTIONS, Posterior
from .metrics import pair_figures, summarize, summarize_rewards
from .reward_config import DiscoRewardConfig, likelihood_settings
from .search import Beginning, space_around


logger = get_logger(__name__)

LIKELIHOOD_LEARNING_RATE = 0.02


class DiscoRewardTrainer(RewardTrainer):
    """
    Trainer for distributional reward models.

    It takes the arguments of [`~trl.RewardTrainer`], with the same meaning, and trains a reward with a location and a
    scale for each answer by minimizing -log P(chosen ≻ rejected), the exact probability that one random reward exceeds
    the other (Thurstone, 1927, with a learned scale for every answer; for its use in reward models see Distributional
    Preference Learning, arXiv 2312.08358, and PURM, arXiv 2503.22480). With a `margin` m in the data, the loss is
    -log F((Δ - m) / s); the metrics leave m out.

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
            A Hub id or directory (of a base language model, a scalar reward model, a disco checkpoint or a PEFT
            adapter), or a sequence classifier with one label, or a `PeftModel` around one. Instances are upgraded in
            place: they keep their weights and gain a scale.
        args ([`DiscoRewardConfig`], *optional*):
            Configuration for this trainer.
        peft_config ([`~peft.PeftConfig`], *optional*):
            As in TRL, but the reward head is trained, kept in float32 and saved with the adapter whatever it says: the
            task type and `modules_to_save` need not be set. The object passed is not changed.
        data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks, optimizers,
        optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config:
            As for [`~trl.RewardTrainer`].

    Raises:
        ValueError: if a row of the data cannot be used (it names row, column and fix), if the model cannot carry a
            reward distribution, or if its checkpoint contradicts `args`.
        FloatingPointError: in training, when a loss or a gradient is not finite; it names the rows of the batch.
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
        if args.max_tokens_per_batch is not None and isinstance(train_dataset, IterableDataset):
            raise ValueError(
                "max_tokens_per_batch needs the length of every pair before the first batch, and train_dataset is a "
                "stream; set per_device_train_batch_size instead, or load the dataset without streaming=True"
            )

        # Processes: what they may not divide among each other
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        accelerator_config: Any = args.accelerator_config
        if accelerator_config.dispatch_batches is None and any(
            isinstance(dataset, IterableDataset) for dataset in evaluated.values()
        ):
            # accelerate's default for a stream. TRL (1.12 to 1.16) sees to it where the training data are one.
            accelerator_config.dispatch_batches = False
        from_launcher = parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG")  # what the Accelerator looks at
        check_parallelism(
            args.world_size,
            getattr(args, "parallelism_config", None) or (ParallelismConfig() if from_launcher else None),
            getattr(args.deepspeed_plugin, "deepspeed_config", None),
            accelerator_config.dispatch_batches,
        )

        # What there is to learn beside the rewards
        surveyed = survey(train_dataset) if isinstance(train_dataset, Dataset | IterableDataset) else Survey()
        likelihood = likelihood_settings(args, surveyed)

        # Model and PEFT. TRL builds a string model between seeding and wrapping it, with its own rules for dtype,
        # devices and revision, so that is where ours has to come in.
        peft_config = copy.deepcopy(peft_config)
        head_weights: dict[str, dict[str, torch.Tensor]] = {}

        def adopt(model: Any) -> None:
            reward_model = upgrade(model, args.reward_family, args.fixed_scale, likelihood)
            if args.epistemic:
                reward_model.know_epistemic(MOST_DIRECTIONS)
            if "rating_values" in likelihood:
                reward_model.start_thresholds(surveyed.ratings)
            if isinstance(peft_config, PeftConfig):  # TRL refuses any other type
                save_reward_head(peft_config, reward_model.head_name, reward_model.newly_initialized)
            for name, head in reward_model.named_reward_heads():
                head_weights[name] = {key: value.clone() for key, value in head.state_dict().items()}

        if not isinstance(model, str):
            adopt(model)
        with _lend_model_class(args, adopt):
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
                peft_config=peft_config,
            )
        self._reward_model = self.model.get_base_model() if is_peft_model(self.model) else self.model
        self._family = get_family(self._reward_model.config.disco["reward_family"])
        if is_peft_model(self.model):
            keep_to_one_family(self.model)

        known = self._reward_model.config.disco.get("likelihood", {})
        for name, dataset in [("train", train_dataset), *evaluated.items()]:
            if isinstance(dataset, Dataset | IterableDataset):
                found = surveyed if dataset is train_dataset else survey(dataset)
                check_answerable(dataset, name, found, known)

        check = functools.partial(check_token_ids, known=vocabulary_size(self._reward_model))
        if self.train_dataset is not None:
            self.train_dataset = check(self.train_dataset, "train")
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: check(dataset, name) for name, dataset in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = check(self.eval_dataset, "eval")

        # TRL (1.12 to 1.16) casts every trainable parameter of a quantized model to bfloat16, the head included. Its
        # float32 values are put back, not the rounded ones cast up.
        (any_weights, *_) = head_weights.values()
        for name, head in self._reward_model.named_reward_heads():
            if head.weight.dtype != torch.float32:
                head.to(torch.float32)
                head.load_state_dict(head_weights.get(name, any_weights))

        # Optimizer: one that was made before the model had a scale would leave the scale as it starts
        if optimizers[0] is not None:
            optimized = {parameter for group in optimizers[0].param_groups for parameter in group["params"]}
            if not optimized.issuperset(self._reward_model.scale_head.parameters()):
                raise ValueError(
                    "the optimizer passed does not hold the parameters of the scale, which this model has only now; "
                    "make the optimizer from those of DiscoRewardModel.from_pretrained(...), or pass "
                    "optimizer_cls_and_kwargs instead"
                )

        # Data collator: TRL's, which also carries the row numbers that an error message needs, or one that puts what
        # the sequences of a batch share there once
        if data_collator is None:
            pairs_of_rows = surveyed.pairs_of_rows
            refusal = self._why_no_prefix_sharing() if args.prefix_sharing else None
            if refusal is not None:
                logger.warning(
                    f"prefix_sharing is off for this {type(self._reward_model).__name__}: {refusal}. Batches are "
                    "padded as TRL's are, which costs time and changes nothing else."
                )
            self.data_collator = DataCollatorForDiscoPreference(
                pad_token_id=self.data_collator.pad_token_id,
                pad_to_multiple_of=self.data_collator.pad_to_multiple_of,
                share_prefixes=args.prefix_sharing and refusal is None,
                weigh_by=args.weigh_by,
                rating_values=known.get("rating_values"),
                # Processes put their batches together for the metrics, and have to have as many pairs.
                pairs_per_row=max(pairs_of_rows) if args.world_size > 1 and len(pairs_of_rows) > 1 else None,
            )

        # Which pairs go into a batch
        self._pairs_per_batch: float | None = None  # the mean, where batches of max_tokens_per_batch differ in it
        if args.groups_by_length and isinstance(self.train_dataset, IterableDataset):
            self.train_dataset = group_stream(self.train_dataset, self._pairs_per_step, self._data_seed)
        self.add_callback(SamplerEpoch())

        # What is fitted when training ends, to the predictions that it has made
        is_learned = self._reward_model.scale_head.fixed_scale is None
        has_error = "location_error" in self._reward_model.config.disco.get("likelihood", {})
        passes_once = args.max_steps > 0 or args.num_train_epochs <= 1
        wanted = passes_once and not has_error if args.calibrate is None else args.calibrate
        self._calibrates = wanted and is_learned
        # The first process does it, for all to have the same head.
        keeps = (self._calibrates or args.epistemic) and args.process_index == 0
        self._memory = HeadMemory() if keeps else None
        self.add_callback(Calibration(self))
        if args.epistemic:
            self.add_callback(Posterior(self))

        # Figures of the pairs of an evaluation, for when it is logged
        self._evaluated: list[torch.Tensor] = []

        # Guard against losses and gradients that are not finite
        self._guard = FiniteGuard(self)
        self.add_callback(self._guard)
        self.add_callback(PushWithSettings())

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # (Tensor parallelism may have come with the model.)
        check_parallelism(parallelism=getattr(self.accelerator, "parallelism_config", None))
        keep_head_apart(self.accelerator)

    def _why_no_prefix_sharing(self) -> str | None:
        if self.args.torch_compile:
            return "with torch_compile each shape of a batch would be compiled anew"
        if self.args.n_gpu > 1:
            return "a batch of one row cannot be split among the devices of one process (use accelerate launch)"
        if self.accelerator.dispatch_batches:
            return "dispatch_batches=True cuts batches apart between the sequences"
        return prepare(self.model)

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        dataset = prepare_preferences(dataset, processing_class, dataset_name, num_proc=args.dataset_num_proc)
        # TRL tokenizes what is not tokenized yet; its filter reads the dataset row by row once more, and ours does not
        unfiltered = copy.copy(args)
        unfiltered.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, unfiltered, dataset_name)
        return finish_preferences(dataset, dataset_name, max_length=args.max_length)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in (ROW_COLUMN, RANKED_IDS, "ranks", *JUDGEMENT_COLUMNS) if name not in columns]

    @property
    def _pairs_per_step(self) -> int:
        return self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.groups_by_length and isinstance(dataset, Dataset):
            return LengthGroupedSampler(pair_lengths(dataset), self._pairs_per_step, self._data_seed)
        return super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # transformers' own groups evaluation by length too: it needs `input_ids`, and takes predictions out of order.
        if self.args.groups_by_length and isinstance(eval_dataset, Dataset):
            return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
        return super()._get_eval_sampler(eval_dataset)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if self.args.max_tokens_per_batch is None:
            return loader
        sampler = TokenBudgetBatchSampler(
            pair_lengths(loader.dataset),
            self.args.max_tokens_per_batch,
            num_processes=self.args.world_size,
            accumulation_steps=self.args.gradient_accumulation_steps,
            seed=self._data_seed,
            drop_last=self.args.dataloader_drop_last,
        )
        self._pairs_per_batch = sampler.pairs_per_batch
        return with_batches(loader, sampler, self.accelerator)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is not None:  # the caller's own
            return super().create_optimizer(*args, **kwargs)
        optimizer = super().create_optimizer(*args, **kwargs)
        # The few numbers that the likelihood learns beside the rewards have a learning rate of their own: they are in
        # units of reward, or logarithms, whatever suits the language model.
        learned = {id(p) for name, p in self.model.named_parameters() if ".likelihood." in name}
        own = [p for group in optimizer.param_groups for p in group["params"] if id(p) in learned]
        if own:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in learned]
            optimizer.add_param_group({"params": own, "lr": LIKELIHOOD_LEARNING_RATE, "weight_decay": 0.0})
        return optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mode = "train" if self.model.training else "eval"
        rows = inputs.pop(ROW_COLUMN, None)
        answers = inputs.pop(ANSWERS, None)
        judgements = Judgements.of_batch(inputs)

        # TRL's method runs the model and logs its metrics of the rewards, which are the locations here. Its loss is
        # of no use: it is a sum whose Bradley–Terry term cannot be taken out again.
        _, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        rewards = self._reward_model.rewards_of(outputs)
        count = len(rewards) // 2
        chosen, rejected = rewards[:count], rewards[count:]
        if judgements is None:
            judgements = Judgements.forced_choices(count, rewards.location.device, inputs.get("margin"))

        responses = self._reward_model.responses_of(outputs)
        log_likelihoods = log_likelihood(self._family, chosen, rejected, judgements, responses)
        # What accelerate repeats to even out the last batches counts in training, as with TRL's trainer and any other.
        real = slice(None) if mode == "train" else slice(self._real_pairs(count, process=True) or None)
        loss = -(judgements.weight.to(log_likelihoods) * log_likelihoods)[real].mean().to(rewards.location)
        if self.args.center_rewards_coefficient is not None:
            center = torch.mean((chosen.location + rejected.location)[real] ** 2)
            loss = loss + self.args.center_rewards_coefficient * center
        if mode == "train" and self._pairs_per_batch is not None:
            # The losses of batches are averaged, whatever their size; a pair is to weigh the same in each.
            loss = loss * (len(log_likelihoods) / self._pairs_per_batch)

        with torch.no_grad():
            figures = self.accelerator.gather(pair_figures(chosen, rejected, judgements))
            figures = figures[: self._real_pairs(len(figures))]
            learned = {"location_error": rewards.location_error, **vars(responses)}
            metrics = {
                name: value.mean().item()
                for name, value in learned.items()
                if value is not None and name != "thresholds"
            }
            if mode == "train":
                metrics |= summarize(figures)
            else:
                self._evaluated.append(figures)  # of the whole evaluation, for `log`
        if "accuracy" in metrics:  # TRL's counts pairs in which the chosen side is ahead, whoever won the votes
            self._metrics[mode]["accuracy"].pop()
        for name, metric in metrics.items():
            self._metrics[mode][name].append(metric)

        if mode == "train":
            self._guard.check_loss(loss, rows)
            head = self._reward_model.scale_head
            if head.fixed_scale is None:
                head.track(outputs.pooled_hidden_state, outputs.logits, gather=self.accelerator.gather)
            # In later passes predictions are not made in advance.
            if self._memory is not None and ((self.state.epoch or 0) < 1 or not self._calibrates):
                self._memory.add(outputs.pooled_hidden_state, outputs.logits, outputs.raw_shape, judgements, answers)
        return (loss, outputs) if return_outputs else loss

    def _real_pairs(self, pairs: int, process: bool = False) -> int:
        """
        How many of the pairs in hand are no repetitions: accelerate evens out the last batches of several processes
        with rows from the beginning, which come last.

        Args:
            pairs: gathered from all processes, or with `process` those of this one.
        """
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        # In training the Trainer fetches all batches of an optimizer step before it computes the first of them.
        is_last = state.end_of_dataloader and (not self.model.training or state.sync_gradients)
        if processes == 1 or not is_last or state.remainder <= 0:
            return pairs
        total = pairs * processes if process else pairs
        # (A row may be a ranking, which is several pairs, of one number in all rows.)
        real = total * state.remainder // state.active_dataloader.total_batch_size
        return min(max(real - pairs * self.accelerator.process_index, 0), pairs) if process else min(real, pairs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated.clear()  # of predictions, which are not logged
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._evaluated and not self.model.training:
            # Over all pairs at once: the mean of batches' means would hang on the sizes of the batches.
            figures = torch.cat(self._evaluated)
            for name, value in (summarize(figures) | summarize_rewards(figures)).items():
                self._metrics["eval"][name] = [value]
            self._evaluated.clear()
        super().log(logs, start_time)

    def _prepare_input(self, data: Any) -> Any:
        # With DeepSpeed the Trainer casts what is not whole-numbered to the type of the weights. Here these are
        # margins, weights and soft labels, none of which the model sees.
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def train(  # type: ignore[override]  # the rest goes through `kwargs`
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """
        As in transformers, but `resume_from_checkpoint=True` goes on from the newest checkpoint that is whole: one
        that was cut off in writing, as the process was killed or the disk full, is warned of and passed over.

        Raises:
            ValueError: the checkpoint to resume from is torn, or all there are.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole_checkpoint(self._output_dir) or "") or True
        elif resume_from_checkpoint:
            problem = why_torn(Path(resume_from_checkpoint))
            if problem is not None:
                raise ValueError(
                    f"{resume_from_checkpoint} is no checkpoint to resume from: {problem}. Name another, or pass "
                    "resume_from_checkpoint=True for the newest whole one"
                )
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Before transformers writes its state, which says that the checkpoint is whole, and removes older ones
        if self._memory is not None and not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            self._memory.save(folder / MEMORY_FILE)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._memory is not None and checkpoint is not None and Path(checkpoint, MEMORY_FILE).is_file():
            self._memory.load(Path(checkpoint, MEMORY_FILE))

    def hyperparameter_search(  # type: ignore[override]  # the rest goes through `kwargs`
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        As in transformers, but no `model_init` is needed: each trial begins with the weights that the model has now,
        and so does what comes after the search.

        Args:
            hp_space: the default tries learning rates and batch sizes around those in `args`; see
                `disco_trl.trainer.search.space_around`.
            compute_objective: the default is the NLL on the `eval_dataset`, `eval_nll`.
            **kwargs: `n_trials`, `direction`, `backend`, `hp_name` and those of the backend.
        """
        beginning = Beginning(self)
        self.model_init = beginning  # type: ignore[assignment]
        try:
            return super().hyperparameter_search(
                hp_space or space_around(self.args.learning_rate, self.args.per_device_train_batch_size),
                compute_objective or (lambda metrics: metrics["eval_nll"]),
                **kwargs,
            )
        finally:
            self.model_init = None  # type: ignore[assignment]
            self.model = self.model_wrapped = beginning()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        # In the place of the card that PEFT leaves
        card = self._make_model_card(model_name=self._output_dir.name)
        card.save(Path(output_dir or self._output_dir) / "README.md")

    @property
    def _output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

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
        evaluations = [entry for entry in self.state.log_history if "eval_loss" in entry]
        metrics = {key: value for key, value in (evaluations[-1] if evaluations else {}).items() if key != "epoch"}
        return make_model_card(
            self.model,
            model_name=model_name,
            hub_model_id=self.hub_model_id,
            dataset_name=dataset_name,
            tags={*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])},
            metrics=metrics,
        )


@contextlib.contextmanager
def _lend_model_class(args: DiscoRewardConfig, adopt: Callable[[Any], None]) -> Iterator[None]:
    """While TRL builds a model from a string, the class it asks is ours.

    TRL (1.12 to 1.16) hands `AutoModelForSequenceClassification`, a global of its module, to a function that only
    calls `from_pretrained` on it; there is no argument to name another class.
    """

    class ModelClass:
        @staticmethod
        def from_pretrained(path: str, **kwargs: Any) -> Any:
            model = DiscoRewardModel.from_pretrained(
                path, reward_family=args.reward_family, fixed_scale=args.fixed_scale, is_trainable=True, **kwargs
            )
            adopt(model)
            return model

    name = "AutoModelForSequenceClassification"
    original = getattr(trl_reward_trainer, name)
    setattr(trl_reward_trainer, name, ModelClass)
    try:
        yield
    finally:
        setattr(trl_reward_trainer, name, original)
