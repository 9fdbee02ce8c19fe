"""DPO with a scale that is learned beside the policy: its value by hand, whose gradient it is, and what it learns."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from dpo_training import disco_dpo_trainer
from peft import LoraConfig
from scipy.stats import norm
from tiny_training import preferences
from transformers import AutoModelForCausalLM

from disco_trl import get_family
from disco_trl.models.scale_head import bounded_exp


UNIT = get_family("normal").unit_scale


def with_a_scale(tmp_path, sharp_llama_dir, **options):
    """A trainer whose scale varies, and whose reference is not the policy."""
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_pretrained(sharp_llama_dir, dtype="float32")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    defaults = {"train_dataset": preferences("conversational", rows=4), "reward_family": "normal", "ref_model": other}
    trainer = disco_dpo_trainer(tmp_path, model=sharp_llama_dir, **(defaults | options))
    if trainer.args.scale_training:
        with torch.no_grad():
            weight = trainer.policy_head.scale.weight
            weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return trainer


def whole_batch(trainer):
    return trainer._prepare_inputs(trainer.data_collator([*trainer.train_dataset]))


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_the_scale_reads_the_end_of_the_answer(tmp_path, sharp_llama_dir, prefix_sharing):
    trainer = with_a_scale(tmp_path, sharp_llama_dir, scale_training="joint", prefix_sharing=prefix_sharing)
    trainer.model.eval()
    mean = torch.linspace(-0.1, 0.1, trainer.model.config.hidden_size)
    trainer.policy_head.scale.mean_hidden.copy_(mean)
    batch = whole_batch(trainer)
    loss = trainer.compute_loss(trainer.model, dict(batch)).item()

    lengths = batch["attention_mask"].sum(dim=1)
    locations, scales = [], []
    for ids, length, answer in zip(batch["input_ids"], lengths, batch["completion_mask"], strict=True):
        ids, answer = ids[None, :length], answer[1:length].bool()
        logps = []
        for model in (trainer.model, trainer.ref_model):
            output = model(ids, output_hidden_states=True)
            per_token = output.logits[0, :-1].log_softmax(dim=-1).gather(-1, ids[0, 1:, None])[:, 0]
            logps.append(per_token[answer].sum().item())
            if model is trainer.model:
                state = output.hidden_states[-1][0, -1]
        locations.append(trainer.beta * (logps[0] - logps[1]))
        raw = trainer.policy_head.scale.weight[0] @ (state - mean)
        scales.append(UNIT * bounded_exp(raw).item())
    pairs = zip(locations[:4], locations[4:], scales[:4], scales[4:], strict=True)
    expected = -np.mean([norm.logcdf((a - b) / math.hypot(s, t)) for a, b, s, t in pairs])
    assert loss == pytest.approx(expected, rel=1e-4)
    assert np.ptp(np.log(scales)) > 0.1


def gradients(trainer) -> dict[str, torch.Tensor]:
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(whole_batch(trainer))).backward()
    return {name: parameter.grad for name, parameter in trainer.model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)])
def test_its_gradient_is_kept_from_the_policy_unless_asked(tmp_path, sharp_llama_dir, peft_config):
    """Detached, the policy's gradient is that of the same scales, given as columns."""
    options = {"peft_config": peft_config, "ref_model": None} if peft_config else {}
    found = {}
    for training in ("detached", "joint"):
        torch.manual_seed(0)
        trainer = with_a_scale(tmp_path, sharp_llama_dir, scale_training=training, **options)
        found[training] = gradients(trainer)
        assert trainer.policy_head.scale.weight.grad.norm() > 0
    caught = []
    head = trainer.policy_head.scale
    head.register_forward_hook(lambda _module, _args, output: caught.append(output[:, 0].tolist()))
    trainer.compute_loss(trainer.model, dict(whole_batch(trainer)))
    chosen, rejected = caught[-1][:4], caught[-1][4:]
    data = preferences("conversational", rows=4)
    data = data.add_column("scale_chosen", chosen).add_column("scale_rejected", rejected)
    torch.manual_seed(0)
    given = with_a_scale(tmp_path, sharp_llama_dir, train_dataset=data, **options)
    given._scales.mean = (
        UNIT  # Those of columns are divided by their own geometric mean, which bounds have moved here.
    )
    expected = gradients(given)
    for name, gradient in expected.items():
        torch.testing.assert_close(found["detached"][name], gradient, atol=1e-5, rtol=1e-3)
    changed = max((found["joint"][name] - gradient).abs().max().item() for name, gradient in expected.items())
    assert changed > 1e-3


def test_it_learns_what_people_disagree_about(tmp_path, sharp_llama_dir):
    """Strengths of answers about films are all over the place, and others are called equal."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(64):
        texts = (f"the film {number % 7}", f"a film {number % 5}") if number % 2 else ("the day", "a piano is big")
        rows.append(
            {
                "prompt": [{"role": "user", "content": "what is best"}],
                "chosen": [{"role": "assistant", "content": texts[0]}],
                "rejected": [{"role": "assistant", "content": texts[1]}],
                "preference_strength": int(rng.choice([-3, 3])) if number % 2 else 0,
            }
        )
    trainer = disco_dpo_trainer(
        tmp_path,
        model=sharp_llama_dir,
        train_dataset=Dataset.from_list(rows),
        reward_family="normal",
        scale_training="detached",
        per_device_train_batch_size=16,
        max_steps=40,
        learning_rate=1e-4,
    )
    scales: list[torch.Tensor] = []
    trainer.train()
    head = trainer.policy_head.scale
    handle = head.register_forward_hook(lambda _module, _args, output: scales.append(output[:, 0]))
    trainer.model.eval()
    with torch.no_grad():
        trainer.compute_loss(
            trainer.model, dict(trainer._prepare_inputs(trainer.data_collator([*trainer.train_dataset])))
        )
    handle.remove()
    contested = torch.tensor([number % 2 == 1 for number in range(64)]).repeat(2)
    log_scale = (scales[0] / UNIT).log()
    assert log_scale[contested].mean() > log_scale[~contested].mean() + 0.3
    assert log_scale.mean().abs() < 0.3  # The geometric mean is the unit.
    assert trainer.state.log_history[0]["scale_min"] > 0
