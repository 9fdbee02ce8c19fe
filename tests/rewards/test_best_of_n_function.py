"""`best_of_n`, called from Python. (The command is tested in `test_best_of_n.py`.)"""

import pytest
from reward_rows import assistant, close, user

from disco_trl import DiscoReward, best_of_n


@pytest.mark.parametrize("kind", ["text", "messages"])
@pytest.mark.parametrize("transform", ["mean", "lower_bound", "win_rate"])
def test_best_of_n(kind, transform, reward_dir):
    prompts = ["Who? ", "Who? ", "Why? "]  # equal prompts of two rows are two tasks
    candidates = [["people", "a user", "the film"], ["people", "not at all"], ["the answer is short"]]
    if kind == "messages":
        prompts = [user(prompt) for prompt in prompts]
        candidates = [[assistant(answer) for answer in answers] for answers in candidates]
    found = best_of_n(prompts, candidates, transform, model=reward_dir())
    assert len(found) == 3
    for prompt, answers, best in zip(prompts, candidates, found, strict=True):
        # The same as each task on its own
        alone = DiscoReward(reward_dir(), transform=transform)([prompt] * len(answers), answers)
        assert best.rewards.tolist() == pytest.approx(alone, rel=1e-5, abs=1e-5)
        assert best.index == max(range(len(answers)), key=alone.__getitem__)
        assert best.candidate is answers[best.index]
        assert len(best.distribution) == len(answers)
        if transform == "lower_bound":
            expected = best.distribution.location - best.distribution.scale
            assert best.rewards.tolist() == close(expected)


def test_best_of_n_of_equal_rewards_takes_the_first(reward_dir):
    (best,) = best_of_n(["Who? "], [["people", "people", "people"]], model=reward_dir())
    assert best.index == 0


def test_best_of_n_of_nothing(reward_dir):
    assert best_of_n([], [], model=reward_dir()) == []
    with pytest.raises(ValueError, match="row 1: candidates must be a list of at least one"):
        best_of_n(["a", "b"], [["c"], []], model=reward_dir())
    with pytest.raises(ValueError, match="row 0: candidates must be a list"):
        best_of_n(["a"], ["c"], model=reward_dir())
    with pytest.raises(ValueError, match="2 prompts but 1 lists"):
        best_of_n(["a", "b"], [["c"]], model=reward_dir())
