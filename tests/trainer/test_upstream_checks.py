"""
TRL and transformers with changes that a release could bring: each ends in the one error that names the releases.

A change is made to the source of the installed library, for one test. Without the checks most of them train on in
silence: votes dropped, rows unchecked, logged margins of other pairs.
"""

import configparser
import inspect
import logging
import re
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
import trl
from dpo_training import disco_dpo_trainer
from tiny_training import disco_trainer, preferences
from torch.utils.data import RandomSampler, SequentialSampler
from transformers import AutoModelForSequenceClassification, Trainer
from trl import RewardTrainer
from trl.trainer import reward_trainer as trl_reward_trainer

from disco_trl import DiscoRewardTrainer
from disco_trl.trainer import upstream_checks
from disco_trl.trainer.upstream_checks import SUPPORTED, UpstreamError


@pytest.fixture
def change(monkeypatch):
    """`change(kind, method, old, new)` changes the source of a method while a test runs."""

    def apply(kind: type, method: str, old: str, new: str) -> None:
        function = inspect.unwrap(vars(kind)[method])
        source = textwrap.dedent(inspect.getsource(function))
        assert old in source
        source = source.replace(old, new).replace("super()", f"super({kind.__name__}, self)")
        made: dict = {}
        exec(compile(source, f"<changed {method}>", "exec"), function.__globals__, made)
        monkeypatch.setattr(kind, method, made[method])

    return apply


@pytest.fixture
def rename(monkeypatch):
    """`rename(kind, old, new)` gives a method another name while a test runs, where it is defined."""

    def apply(kind: type, old: str, new: str) -> None:
        monkeypatch.setattr(kind, new, vars(kind)[old], raising=False)
        monkeypatch.delattr(kind, old)

    return apply


@pytest.fixture
def refused(tmp_path, tiny_llama_dir):
    """`refused(problem)` trains on votes that contradict the order of the sides, and expects the error."""

    def run(problem: str, evaluates: bool = False) -> None:
        rows = preferences(rows=8)
        for name, value in (("chosen_votes", 0), ("rejected_votes", 5), ("importance", 1)):
            rows = rows.add_column(name, [value] * 8)
        with pytest.raises(UpstreamError, match=problem) as error:
            trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=rows, eval_dataset=rows, max_steps=1)
            with torch.no_grad():
                trainer.model.score.weight *= 30  # so that pairs differ
            trainer.evaluate() if evaluates else trainer.train()
        message = str(error.value)
        assert f"Installed: trl {trl.__version__} and transformers {transformers.__version__}" in message
        assert f"supported: trl {SUPPORTED['trl']} and transformers {SUPPORTED['transformers']}" in message

    return run


BUILT = "create_model_from_path(model, AutoModelForSequenceClassification,"


@pytest.mark.parametrize("name_is_gone", [False, True])
def test_the_model_is_built_by_another_class(refused, change, monkeypatch, name_is_gone):
    monkeypatch.setattr(trl_reward_trainer, "ModelClass", AutoModelForSequenceClassification, raising=False)
    change(RewardTrainer, "__init__", BUILT, "create_model_from_path(model, ModelClass,")
    if name_is_gone:
        monkeypatch.delattr(trl_reward_trainer, "AutoModelForSequenceClassification")
    refused("built the model, and not by AutoModelForSequenceClassification.from_pretrained .* has no scale")


def test_another_model_is_trained(refused, change):
    change(RewardTrainer, "__init__", "train_dataset = self._prepare", "other = model; model = __import__('copy')."
           "deepcopy(model); train_dataset = self._prepare")  # fmt: skip
    refused("the model that trl's RewardTrainer trains, a .*, is not the one that was given a scale")


def test_accuracy_is_not_logged(refused, change):
    change(RewardTrainer, "compute_loss", 'self._metrics[mode]["accuracy"].append(mean_accuracy)', "pass")
    refused("does not log `accuracy` and `margin`")


def test_a_method_takes_another_argument(refused, change):
    change(RewardTrainer, "_prepare_dataset", "dataset_name: str,", "dataset_name: str, packing: bool = False,")
    refused("_prepare_dataset of trl's RewardTrainer takes packing, which .* does not know")


