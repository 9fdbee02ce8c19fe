"""Models in pieces: what is refused before training, and the files for `accelerate launch`."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import ParallelismConfig
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from tiny_models import tiny_config
from tiny_training import disco_trainer, preferences
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlamaForSequenceClassification
from trl import RewardTrainer

from disco_trl import DiscoRewardModel
from disco_trl.models import distributed as sharding
from disco_trl.models.architectures import find_head
from disco_trl.models.distributed import check_parallelism, is_main_process


ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"
FILES = ("one_gpu", "ddp", "fsdp2", "zero2", "zero3", "zero3_offload", "two_nodes")


# What is refused


@pytest.mark.parametrize(
    ("has", "message"),
    [
        ({"parallelism": ParallelismConfig(cp_size=2)}, r"context parallelism \(cp_size=2\) is not supported"),
        ({"parallelism": ParallelismConfig(sp_size=4)}, r"sequence parallelism \(sp_size=4\) .* last token"),
        ({"parallelism": ParallelismConfig(tp_size=2)}, r"tensor parallelism \(tp_size=2\) .* FSDP2 or"),
        ({"deepspeed": {"tensor_parallel": {"autotp_size": 2}}}, r"tensor parallelism \(tp_size=2\)"),
        ({"dispatches": True, "processes": 2}, "dispatch_batches=True .* two sides of a pair would be parted"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, r"bf16\.enabled casts every weight, the reward head"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, r"fp16\.enabled .*torch_autocast.* pass fp16=False"),
    ],
)
def test_what_is_refused(has, message):
    with pytest.raises(ValueError, match=message):
        check_parallelism(**has)


@pytest.mark.parametrize(
    "has",
    [
        {},
        {"parallelism": ParallelismConfig(dp_shard_size=2)},
        {"dispatches": True, "processes": 1},  # one process gets the whole batch
        {"deepspeed": {"bf16": {"enabled": "auto"}, "torch_autocast": {"enabled": True}}},
    ],
)
def test_what_is_not(has):
    check_parallelism(**has)


def test_the_trainer_asks_before_it_loads_anything(tmp_path, monkeypatch):
    arguments = {"model": "not loaded", "train_dataset": preferences()}
    with pytest.raises(ValueError, match=r"cp_size=2"):
        disco_trainer(tmp_path, parallelism_config=ParallelismConfig(cp_size=2), **arguments)
    # from `accelerate launch`
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    with pytest.raises(ValueError, match=r"sp_size=2"):
        disco_trainer(tmp_path, **arguments)


def test_tensor_parallelism_that_came_with_the_model(tmp_path, tiny_llama_dir, monkeypatch):
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences())
    monkeypatch.setattr(type(trainer.accelerator), "parallelism_config", ParallelismConfig(tp_size=2))
    monkeypatch.setattr(RewardTrainer, "create_accelerator_and_postprocess", lambda self: None)
    with pytest.raises(ValueError, match=r"tp_size=2"):
        trainer.create_accelerator_and_postprocess()


def test_a_stream_to_evaluate_is_not_dispatched(tmp_path, tiny_llama_dir):
    trainer = disco_trainer(
        tmp_path,
        model=tiny_llama_dir,
        train_dataset=preferences(),
        eval_dataset=preferences(rows=8, seed=1).to_iterable_dataset(),
    )
    assert trainer.accelerator.dispatch_batches is False
    assert trainer.evaluate()["eval_nll"] > 0


def test_a_model_is_looked_at_without_being_taken_to_pieces(monkeypatch):
    # Where this is so, transformers shards whatever model is made, for which it would import DeepSpeed.
    monkeypatch.setattr("transformers.modeling_utils.is_deepspeed_zero3_enabled", lambda: True)
    assert find_head(LlamaForSequenceClassification, tiny_config("llama", num_labels=1))[0] == "score"


def test_judgements_keep_their_precision_under_deepspeed(tmp_path, tiny_llama_dir, monkeypatch):
    trainer = disco_trainer(tmp_path, model=tiny_llama_dir, train_dataset=preferences(margin=True))
    # As the Trainer finds it out, and where it looks for the weights' type
    trainer.is_deepspeed_enabled = True
    config = SimpleNamespace(dtype=lambda: torch.bfloat16)
    monkeypatch.setitem(vars(trainer.accelerator.state), "deepspeed_plugins", {})
    monkeypatch.setattr(
        type(trainer.accelerator.state), "deepspeed_plugin", SimpleNamespace(hf_ds_config=config), raising=False
    )
    margin = torch.tensor([0.3, 1.7])
    inputs = trainer._prepare_inputs({"input_ids": torch.tensor([[5]]), "margin": margin})
    assert torch.equal(inputs["margin"], margin)
    assert inputs["margin"].dtype == torch.float32


# The files


def test_there_are_no_others():
    assert {path.stem for path in LAUNCH.iterdir()} == set(FILES)
    assert {path.suffix for path in LAUNCH.iterdir()} == {".yaml", ".json"}


@pytest.mark.parametrize("name", FILES)
def test_accelerate_takes_them(name, monkeypatch):
    monkeypatch.chdir(ROOT)  # from where the path of a DeepSpeed config is meant
    path = LAUNCH / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.num_processes == {"one_gpu": 1, "two_nodes": 16}.get(name, 8)
    assert config.num_machines == (2 if name == "two_nodes" else 1)
    assert config.distributed_type.value == {
        "one_gpu": "NO", "ddp": "MULTI_GPU", "two_nodes": "MULTI_GPU", "fsdp2": "FSDP"
    }.get(name, "DEEPSPEED")  # fmt: skip
    # What the launcher makes of it
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.num_processes == config.num_processes
    assert arguments.mixed_precision == ("no" if name.startswith("zero") else "bf16")
    assert arguments.use_fsdp == (name == "fsdp2")
    if name == "fsdp2":
        assert int(arguments.fsdp_version) == 2
        assert arguments.fsdp_state_dict_type == "FULL_STATE_DICT"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("zero")])
def test_deepspeed_leaves_the_head_in_float32(name):
    entries = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
    # accelerate refuses these beside a DeepSpeed config file.
    assert "mixed_precision" not in entries
    assert entries["deepspeed_config"].keys() == {"deepspeed_config_file", "zero3_init_flag"}
    file = Path(entries["deepspeed_config"]["deepspeed_config_file"])
    assert file == (LAUNCH / f"{name}.json").relative_to(ROOT)
    config = json.loads((ROOT / file).read_text())
    check_parallelism(deepspeed=config)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    zero = config["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert entries["deepspeed_config"]["zero3_init_flag"] == (zero["stage"] == 3)
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)
    offload = {"device": "cpu", "pin_memory": True} if name == "zero3_offload" else None
    assert zero.get("offload_param") == zero.get("offload_optimizer") == offload


@pytest.mark.parametrize("name", FILES)
def test_the_docs_name_them(name):
    docs = (ROOT / "docs" / "distributed.md").read_text()
    assert f"`{name}.yaml`" in docs
    text = (LAUNCH / f"{name}.yaml").read_text()
    assert f"accelerate launch --config_file examples/launch/{name}.yaml" in text
    assert "When to use it:" in text
    assert "docs/distributed.md" in (ROOT / "README.md").read_text()


# FSDP2, whose real run is in tests/models/test_training_processes.py


class Fsdp2Accelerator:
    """An accelerator with FSDP2 whose `prepare` is a function of the test's."""

    is_fsdp2 = True

    def __init__(self, prepare):
        self.prepare = prepare


