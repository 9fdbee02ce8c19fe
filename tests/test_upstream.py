"""`docs/upstream.md` against the code and against the installed libraries."""

import ast
import importlib
import re
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
from dpo_training import disco_dpo_trainer
from tiny_training import disco_trainer, preferences

import disco_trl
from disco_trl.data.collator import DataCollatorForDiscoPreference
from disco_trl.data.dpo_collator import DataCollatorForDiscoDPO
from disco_trl.trainer.dpo_trainer import OVERRIDDEN, DiscoDPOTrainer
from disco_trl.trainer.reward_trainer import DiscoRewardTrainer
from disco_trl.trainer.upstream_checks import HOOKS


PACKAGE = Path(disco_trl.__file__).parent
PAGE = (Path(__file__).parents[1] / "docs" / "upstream.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]
LIBRARIES = ("trl", "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "torch", "safetensors")
NAMES = {name: row for row in ROWS for name in re.findall(r"`([\w.]+)`", row[0])}
# Set by a constructor, so not on the class.
OF_INSTANCES = {
    *("_metrics", "_signature_columns", "_train_batch_size", "_attn_implementation", "_name_or_path"),
    *("_fingerprint", "_parameters", "_buffers"),
}


def resolve(name: str):
    """The object of a dotted name, which begins with a module."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def test_the_page_has_rows():
    assert len(ROWS) > 40
    assert all(len(row) == 4 for row in ROWS)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_listed_is_there(name):
    if name.rpartition(".")[2] in OF_INSTANCES:
        name = name.rpartition(".")[0]
    resolve(name)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_listed_is_used_where_the_page_says(name):
    _, places, *_ = NAMES[name]
    for place in re.findall(r"`([\w/.]+)`", places):
        assert name.rpartition(".")[2] in (PACKAGE / place).read_text(encoding="utf-8")


def test_the_tests_that_are_named_exist():
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE))
    assert named
    assert not {path for path in named if not (Path(__file__).parents[1] / path).is_file()}


def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")}


PUBLIC_MODULES = {
    *LIBRARIES,
    *("accelerate.logging", "accelerate.utils", "safetensors.torch", "safetensors.numpy", "transformers.utils"),
    *("transformers.trainer_utils", "torch.nn", "torch.nn.functional", "torch.utils.data"),
    *("torch.distributed.tensor", "torch.distributed.fsdp", "torch.nn.attention.varlen"),
}


def test_imports_from_private_places_are_listed():
    unlisted = set()
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.level or node.module.split(".")[0] not in LIBRARIES:
                continue
            for alias in node.names:
                is_private = alias.name.startswith("_") or node.module not in PUBLIC_MODULES
                names = {name for name in NAMES if f".{name}.".find(f".{alias.name}.") >= 0}
                if is_private and not names:
                    unlisted.add(f"{path.relative_to(PACKAGE)}: {node.module}.{alias.name}")
    assert not unlisted


def test_private_attributes_of_others_are_listed():
    """Attributes with an underscore that nothing in the package defines belong to another library."""
    ours, used = {"_asdict", "_replace"}, {}  # those two are a named tuple's public methods
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.arg):
                ours.add(node.arg)
            if isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
                used.setdefault(node.attr, path.relative_to(PACKAGE))
    assert not {name: place for name, place in used.items() if name not in ours and f"{name}`" not in PAGE}


@pytest.mark.parametrize(
    ("kind", "upstream"),
    [
        (DiscoRewardTrainer, (transformers.Trainer,)),
        (DiscoDPOTrainer, (transformers.Trainer,)),
        (DataCollatorForDiscoDPO, (object,)),
        (DataCollatorForDiscoPreference, (object,)),
        (importlib.import_module("disco_trl.models.modeling").DiscoRewardModel, (transformers.PreTrainedModel,)),
        (importlib.import_module("disco_trl.models.adapters")._OneFamily, (peft.PeftModel,)),
    ],
)
def test_overridden_methods_are_listed(kind, upstream):
    others = [base for base in (*kind.__mro__, *upstream) if not base.__module__.startswith("disco_trl")]
    unlisted = set()
    for ours in (base for base in kind.__mro__ if base.__module__.startswith("disco_trl")):
        for name in vars(ours):
            theirs = any(
                name in vars(ancestor) for base in others for ancestor in base.__mro__ if ancestor is not object
            )
            is_generated = name.startswith("__") and (name != "__init__" or "Trainer" not in kind.__name__)
            # `from_pretrained` is documented, and calls the stock one.
            if theirs and not is_generated and name != "from_pretrained" and f".{name}`" not in PAGE:
                unlisted.add(f"{ours.__name__}.{name}")
    assert not unlisted


def test_the_overrides_of_the_trainer_are_checked_at_run_time():
    """A constructor of another signature, tags and model cards end in errors of their own, or in none that matters."""
    listed = {
        name.rpartition(".")[2] for name in NAMES if re.search(r"\b(RewardTrainer|DPOTrainer|Trainer)\.\w+$", name)
    }
    others = {"__init__", "_tag_names", "_name", "train", "create_optimizer", "hyperparameter_search", *OF_INSTANCES}
    assert listed - others - {"_get_output_dir", "_prepare_inputs"} == {*HOOKS, *OVERRIDDEN} - others


def test_what_constructors_set_is_there(tmp_path, tiny_llama_dir):
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences())
    trainer._set_signature_columns_if_needed()
    instances = {
        "trl.trainer.dpo_trainer.DPOTrainer": disco_dpo_trainer(
            tmp_path, model=tiny_llama_dir, train_dataset=preferences()
        ),
        "transformers.Trainer": trainer,
        "trl.trainer.reward_trainer.RewardTrainer": trainer,
        "transformers.PreTrainedConfig": trainer.model.config,
        "torch.nn.Module": torch.nn.Linear(1, 1),
        "datasets.Dataset": datasets.Dataset.from_dict({"text": ["a"]}),
    }
    for name in NAMES:
        kind, _, attribute = name.rpartition(".")
        if attribute in OF_INSTANCES:
            assert getattr(instances[kind], attribute, None) is not None, name
