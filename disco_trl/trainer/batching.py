"""
Which pairs go into a batch: what a trainer of pairs overrides of transformers' Trainer.

The samplers themselves are `disco_trl.data.samplers`. Here they get the sizes of a step, a seed, and a place in the
Trainer's hooks, for any trainer whose rows are pairs.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer

from ..data.samplers import LengthGroupedSampler, TokenBudgetBatchSampler, pair_lengths, with_batches
from .reward_config import DiscoRewardConfig
from .upstream_checks import UpstreamChecks, hook


class PairBatching(Trainer):
    """
    A trainer of pairs with batches of similar length, or of a bounded number of tokens.

    It is inherited beside one of TRL's trainers and before it, so that `super()` here reaches that one's methods. It
    reads `groups_by_length`, `max_tokens_per_batch` and what transformers has of the same from `args`.
    """

    args: DiscoRewardConfig
    model: Any
    _upstream: UpstreamChecks
    # Mean number of pairs in a batch where batches of max_tokens_per_batch differ in it
    _pairs_per_batch: float | None = None

    @property
    def _pairs_per_step(self) -> int:
        return self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps

    @property
    def _passes(self) -> float:
        """How often training goes through its data, as far as it is known before it begins."""
        args = self.args
        if args.max_steps <= 0:
            return args.num_train_epochs
        if args.max_tokens_per_batch is not None or not isinstance(self.train_dataset, Dataset):
            return 1.0
        return args.max_steps * self._pairs_per_step / len(self.train_dataset)

    @property
    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    @hook
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.groups_by_length and isinstance(dataset, Dataset):
            return LengthGroupedSampler(pair_lengths(dataset), self._pairs_per_step, self._data_seed)
        return super()._get_train_sampler(train_dataset)

    @hook
    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        # transformers' own groups evaluation by length too: it needs `input_ids`, and takes predictions out of order.
        if self.args.groups_by_length and isinstance(eval_dataset, Dataset):
            return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None
        return super()._get_eval_sampler(eval_dataset)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        self._upstream.after_dataloader(self, "train", self.train_dataset)
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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        loader = super().get_eval_dataloader(eval_dataset)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        named: Any = self.eval_dataset
        self._upstream.after_dataloader(self, "eval", named[dataset] if isinstance(dataset, str) else dataset)
        return loader

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