def shard_like_accelerate(policy: MixedPrecisionPolicy):
    """What accelerate's `fsdp2_prepare_model` does: it looks the function up when it runs, and shards bottom up."""

    def prepare(model):
        from torch.distributed.fsdp import fully_shard

        fully_shard([model.model.norm, model.score], mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        return model

    return prepare


@pytest.fixture
def sharded(monkeypatch):
    """What torch is asked to shard, with the policies: sharding itself takes several processes."""
    found = []
    monkeypatch.setattr(
        torch.distributed.fsdp, "fully_shard", lambda module, mp_policy: found.append((module, mp_policy))
    )
    return found


POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, output_dtype=torch.bfloat16)


def test_the_head_is_sharded_apart_in_this_thread(tiny_llama_dir, sharded):
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir)
    other = DiscoRewardModel.from_pretrained(tiny_llama_dir)
    original = torch.distributed.fsdp.fully_shard
    shard = shard_like_accelerate(POLICY)

    def shard_another_elsewhere(model):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(shard, other).result()
        return shard(model)

    accelerator = Fsdp2Accelerator(shard_another_elsewhere)
    sharding.keep_head_apart(accelerator)
    assert accelerator.prepare(model) is model
    in_float32 = MixedPrecisionPolicy()
    policies = {
        id(module) if isinstance(module, torch.nn.Module) else "tail": policy for module, policy in sharded[2:]
    }
    assert [policy for _, policy in sharded[:2]] == [POLICY, POLICY]
    assert policies[id(model.score)] == in_float32
    assert policies["tail"] == policies[id(model)] == replace(POLICY, output_dtype=None)
    assert torch.distributed.fsdp.fully_shard is original
    # A model that is sharded already is left as it is.
    again = Fsdp2Accelerator(lambda model: model)
    sharding.keep_head_apart(again)
    assert again.prepare(model) is model


def test_a_head_that_was_not_sharded_apart_is_an_error(tiny_llama_dir, sharded):
    """As with an accelerate that looks the function up elsewhere."""
    model = DiscoRewardModel.from_pretrained(tiny_llama_dir)
    accelerator = Fsdp2Accelerator(lambda model: model)
    sharding.keep_head_apart(accelerator)
    with pytest.raises(RuntimeError, match=r"head score was sharded with the weights .* accelerate [\d.]+ does not"):
        accelerator.prepare(model)
    accelerator = Fsdp2Accelerator(lambda model: shard_like_accelerate(POLICY)(model.bfloat16()))
    sharding.keep_head_apart(accelerator)
    with pytest.raises(RuntimeError, match=r"head score is in torch\.bfloat16"):
        accelerator.prepare(model)


def test_torchs_function_is_given_back():
    before = torch.distributed.fsdp.fully_shard
    with pytest.raises(RuntimeError, match="on the way"), sharding.heads_as_their_own_units():
        assert torch.distributed.fsdp.fully_shard is not before
        raise RuntimeError("on the way")
    assert torch.distributed.fsdp.fully_shard is before


def test_the_first_of_several_processes_speaks():
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend "fake"

    assert is_main_process()
    for rank in (0, 1):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=2)
        try:
            assert is_main_process() is (rank == 0)
        finally:
            torch.distributed.destroy_process_group()