@pytest.mark.parametrize("is_kept", [False, True])
def test_the_preparation_of_datasets_has_another_name(refused, change, rename, is_kept, monkeypatch):
    if is_kept:
        monkeypatch.setattr(RewardTrainer, "_prepare_pairs", RewardTrainer._prepare_dataset, raising=False)
    else:
        rename(RewardTrainer, "_prepare_dataset", "_prepare_pairs")
    change(RewardTrainer, "__init__", "self._prepare_dataset(", "self._prepare_pairs(")
    refused("calls `_prepare_dataset` .*checked" if is_kept else "has no method _prepare_dataset, which")


def test_prepared_datasets_are_not_kept(refused, change):
    change(RewardTrainer, "__init__", "train_dataset = self._prepare", "_ = self._prepare")
    refused("has not kept the datasets that `_prepare_dataset` returned")


HOOK = "_set_signature_columns_if_needed"


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("is_kept", [False, True])
def test_the_columns_that_are_kept_are_chosen_elsewhere(refused, change, rename, monkeypatch, is_kept, evaluates):
    """Votes were dropped in silence, and the margin had the other sign."""
    for kind in (RewardTrainer, Trainer):
        if is_kept:
            monkeypatch.setattr(kind, "_choose_columns", vars(kind)[HOOK], raising=False)
        else:
            rename(kind, HOOK, "_choose_columns")
    change(Trainer, "_remove_unused_columns", f"self.{HOOK}()", "self._choose_columns()")
    refused(
        f"calls `{HOOK}` .*votes, ratings and margins would be dropped" if is_kept else f"no method {HOOK}", evaluates
    )


@pytest.mark.parametrize("evaluates", [False, True])
def test_columns_are_removed_all_the_same(refused, change, evaluates):
    columns = 'signature_columns = ["chosen_ids", "rejected_ids", "margin"]'
    change(Trainer, "_remove_unused_columns", "signature_columns = self._signature_columns", columns)
    refused("lacks row_index, judgements, which the columns of the dataset give", evaluates)


def test_trl_reads_a_column_that_is_not_known(refused, change):
    # As TRL once began to read `margin`
    change(RewardTrainer, HOOK, '"margin"]', '"margin", "importance"]')
    refused("reads the column importance of the dataset, .* would ignore")


def test_metrics_are_kept_elsewhere(refused, change):
    change(RewardTrainer, "__init__", "self._metrics = {", "self._logged = {")
    refused("does not keep its metrics in `_metrics`")


@pytest.mark.parametrize("evaluates", [False, True])
def test_the_two_sides_are_interleaved(refused, change, evaluates):
    """The loss was right, and the logged margin that of other pairs."""
    change(
        RewardTrainer,
        "compute_loss",
        "torch.chunk(outputs.logits.squeeze(-1), chunks=2)",
        "outputs.logits.squeeze(-1).view(-1, 2).unbind(dim=-1)",
    )
    refused("margin of .* does not read the chosen sides as the first half of a batch", evaluates)


def test_inputs_are_prepared_elsewhere(refused, monkeypatch):
    monkeypatch.setattr(Trainer, "_prepare_inputs", lambda self, inputs: inputs)
    refused("calls `_prepare_input` .*rounded to bfloat16")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_samplers_are_made_elsewhere(refused, change, mode):
    change(Trainer, f"get_{mode}_dataloader", f"sampler_fn=self._get_{mode}_sampler", "sampler_fn=None")
    refused(f"calls `_get_{mode}_sampler`", evaluates=mode == "eval")


# What is no change


