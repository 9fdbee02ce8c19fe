"""The commands `score`, `prepare` and `head` of `benchmarks.speed`: the work outside the training loop."""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, extract_prompt

from disco_trl import DiscoReward, DiscoRewardConfig, get_family
from disco_trl.data.columns import OVERALL
from disco_trl.data.files import choose_split, load_preferences
from disco_trl.data.forest import grow_forest
from disco_trl.data.tokenization import tokenize
from disco_trl.distributions.judgements import Judgements
from disco_trl.models.heads import DiscoHead
from disco_trl.models.outputs import overall
from disco_trl.rewards.reward_function import Content
from disco_trl.trainer.epistemic import MOST_DIRECTIONS, fit_posterior
from disco_trl.trainer.predictions import PredictionMemory

from .peak_memory import PeakMemory, in_fresh_process
from .speed_counts import synthetic_pairs
from .speed_train import BASELINE, VARIANTS, make_trainer, quieten


def now() -> float:
    """The clock, after the GPU has finished its queued work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# Scoring


Group = tuple[Content, list[Content]]
"""A prompt and its answers."""


class RewardPath:
    """The path of a reward through the `_calculate_rewards` of a `GRPOTrainer`.

    Args:
        reward ([`~transformers.PreTrainedModel`] or [`DiscoReward`]):
            A stock sequence classifier, for which TRL tokenizes, pads and runs all texts as one batch, or our reward
            function.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the reward model.
    """

    def __init__(self, reward: Any, tokenizer: Any):
        self.tokens = 0
        """Number of tokens that went through the layers, padding included."""
        is_model = isinstance(reward, torch.nn.Module)
        (reward if is_model else reward.model).register_forward_pre_hook(self._count, with_kwargs=True)
        # The trainer requires a policy, which is never run.
        policy = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
            )
        )
        with tempfile.TemporaryDirectory() as folder:  # nothing is saved
            settings = GRPOConfig(
                folder,
                bf16=False,  # no autocast: the reward model runs in the dtype in which it was loaded
                use_cpu=not torch.accelerator.is_available(),
                report_to="none",
            )
            self._trainer = GRPOTrainer(
                policy,
                reward_funcs=reward,
                args=settings,
                train_dataset=Dataset.from_list([{"prompt": ""}]),
                processing_class=tokenizer,
                reward_processing_classes=tokenizer if is_model else None,
            )

    def __call__(self, prompts: list[Content], completions: list[Content]) -> torch.Tensor:
        """Rewards of shape `(N,)`."""
        inputs = [{"prompt": prompt} for prompt in prompts]
        rewards = self._trainer._calculate_rewards(inputs, prompts, completions, [[]] * len(prompts))
        return rewards[:, 0].float().cpu()

    def _count(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens += kwargs["input_ids"].numel()


def read_groups(args: argparse.Namespace, tokenizer: Any, low: int, high: int, answers: int) -> list[Group]:
    """Prompts of `low` to `high` tokens, each with its own two answers followed by those of other rows."""
    rows = choose_split(load_preferences(args.dataset, argument="--dataset"), args.split, "--dataset")
    rng = random.Random(args.seed)
    explicit: list[Any] = [row if "prompt" in row else extract_prompt(row) for row in rows.shuffle(seed=args.seed)]
    others = [row[side] for row in explicit for side in ("chosen", "rejected")]
    number = args.prompts * args.calls
    groups: list[Group] = []
    for row in explicit:
        if low <= len(tokenize(tokenizer, row["prompt"])) <= high:
            more = rng.sample(others, max(answers - 2, 0))
            groups.append((row["prompt"], [row["chosen"], row["rejected"], *more][:answers]))
        if len(groups) == number:
            return groups
    raise ValueError(
        f"only {len(groups)} prompts have {low} to {high} tokens, and --prompts times --calls is {number}; lower "
        "them, or widen --prompt-tokens"
    )


def run_score(args: argparse.Namespace) -> dict[str, Any]:
    """Command `score`: times TRL's path and ours, alternating call by call, for each number of answers."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = getattr(torch, args.dtype)
    stock = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype=dtype).eval()
    paths = {
        "trl": RewardPath(stock, tokenizer),
        "disco": RewardPath(DiscoReward(args.model, tokenizer, dtype=dtype), tokenizer),
    }
    points = []
    low, high = args.prompt_tokens
    for answers in args.answers:
        points.append(_score_point(paths, tokenizer, args, low, high, answers))
    if args.sweep:
        for low, high in ((16, 48), (48, 96), (192, 320), (384, 640)):
            points.append(_score_point(paths, tokenizer, args, low, high, max(args.answers)))
    return {"points": points}


