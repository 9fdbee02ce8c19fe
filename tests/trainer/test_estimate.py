"""`disco-trl estimate` is compared with real training: the bytes of real objects after a step, and real peaks."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny_models import ARCHITECTURES, VOCAB, base_model, tiny_config
from tiny_training import disco_trainer, preferences
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    T5Config,
    TrainerCallback,
)

from benchmarks.estimate import MALLOC, Setting, measure, settings_of
from benchmarks.peak_memory import in_fresh_process
from disco_trl import DiscoRewardModel
from disco_trl.cli.estimate import GIB
from disco_trl.cli.main import main
from disco_trl.models.prefix_sharing import prepare
from disco_trl.trainer.dataless_model import METHODS, Settings
from disco_trl.trainer.dataless_step import DatalessTrainer, LiveMemory, bytes_of
from disco_trl.trainer.estimate import estimate, largest_batch


# Architectures that `prepare` knows to support prefix sharing
KNOWN = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "opt")
FLOAT32 = Settings(length=32, dtype="float32", activation_checkpointing=False, device="cpu")


@pytest.fixture
def llama_dir(widened_llama_dir) -> str:
    """The tests' tiny Llama, wide enough for the blocks of 4-bit weights and 8-bit optimizer states."""
    return widened_llama_dir(128)


