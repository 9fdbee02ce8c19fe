"""Runs that choose their batches by length or by tokens, on one process and on two.

Run under a launcher (`torchrun --nproc_per_node 2 test_samplers_training.py MODEL OUTPUT`) this file trains on each
process and writes what each saw; one test does so.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_training import disco_trainer, furthest, preferences, weights

from disco_trl.data.columns import ROW_COLUMN
from disco_trl.data.samplers import (
    pair_lengths,
)


GROUPED = {"train_sampling_strategy": "group_by_length"}
BY_TOKENS = {"max_tokens_per_batch": 90}
SAMPLINGS = pytest.mark.parametrize("sampling", [GROUPED, BY_TOKENS], ids=["group_by_length", "max_tokens_per_batch"])


class RecordingCollator:
    """Keeps the row numbers of each batch of a trainer."""

    def __init__(self, trainer):
        self.collate = trainer.data_collator
        self.rows: list[list[int]] = []
        trainer.data_collator = self

    def __call__(self, examples):
        self.rows.append([example[ROW_COLUMN] for example in examples])
        return self.collate(examples)


@SAMPLINGS
def test_a_run_takes_each_row_once_an_epoch(tmp_path, tiny_llama_dir, sampling):
    trainer = disco_trainer(
        tmp_path, model=tiny_llama_dir, train_dataset=preferences(rows=50), max_steps=-1, num_train_epochs=2,
        gradient_accumulation_steps=2, eval_dataset=preferences(rows=6, seed=1), eval_strategy="epoch", **sampling,
    )  # fmt: skip
    recorded = RecordingCollator(trainer)
    trainer.train()
    rows = [row for batch in recorded.rows for row in batch]
    first, second = rows[:50], rows[56:106]
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert rows[50:56] == rows[106:] == list(range(6))  # evaluation is in the order of its rows
    assert trainer.state.global_step * 2 * 2 >= len(recorded.rows) - 4  # as planned: nothing left over
    if sampling is BY_TOKENS:
        lengths = pair_lengths(trainer.train_dataset)
        first_epoch = recorded.rows[: len(trainer.get_train_dataloader())]
        assert all(lengths[batch].sum() <= 90 for batch in first_epoch)
        assert len(set(map(len, first_epoch))) > 1


@SAMPLINGS
def test_resuming_in_the_second_epoch_gives_the_same_bits(tmp_path, tiny_llama_dir, sampling):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences(rows=50), "gradient_accumulation_steps": 2}
    arguments |= {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 9, **sampling}
    straight = disco_trainer(tmp_path, **arguments)
    straight.train()
    epochs = straight.state.num_train_epochs
    assert straight.state.global_step / epochs < 9 < straight.state.global_step  # a save within the second
    resumed = disco_trainer(tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert resumed.state.global_step == straight.state.global_step
    assert furthest(weights(straight.model), weights(resumed.model)) == 0


def test_streaming_run(tmp_path, tiny_llama_dir):
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences(rows=60).to_iterable_dataset(),
        max_steps=15,
        **GROUPED,
    )
    recorded = RecordingCollator(trainer)
    trainer.train()
    assert sorted(row for batch in recorded.rows[:15] for row in batch) == list(range(60))
    assert [row for batch in recorded.rows[:15] for row in batch] != list(range(60))


def test_by_default_the_order_is_trls(tmp_path, tiny_llama_dir):
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(rows=50))
    assert isinstance(trainer.get_train_dataloader().batch_sampler.sampler, torch.utils.data.RandomSampler)
    assert trainer._pairs_per_batch is None


@pytest.mark.parametrize("options", [{}, {"center_rewards_coefficient": 0.1}], ids=["plain", "centred"])
def test_batches_by_tokens_have_the_gradient_of_all_pairs(tmp_path, tiny_llama_dir, options):
    """Averaged over the batches of an epoch, as accumulation does."""

    def mean_gradient(**sampling) -> dict[str, torch.Tensor]:
        trainer = disco_trainer(
            tmp_path, model=tiny_llama_dir, train_dataset=preferences(rows=30, margin=True), **options, **sampling
        )
        # A learned scale follows a running mean, which is another in other batches; so it keeps still here.
        trainer._reward_model.scale_head.track = lambda *args, **kwargs: None
        with torch.no_grad():
            trainer.model.score.weight *= 30
        loader = trainer.get_train_dataloader()
        trainer.model.train()
        sizes = []
        for batch in loader:
            sizes.append(len(batch[ROW_COLUMN]))
            (trainer.compute_loss(trainer.model, batch) / len(loader)).backward()
        assert (len(set(sizes)) > 1) == bool(sampling.get("max_tokens_per_batch"))
        return {name: parameter.grad for name, parameter in trainer.model.named_parameters()}

    expected = mean_gradient(per_device_train_batch_size=30)
    found = mean_gradient(max_tokens_per_batch=90)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert furthest(found, expected) < 1e-5 * largest


def test_batches_by_tokens_need_to_know_all_lengths(tmp_path, tiny_llama_dir):
    with pytest.raises(ValueError, match=r"max_tokens_per_batch needs .* stream; set per_device_train_batch_size"):
        disco_trainer(tmp_path, model="not loaded", train_dataset=preferences().to_iterable_dataset(), **BY_TOKENS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch=0 must be a positive whole number"),
        ({"max_tokens_per_batch": 1e4}, "max_tokens_per_batch=10000.0 must be"),
        ({"max_tokens_per_batch": True}, "max_tokens_per_batch=True must be"),
        ({**BY_TOKENS, "train_sampling_strategy": "sequential"}, "train_sampling_strategy='sequential' forbids"),
        ({**BY_TOKENS, "accelerator_config": {"split_batches": True}}, "accelerator_config: split_batches"),
        ({**BY_TOKENS, "accelerator_config": {"dispatch_batches": True}}, "accelerator_config: dispatch_batches"),
        ({**BY_TOKENS, "auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"train_sampling_strategy": "batch_rebalance"}, "set max_tokens_per_batch instead"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        disco_trainer(tmp_path, model="not loaded", train_dataset=preferences(), **options)


# Two processes


def train_and_report(model: str, output: Path, sampling: dict, rows: int, resume_from: str | None = None) -> dict:
    trainer = disco_trainer(
        output, model=model, train_dataset=preferences(rows=rows), max_steps=-1, num_train_epochs=2,
        gradient_accumulation_steps=2, save_strategy="steps", save_steps=5, per_device_train_batch_size=3, **sampling,
    )  # fmt: skip
    recorded = RecordingCollator(trainer)
    trainer.train(resume_from_checkpoint=resume_from)
    parameters = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return {
        "rows": recorded.rows,
        "steps": trainer.state.global_step,
        "parameters": [value.hex() for value in parameters.tolist()],
    }


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_train_and_resume(tiny_llama_dir, tmp_path):
    here = Path(__file__).parent
    paths = [str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__]
    launched = subprocess.run(
        [*command, tiny_llama_dir, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    reports = [json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2)]
    for name in ("group_by_length", "max_tokens_per_batch"):
        straight, resumed = ([report[name][run] for report in reports] for run in ("straight", "resumed"))
        assert straight[0]["steps"] == resumed[0]["steps"]
        assert straight[0]["steps"] // 2 < 5 < straight[0]["steps"]  # resumed within the second epoch
        assert straight[0]["parameters"] == straight[1]["parameters"]
        assert resumed[0]["parameters"] == straight[0]["parameters"]

        batches = len(straight[0]["rows"]) // 2  # of a process in an epoch
        epochs = []
        for epoch in range(2):
            span = slice(epoch * batches, (epoch + 1) * batches)
            epochs.append([row for report in straight for batch in report["rows"][span] for row in batch])
            times = Counter(epochs[-1])
            assert len(times) == 47
            if name == "max_tokens_per_batch":
                assert sum(times.values()) == 48  # one twice, as 47 is odd
                sizes = [[len(batch) for batch in report["rows"][span]] for report in straight]
                assert sizes[0] == sizes[1]
        assert epochs[0] != epochs[1]
        # The rows of the resumed run are the last ones of the straight one.
        for process in range(2):
            rest = resumed[process]["rows"]
            assert rest == straight[process]["rows"][-len(rest) :]


if __name__ == "__main__":
    import conftest  # noqa: F401 (sets the environment of the tests)

    report = {}
    for name, sampling in (("group_by_length", GROUPED), ("max_tokens_per_batch", BY_TOKENS)):
        output = Path(sys.argv[2]) / name
        straight = train_and_report(sys.argv[1], output, sampling, rows=47)
        resumed = train_and_report(sys.argv[1], output, sampling, rows=47, resume_from=str(output / "checkpoint-5"))
        report[name] = {"straight": straight, "resumed": resumed}
    (Path(sys.argv[2]) / f"{os.environ['RANK']}.json").write_text(json.dumps(report))
    # Left to the interpreter's end, gloo's threads are now and then still busy, and abort the process.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