def _score_point(
    paths: dict[str, RewardPath], tokenizer: Any, args: argparse.Namespace, low: int, high: int, answers: int
) -> dict[str, Any]:
    groups = read_groups(args, tokenizer, low, high, answers)
    calls = [groups[first : first + args.prompts] for first in range(0, len(groups), args.prompts)]
    seconds: dict[str, list[float]] = {name: [0.0] * (args.rounds + 1) for name in paths}
    rewards: dict[str, list[torch.Tensor]] = {name: [] for name in paths}
    for path in paths.values():
        path.tokens = 0
    rounds = args.rounds + 1  # the first is the warm-up
    with tqdm(total=rounds * len(calls), desc=f"K = {answers}, prompts of {low} to {high} tokens", unit="call") as bar:
        for round_ in range(rounds):
            for call in calls:
                prompts = [prompt for prompt, own in call for _ in own]
                completions = [answer for _, own in call for answer in own]
                for name, path in paths.items():
                    start = now()
                    rewards[name].append(path(prompts, completions))
                    seconds[name][round_] += now() - start
                bar.update()

    unique = prompt_tokens = answer_tokens = 0
    for prompt, own in groups:
        sequences: list[list[int]] = [tokenize(tokenizer, prompt + answer) for answer in own]  # type: ignore[operator]
        length = len(tokenize(tokenizer, prompt))
        prompt_tokens += length
        answer_tokens += sum(map(len, sequences)) - length * len(sequences)
        unique += len(grow_forest(sequences, tokenizer.pad_token_id).tokens)
    first, second = (torch.cat(rewards[name]) for name in paths)
    texts = len(groups) * answers
    return {
        "answers": answers,
        "prompt_tokens": prompt_tokens / len(groups),
        "answer_tokens": answer_tokens / texts,
        "texts_per_call": args.prompts * answers,
        "texts_per_second": {name: [texts / taken for taken in own[1:]] for name, own in seconds.items()},
        "times_trl": [trl / disco for trl, disco in zip(seconds["trl"][1:], seconds["disco"][1:], strict=True)],
        "processed_per_unique": {name: path.tokens / rounds / unique for name, path in paths.items()},
        "largest_difference": (first - second).abs().max().item(),
        "reward_deviation": first.std().item(),
    }


# Preparing


def write_rows(dataset: str, split: str, number: int, folder: Path) -> None:
    """Writes the requested number of rows to disk. If the dataset has fewer, its rows are repeated with a number in
    the text, so that no two rows are alike.
    """
    rows = choose_split(load_preferences(dataset, argument="--dataset"), split, "--dataset")

    def numbered(content: Content, cycle: int) -> Content:
        if isinstance(content, str):
            return f"({cycle}) {content}"
        return [{**content[0], "content": f"({cycle}) {content[0]['content']}"}, *content[1:]]

    def generate() -> Iterator[dict[str, Any]]:
        for row in range(number):
            cycle, place = divmod(row, len(rows))
            example = rows[place]
            starts = ["prompt"] if "prompt" in example else ["chosen", "rejected"]
            yield {**example, **{name: numbered(example[name], cycle) for name in starts}}

    with tempfile.TemporaryDirectory() as cache:
        Dataset.from_generator(generate, cache_dir=cache).save_to_disk(folder)