class GradientBytes(TrainerCallback):
    """Records the bytes of all gradients before an optimizer step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = bytes_of(parameter.grad for parameter in model.parameters() if parameter.grad is not None)


def held(model) -> list[torch.Tensor]:
    """Parameters, buffers, and what bitsandbytes stores beside each 4-bit weight.

    `state2.code` is left out: it is one table that all layers share.
    """
    tensors = [*model.parameters(), *model.buffers()]
    for state in (p.quant_state for p in model.parameters() if hasattr(p, "quant_state")):
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax]
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_those_of_the_real_objects_after_a_step(tmp_path, llama_dir, method, dtype):
    options: dict = {"model_init_kwargs": {"dtype": dtype}, "bf16": dtype != "float32"}
    if method != "full":
        options["peft_config"] = LoraConfig(r=16, target_modules="all-linear")
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    gradients = GradientBytes()
    trainer = disco_trainer(
        tmp_path, model=llama_dir, train_dataset=preferences(), callbacks=[gradients], **options, max_steps=1
    )
    trainer.train()
    settings = Settings(length=32, dtype=dtype, activation_checkpointing=False, device="cpu")
    found = estimate(AutoConfig.from_pretrained(llama_dir), llama_dir, method, settings)

    quantized = {id(p): p.quant_state.shape.numel() for p in trainer.model.parameters() if hasattr(p, "quant_state")}
    assert found.parameters == sum(quantized.get(id(p), p.numel()) for p in trainer.model.parameters())
    assert found.trained == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert found.weights == bytes_of(held(trainer.model))
    assert found.gradients == gradients.found
    states = [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert found.optimizer == bytes_of(states)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "sgd", "adafactor"])
def test_optimizer_states_are_those_of_the_real_optimizer(tmp_path, llama_dir, optim):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    trainer = disco_trainer(tmp_path, model=llama_dir, train_dataset=preferences(), optim=optim, max_steps=1)
    trainer.train()
    states = [v for state in trainer.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    settings = Settings(length=32, dtype="float32", optim=optim, device="cpu")
    expected = DatalessTrainer(AutoConfig.from_pretrained(llama_dir), llama_dir, "full", settings)
    assert expected.optimizer_bytes()[0] == bytes_of(states)


def test_paged_states_are_as_many_as_unpaged_ones(llama_dir):
    pytest.importorskip("bitsandbytes")
    config = AutoConfig.from_pretrained(llama_dir)
    states = {
        optim: DatalessTrainer(config, llama_dir, "full", Settings(length=32, optim=optim)).optimizer_bytes()[0]
        for optim in ("adamw_8bit", "paged_adamw_8bit", "adamw_torch")
    }
    assert states["paged_adamw_8bit"] == states["adamw_8bit"] < states["adamw_torch"] / 1.5


# Activations


def real_model(architecture: str, tmp_path: Path, length: int):
    """A tiny model with data, in training mode and without dropout."""
    base = base_model(architecture)
    base.config.max_position_embeddings = length
    base.save_pretrained(tmp_path)
    model = DiscoRewardModel.from_pretrained(tmp_path, dtype="float32").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def real_batch(batch):
    """The same batch with token ids in the tiny model's vocabulary and, if it is padded, one padding token.

    transformers creates no mask for a batch without padding, but the estimate has to allow for one.
    """
    batch = {name: tensor % VOCAB if name == "input_ids" else tensor for name, tensor in batch.items()}
    if "nodes" not in batch:
        batch["attention_mask"][0, -1] = 0
    return batch


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2"])
def test_the_peak_of_a_step_is_that_of_one_with_data(tmp_path, architecture, shares, checkpoints):
    settings = Settings(
        length=48,
        prompt_share=0.5,
        prefix_sharing=shares,
        dtype="float32",
        activation_checkpointing=checkpoints,
        device="cpu",
    )
    model = real_model(architecture, tmp_path, 64)
    dataless = DatalessTrainer(tiny_config(architecture), architecture, "full", settings)
    batch = real_batch(dataless._batch(3))
    if shares:
        assert prepare(model) is None and dataless.refusal is None
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    live = LiveMemory([*model.parameters(), *model.buffers(), *(v for v in batch.values() if torch.is_tensor(v))])
    with live:
        output = model(**batch)
        loss = output.logits.sum() + output.scale.sum()
        del output
        loss.backward()
    step = dataless.step(3)
    assert step.gradients == bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    assert step.peak == pytest.approx(live.peak(), rel=0.03)


@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "activation_checkpointing_enable"), reason="transformers 5.24 has the new name"
)
def test_activations_are_dropped_without_the_old_name(monkeypatch):
    """transformers 6 has no `gradient_checkpointing_enable`."""
    monkeypatch.delattr(PreTrainedModel, "gradient_checkpointing_enable")
    monkeypatch.setattr(PreTrainedModel, "_is_overridden", lambda self, name: False)  # where 5.24 looks for the name
    config = tiny_config("llama", max_position_embeddings=256)
    settings = [replace(FLOAT32, length=256, activation_checkpointing=drops) for drops in (False, True)]
    kept, dropped = (DatalessTrainer(config, "llama", "full", one).step(2).activations for one in settings)
    assert dropped < 0.8 * kept


def test_what_is_saved_for_the_backward_pass_is_counted(tmp_path):
    model = real_model("llama", tmp_path, 256)
    config = tiny_config("llama", max_position_embeddings=256)
    settings = replace(FLOAT32, length=256, prefix_sharing=False)
    dataless = DatalessTrainer(config, "llama", "full", settings)
    weights = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage  # held, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**real_batch(dataless._batch(4)))
    expected = sum(storage.nbytes() for storage in saved.values())
    # Besides the saved tensors, only the temporary tensors of one operation are alive at the peak.
    assert expected < dataless.step(4).activations < 1.15 * expected


def test_shared_prefixes_checkpoints_and_adapters_take_less(llama_dir):
    config = AutoConfig.from_pretrained(llama_dir, max_position_embeddings=512)

    def activations(method="full", **changed) -> int:
        settings = Settings(**({"length": 512, "prompt_share": 0.75, "activation_checkpointing": False} | changed))
        return DatalessTrainer(config, llama_dir, method, settings).step(2).activations

    shared = activations()
    # 640 of the pair's 2 × 512 tokens are computed: 384 shared ones and twice 128.
    assert 0.5 < shared / activations(prefix_sharing=False) < 0.75
    assert activations(activation_checkpointing=True) < 0.8 * shared
    assert activations(dtype="float32") > 1.3 * activations(dtype="bfloat16")
    gradients = DatalessTrainer(config, llama_dir, "lora", Settings(length=32, lora_r=4)).step(1).gradients
    assert DatalessTrainer(config, llama_dir, "lora", Settings(length=32, lora_r=8)).step(1).gradients > gradients


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *((architecture, "full") for architecture in ARCHITECTURES),
        *((architecture, method) for architecture in ("gpt2", "gemma3", "bert", "roberta") for method in METHODS[1:]),
    ],
)
def test_every_architecture_can_be_estimated(architecture, method):
    config = tiny_config(architecture)
    found = estimate(config, architecture, method, Settings(length=24, device="cpu"), batch_size=2)
    assert found.total >= found.weights + found.optimizer + found.gradients
    assert (found.prefix_sharing_refusal is None) == (architecture in KNOWN)
    if method == "full":
        assert found.parameters == found.trained
    else:
        assert found.trained < found.parameters


# Several devices, and what fits


def test_what_devices_share_is_divided_among_them(llama_dir):
    config = AutoConfig.from_pretrained(llama_dir)

    def on(processes, sharding):
        return estimate(config, llama_dir, "full", FLOAT32, 2, processes, sharding)

    alone, copied, zero2, zero3 = on(1, "none"), on(4, "none"), on(4, "zero2"), on(4, "zero3")
    assert copied.gradients == 2 * alone.gradients  # the buckets of DistributedDataParallel
    assert (zero2.weights, zero2.gradients) == (alone.weights, round(alone.gradients / 4))
    assert zero3.weights == round(alone.weights / 4)
    assert zero2.optimizer == zero3.optimizer == round(alone.optimizer / 4)
    assert zero3.activations > alone.activations == zero2.activations


def test_zero_keeps_a_float32_copy_of_weights_in_bfloat16_and_fsdp_float32_weights(llama_dir):
    config = AutoConfig.from_pretrained(llama_dir)
    settings = Settings(length=32)

    def on(sharding):
        return estimate(config, llama_dir, "full", settings, 2, 1, sharding)

    alone, zero2, fsdp = on("none"), on("zero2"), on("fsdp")
    assert zero2.optimizer == alone.optimizer + 4 * alone.trained
    assert zero2.weights < 0.6 * alone.weights
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer) == (alone.weights, 4 * alone.trained, alone.optimizer)


@pytest.mark.parametrize("memory", [0, 99, 100, 101, 1_000, 4_321, 100_000, 10**9])
def test_the_largest_batch_is_the_one_that_counting_finds(memory):
    def total(pairs: int) -> int:
        return max(90 + 10 * pairs, 400 + pairs, 37 * pairs - 200)

    fitting = [pairs for pairs in range(1, 4097) if total(pairs) <= memory]
    assert largest_batch(total, memory) == max(fitting, default=0)


def test_the_largest_batch_is_found_in_few_looks():
    looks = []

    def total(pairs: int) -> int:
        looks.append(pairs)
        return max(1000 + pairs, 70 * pairs)

    assert largest_batch(total, 70 * 1234) == 1234
    assert len(looks) < 15


# The command


def test_the_command_says_what_fits(llama_dir, tmp_path, capsys):
    arguments = ["estimate", llama_dir, "--length", "32", "--batch_size", "2", "--methods", "full", "lora"]
    main([*arguments, "--json", str(tmp_path / "memory.json")])
    assert "| LoRA | " in capsys.readouterr().out
    written = json.loads((tmp_path / "memory.json").read_text())
    assert written["settings"]["length"] == 32 and "json" not in written["settings"]
    totals = {name: found["total"] for name, found in written["estimates"].items()}
    assert totals["lora"] < totals["full"]
    between = sum(totals.values()) / 2
    main([*arguments, "--memory", str(between / GIB)])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    full, lora = ([cell.strip() for cell in row] for row in rows[2:])
    assert (full[0], full[-2]) == ("full", "no")
    assert (lora[0], lora[-2]) == ("LoRA", "yes")
    assert int(lora[-1]) >= 2 > int(full[-1])


def test_an_encoder_is_padded_and_told_of(tmp_path, capsys):
    tiny_config("bert").save_pretrained(tmp_path)
    main(["estimate", str(tmp_path), "--length", "24", "--methods", "full"])
    assert "Without prefix sharing: it is not a disco model on a decoder" in capsys.readouterr().out


def test_what_cannot_be_estimated_is_an_error(tmp_path, llama_dir):
    T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="encoder-decoder"):
        main(["estimate", str(tmp_path)])
    with pytest.raises(SystemExit, match="reads at most"):
        main(["estimate", llama_dir, "--length", "100000"])
    with pytest.raises(SystemExit) as exit_info:
        main(["estimate", llama_dir, "--batch_size", "0"])
    assert exit_info.value.code == 2
    for name, value in {"dtype": "int8", "optim": "lion", "sharding": "zero9", "methods": "dora"}.items():
        with pytest.raises(SystemExit, match=f"{value!r} is unknown; choose one of '"):
            main(["estimate", llama_dir, f"--{name}", value])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_real_run_holds_what_is_estimated(tmp_path, llama_dir, monkeypatch):
    for name, value in MALLOC.items():
        monkeypatch.setenv(name, value)
    config = AutoConfig.from_pretrained(
        llama_dir, hidden_size=768, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=12,
        num_key_value_heads=6, head_dim=64, vocab_size=8192, max_position_embeddings=256,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama_dir).save_pretrained(tmp_path)
    setting = Setting(2, 128, False)
    expected = estimate(config, str(tmp_path), "full", settings_of(setting, True), setting.batch_size)
    measured = in_fresh_process(measure, str(tmp_path), "full", setting, True, "float32")
    assert expected.total == pytest.approx(measured, rel=0.15)
