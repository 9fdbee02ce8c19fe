"""What people said, in DPO: the likelihood of each column by hand, what it does to the policy, and what is refused."""

import json
import math

import pytest
import torch
from datasets import Dataset, load_from_disk
from dpo_training import disco_dpo_trainer
from peft import LoraConfig
from scipy.stats import norm
from tiny_training import disco_trainer, furthest, preferences, weights
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_trainer import DataCollatorForPreference

from disco_trl import DiscoDPOConfig, DiscoDPOTrainer, DiscoReward, get_family
from disco_trl.models.inference import load_trained
from disco_trl.models.policy_head import LEARNED_FILE
from disco_trl.trainer import dpo_scales
from disco_trl.trainer import dpo_trainer as dpo_trainer_module


@pytest.fixture
def other(tiny_llama_dir):
    """A reference that is not the policy, so that log-ratios are not 0."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def one_batch(tmp_path, tiny_llama_dir, other, columns, **options):
    """Loss of four pairs, and the locations of their sides in units of reward."""
    data = preferences("conversational", rows=4)
    for name, values in columns.items():
        data = data.add_column(name, values)
    trainer = disco_dpo_trainer(tmp_path, model=tiny_llama_dir, ref_model=other, train_dataset=data, **options)
    trainer.model.eval()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    plain = {name: value for name, value in batch.items() if name not in ("judgements", "strength_counts")}
    labels = plain["input_ids"].masked_fill(plain.pop("completion_mask") == 0, -100)
    logps = [
        torch.nn.functional.log_softmax(model(plain["input_ids"], attention_mask=plain["attention_mask"]).logits, -1)
        for model in (trainer.model, other)
    ]
    difference = (logps[0] - logps[1])[:, :-1]
    following = labels[:, 1:]
    per_token = difference.gather(-1, following.clamp(min=0)[..., None])[..., 0]
    location = trainer.beta * (per_token * (following != -100)).sum(dim=1)
    return trainer, loss, (location[:4] - location[4:]).tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_votes_soft_labels_and_weights(tmp_path, tiny_llama_dir, other):
    columns = {"chosen_votes": [3, 0, 1, 2], "rejected_votes": [1, 2, 1, 0], "weight": [1.0, 2.0, 0.5, 0.0]}
    _, loss, delta = one_batch(tmp_path, tiny_llama_dir, other, columns)
    expected = 0.0
    for d, wins, losses, weight in zip(delta, *columns.values(), strict=True):
        said = wins * math.log(sigmoid(d)) + losses * math.log(sigmoid(-d))
        expected -= weight * said / (wins + losses) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)

    _, loss, delta = one_batch(tmp_path, tiny_llama_dir, other, {"preference_probability": [0.9, 0.5, 0.2, 1.0]})
    expected = -sum(
        p * math.log(sigmoid(d)) + (1 - p) * math.log(sigmoid(-d))
        for p, d in zip([0.9, 0.5, 0.2, 1.0], delta, strict=True)
    )
    assert loss.item() == pytest.approx(expected / 4, rel=1e-5)


def test_margins_and_label_noise_of_the_normal_family(tmp_path, tiny_llama_dir, other):
    margins = [0.0, 0.5, 1.0, -0.3]
    options = {"reward_family": "normal", "label_noise": 0.1}
    _, loss, delta = one_batch(tmp_path, tiny_llama_dir, other, {"margin": margins}, **options)
    width = math.sqrt(2) * get_family("normal").unit_scale
    probabilities = [norm.cdf((d - m) / width) for d, m in zip(delta, margins, strict=True)]
    assert loss.item() == pytest.approx(-sum(math.log(0.9 * p + 0.1 * (1 - p)) for p in probabilities) / 4, rel=1e-5)


def test_ties_and_strengths(tmp_path, tiny_llama_dir, other):
    strengths = [0, 2, -1, 1]
    columns = {"preference_strength": strengths}
    trainer, loss, delta = one_batch(tmp_path, tiny_llama_dir, other, columns, reward_family="normal")
    learned = {name: value.tolist() for name, value in trainer.policy_head.likelihood.values().items()}
    (c1,), (c2,) = learned["tie_width"], learned["strength_boundaries"]
    width = math.sqrt(2) * get_family("normal").unit_scale
    bounds = {0: (-c1, c1), 1: (c1, c2), 2: (c2, math.inf), -1: (-c2, -c1)}
    said = [
        norm.cdf((bounds[k][1] - d) / width) - norm.cdf((bounds[k][0] - d) / width)
        for k, d in zip(strengths, delta, strict=True)
    ]
    assert loss.item() == pytest.approx(-sum(map(math.log, said)) / 4, rel=1e-5)


def test_a_strength_reaches_the_policy(tmp_path, tiny_llama_dir, other):
    """In a reward model it moves the scale alone, unless asked."""
    gradients = []
    for strength in (1, 3):
        columns = {"preference_strength": [strength, -1, 2, 1]}
        trainer, _, _ = one_batch(tmp_path, tiny_llama_dir, other, columns, strength_levels=3)
        with torch.no_grad():  # the boundaries that both have
            trainer.policy_head.likelihood.strength_boundaries.zero_()
        inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        trainer.compute_loss(trainer.model, inputs).backward()
        gradients.append(trainer.model.lm_head.weight.grad.clone())
    assert (gradients[0] - gradients[1]).norm() > 0.05 * gradients[0].norm()


def test_scales_of_the_answers(tmp_path, tiny_llama_dir, other, caplog):
    """Divided by their geometric mean, which is 2 here."""
    columns = {"scale_chosen": [1.0, 2.0, 4.0, 2.0], "scale_rejected": [2.0, 2.0, 4.0, 1.0]}
    _, loss, delta = one_batch(tmp_path, tiny_llama_dir, other, columns, reward_family="normal")
    unit = get_family("normal").unit_scale / 2
    widths = [unit * math.hypot(a, b) for a, b in zip(*columns.values(), strict=True)]
    expected = -sum(math.log(norm.cdf(d / width)) for d, width in zip(delta, widths, strict=True)) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert (
        "scale_chosen and scale_rejected are the scales of the answers, divided by their geometric mean, 2"
        in caplog.text
    )

    _, loss, _ = one_batch(tmp_path, tiny_llama_dir, other, columns, reward_family="normal", fixed_scale=2 * unit)
    _, plain, _ = one_batch(tmp_path, tiny_llama_dir, other, {}, reward_family="normal")
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)


def test_scales_of_a_reward_model(tmp_path, tiny_llama_dir, monkeypatch):
    reward_model = disco_trainer(
        tmp_path, model=tiny_llama_dir, train_dataset=preferences("conversational"), scale_training="joint"
    )
    with torch.no_grad():
        reward_model.model.score.scale.weight.add_(0.5)
    reward_model.save_model(str(tmp_path / "reward"))
    data = preferences("conversational", rows=8)
    loaded = []
    monkeypatch.setattr(dpo_scales, "load_trained", lambda path: loaded.append(path) or load_trained(path))
    options = {"model": tiny_llama_dir, "train_dataset": data, "eval_dataset": data.select(range(3))}
    trainer = disco_dpo_trainer(tmp_path / "policy", scale_model=str(tmp_path / "reward"), **options)
    assert loaded == [str(tmp_path / "reward")]  # once for both datasets
    rewards = DiscoReward(str(tmp_path / "reward"))
    prompts = [row["prompt"] for row in data]
    for name, side in (("scale_chosen", "chosen"), ("scale_rejected", "rejected")):
        expected = rewards.distribution(prompts, [row[side] for row in data]).scale.tolist()
        assert trainer.train_dataset[name] == pytest.approx(expected, rel=1e-5)
        assert trainer.eval_dataset[name] == pytest.approx(expected[:3], rel=1e-5)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["scale_min"] < entry["scale_mean"] < entry["scale_max"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: {"train_dataset": rows.map(lambda row, i: {"scale_chosen": i}, with_indices=True)},
            "row 0, column 'scale_chosen': 0.0 is not a positive",
        ),
        (
            lambda rows: {"train_dataset": rows, "eval_dataset": preferences(rows=4)},
            "eval dataset: it lacks scale_chosen and",
        ),
        (
            lambda rows: {"train_dataset": rows.to_iterable_dataset(), "scale_model": "x"},
            "a stream is not scored by scale_model",
        ),
        (lambda rows: {"train_dataset": rows, "scale_model": "x", "fixed_scale": 1.0}, "leave one of them out"),
        (
            lambda rows: {"train_dataset": rows, "scale_training": "joint", "fixed_scale": 1.0, "scale_model": "x"},
            "leave two of them out",
        ),
        (
            lambda rows: {"train_dataset": rows, "scale_training": "joint"},
            "train dataset: scale_chosen and scale_rejected give the scales that scale_training='joint' would learn",
        ),
    ],
)
def test_scales_that_cannot_be_used(tmp_path, tiny_llama_dir, change, message):
    rows = preferences(rows=4).add_column("scale_chosen", [1.0] * 4).add_column("scale_rejected", [1.0] * 4)
    with pytest.raises(ValueError, match=message):
        disco_dpo_trainer(tmp_path, model=tiny_llama_dir, **change(rows))


def test_rankings_are_their_pairs(tmp_path, tiny_llama_dir):
    prompt = [{"role": "user", "content": "what is best"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("a piano", "a film", "the day")]
    ranking = Dataset.from_list([{"prompt": prompt, "completions": answers, "ranks": [1, 2, 2]}] * 4)
    pairs = [
        {"prompt": prompt, "chosen": answers[a], "rejected": answers[b], "tie": tie, "weight": 1 / 3}
        for _ in range(4)
        for a, b, tie in ((0, 1, False), (0, 2, False), (1, 2, True))
    ]
    trainers = [
        disco_dpo_trainer(tmp_path, model=tiny_llama_dir, train_dataset=data)
        for data in (ranking, Dataset.from_list(pairs))
    ]
    batches = [trainer.data_collator([*trainer.train_dataset]) for trainer in trainers]
    assert len(trainers[0].train_dataset) == 12
    for name in ("input_ids", "judgements", "places"):
        if name in batches[1]:
            torch.testing.assert_close(batches[0][name], batches[1][name])


def graded(rows: int = 16) -> Dataset:
    return preferences("conversational", rows=rows).add_column("preference_strength", [0, 1, 2, 3] * (rows // 4))


def test_what_is_learned_is_saved_beside_the_policy_and_resumed(tmp_path, tiny_llama_dir):
    options = {"model": tiny_llama_dir, "train_dataset": graded(), "label_noise": None, "save_strategy": "steps"}
    options["scale_training"] = "joint"
    whole = disco_dpo_trainer(tmp_path / "whole", **options, save_steps=2, max_steps=4)
    start = whole.policy_head.state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    whole.train()
    learned = {f"likelihood.{name}" for name in ("tie_width", "label_noise", "strength_boundaries")}
    assert start.keys() > learned | {"scale.weight", "scale.mean_hidden"}
    assert furthest(start, whole.policy_head.state_dict()) > 1e-3
    resumed = disco_dpo_trainer(tmp_path / "resumed", **options, save_steps=2, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert furthest(whole.policy_head.state_dict(), resumed.policy_head.state_dict()) == 0
    assert furthest(weights(whole.model), weights(resumed.model)) == 0

    whole.save_model(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "disco_likelihood.json").read_text())
    assert settings["strength_levels"] == 3 and settings["reward_family"] == "logistic"
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    with pytest.raises(ValueError, match=r"learned other things \(scale\.location_error, .* differ\)"):
        disco_dpo_trainer(tmp_path / "fixed", **(options | {"scale_training": None})).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )
    (tmp_path / "whole" / "checkpoint-2" / LEARNED_FILE).unlink()
    with pytest.raises(ValueError, match=f"has no {LEARNED_FILE}, in which likelihood.tie_width"):
        disco_dpo_trainer(tmp_path / "again", **options).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )


def test_an_adapter_is_saved_with_it(tmp_path, tiny_llama_dir):
    lora = LoraConfig(r=4, task_type="CAUSAL_LM")
    trainer = disco_dpo_trainer(tmp_path, model=tiny_llama_dir, train_dataset=graded(), peft_config=lora, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert {"adapter_model.safetensors", LEARNED_FILE} <= {path.name for path in tmp_path.iterdir()}


def test_trls_names_and_ours_are_logged(tmp_path, tiny_llama_dir):
    trainer = disco_dpo_trainer(tmp_path, model=tiny_llama_dir, train_dataset=graded(), eval_dataset=graded(8))
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    theirs = {"rewards/chosen", "rewards/accuracies", "logps/chosen", "entropy", "mean_token_accuracy"}
    assert theirs | {"nll", "prob_chosen", "tie_width"} <= entry.keys()
    assert {"eval_nll", "eval_prob_chosen", "eval_rewards/margins"} <= trainer.evaluate().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["hinge"]}, "must contain 'sigmoid' once"),
        ({"loss_type": ["sigmoid", "sigmoid"]}, "must contain 'sigmoid' once"),
        ({"f_divergence_type": "forward_kl"}, "holds for the reverse KL"),
        ({"use_weighting": True}, "a column of the data, `weight`"),
        ({"use_liger_kernel": True}, "forced choices built in"),
        ({"label_smoothing": 0.1}, "set label_noise"),
        ({"reward_family": "gumbel"}, "gumbel"),
        ({"fixed_scale": -1.0}, "fixed_scale"),
        ({"label_noise": 0.5}, "label_noise"),
        ({"scale_training": "at_end"}, "must be 'detached' or 'joint', or left out"),
    ],
)
def test_options_without_a_meaning_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DiscoDPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, **options)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("chosen_rating", [4, 3, 5, 1], "column 'chosen_rating': the policy's reward of an answer is known up to"),
        ("attribute", ["tone"] * 4, "column 'attribute': a policy has one reward"),
        ("preference_probability", [0.2, 0.4, 1.2, 0.1], "row 2, column 'preference_probability'"),
    ],
)
def test_rows_that_say_nothing_about_a_policy(tmp_path, tiny_llama_dir, column, values, message):
    data = preferences(rows=4).add_column(column, values)
    with pytest.raises(ValueError, match=message):
        disco_dpo_trainer(tmp_path, model=tiny_llama_dir, train_dataset=data)


def test_an_optimizer_that_lacks_what_is_learned(tmp_path, tiny_llama_dir, tiny_tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"likelihood\.tie_width, likelihood\.strength_boundaries"):
        disco_dpo_trainer(
            tmp_path,
            model=model,
            processing_class=tiny_tokenizer,
            train_dataset=graded(),
            optimizers=(optimizer, None),
        )


def test_a_collator_that_reads_no_judgements(tmp_path, tiny_llama_dir):
    collator = DataCollatorForPreference(pad_token_id=0)
    trainer = disco_dpo_trainer(
        tmp_path, model=tiny_llama_dir, train_dataset=graded(), data_collator=collator, tie_width=0.5
    )
    with pytest.raises(ValueError, match="a batch lacks what the column preference_strength says, because the data_c"):
        trainer.train()


def test_a_collator_that_reads_no_scales(tmp_path, tiny_llama_dir):
    rows = preferences(rows=4).add_column("scale_chosen", [1.0, 2.0] * 2).add_column("scale_rejected", [1.0] * 4)
    collator = DataCollatorForPreference(pad_token_id=0)
    trainer = disco_dpo_trainer(tmp_path, model=tiny_llama_dir, train_dataset=rows, data_collator=collator)
    with pytest.raises(ValueError, match="a batch lacks scale_chosen and scale_rejected, which the rows have"):
        trainer.train()


def test_another_configuration_is_named(tmp_path, tiny_llama_dir):
    from trl import DPOConfig

    from disco_trl import DiscoDPOTrainer

    with pytest.raises(TypeError, match="args must be a DiscoDPOConfig, got DPOConfig"):
        DiscoDPOTrainer(tiny_llama_dir, args=DPOConfig(str(tmp_path), bf16=False), train_dataset=preferences())


def test_a_loss_that_is_not_finite_names_its_rows(tmp_path, tiny_llama_dir, tiny_tokenizer):
    data = preferences(rows=16)
    data = data.map(lambda row, i: {"chosen": "x y"} if i == 9 else row, with_indices=True)  # in no other row
    options = {
        "train_dataset": data,
        "train_sampling_strategy": "sequential",
        "save_strategy": "steps",
        "save_steps": 1,
    }
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype="float32")
    trainer = disco_dpo_trainer(tmp_path, model=model, processing_class=tiny_tokenizer, **options)
    own = set(trainer.train_dataset[9]["chosen_ids"]) - {
        token for row in trainer.train_dataset for name in ("prompt_ids", "rejected_ids") for token in row[name]
    }
    with torch.no_grad():
        model.model.embed_tokens.weight[[*own]] = torch.nan
    with pytest.raises(FloatingPointError, match=r"step 3: the loss is nan.* in this step: 8, 9, 10, 11\.") as error:
        trainer.train()
    assert f"Last good checkpoint: {tmp_path / 'checkpoint-2'}" in str(error.value)


def test_a_reference_in_advance_goes_on_where_it_was(tmp_path, tiny_llama_dir, monkeypatch):
    """It is kept part by part, so that a run which is killed loses the part that it is at."""
    preferences("conversational", rows=14).save_to_disk(str(tmp_path / "rows"))
    monkeypatch.setattr(dpo_trainer_module, "PRECOMPUTED_AT_ONCE", 4)
    computed = []
    compute = DiscoDPOTrainer.compute_ref_log_probs

    def count(self, model, inputs):
        if len(computed) == 3:
            raise KeyboardInterrupt
        computed.append(inputs["input_ids"].shape[0] // 2)
        return compute(self, model, inputs)

    def build(**options):
        data = load_from_disk(str(tmp_path / "rows"))
        return disco_dpo_trainer(tmp_path / "run", model=tiny_llama_dir, train_dataset=data, **options)

    monkeypatch.setattr(DiscoDPOTrainer, "compute_ref_log_probs", count)
    options = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        build(**options)
    assert computed == [2, 2, 2]  # one part, and half of the next
    computed[:] = [None] * 4
    trainer = build(**options)
    assert computed[4:] == [2] * 5
    assert trainer.train_dataset["row_index"][:] == list(range(14))
    plain = build()
    rows = [plain.train_dataset[number] for number in range(14)]
    batch = plain._prepare_inputs(plain.data_collator(rows))
    for name, expected in zip(
        ("ref_chosen_logps", "ref_rejected_logps"), compute(plain, plain.ref_model, batch), strict=True
    ):
        torch.testing.assert_close(torch.tensor(trainer.train_dataset[name][:]), expected, atol=1e-4, rtol=1e-4)
