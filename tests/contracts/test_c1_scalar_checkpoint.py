"""Contract C1: a saved disco checkpoint is a scalar reward model.

Whoever knows nothing of disco-trl loads it with

    AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)

and gets the locations, the point estimates of the rewards, as `logits[:, 0]`:

1. Nothing is missing on loading; what the stock class does not know (the keys under `<head>.scale`) it leaves alone.
2. In float32 they equal the disco model's locations to 1e-6 · max(1, |μ|), for every supported architecture, any batch
   and either side of padding, also where the padding token is the end-of-text token. (The one difference there can be
   is the order in which w · h is summed, since the stock head takes every token and a disco head the pooled ones. If
   large terms cancel, float32 cannot tell μ better than 2⁻²³ Σ|wᵢhᵢ|, and that much more is allowed.) In bfloat16 they
   agree to 0.02 · max(1, |μ|): the stock head rounds its weights and its output to three digits, where a disco head
   works in float32 on the same hidden states.
3. `config.json` names the stock architecture and model type, and one label. The weights are safetensors only.
4. This holds for full, sharded and bfloat16 checkpoints, with fixed scales, after the vocabulary was resized, for a
   PEFT adapter directory loaded by path, and for what is saved after merging an adapter.
"""

import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import (
    ARCHITECTURES,
    SCALE_STATE,
    batch,
    head_of,
    load,
    load_stock,
    lora,
    randomize_heads,
    save_adapter,
)
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

from disco_trl import DiscoRewardModel


all_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
BFLOAT16_TOLERANCE = 0.02


@torch.no_grad()
def assert_same_rewards(stock, disco, tolerance: float = 1e-6) -> None:
    inner = disco.get_base_model() if isinstance(disco, PeftModel) else disco
    weight = functools.reduce(getattr, inner.head_name.split("."), inner).weight
    for size in (1, 4):
        for padding_side in ("right", "left"):
            inputs = batch(size, padding_side)
            output = disco(**inputs)
            location, logits = output.logits.float(), stock(**inputs).logits.float()
            assert logits.shape == location.shape == (size, 1)
            order = 2**-23 * (output.pooled_hidden_state * weight).abs().sum(dim=-1, keepdim=True)
            error = (logits - location).abs()
            assert (error <= tolerance * location.abs().clamp_min(1) + order).all(), (size, padding_side)
    # A head of zeros would pass all of the above.
    assert location.std() > 1e-3


@all_architectures
def test_what_the_scale_reads_leaves_the_location_alone(architecture, base_model_dir, tmp_path):
    disco = DiscoRewardModel.from_pretrained(base_model_dir(architecture))
    disco.set_scale_layer(1)
    randomize_heads(disco).save_pretrained(tmp_path)
    stock, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert_same_rewards(stock.eval(), disco)


@all_architectures
def test_the_stock_class_gives_the_locations(architecture, disco_dir):
    path = disco_dir(architecture)
    stock, info = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, output_loading_info=True)
    disco = load(path)
    assert type(stock) is not type(disco)
    assert not isinstance(stock, DiscoRewardModel)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(key.startswith(f"{disco.head_name}.scale.") for key in info["unexpected_keys"])
    assert_same_rewards(stock.eval(), disco)


@all_architectures
def test_the_config_is_a_stock_one(architecture, base_model_dir, disco_dir):
    base = AutoConfig.from_pretrained(base_model_dir(architecture))
    config = AutoConfig.from_pretrained(disco_dir(architecture))
    stock = AutoModelForSequenceClassification.from_config(base)
    assert config.architectures == [type(stock).__name__]
    assert config.architectures[0].endswith("ForSequenceClassification")
    assert config.model_type == base.model_type
    assert type(config) is type(base)
    assert config.num_labels == 1
    assert not hasattr(config, "auto_map")


def test_the_files_are_config_and_safetensors(disco_dir):
    path = Path(disco_dir("llama"))
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(path / "model.safetensors", "pt") as file:
        head = sorted(key for key in file.keys() if key.startswith("score"))
    assert head == sorted([*(f"score.scale.{name}" for name in SCALE_STATE), "score.weight"])


WITHOUT_DISCO = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "disco_trl":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForSequenceClassification

job = json.load(sys.stdin)
inputs = {name: torch.tensor(rows) for name, rows in job["inputs"].items()}
logits = {}
for path in job["paths"]:
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()
    with torch.no_grad():
        logits[path] = model(**inputs).logits[:, 0].tolist()
