"""What a checkpoint remembers of its training rows: `ScaleHead.track` and `ScaleHead.traits`.

The running moments are compared with moments computed directly, in float64, over all rows at once, where a row weighs
e^(-rows since its step / memory) of what the newest step's rows weigh.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import batch, load, lora, save_adapter
from tiny_training import disco_trainer, preferences
from torch import Tensor, nn

from disco_trl.models.heads import DiscoHead
from disco_trl.models.scale_head import ScaleHead


MOMENTS = ("mean_hidden", "var_hidden", "mean_traits", "var_traits", "rows_seen")


def scale_head(size: int = 4) -> ScaleHead:
    head = ScaleHead(size, unit_scale=1.5, fixed_scale=None, device=None)
    torch.nn.init.normal_(head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return head


def rows(number: int, size: int = 4, mean: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean + torch.linspace(0.5, 2, size) * torch.randn(number, size, generator=generator)


def direct_moments(steps: list[Tensor], memory: float = 512) -> tuple[Tensor, Tensor]:
    """Weighted mean and variance of all rows `[N, H]` of all steps, in float64."""
    since = torch.tensor([sum(len(later) for later in steps[index + 1 :]) for index in range(len(steps))])
    # Each step's rows share the weight that is left of it, -expm1(-n / memory), equally.
    weights = torch.cat(
        [
            torch.full((len(step),), -math.expm1(-len(step) / memory) / len(step)) * math.exp(-before / memory)
            for step, before in zip(steps, since.tolist(), strict=True)
        ]
    ).double()
    weights /= weights.sum()
    values = torch.cat(steps).double()
    mean = weights @ values
    return mean, weights @ (values - mean).square()


# The moments


@pytest.mark.parametrize("sizes", [[64], [16, 16, 16], [2] * 40, [300, 5, 700, 64]], ids=str)
def test_moments_are_those_computed_directly(sizes):
    head = scale_head()
    steps = list(rows(sum(sizes), mean=2.0).split(sizes))
    for step in steps:
        head.track(step, torch.zeros(len(step), 1))
    mean, var = direct_moments(steps)
    torch.testing.assert_close(head.mean_hidden.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.var_hidden.double(), var, rtol=1e-4, atol=1e-6)
    assert head.rows_seen.item() == sum(sizes)


@pytest.mark.parametrize("mean", [1e2, -1e4])
def test_large_means_do_not_cancel(mean):
    """Hidden states have dimensions whose mean is hundreds of times their deviation; float32 keeps seven digits."""
    head = scale_head()
    steps = list(rows(96, mean=mean).split([32, 64]))
    for step in steps:
        head.track(step, step[:, :1])
        mean_now, var = direct_moments(steps[: 1 + (step is steps[1])])
        torch.testing.assert_close(head.mean_hidden.double(), mean_now, rtol=1e-6, atol=0)
        torch.testing.assert_close(head.var_hidden.double(), var, rtol=5e-3, atol=0)
        torch.testing.assert_close(head.var_traits[0].double(), var[0], rtol=5e-3, atol=0)


@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_two_processes_merge_to_what_one_would_have(mean):
    """Two steps of two processes, whose rows differ in their mean as well: one head with all rows, two with half."""
    steps = [torch.cat([rows(8, mean=mean), rows(8, mean=mean + 3, seed=1)]), rows(16, mean=mean + 1, seed=2)]
    one = scale_head()
    for step in steps:
        one.track(step, step[:, :1])

    two = [scale_head(), scale_head()]
    meeting, brought = threading.Barrier(2, timeout=10), [torch.empty(0)] * 2

    def follow(process: int) -> None:
        def gather(tensor: Tensor) -> Tensor:
            brought[process] = tensor
            meeting.wait()
            both = torch.cat(brought)
            meeting.wait()
            return both

        for step in steps:
            half = step.chunk(2)[process]
            two[process].track(half, half[:, :1], gather=gather)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(follow, range(2)))
    for name in MOMENTS:
        assert torch.equal(getattr(two[0], name), getattr(two[1], name))
        torch.testing.assert_close(getattr(two[0], name), getattr(one, name), rtol=2e-4, atol=1e-4)
    assert two[0].rows_seen.item() == 32


# Traits


def test_traits_by_hand():
    head = ScaleHead(2, unit_scale=2.0, fixed_scale=None, device=None)
    head.mean_hidden.copy_(torch.tensor([1.0, -1.0]))
    head.var_hidden.copy_(torch.tensor([4.0, 0.25]))
    traits = head.traits(
        torch.tensor([[3.0, 0.0], [1.0, -1.0]]), torch.tensor([[0.7], [-2.0]]), torch.full((2, 1), 6.0)
    )
    # ((3 - 1)² / 4 + (0 + 1)² / 0.25) / 2 = 2.5; log(6 / 2) = log 3
    expected = torch.tensor([[0.7, math.log(3), math.log(2.5)], [-2.0, math.log(3), math.log(1e-12)]])
    torch.testing.assert_close(traits, expected)


def test_moments_of_the_traits():
    """After one step, whose rows' traits are taken about that step's own mean and variance."""
    head = scale_head()
    hidden_states, location = rows(128, mean=1.0), rows(128, seed=1)[:, :1]
    head.track(hidden_states, location)
    traits = head.traits(hidden_states, location, head(hidden_states))
    torch.testing.assert_close(head.mean_traits, traits.mean(dim=0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.var_traits, traits.var(dim=0, correction=0), rtol=1e-4, atol=1e-6)
    assert abs(head.mean_traits[1].item()) < 1e-3  # mean log(σ / u)
    assert traits[:, 2].exp().mean().item() == pytest.approx(1, abs=1e-4)  # squared distances in units of variance


def test_a_head_that_changes_brings_its_moments_along():
    """Drift divided by the logged shift is the spread that answers like the training rows have, in every trait."""
    torch.manual_seed(0)
    head = DiscoHead.convert(nn.Linear(16, 1), unit_scale=1.5, fixed_scale=None)
    for step in rows(4096, size=16, mean=1.0).split(64):
        head.scale.track(step, head(step).detach())
    weight = torch.randn(1, 16, generator=torch.Generator().manual_seed(2)) / 8
    trained = rows(4096, size=16, mean=1.0)
    head.refit(trained, head(trained).detach()[:, 0], factor=0.4, scale_weight=weight)

    like_them = rows(4096, size=16, mean=1.0, seed=3)
    shifted = like_them + 0.5
    with torch.no_grad():
        own, moved = (head.scale.traits(states, head(states), head.scale(states)) for states in (like_them, shifted))
    drift = moved.mean(dim=0) - own.mean(dim=0)
    shift = (moved.mean(dim=0) - head.scale.mean_traits) / head.scale.var_traits.sqrt()
    spread = own.std(dim=0)
    assert ((own.mean(dim=0) - head.scale.mean_traits) / spread).abs().max() < 0.15
    assert (drift / shift).tolist() == pytest.approx(spread.tolist(), rel=0.25)
    torch.testing.assert_close(head.scale.var_traits.sqrt(), spread, rtol=0.1, atol=0)


def test_a_fixed_scale_keeps_nothing():
    head = ScaleHead(4, unit_scale=1.0, fixed_scale=0.5, device=None)
    assert not head.state_dict()


# Checkpoints


def moments(model) -> dict[str, Tensor]:
    return {name: getattr(model.scale_head, name).clone() for name in MOMENTS}


def train(tmp_path, tokenizer, tiny_llama_dir, **options):
    trainer = disco_trainer(
        tmp_path / "run",
        model=tiny_llama_dir,
        processing_class=tokenizer,
        train_dataset=preferences("standard", rows=16),
        **options,
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    return trainer


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_a_checkpoint_keeps_them(adapter, tmp_path, tiny_tokenizer, tiny_llama_dir):
    options = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if adapter else {}
    trainer = train(tmp_path, tiny_tokenizer, tiny_llama_dir, **options)
    trained = moments(trainer.model)
    assert trained["rows_seen"].item() == 4 * 4 * 2  # steps, pairs a step, sides
    assert all(tensor.any() for tensor in trained.values())
    loaded = load(tmp_path / "saved")
    for name, tensor in moments(loaded).items():
        assert torch.equal(tensor, trained[name]), name
    if adapter:
        merged = loaded.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        for name, tensor in moments(load(tmp_path / "merged")).items():
            assert torch.equal(tensor, trained[name]), name


def test_each_adapter_has_its_own(base_model_dir, tmp_path):
    model = lora(load(base_model_dir("llama")))
    model.add_adapter("other", model.peft_config["default"])
    model.scale_head.track(rows(8, size=64), torch.zeros(8, 1))
    path = save_adapter(model, tmp_path)
    of_default = moments(model)
    model.set_adapter("other")
    assert moments(model)["rows_seen"] != of_default["rows_seen"]
    model.set_adapter("default")
    for name, tensor in moments(load(path)).items():
        assert torch.equal(tensor, of_default[name])


def test_they_say_what_the_rows_were(tmp_path, tiny_tokenizer, tiny_llama_dir):
    """With a learning rate of zero the rows' traits can be taken again afterwards."""
    ids = batch(4)["input_ids"].tolist()
    dataset = Dataset.from_dict({"chosen_ids": ids[:2], "rejected_ids": ids[2:]})
    options = {"per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 0.0}
    trainer = disco_trainer(
        tmp_path, model=tiny_llama_dir, processing_class=tiny_tokenizer, train_dataset=dataset, **options
    )
    trainer.train()
    model = trainer.model.eval()
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([row])) for row in ids]
    hidden_states = torch.cat([output.scale_state for output in outputs])
    location = torch.cat([output.logits for output in outputs])
    head = model.scale_head
    torch.testing.assert_close(head.mean_hidden, hidden_states.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.var_hidden, hidden_states.var(dim=0, correction=0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.mean_traits[0], location.mean(), rtol=1e-4, atol=1e-5)
