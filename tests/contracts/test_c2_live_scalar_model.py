"""Contract C2: a live disco model is a scalar reward model.

Code that was written for a one-label `...ForSequenceClassification` takes a disco model as it is:

1. `model(**inputs).logits` is `[batch, 1]`, the location, and the same output carries `scale`, `[batch, 1]`, positive
   and in float32. `scale` is in `keys_to_ignore_at_inference`, so that a `Trainer` hands `compute_metrics` one array.
   Everything else is the stock output: tuples, hidden states, the loss for `labels`. Several threads may ask at once.
2. `config.num_labels` is 1, and the model is a `PreTrainedModel` of the stock class.
3. Decoder-only models: `model.score(hidden_states)` is `[..., 1]` and `getattr(model, model.base_model_prefix)` is the
   backbone. The location is the score at the last token whose id is not the padding id, Hugging Face's own pooling.
4. So it goes into `GRPOTrainer(reward_funcs=model)`, `RLOOTrainer(reward_funcs=model)` and, where TRL has it,
   `PPOTrainer(reward_model=model)`.
5. Gradients reach location, scale and backbone, also with gradient checkpointing; with a fixed scale there is no scale
   to learn.

How a model gets there (from which files, in which dtype) is in `test_c2_ways_in.py`.
"""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from datasets import Dataset
from tiny_models import ARCHITECTURES, DECODERS, PAD, batch, head_of, load, load_stock, lora, randomize_heads
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.utils import get_reward

from disco_trl import DiscoRewardModel, get_family
from disco_trl.models.heads import DiscoHead


all_architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
all_decoders = pytest.mark.parametrize("architecture", DECODERS)
needs_ppo = pytest.mark.skipif(
    importlib.util.find_spec("trl.experimental.ppo") is None, reason="TRL 1.13 removed PPOTrainer"
)


# 1, 2. The output


@all_architectures
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("size", [1, 4])
def test_output(architecture, padding_side, size, disco_dir):
    model = load(disco_dir(architecture))
    inputs = batch(size, padding_side)
    with torch.no_grad():
        output = model(**inputs)
        reward = model.reward_distribution(**inputs)
    assert output.logits.shape == output.scale.shape == (size, 1)
    assert output.logits.dtype == output.scale.dtype == torch.float32
    assert (output.scale > 0).all()
    assert torch.isfinite(output.scale).all()
    if size > 1:
        assert output.scale.std() > 1e-3
    assert torch.equal(reward.location, output.logits[:, 0])
    assert torch.equal(reward.scale, output.scale[:, 0])
    assert reward.family == "normal"


@all_architectures
def test_it_is_a_stock_model(architecture, disco_dir):
    model = load(disco_dir(architecture))
    stock = load_stock(disco_dir(architecture))
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, type(stock))
    assert type(model).__name__ == type(stock).__name__
    assert model.config.num_labels == 1
    assert {"scale", "pooled_hidden_state", "scale_state"} <= set(model.config.keys_to_ignore_at_inference)
    assert set(stock.config.keys_to_ignore_at_inference) <= set(model.config.keys_to_ignore_at_inference)
    assert isinstance(head_of(model), DiscoHead)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "modernbert"])