assert not any(name.startswith("disco_trl") for name in sys.modules)
json.dump(logits, open(job["output"], "w"))
"""


def test_no_disco_trl_is_needed(disco_dir, tmp_path):
    # A process of its own, in which disco_trl cannot be imported.
    inputs = batch(4, "left")
    paths = {architecture: disco_dir(architecture) for architecture in ARCHITECTURES}
    job = {
        "inputs": {name: tensor.tolist() for name, tensor in inputs.items()},
        "paths": list(paths.values()),
        "output": str(tmp_path / "logits.json"),
    }
    subprocess.run([sys.executable, "-c", WITHOUT_DISCO], input=json.dumps(job), text=True, check=True)
    logits = json.loads((tmp_path / "logits.json").read_text())
    for architecture, path in paths.items():
        with torch.no_grad():
            location = load(path).reward_distribution(**inputs).location
        expected = [pytest.approx(value, abs=1e-6 * max(1, abs(value))) for value in location.tolist()]
        assert logits[path] == expected, architecture


@pytest.mark.parametrize("settings", [{"reward_family": "cauchy"}, {"reward_family": "logistic", "fixed_scale": 2.0}])
def test_every_family_and_a_fixed_scale(settings, disco_dir):
    path = disco_dir("llama", **settings)
    assert_same_rewards(load_stock(path), load(path))


@all_architectures
def test_bfloat16(architecture, disco_dir):
    path = disco_dir(architecture)
    disco = load(path, dtype=torch.bfloat16)
    assert_same_rewards(load_stock(path, dtype=torch.bfloat16), disco, BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("architecture", ["llama", "roberta"])
def test_a_bfloat16_checkpoint_keeps_its_head_in_float32(architecture, base_model_dir, tmp_path):
    model = load(base_model_dir(architecture), dtype=torch.bfloat16)
    randomize_heads(model).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name, tensor in head_of(model).state_dict().items():
        saved = state[f"{model.head_name}.{name}"]
        assert saved.dtype == torch.float32
        assert torch.equal(saved, tensor)
    # By default transformers loads in the dtype of the checkpoint, which is what TRL gets from a path.
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_rewards(load_stock(tmp_path), model, BFLOAT16_TOLERANCE)
    float32 = {"dtype": torch.float32}
    assert_same_rewards(load_stock(tmp_path, **float32), load(tmp_path, **float32))


@pytest.mark.parametrize("architecture", ["llama", "deberta_v2"])
def test_sharded(architecture, disco_dir, tmp_path):
    model = load(disco_dir(architecture))
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    stock, disco = load_stock(tmp_path), load(tmp_path)
    assert_same_rewards(stock, disco)
    assert_same_rewards(stock, model)
    inputs = batch(4)
    with torch.no_grad():
        assert torch.equal(disco(**inputs).scale, model(**inputs).scale)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_after_the_vocabulary_was_resized(architecture, disco_dir, tmp_path):
    model = load(disco_dir(architecture))
    before = model.reward_distribution(**batch(4))
    model.resize_token_embeddings(80)
    model.save_pretrained(tmp_path)
    disco = load(tmp_path)
    assert disco.get_input_embeddings().num_embeddings == 80
    assert_same_rewards(load_stock(tmp_path), disco)
    after = disco.reward_distribution(**batch(4))
    torch.testing.assert_close(after.location, before.location, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after.scale, before.scale, rtol=1e-6, atol=1e-6)


@all_architectures
def test_a_peft_adapter_by_path(architecture, base_model_dir, tmp_path):
    live = lora(load(base_model_dir(architecture)))
    path = save_adapter(live, tmp_path / "adapter")
    stock = load_stock(path)
    assert not isinstance(stock, DiscoRewardModel)
    assert_same_rewards(stock, live)

    loaded = load(path)
    inputs = batch(4)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, live(**inputs).logits, rtol=0, atol=0)
        torch.testing.assert_close(loaded(**inputs).scale, live(**inputs).scale, rtol=0, atol=0)
        plain = load(base_model_dir(architecture))(**inputs)
        assert not torch.allclose(plain.logits, live(**inputs).logits)

    merged = loaded.merge_and_unload().eval()
    assert isinstance(merged, DiscoRewardModel)
    merged.save_pretrained(tmp_path / "merged")
    disco = load(tmp_path / "merged")
    assert_same_rewards(load_stock(tmp_path / "merged"), disco)
    # Merging rounds the sum of two weights: what PEFT itself loses, with large random ones.
    assert_same_rewards(disco, live, tolerance=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(disco(**inputs).scale, live(**inputs).scale, rtol=1e-3, atol=0)


def test_an_adapter_on_a_disco_checkpoint(disco_dir, tmp_path):
    path = save_adapter(lora(load(disco_dir("llama", reward_family="cauchy"))), tmp_path)
    disco = load(path)
    assert disco.reward_distribution(**batch(1)).family == "cauchy"
    assert_same_rewards(load_stock(path), disco)


def test_a_text_classification_pipeline(tiny_llama_dir, tmp_path):
    # How reward benchmarks call a reward model they know nothing about.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    model = randomize_heads(load(tiny_llama_dir))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["The capital of France is Paris.", "Practise a little every day, and the piano will come."]
    outputs = pipeline("text-classification", str(tmp_path))(texts, function_to_apply="none", batch_size=2)
    with torch.no_grad():
        reward = model.reward_distribution(**tokenizer(texts, padding=True, return_tensors="pt"))
    for output, location in zip(outputs, reward.location.tolist(), strict=True):
        assert math.isclose(output["score"], location, abs_tol=1e-6 * max(1, abs(location)))
