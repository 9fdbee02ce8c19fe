"""Test the package against releases of TRL, transformers and Python.

Run as:

    python -m benchmarks.compatibility --output runs/compatibility                        # all of `RELEASES`
    python -m benchmarks.compatibility --output runs/compatibility --releases 1.16.0/5.18.0

pip installs each pair of releases in turn, and the contract and training tests are run with it. Results are kept in
the output folder and accumulate over runs; `compatibility.md` there is the table of all of them. `--python` selects
another interpreter, and `--torch installed` uses the torch that it has.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm


ROOT = Path(__file__).resolve().parents[1]
# TRL and transformers: every transformers allowed with the newest TRL, every TRL with the newest transformers, and the
# oldest of both.
RELEASES = (
    *(f"1.16.0/5.{version}" for version in ("24.0", "23.0", "22.2", "21.1", "20.2", "19.0", "18.0")),
    *(f"{version}/5.24.0" for version in ("1.15.0", "1.14.2", "1.13.0", "1.12.0")),
    "1.12.0/5.18.0",
)
TESTS = (
    "tests/contracts",
    *("tests/trainer/test_reward_trainer.py", "tests/trainer/test_crashes.py", "tests/trainer/test_qlora.py"),
    *("tests/rewards/test_disco_reward.py", "tests/rewards/test_reward_metrics.py"),
    *("tests/rewards/test_scalar_reward.py", "tests/rewards/test_best_of_n_function.py"),
    *("tests/models/test_adapters.py", "tests/models/test_prefix_sharing_training.py"),
)
PACKAGES = ("trl", "transformers", "torch", "peft", "accelerate", "datasets", "bitsandbytes")
FINDS = f"""
import importlib.metadata, json, platform
versions = {{name: importlib.metadata.version(name) for name in {PACKAGES!r}}}
print(json.dumps({{"python": platform.python_version(), **versions}}))
"""


@dataclass
class Outcome:
    """Test results in one environment.

    Attributes:
        asked (`str`):
            Releases of TRL and transformers, such as `"1.16.0/5.24.0"`.
        versions (`dict[str, str]`):
            Versions of Python and of `PACKAGES` as pip chose them. Empty if the releases cannot be installed.
        passed (`int`):
            Number of tests that passed.
        failed (`int`):
            Number of tests that failed.
        skipped (`int`):
            Number of tests that were skipped.
        failures (`list[str]`):
            Names of the tests that failed, or the last lines of pip's output.
    """

    asked: str
    versions: dict[str, str]
    passed: int
    failed: int
    skipped: int
    failures: list[str]


def make_environment(folder: Path, python: str, torch: str) -> Path:
    """Creates a virtual environment with torch, and returns the path of its interpreter."""
    options = ["--system-site-packages"] if torch == "installed" else []
    subprocess.run([python, "-m", "venv", "--clear", *options, str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    if torch != "installed":
        subprocess.run([*pip_install(interpreter), torch], check=True)
    return interpreter


def pip_install(interpreter: Path) -> list[str]:
    """The start of a `pip install` command for an interpreter."""
    return [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def try_releases(asked: str, interpreter: Path, folder: Path) -> Outcome:
    """Installs a pair of releases and runs the tests with it. The log of the tests is written to `folder`."""
    trl, transformers = asked.split("/")
    step = [*pip_install(interpreter), f"trl=={trl}", f"transformers=={transformers}", "-e", f"{ROOT}[test]"]
    pip = subprocess.run(step, stderr=subprocess.PIPE, text=True)
    if pip.returncode != 0:
        return Outcome(asked, {}, 0, 0, 0, [line for line in pip.stderr.splitlines() if "ERROR" in line][-3:])
    found = subprocess.run([interpreter, "-c", FINDS], capture_output=True, text=True, check=True)
    report = folder / "tests.xml"
    command = [str(interpreter), "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"]
    with (folder / "tests.log").open("w") as log:
        subprocess.run(
            [*command, f"--junitxml={report}", *TESTS],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    tests = ElementTree.parse(report).getroot().findall(".//testcase")
    failures = [
        f"{test.get('classname')}::{test.get('name')}"
        for test in tests
        if test.find("failure") is not None or test.find("error") is not None
    ]
    skipped = sum(test.find("skipped") is not None for test in tests)
    return Outcome(
        asked,
        json.loads(found.stdout.splitlines()[-1]),
        len(tests) - len(failures) - skipped,
        len(failures),
        skipped,
        failures,
    )


def table(outcomes: list[Outcome]) -> str:
    """Markdown table of outcomes, newest releases first."""

    def order(outcome: Outcome) -> list[int]:
        parts = outcome.asked.replace("/", ".").split(".") + outcome.versions.get("python", "0").split(".")
        return [int(part) for part in parts]

    names = ("python", *PACKAGES)
    lines = ["| " + " | ".join(name.capitalize() if name == "python" else name for name in names)]
    lines[0] += " | tests passed | failed | skipped |"
    lines.append("|" + " --- |" * len(names) + " ---: |" * 3)
    for outcome in sorted(outcomes, key=order, reverse=True):
        if not outcome.versions:
            trl, transformers = outcome.asked.split("/")
            lines.append(f"| | {trl} | {transformers} |" + " |" * (len(names) - 3) + " cannot be installed | | |")
            continue
        cells = [outcome.versions[name].partition("+")[0] for name in names]
        cells += [f"{outcome.passed:,}", str(outcome.failed), str(outcome.skipped)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Runs the tests that the command line selects, and writes the table of all results in the output folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compatibility",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--releases",
        nargs="+",
        default=RELEASES,
        metavar="TRL/TRANSFORMERS",
        help="Pairs of releases to test (default: all pairs in `RELEASES`).",
    )
    parser.add_argument(
        "--python", default=sys.executable, help="Interpreter to test with (default: the one that runs this)."
    )
    parser.add_argument(
        "--torch",
        default="torch==2.13.0",
        help="Requirement that pip installs torch by, or `installed` for the interpreter's own torch "
        "(default: %(default)s).",
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder in which results accumulate.")
    args = parser.parse_args()
    version = subprocess.run(
        [args.python, "-c", "import platform; print(platform.python_version())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    folders = {asked: args.output.resolve() / f"{asked.replace('/', '-')}-python-{version}" for asked in args.releases}
    left = {asked: folder for asked, folder in folders.items() if not (folder / "outcome.json").exists()}
    with tempfile.TemporaryDirectory() as environment:
        interpreter = make_environment(Path(environment), args.python, args.torch) if left else Path()
        for asked, folder in tqdm(left.items(), desc="Releases", unit="pair"):
            folder.mkdir(parents=True, exist_ok=True)
            outcome = try_releases(asked, interpreter, folder)
            (folder / "outcome.json").write_text(json.dumps(asdict(outcome), indent=2), encoding="utf-8")
            tqdm.write(f"{asked}, Python {version}: {outcome.passed} passed, {outcome.failed} failed")
    outcomes = [Outcome(**json.loads(path.read_text(encoding="utf-8"))) for path in args.output.glob("*/outcome.json")]
    found = table(outcomes)
    (args.output / "compatibility.md").write_text(found + "\n", encoding="utf-8")
    print(found)


if __name__ == "__main__":
    main()
