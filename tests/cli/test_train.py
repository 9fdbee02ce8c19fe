"""`scripts/disco_reward.py` and `disco-trl train`, from command line to saved model, on a tiny random Llama."""

import gzip
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from preference_rows import write_pairs

from disco_trl import DiscoRewardTrainer
from disco_trl.cli import launch, train
from disco_trl.cli.commands import COMMANDS
from disco_trl.data.files import choose_split, load_preferences


SCRIPT = Path(__file__).parents[2] / "scripts" / "disco_reward.py"

# Small and plain: float32, no gradient checkpointing, on the CPU.
SMALL_RUN = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "save_strategy": "no",
    "disable_tqdm": True,
}


def as_arguments(**options) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def pairs_folder(tmp_path_factory) -> Path:
    """A folder with `train.jsonl` and `test.jsonl`, conversations of two turns."""
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "train.jsonl")
    write_pairs(folder / "test.jsonl", number=8)
    return folder


def run_in_process(monkeypatch, *arguments: str) -> None:
    """What the script does, without the seconds that a new interpreter takes to import torch."""
    monkeypatch.setattr(sys, "argv", ["disco_reward.py", *arguments])
    launch.main("train")


def assert_scores_as_a_plain_classifier(path: Path, family: str) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from disco_trl import DiscoRewardModel

    tokenizer = AutoTokenizer.from_pretrained(path)
    inputs = tokenizer(["a short answer", "people and films"], return_tensors="pt", padding=True)
    plain = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()
    disco = DiscoRewardModel.from_pretrained(path).eval()
    with torch.no_grad():
        logits = plain(**inputs).logits[:, 0]
        reward = disco.reward_distribution(**inputs)
    torch.testing.assert_close(logits, reward.location, rtol=1e-6, atol=1e-6)
    assert (reward.scale > 0).all()
    assert getattr(reward.family, "name", reward.family) == family


# Data


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv", ".CSV"])
@pytest.mark.parametrize("streaming", [False, True])
def test_local_files_load(tmp_path, suffix, streaming):
    rows = [{"chosen": "good", "rejected": "bad"}, {"chosen": "fine", "rejected": "poor"}]
    path = tmp_path / f"pairs{suffix}"
    if suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    else:
        if suffix.lower() == ".csv":
            text = "chosen,rejected\ngood,bad\nfine,poor\n"
        elif suffix.startswith(".jsonl"):
            text = "\n".join(map(json.dumps, rows))
        else:
            text = json.dumps(rows)
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    dataset = load_preferences(str(path), streaming=streaming)
    assert list(dataset) == ["train"]
    assert list(dataset["train"]) == rows


def test_a_relative_path_loads(tmp_path, monkeypatch):
    write_pairs(tmp_path / "pairs.jsonl", number=3)
    monkeypatch.chdir(tmp_path)
    assert len(load_preferences("pairs.jsonl")["train"]) == 3


def test_a_folder_loads_with_its_splits(pairs_folder):
    dataset = load_preferences(str(pairs_folder))
    assert {split: len(rows) for split, rows in dataset.items()} == {"train": 16, "test": 8}


@pytest.mark.parametrize("streaming", [False, True])
def test_the_splits_of_a_folder_may_have_other_columns(tmp_path, streaming):
    pair = {"chosen": "good", "rejected": "bad"}
    (tmp_path / "train.jsonl").write_text(json.dumps(pair))
    (tmp_path / "test.jsonl").write_text(json.dumps(pair | {"chosen_rating": [1, 2]}))
    dataset = load_preferences(str(tmp_path), streaming=streaming)
    assert list(dataset["train"]) == [pair]
    assert list(dataset["test"]) == [pair | {"chosen_rating": [1, 2]}]