def prepare_once(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of a trainer's `_prepare_dataset`. It has to be called in a process of its own."""
    quieten()
    datasets.disable_caching()
    dataset = datasets.load_from_disk(folder)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer_class = VARIANTS[name].trainer
    config_class = RewardConfig if trainer_class is RewardTrainer else DiscoRewardConfig
    with tempfile.TemporaryDirectory() as output:
        settings = config_class(
            output, max_length=args.max_length, dataset_num_proc=args.num_proc, bf16=False, report_to="none"
        )
        two_rows = dataset.select(range(2))
        trainer: Any = trainer_class(args.model, settings, train_dataset=two_rows, processing_class=tokenizer)
    with PeakMemory() as memory:
        start = time.perf_counter()
        prepared = trainer._prepare_dataset(dataset, tokenizer, trainer.args, "train")
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_bytes": memory.peak_bytes, "kept": len(prepared)}


def run_prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Command `prepare`: times TRL's preparation of a dataset and ours, alternating, for each size."""
    points = []
    runs = len(args.sizes) * args.rounds * 2
    with tempfile.TemporaryDirectory() as folder, tqdm(total=runs, desc="preparing", unit="run") as bar:
        for size in args.sizes:
            rows = Path(folder) / str(size)
            write_rows(args.dataset, args.split, size, rows)
            found: dict[str, list[dict[str, Any]]] = {BASELINE: [], "default": []}
            for _ in range(args.rounds):
                for name, own in found.items():
                    bar.set_postfix_str(f"{size:,} pairs, {VARIANTS[name].label}")
                    own.append(in_fresh_process(prepare_once, name, rows, args))
                    bar.update()
            points.append(
                {
                    "pairs": size,
                    "kept": {name: own[0]["kept"] for name, own in found.items()},
                    "pairs_per_second": {name: [size / run["seconds"] for run in own] for name, own in found.items()},
                    "peak_bytes": {name: max(run["peak_bytes"] for run in own) for name, own in found.items()},
                    "times_trl": [
                        trl["seconds"] / disco["seconds"]
                        for trl, disco in zip(found[BASELINE], found["default"], strict=True)
                    ],
                }
            )
    return {"points": points}


# Head and loss


def run_head(args: argparse.Namespace) -> dict[str, Any]:
    """Command `head`: times head and loss, forward and backward, on the pooled hidden states of a batch.

    A scalar linear head with Bradley–Terry is compared with ours and the default family, including the running moments
    of the training rows. A step of the model (forward and backward, without optimizer) on the same batch, in our
    fastest configuration, is timed beside them.
    """
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    pairs = synthetic_pairs(args.batch_size, args.length, args.prompt_share, tokenizer, args.seed)
    trainer = make_trainer("default", pairs, args)
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    for column in ("row_index", "answers"):
        batch.pop(column, None)
    model = trainer.accelerator.prepare(trainer.model)

    def model_step() -> Any:
        output = model(**batch)
        output.logits.sum().backward()
        model.zero_grad()
        return output.pooled_hidden_state

    hidden = model_step().detach().clone().requires_grad_()
    width = hidden.shape[-1]
    plain_head = torch.nn.Linear(width, 1, bias=False, device=hidden.device, dtype=hidden.dtype)
    family = get_family("normal")
    head = DiscoHead.convert(torch.nn.Linear(width, 1, bias=False, device=hidden.device), family.unit_scale, None)
    head.add_epistemic(min(MOST_DIRECTIONS, width))

    def plain() -> None:
        chosen, rejected = plain_head(hidden).squeeze(-1).chunk(2)
        (-F.logsigmoid(chosen - rejected).mean()).backward()

    def disco() -> None:
        output = head(hidden, full_output=True)
        (location_chosen, location_rejected), (scale_chosen, scale_rejected) = (
            overall(values).chunk(2) for values in (output.location, output.scale)
        )
        (-family.log_prob_greater(location_chosen, scale_chosen, location_rejected, scale_rejected).mean()).backward()
        head.scale.track(hidden.detach(), output.location.detach())

    def seconds(step: Callable[[], Any], repeats: int) -> float:
        start = now()
        for _ in range(repeats):
            step()
        return (now() - start) / repeats

    # The memory and the fit of the posterior that `epistemic=True` adds to an epoch, divided by its number of steps
    steps = args.pairs // args.batch_size
    said = Judgements.forced_choices(args.batch_size, hidden.device)
    noise = torch.Generator().manual_seed(args.seed)

    def posterior() -> None:
        memory = PredictionMemory(keeps_hidden_states=True)
        for _ in range(steps):
            states = hidden.detach() + torch.randn(hidden.shape, generator=noise).to(hidden)
            memory.add(states, states, {OVERALL: (states[:, :1], None)}, {OVERALL: said})
        predictions = memory.predictions(OVERALL)
        assert predictions is not None
        fit_posterior(head, family, predictions.in_hindsight(), pairs=args.pairs)

    taken: dict[str, list[float]] = {"plain": [], "disco": [], "model": [], "posterior": []}
    for _ in tqdm(range(args.rounds + 1), desc="head and loss", unit="round"):
        taken["plain"].append(seconds(plain, 100))
        taken["disco"].append(seconds(disco, 100))
        taken["model"].append(seconds(model_step, 1))
        taken["posterior"].append(seconds(posterior, 1) / steps)
    rounds = {name: own[1:] for name, own in taken.items()}  # without the warm-up
    overheads = [
        (disco - plain) / model
        for plain, disco, model in zip(rounds["plain"], rounds["disco"], rounds["model"], strict=True)
    ]
    return {
        "seconds": {name: statistics.median(own) for name, own in rounds.items()},
        "overhead": overheads,
        "posterior": [own / model for own, model in zip(rounds["posterior"], rounds["model"], strict=True)],
        "tokens": batch["input_ids"].numel(),
    }