def test_everything_else_is_the_stock_output(architecture, disco_dir):
    model, stock = load(disco_dir(architecture)), load_stock(disco_dir(architecture))
    inputs = batch(4)
    with torch.no_grad():
        for labels in (torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([[1], [0], [3], [1]])):
            loss = model(**inputs, labels=labels).loss
            torch.testing.assert_close(loss, stock(**inputs, labels=labels.float()).loss)
        output = model(**inputs, output_hidden_states=True)
        expected = stock(**inputs, output_hidden_states=True)
        assert len(output.hidden_states) == len(expected.hidden_states)
        torch.testing.assert_close(output.hidden_states[-1], expected.hidden_states[-1])

        as_tuple = model(**inputs, return_dict=False)
        stock_tuple = stock(**inputs, return_dict=False)
        assert isinstance(as_tuple, tuple)
        assert len(as_tuple) == len(stock_tuple) + 3
        torch.testing.assert_close(as_tuple[0], stock_tuple[0], rtol=1e-6, atol=1e-6)
        # What is ours comes last: nothing else has moved.
        output = model(**inputs)
        for ours, name in zip(as_tuple[-3:], ("scale", "pooled_hidden_state", "scale_state"), strict=True):
            assert torch.equal(ours, output[name])


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_trainer_receives_one_array(architecture, disco_dir, tmp_path):
    model = load(disco_dir(architecture))
    inputs = batch(4)
    dataset = Dataset.from_dict({**{name: tensor.tolist() for name, tensor in inputs.items()}, "labels": [0.0] * 4})
    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to="none")
    predictions = Trainer(model, args).predict(dataset).predictions
    assert predictions.shape == (4, 1)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(predictions), model(**inputs).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_several_threads_at_once(architecture, disco_dir):
    model = load(disco_dir(architecture))
    batches = [batch(size, side) for size in (1, 2, 3, 4) for side in ("left", "right")]
    with torch.no_grad():
        expected = [model(**inputs) for inputs in batches]

    def score(index: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                output = model(**batches[index])
                assert torch.equal(output.logits, expected[index].logits)
                assert torch.equal(output.scale, expected[index].scale)

    with ThreadPoolExecutor(len(batches)) as pool:
        list(pool.map(score, range(len(batches))))


# 3. Decoder-only models


@all_decoders
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_the_reward_is_the_score_at_the_last_token_that_is_not_padding(architecture, padding_side, disco_dir):
    model = load(disco_dir(architecture))
    inputs = batch(4, padding_side)
    with torch.no_grad():
        hidden_states = getattr(model, model.base_model_prefix)(**inputs).last_hidden_state
        scores = model.score(hidden_states)
        output = model(**inputs)
    assert scores.shape == (*inputs["input_ids"].shape, 1)
    assert model.score(hidden_states[0, 0]).shape == (1,)
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        last = max(position for position, token in enumerate(ids) if token != PAD)
        torch.testing.assert_close(output.logits[row], scores[row, last], rtol=1e-6, atol=1e-6)
        # raw = weight · (h - mean_hidden), and σ = u · exp(L tanh(raw / L)) with L = log 1000 and u the family's unit
        h = hidden_states[row, last]
        torch.testing.assert_close(output.pooled_hidden_state[row], h, rtol=1e-6, atol=1e-6)
        raw = model.score.scale.weight.double() @ (h - model.score.scale.mean_hidden).double()
        limit = torch.tensor(1e3, dtype=torch.float64).log()
        sigma = get_family("normal").unit_scale * torch.exp(limit * torch.tanh(raw / limit))
        torch.testing.assert_close(output.scale[row].double(), sigma, rtol=1e-5, atol=0)


@all_decoders
def test_the_way_ppo_reads_a_reward_model(architecture, disco_dir):
    model = load(disco_dir(architecture))
    inputs = batch(4)
    # TRL cuts a response at its first padding token, hence the texts without their end-of-text tokens.
    ids = inputs["input_ids"]
    with torch.no_grad():
        per_token, rewards, _ = get_reward(model, ids, pad_token_id=PAD, context_length=1)
        mask = (ids != PAD).long()
        assert per_token.shape == (*ids.shape, 1)
        torch.testing.assert_close(
            rewards, model(input_ids=ids, attention_mask=mask).logits[:, 0], rtol=1e-5, atol=1e-5
        )


# 4. Into TRL's policy trainers


@pytest.fixture
def policy_and_reward(tiny_llama_dir):
    """A policy's directory, a live reward model that has not seen any trainer, its tokenizer, and prompts."""
    reward_model = randomize_heads(DiscoRewardModel.from_pretrained(tiny_llama_dir))
    prompts = Dataset.from_dict({"prompt": ["The capital of France is", "Some people like", "What is", "A user asks"]})
    return tiny_llama_dir, reward_model, AutoTokenizer.from_pretrained(tiny_llama_dir), prompts


def run_one_step(trainer_class, config_class, policy_dir, reward_model, prompts, output_dir, **kwargs):
    rewards = []
    reward_model.register_forward_hook(lambda module, args, output: rewards.append(output.logits[:, 0].detach()))
    args = config_class(
        str(output_dir),
        max_steps=1,
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = trainer_class(policy_dir, reward_funcs=reward_model, args=args, train_dataset=prompts, **kwargs)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert logged["reward"] == pytest.approx(torch.cat(rewards).mean().item(), abs=1e-5)


@pytest.mark.parametrize(("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_grpo_and_rloo(trainer_class, config_class, policy_and_reward, tmp_path):
    policy_dir, reward_model, _, prompts = policy_and_reward
    run_one_step(trainer_class, config_class, policy_dir, reward_model, prompts, tmp_path)


def test_grpo_with_a_live_peft_model(policy_and_reward, tmp_path):
    # TRL tests for `PreTrainedModel` before it finds the tokenizer itself; with that given, any module will do.
    policy_dir, reward_model, tokenizer, prompts = policy_and_reward
    peft_model = lora(reward_model)
    run_one_step(
        GRPOTrainer, GRPOConfig, policy_dir, peft_model, prompts, tmp_path, reward_processing_classes=tokenizer
    )


@needs_ppo
def test_ppo(policy_and_reward, tmp_path):
    from transformers import AutoModelForCausalLM
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy_dir, reward_model, tokenizer, prompts = policy_and_reward
    dataset = prompts.map(lambda row: {"input_ids": tokenizer(row["prompt"])["input_ids"]}, remove_columns=["prompt"])
    trainer = PPOTrainer(
        PPOConfig(
            str(tmp_path),
            total_episodes=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            response_length=4,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            missing_eos_penalty=None,
        ),
        tokenizer,
        AutoModelForCausalLM.from_pretrained(policy_dir),
        AutoModelForCausalLM.from_pretrained(policy_dir),
        reward_model,
        dataset,
        value_model=randomize_heads(DiscoRewardModel.from_pretrained(policy_dir)),
        eval_dataset=dataset,
    )
    trainer.train()
    scores = [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry]
    assert scores
    assert all(abs(score) > 1e-6 for score in scores)


# 5. Training


@all_architectures
def test_gradients_reach_scale_and_backbone(architecture, disco_dir):
    model = load(disco_dir(architecture)).train()
    inputs = batch(4)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)  # dropout
        reward = model.reward_distribution(**inputs)
        sides = zip(reward.location.chunk(2), reward.scale.chunk(2), strict=True)
        (location_a, scale_a), (location_b, scale_b) = sides
        get_family(reward.family).log_prob_greater(location_a, scale_a, location_b, scale_b).sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    plain = {name: gradient.clone() for name, gradient in gradients().items()}
    head = {f"{model.head_name}.{name}" for name, _ in head_of(model).named_parameters()}
    assert f"{model.head_name}.scale.weight" in head <= set(plain)
    for gradient in plain.values():
        assert torch.isfinite(gradient).all()
    for name in (f"{model.head_name}.weight", f"{model.head_name}.scale.weight"):
        assert plain[name].abs().max() > 0, name
    assert any(gradient.abs().max() > 0 for name, gradient in plain.items() if "embed" in name or "wte" in name)

    # The same with the activations worked out again in the backward pass.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = gradients()
    assert set(checkpointed) == set(plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_fixed_scale_has_nothing_to_learn(disco_dir):
    model = load(disco_dir("llama", reward_family="logistic", fixed_scale=2**-0.5))
    assert [name for name, _ in head_of(model).named_parameters()] == ["weight"]
    assert list(head_of(model).scale.state_dict()) == []
    with torch.no_grad():
        assert torch.equal(model(**batch(4)).scale, torch.full((4, 1), 2**-0.5))
