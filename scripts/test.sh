#!/usr/bin/env bash
# Run all checks that a change has to pass, in separate environments:
#
#   .venvs/trl-newest   newest TRL: ruff, mypy, all tests, and a wheel that is built and tested outside the checkout
#   .venvs/trl-1.12     oldest supported TRL (and the last with PPOTrainer): the contract tests
#
#   bash scripts/test.sh [--fresh] [--fast] [--next] [arguments for pytest]
#
# Tests run in as many processes as there are cores, at most 4, with one thread each. `-n 0` and OMP_NUM_THREADS change
# that.
#
#   --fresh   recreate the environments (by default only if setup.cfg, pyproject.toml, PYTHON or TORCH_SPEC change)
#   --fast    skip the tests marked `slow`
#   --next    only the contract tests, in .venvs/trl-next, with the newest TRL and transformers that there are, whatever
#             setup.cfg allows: docs/upstream.md says when and how to raise its bounds
#
# PYTHON is the interpreter (default: python3). TORCH_SPEC is what pip installs as torch, e.g. another version or
# "torch --index-url <your mirror of CPU builds>".

set -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fresh=false
fast=false
next=false
pytest_args=()
for argument in "$@"; do
    case $argument in
        --fresh) fresh=true ;;
        --fast) fast=true ;;
        --next) next=true ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) pytest_args+=("$argument") ;;
    esac
done

PYTHON=${PYTHON:-python3}
# torch is installed first and by version. For "torch>=2.6" alone, pip would prefer a newer torch of the registry, with
# gigabytes of CUDA libraries, to a local CPU build (--find-links).
TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "scripts/test.sh: $PYTHON must be Python 3.11 or newer; name another with PYTHON=..." >&2
    exit 2
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1
passed=()
failed=()

# step NAME COMMAND...: run the command, record whether it passed, and continue.
step() {
    local name=$1 start=$SECONDS
    shift
    printf '\n=== %s\n' "$name"
    if "$@"; then
        passed+=("$name ($((SECONDS - start)) s)")
    else
        failed+=("$name ($((SECONDS - start)) s)")
        return 1
    fi
}

# begin COMMAND...: start the command in the background; `finish`, as a step, waits for it and prints what it printed.
begin() {
    background_log=$(mktemp)
    "$@" >"$background_log" 2>&1 &
    background=$!
    trap 'kill $background 2>/dev/null; rm -f "$background_log"' EXIT
}
finish() {
    wait $background
    local status=$?
    trap - EXIT
    cat "$background_log"
    rm -f "$background_log"
    return $status
}

# environment DIRECTORY REQUIREMENT...: create a virtual environment and install the requirements into it.
environment() {
    local directory=$1 torch_spec stamp
    shift
    stamp=$(cat setup.cfg pyproject.toml <("$PYTHON" --version) <(pwd; echo "$TORCH_SPEC" "$@") | cksum)
    if ! $fresh && [[ -f $directory/stamp && $(<"$directory/stamp") == "$stamp" ]]; then
        echo "$directory is up to date"
        return
    fi
    echo "installing into $directory; this takes minutes"
    read -ra torch_spec <<<"$TORCH_SPEC"
    rm -rf "$directory" &&
        "$PYTHON" -m venv "$directory" &&
        "$directory/bin/pip" install --quiet "${torch_spec[@]}" &&
        "$directory/bin/pip" install --quiet "$@" &&
        echo "$stamp" >"$directory/stamp" &&
        "$directory/bin/pip" list 2>/dev/null | grep -E '^(accelerate|datasets|peft|torch|transformers|trl) '
}

# Build a wheel and test it from a directory where Python cannot find the checkout. The wheel is built from the source
# distribution, so that a file missing there is missing in the test as well.
try_wheel() {
    local python=$PWD/.venvs/trl-newest/bin/python folder status
    folder=$(mktemp -d) &&
        "$python" -m build --outdir "$folder/dist" . >"$folder/build.log" 2>&1 || {
        tail -n 20 "$folder/build.log"
        return 1
    }
    "$python" -m pip install --quiet --no-deps --target "$folder/site" "$folder"/dist/*.whl &&
        cp tests/conftest.py tests/command_line.py tests/test_package.py tests/cli/test_main.py "$folder" &&
        (
            # PYTHONPATH comes before the editable checkout.
            export PYTHONPATH=$folder/site
            cd "$folder" &&
                "$python" -c "
import disco_trl
assert disco_trl.__file__.startswith('$folder'), disco_trl.__file__" &&
                "$folder/site/bin/disco-trl" --version &&
                "$python" -m pytest --quiet -p no:cacheprovider test_package.py test_main.py
        )
    status=$?
    rm -rf "$folder"
    return $status
}

contract_tests=(tests/contracts tests/handoff tests/test_upstream.py
    tests/trainer/test_{reward_trainer,reward_config,calibration,epistemic,metrics,crashes,adoption,upstream_checks}.py
    tests/trainer/test_dpo_{judgements,scale_training}.py tests/models/test_policy.py
    tests/models/test_{prefix_sharing_training,distributed}.py
    tests/data/test_{preparation,samplers,judgements,hostile_inputs}.py
    tests/rewards/test_{disco_reward,reward_metrics,scalar_reward,best_of_n_function}.py)
mark=()
$fast && mark=(-m "not slow")
# One thread each: with models this small, a second one is mostly idle.
workers=(--numprocesses logical --maxprocesses 4 --dist worksteal)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# summarize: list what passed and what failed, and exit.
summarize() {
    printf '\n=== summary, %d:%02d minutes\n' $((SECONDS / 60)) $((SECONDS % 60))
    ((${#passed[@]})) && printf 'passed  %s\n' "${passed[@]}"
    ((${#failed[@]})) && printf 'FAILED  %s\n' "${failed[@]}"
    exit $((${#failed[@]} > 0))
}

if $next; then
    upcoming=.venvs/trl-next
    step "environment: next TRL" environment $upcoming -e '.[test]' &&
        step "newest releases" $upcoming/bin/pip install --quiet --upgrade --no-deps trl transformers &&
        step "contract tests: next TRL" \
            $upcoming/bin/python -m pytest "${workers[@]}" -m "not slow" "${pytest_args[@]}" "${contract_tests[@]}"
    summarize
fi

newest=.venvs/trl-newest oldest=.venvs/trl-1.12
has_newest=false has_oldest=false
begin environment $oldest -e '.[test,ppo]'
step "environment: newest TRL" environment $newest -e '.[dev]' && has_newest=true
if $has_newest; then
    step "ruff check" $newest/bin/ruff check .
    step "ruff format" $newest/bin/ruff format --check .
    step "mypy" $newest/bin/mypy
fi
step "environment: TRL 1.12" finish && has_oldest=true
if $has_newest; then
    step "tests: newest TRL" $newest/bin/python -m pytest "${workers[@]}" "${mark[@]}" "${pytest_args[@]}"
    step "wheel outside the checkout" try_wheel
fi
if $has_oldest; then
    step "contract tests: TRL 1.12" \
        $oldest/bin/python -m pytest "${workers[@]}" -m "not slow" "${pytest_args[@]}" "${contract_tests[@]}"
    # The newest TRL has no PPOTrainer.
    $fast || step "PPO example: TRL 1.12" $oldest/bin/python -m pytest "${pytest_args[@]}" tests/test_examples.py -k ppo
fi

summarize