@pytest.mark.parametrize("name", ["pairs.jsonl", "./folder", "/no/such/folder"])
def test_a_missing_path_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"--dataset_name {name}: .*looked in {tmp_path}"):
        load_preferences(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("chosen\trejected\n")
    with pytest.raises(ValueError, match=r"pairs\.txt: cannot tell .* \.parquet"):
        load_preferences(str(path))


def test_a_missing_split_lists_the_splits_and_the_mends(pairs_folder):
    dataset = load_preferences(str(pairs_folder / "train.jsonl"))
    with pytest.raises(ValueError, match=r"has no split 'test'; it has 'train'.*train\.jsonl and test\.jsonl"):
        choose_split(dataset, "test", "--dataset_test_split")
    with pytest.raises(ValueError, match=r"as train\.jsonl and test\.jsonl and pass the folder, or do without\."):
        choose_split(dataset, "test", "--dataset_test_split", ["do without"])


# Arguments


def test_no_data_is_an_error(monkeypatch, tmp_path, tiny_llama_dir):
    with pytest.raises(SystemExit, match=r"disco_reward\.py: .*--dataset_name"):
        run_in_process(monkeypatch, *as_arguments(model_name_or_path=tiny_llama_dir, output_dir=tmp_path, **SMALL_RUN))


def test_no_model_is_an_error(monkeypatch, tmp_path, pairs_folder):
    with pytest.raises(SystemExit, match=r"disco_reward\.py: --model_name_or_path"):
        run_in_process(monkeypatch, *as_arguments(dataset_name=pairs_folder, output_dir=tmp_path, **SMALL_RUN))


def test_a_launcher_argument_after_the_script_says_where_it_belongs(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_in_process(monkeypatch, *as_arguments(output_dir=tmp_path, use_cpu=True, num_processes=2))
    assert "accelerate launch --num_processes 2 disco_reward.py" in capsys.readouterr().err


def test_a_misspelt_key_in_a_config_file_is_an_error(monkeypatch, tmp_path, capsys):
    config = tmp_path / "reward.yaml"
    config.write_text(yaml.safe_dump({"learning_rte": 1.0, "output_dir": str(tmp_path)}))
    with pytest.raises(SystemExit):
        run_in_process(monkeypatch, "--use_cpu", "--config", str(config))
    assert "unknown argument learning_rte; did you mean --learning_rate?" in capsys.readouterr().err


def test_the_launcher_leaves_warnings_to_the_processes(monkeypatch, tmp_path, caplog):
    """It parses the arguments too, and would say everything twice."""
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    monkeypatch.setattr("disco_trl.trainer.shared_config.is_torch_bf16_gpu_available", lambda: False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        launch.launch(COMMANDS["train"], ["model", "data", str(tmp_path), "--pad_token", "<pad>"])
    assert launched[0].training_script == "disco_trl.cli.launch"
    assert not [record for record in caplog.records if record.name.startswith("disco_trl")]
    assert not [warning for warning in warned if "pad_token" in str(warning.message)]
    # Logging goes on as before.
    COMMANDS["train"].parser().parse(["model", "data", str(tmp_path)])
    assert "Training is in float32" in caplog.text


# Training


def test_trains_evaluates_and_saves(monkeypatch, tmp_path, tiny_llama_dir, pairs_folder):
    run_in_process(
        monkeypatch,
        *as_arguments(
            model_name_or_path=tiny_llama_dir,
            dataset_name=pairs_folder,
            output_dir=tmp_path / "out",
            reward_family="cauchy",
            eval_strategy="steps",
            eval_steps=1,
            **SMALL_RUN | {"save_strategy": "steps", "save_steps": 2},
        ),
    )
    history = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_nll" in entry] == [1, 2]
    assert [entry["step"] for entry in history if "scale_mean" in entry] == [1, 2]
    assert_scores_as_a_plain_classifier(tmp_path / "out", family="cauchy")


def test_model_init_kwargs_go_before_the_general_arguments(tmp_path, tiny_llama_dir, pairs_folder):
    # One attention implementation on the command line, another in `model_init_kwargs`: the second is the more exact.
    words = [tiny_llama_dir, str(pairs_folder), str(tmp_path / "out")]
    words += as_arguments(
        attn_implementation="sdpa",
        model_init_kwargs='{"attn_implementation": "eager"}',
        **SMALL_RUN | {"max_steps": 1},
    )
    parsed = COMMANDS["train"].parser().parse(words)
    trainer = train.make_trainer(*parsed.arguments)
    train.train(trainer, *parsed.arguments)
    assert parsed.arguments[1].model_init_kwargs == {
        "revision": "main",
        "trust_remote_code": False,
        "attn_implementation": "eager",
        "dtype": "float32",
    }


@pytest.mark.parametrize("named", [True, False])
def test_resumes_from_a_checkpoint(monkeypatch, tmp_path, tiny_llama_dir, pairs_folder, named):
    options = SMALL_RUN | {
        "model_name_or_path": tiny_llama_dir,
        "dataset_name": pairs_folder,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "constant",
    }
    run_in_process(monkeypatch, *as_arguments(output_dir=tmp_path / "whole", **options | {"max_steps": 4}))
    run_in_process(monkeypatch, *as_arguments(output_dir=tmp_path / "halves", **options))
    checkpoint = tmp_path / "halves/checkpoint-2" if named else True
    run_in_process(
        monkeypatch,
        *as_arguments(output_dir=tmp_path / "halves", resume_from_checkpoint=checkpoint, **options | {"max_steps": 4}),
    )
    whole, halves = (
        json.loads((tmp_path / name / "checkpoint-4/trainer_state.json").read_text())["log_history"]
        for name in ("whole", "halves")
    )
    assert [entry["loss"] for entry in halves] == [entry["loss"] for entry in whole]


def test_trains_on_a_mixture(monkeypatch, tmp_path, tiny_llama_dir, pairs_folder):
    config = tmp_path / "reward.yaml"
    files = [str(pairs_folder / name) for name in ("train.jsonl", "test.jsonl")]
    config.write_text(
        yaml.safe_dump(
            SMALL_RUN
            | {
                "model_name_or_path": tiny_llama_dir,
                "datasets": [{"path": "json", "data_files": file} for file in files],
                "test_split_size": 0.25,
                "output_dir": str(tmp_path / "out"),
                "eval_strategy": "steps",
                "eval_steps": 2,
            }
        )
    )
    run_in_process(monkeypatch, "--config", str(config))
    assert_scores_as_a_plain_classifier(tmp_path / "out", family="normal")


def test_columns_of_a_config_file_leave_others_out(monkeypatch, tmp_path, tiny_llama_dir):
    """What errors and warnings advise for columns that are not to be read."""
    row = {"prompt": "Two and two?", "chosen_rating": 4.5, "rejected_rating": 1.5}
    for side, answer in (("chosen", "Four."), ("rejected", "Five.")):
        row[side] = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": answer}]
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    config = tmp_path / "reward.yaml"
    dataset = {"path": "json", "data_files": str(tmp_path / "rows.jsonl")}
    options = SMALL_RUN | {"model_name_or_path": tiny_llama_dir, "output_dir": str(tmp_path / "out")}
    config.write_text(yaml.safe_dump(options | {"datasets": [dataset]}))
    with pytest.raises(
        SystemExit, match=r"column 'prompt': a string .*as `columns` of the dataset in a --config file"
    ):
        run_in_process(monkeypatch, "--config", str(config))
    config.write_text(yaml.safe_dump(options | {"datasets": [dataset | {"columns": ["chosen", "rejected"]}]}))
    run_in_process(monkeypatch, "--config", str(config))
    assert "likelihood" not in json.loads((tmp_path / "out/config.json").read_text())["disco"]


@pytest.mark.slow
def test_script_with_a_config_file_and_peft(tmp_path, tiny_llama_dir, pairs_folder):
    """A user's `trl reward` command with the file name changed, in a process of its own."""
    config = tmp_path / "reward.yaml"
    config.write_text(
        yaml.safe_dump(
            SMALL_RUN
            | {
                "model_name_or_path": tiny_llama_dir,
                "dataset_name": str(pairs_folder),
                "output_dir": "set on the command line",
                "use_peft": True,
                "lora_r": 4,
                "lora_target_modules": ["q_proj", "v_proj"],
                "num_processes": 1,  # the launcher's; the script leaves it alone
            }
        )
    )
    result = subprocess.run(
        [sys.executable, SCRIPT, "--config", config, "--output_dir", tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert f"The reward model is in {tmp_path / 'out'}." in result.stdout
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    assert "PEFT adapter" in (tmp_path / "out" / "README.md").read_text()
    assert_scores_as_a_plain_classifier(tmp_path / "out", family="normal")


def test_an_interrupted_run_says_how_to_resume(monkeypatch, capsys, tmp_path, tiny_llama_dir, pairs_folder):
    options = SMALL_RUN | {"save_strategy": "steps", "save_steps": 1}
    words = [tiny_llama_dir, str(pairs_folder), str(tmp_path / "out"), *as_arguments(**options)]

    def interrupt(self, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("disco_trl.DiscoRewardTrainer.train", interrupt)
    with pytest.raises(SystemExit) as exit_info:
        run_in_process(monkeypatch, *words)
    assert exit_info.value.code == 130
    assert capsys.readouterr().err.endswith("disco_reward.py: interrupted\n")  # nothing was saved

    monkeypatch.undo()
    save, folders = DiscoRewardTrainer.save_model, []

    def save_one(self, output_dir=None, **options):
        folders.append(output_dir)
        if len(folders) == 2:
            raise KeyboardInterrupt
        save(self, output_dir, **options)

    monkeypatch.setattr("disco_trl.DiscoRewardTrainer.save_model", save_one)
    with pytest.raises(SystemExit):
        run_in_process(monkeypatch, *words)
    # The second checkpoint is torn.
    first, second = (tmp_path / "out" / f"checkpoint-{step}" for step in (1, 2))
    assert folders == [str(first), str(second)]
    assert f"interrupted; run again with --resume_from_checkpoint {first} to go on\n" in capsys.readouterr().err


def test_an_error_while_training_keeps_its_traceback(monkeypatch, tmp_path, tiny_llama_dir, pairs_folder):
    def fail(self, *_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr("disco_trl.DiscoRewardTrainer.train", fail)
    with pytest.raises(ValueError, match="a bug"):
        run_in_process(monkeypatch, tiny_llama_dir, str(pairs_folder), str(tmp_path), *as_arguments(**SMALL_RUN))


@pytest.mark.slow
def test_disco_trl_train_shows_the_error_of_the_training_process(tmp_path, tiny_llama_dir):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "disco_trl", "train", "--cpu"),
            *as_arguments(
                model_name_or_path=tiny_llama_dir, dataset_name="missing.jsonl", output_dir=tmp_path, **SMALL_RUN
            ),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert "--dataset_name missing.jsonl: there is no such file" in result.stderr
    assert "CalledProcessError" not in result.stderr


@pytest.mark.slow
@pytest.mark.multiprocess
def test_disco_trl_train_on_two_processes(tmp_path, tiny_llama_dir, pairs_folder):
    result = subprocess.run(
        [
            # accelerate's name for "several processes on this machine"; `--use_cpu` has them meet over gloo.
            *(sys.executable, "-m", "disco_trl", "train", "--multi_gpu", "--num_processes", "2"),
            *as_arguments(
                model_name_or_path=tiny_llama_dir,
                dataset_name=pairs_folder,
                output_dir=tmp_path / "out",
                **SMALL_RUN | {"save_strategy": "steps", "save_steps": 2},
            ),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    # One line from the first process, none from the second.
    assert result.stdout.count("The reward model is in") == 1
    # 16 pairs, 4 on each of two processes at a time: two steps are the whole epoch, where one process would need four.
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    assert state["epoch"] == 1.0
    assert_scores_as_a_plain_classifier(tmp_path / "out", family="normal")
