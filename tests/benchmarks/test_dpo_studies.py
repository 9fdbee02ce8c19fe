"""`benchmarks/dpo_studies.py`: figures against the trainers' own and worked numbers, and studies from end to end."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from test_argument_votes import write_votes
from test_scale_studies import world
from transformers import AutoModelForCausalLM

from benchmarks import dpo_runs, dpo_studies, human_ratings
from benchmarks.dpo_runs import HeldOutPairs, Point, Policy, Run, adapter, log_probabilities, write
from benchmarks.dpo_studies import ARMS, PLAIN, STUDIES, kl_at, one_vote


PROMPT = [{"role": "user", "content": "Say it."}]


@pytest.fixture
def policy(tiny_llama_dir):
    """A tiny language model with an adapter that does something."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), adapter("CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@torch.no_grad()
def test_log_probabilities_are_those_of_each_answer_alone(policy):
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [10]},
        {"prompt_ids": [5, 6, 11], "chosen_ids": [10], "rejected_ids": [7, 8, 9, 12, 13]},
        {"prompt_ids": [5, 6], "chosen_ids": [10], "rejected_ids": [14, 15]},
    ]
    found, states = log_probabilities(policy, Dataset.from_list(rows), pad_token_id=0)
    assert found.shape == (3, 2) and states.shape[:2] == (3, 2)
    for number, row in enumerate(rows):
        for place, side in enumerate(("chosen_ids", "rejected_ids")):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            output = policy(ids, output_hidden_states=True)
            log_probs = output.logits[0, :-1].log_softmax(dim=-1)
            start = len(row["prompt_ids"])
            expected = sum(log_probs[at - 1, ids[0, at]].item() for at in range(start, ids.shape[1]))
            assert found[number, place] == pytest.approx(expected, abs=1e-4)
            torch.testing.assert_close(states[number, place], output.hidden_states[-1][0, -1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_divergence_is_that_of_every_next_token(policy, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(dpo_runs, "WRITTEN", 6)
    monkeypatch.setattr(dpo_runs, "NEW_TOKENS", 5)
    monkeypatch.setattr(dpo_runs, "AT_ONCE", 2)
    sampled = []
    generate = policy.generate

    def noted(*args, **kwargs):
        sampled.append(generate(*args, **kwargs))
        return sampled[-1]

    monkeypatch.setattr(policy, "generate", noted)
    prompts = [PROMPT, [{"role": "user", "content": "Say something else."}]]
    found, texts = write(policy, tiny_tokenizer, prompts)
    assert [prompt for prompt, _ in texts] == [prompts[0]] * 3 + [prompts[1]] * 3

    total = 0.0
    for prompt, of_prompt in zip(prompts, sampled, strict=True):
        start = len(tiny_tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        for ids in of_prompt:
            for place in range(start, len(ids)):
                own = policy(ids[None, :place]).logits[0, -1].log_softmax(dim=-1)
                with policy.disable_adapter():
                    reference = policy(ids[None, :place]).logits[0, -1].log_softmax(dim=-1)
                total += (own.exp() * (own - reference)).sum().item()
                if ids[place] == tiny_tokenizer.eos_token_id:
                    break
    assert found == pytest.approx(total / 6, rel=1e-3)
    assert found > 0.01
    with policy.disable_adapter():  # inside, the reference is the policy
        assert write(policy, tiny_tokenizer, prompts)[0] == pytest.approx(0, abs=1e-5)


def held_out_pairs(rows: int = 12) -> HeldOutPairs:
    words = ["good", "bad", "fine", "poor"]
    pairs = [
        {
            "prompt": PROMPT,
            "chosen": dpo_runs.answer(f"{words[row % 4]} {row}"),
            "rejected": dpo_runs.answer(f"{words[(row + 1) % 4]} plot {row}"),
        }
        for row in range(rows)
    ]
    return HeldOutPairs(pairs, np.ones(rows), np.arange(2 * rows).reshape(rows, 2), [PROMPT])


@pytest.mark.parametrize("options", [{}, {"scale_training": "joint"}, {"scale_model": "reward"}, {"fixed_scale": 2.0}])
def test_predictions_are_those_of_the_trainer(options, tiny_llama_dir, reward_dirs, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo_runs, "WRITTEN", 2)
    monkeypatch.setattr(dpo_runs, "NEW_TOKENS", 3)
    if "scale_model" in options:
        options = {"scale_model": reward_dirs["full"]}
    held_out, trainers = held_out_pairs(), []
    initialize = dpo_runs.DiscoDPOTrainer.__init__

    def noted(self, *args, **kwargs):
        trainers.append(self)
        initialize(self, *args, **kwargs)

    monkeypatch.setattr(dpo_runs.DiscoDPOTrainer, "__init__", noted)
    policy = Policy(options={**options, "num_train_epochs": 4})
    run = dpo_runs.train_policy(policy, tiny_llama_dir, held_out.rows, held_out, tmp_path / "run", "float32", 0)
    expected = trainers[0].evaluate()
    assert run.location.shape == run.scale.shape == (4, 12, 2)
    assert -np.log(run.probability[-1]).mean() == pytest.approx(expected["eval_nll"], abs=2e-4)
    assert dpo_studies.right(run, held_out.share)[-1].mean() == pytest.approx(expected["eval_accuracy"])
    assert np.abs(run.location[-1]).max() > 0
    assert (np.ptp(run.scale[-1]) > 1e-4) == ("fixed_scale" not in options and bool(options))
    assert [point.step for point in run.points] == [1, 2, 3, 4]


def test_figures_of_a_run():
    location = np.array([[[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]])
    run = Run([Point(1, 0.5, [])], location, np.full((1, 3, 2), 2**-0.5))
    share = np.array([0.9, 0.9, 0.5])
    # The probabilities are sigmoid(1), sigmoid(−2) and ½.
    assert run.probability[0] == pytest.approx([0.731059, 0.119203, 0.5], abs=1e-6)
    assert dpo_studies.right(run, share)[0].tolist() == [1, 0, 0.5]
    # −0.9 log 0.731059 − 0.1 log 0.268941 = 0.413262, and so on
    assert dpo_studies.cross_entropy(run, share)[0] == pytest.approx([0.413262, 1.926928, 0.693147], abs=1e-6)
    held_out = HeldOutPairs([], np.array([0.8, 0.2, 0.4, 0.79, 0.61]), np.zeros((5, 2)), [])
    assert held_out.is_clear.tolist() == [True, True, False, False, False]
    assert held_out.is_contested.tolist() == [False, False, True, False, False]
    assert dpo_studies.distance(run, np.array([True, True, False])).tolist() == [1.5]
    assert dpo_studies.pull(run, np.array([True, True, True])) == pytest.approx(1)
    wider = Run(run.points, location, np.full((1, 3, 2), 2**0.5))
    assert dpo_studies.pull(wider, np.array([True, True, True])) == pytest.approx(0.5)


def test_divergence_at_an_accuracy():
    of_arm = {"accuracy": np.array([[0.6, 0.7], [0.6, 0.8]]), "KL": np.array([[1.0, 3.0], [1.0, 5.0]])}
    # The means are 0.6 at 1 and 0.75 at 4.
    assert kl_at(0.55, of_arm) == pytest.approx(0.5)
    assert kl_at(0.70, of_arm) == pytest.approx(3)
    assert np.isnan(kl_at(0.8, of_arm))


def test_one_vote_is_one_that_is_no_tie():
    pair = {"prompt": PROMPT, "chosen": "a", "rejected": "b"}
    rows = [pair | {"preference_strength": votes} for votes in ([1, 1, 0], [-1, 0, 0], [0, 0])]
    found = one_vote(rows, None, 0)
    assert [row["chosen"] for row in found] == ["a", "b"]
    assert all("preference_strength" not in row for row in found)
    wins = [one_vote([pair | {"preference_strength": [1, 1, 1, -1]}], None, seed)[0]["chosen"] for seed in range(200)]
    assert 0.65 < wins.count("a") / 200 < 0.85
    # Without votes, the row is a choice.
    assert one_vote([pair], None, 0) == [pair]


def test_arms_are_told_apart():
    for study in STUDIES.values():
        assert study.arms[0] == PLAIN
        assert len({ARMS[name].title for name in study.arms}) == len(study.arms)


@pytest.mark.slow
def test_studies_from_end_to_end(tiny_llama_dir, tmp_path, monkeypatch):
    rated = world()
    monkeypatch.setattr(human_ratings, "load_ratings", lambda source: rated)
    for module, name, value in (
        *((dpo_studies, name, 32) for name in ("PAIRS", "JUDGED")),
        *((dpo_studies, "HELD_OUT_TEXTS", 20), (dpo_studies, "HELD_OUT_PAIRS", 40)),
        *((dpo_runs, "WRITTEN", 4), (dpo_runs, "NEW_TOKENS", 4), (dpo_runs, "POINTS", 2)),
    ):
        monkeypatch.setattr(module, name, value)
    votes = str(write_votes(tmp_path / "votes"))
    options = ["--model", tiny_llama_dir, "--seeds", "0", "--output", str(tmp_path / "runs")]
    command = ["noisy", "contested", "--argument_votes", votes, *options]
    dpo_studies.main(command)
    for name, study in STUDIES.items():
        lines = (tmp_path / "runs" / f"{name}.md").read_text().splitlines()
        heads, *rows = ([cell.strip() for cell in line.split(" | ")] for line in (lines[0], *lines[2:-2]))
        assert [row[0].strip("| ") for row in rows] == [ARMS[arm].title for arm in study.arms]
        assert {len(row) for row in rows} == {len(heads)}
        assert rows[0][-2] == "–" and all(" to " in row[-2] for row in rows[1:])
        assert (tmp_path / "runs" / f"{name}.png").stat().st_size > 10_000
        assert "of them clear" in lines[-1]

    # What is finished is not repeated.
    patterns = ("points.json", "judged.json", "model.safetensors", "adapter_model.safetensors")
    before = {path: path.stat().st_mtime_ns for name in patterns for path in Path(tmp_path / "runs").rglob(name)}
    assert len([path for path in before if path.name == "points.json"]) == 6 + 6
    dpo_studies.main(command)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_arguments_need_their_folder(tmp_path, capsys):
    with pytest.raises(SystemExit):
        dpo_studies.main(["contested", "--model", "none", "--output", str(tmp_path)])
    assert "needs --argument_votes FOLDER" in capsys.readouterr().err