class WithItsOwnSampler(DiscoRewardTrainer):
    """A user's subclass, whose methods need not call those of its base."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)

    def _prepare_inputs(self, inputs):
        return inputs


GRADED = {"preference_strength": [1, -1, 2, 1] * 4}


@pytest.mark.parametrize(
    ("method", "old", "new", "problem"),
    [
        (
            "__init__",
            "self._prepare_dataset(train_dataset",
            "(lambda x, *rest: x)(train_dataset",
            "does not call `_prep",
        ),
        ("__init__", "self._metrics = {", "self._kept = {", "does not keep its metrics in `_metrics`"),
        ("_compute_loss", "outputs = model(", "outputs = self.model(", "does not call the model that it is given"),
        (
            "_compute_loss",
            "zip(self.loss_types, self.loss_weights, strict=True)",
            "[('sigmoid', 1.0)]",
            "does not take its losses from `loss_types`",
        ),
    ],
)
def test_dpo_is_done_in_another_way(tmp_path, tiny_llama_dir, change, method, old, new, problem):
    change(trl.DPOTrainer, method, old, new)
    data = preferences().add_column("preference_strength", GRADED["preference_strength"])
    with pytest.raises((UpstreamError, AttributeError), match=problem):
        disco_dpo_trainer(tmp_path, model=tiny_llama_dir, train_dataset=data, prefix_sharing=False).train()


def test_columns_are_removed_from_the_rows_of_dpo(tmp_path, tiny_llama_dir, change):
    change(
        Trainer,
        "_remove_unused_columns",
        "signature_columns = self._signature_columns",
        "signature_columns = [n for n in self._signature_columns if n != 'preference_strength']",
    )
    data = preferences().add_column("preference_strength", GRADED["preference_strength"])
    trainer = disco_dpo_trainer(tmp_path, model=tiny_llama_dir, train_dataset=data)
    with pytest.raises(UpstreamError, match="a batch lacks what the column preference_strength says"):
        trainer.train()


def test_a_method_of_dpo_has_another_name_or_argument(tmp_path, tiny_llama_dir, rename, monkeypatch):
    arguments = {"model": tiny_llama_dir, "train_dataset": preferences()}
    with monkeypatch.context() as context:
        context.setattr(trl.DPOTrainer, "compute_ref_log_probs", lambda self, model, inputs, more=None: None)
        with pytest.raises(
            UpstreamError, match="compute_ref_log_probs of trl's DPOTrainer takes more, which that of D"
        ):
            disco_dpo_trainer(tmp_path, **arguments)
    rename(trl.DPOTrainer, "compute_ref_log_probs", "reference_log_probs")
    with pytest.raises(UpstreamError, match="trl's DPOTrainer has no method compute_ref_log_probs"):
        disco_dpo_trainer(tmp_path, **arguments)


def test_a_subclass_may_have_its_own_methods(tmp_path, tiny_llama_dir, monkeypatch):
    monkeypatch.setattr("tiny_training.DiscoRewardTrainer", WithItsOwnSampler)
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(), max_steps=1)
    assert isinstance(trainer, WithItsOwnSampler)
    trainer.train()
    assert not isinstance(trainer.get_train_dataloader().sampler, RandomSampler)


@pytest.mark.parametrize("streams", [False, True])
def test_everything_as_it_is(tmp_path, tiny_llama_dir, streams):
    rows = preferences(rows=8, margin=True).add_column("weight", [1.0] * 8)
    rows = rows.to_iterable_dataset() if streams else rows
    trainer = disco_trainer(
        tmp_path, model=tiny_llama_dir, train_dataset=rows, eval_dataset={"a": rows, "b": rows}, max_steps=3
    )
    trainer.train()
    trainer.evaluate()
    assert trainer.state.global_step == 3


# The releases


def test_the_supported_releases_are_those_that_pip_installs():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    required = setup["options"]["install_requires"].split("\n")
    for name, releases in SUPPORTED.items():
        assert f"{name}{releases}" in required


def test_a_release_that_is_not_supported_is_warned_of_and_named(tmp_path, tiny_llama_dir, monkeypatch, caplog):
    monkeypatch.setattr(transformers, "__version__", "5.18.0")
    monkeypatch.setattr(trl, "__version__", "1.16.3")
    assert not upstream_checks.outside_of_support()
    monkeypatch.setattr(trl, "__version__", "1.17.0.dev0")
    with caplog.at_level(logging.WARNING):
        trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(), max_steps=1)
    warnings = [record.message for record in caplog.records if "has not been tried" in record.message]
    assert len(warnings) == 1 and "trl 1.17.0.dev0" in warnings[0]
    trainer.train()
    message = str(upstream_checks.upstream_error("something is missing"))
    assert message.startswith("something is missing. Installed: trl 1.17.0.dev0")
    assert re.search(re.escape(f"pip install 'trl{SUPPORTED['trl']}'"), message)


def test_a_trainer_that_another_library_has_put_there_is_named(monkeypatch):
    generated = type("PatchedRewardTrainer", (), {"__module__": "patched_cache"})
    monkeypatch.setattr(upstream_checks, "RewardTrainer", generated)
    message = str(upstream_checks.upstream_error("something is missing"))
    assert "has put patched_cache.PatchedRewardTrainer in the place of trl.RewardTrainer; import disco_trl" in message
