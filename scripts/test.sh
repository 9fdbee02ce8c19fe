#!/usr/bin/env bash
# Everything that must hold before a change goes in, in environments of its own:
#
#   .venvs/trl-newest   the newest TRL: ruff, mypy, all tests; a wheel is built and tried outside the checkout
#   .venvs/trl-1.12     the oldest TRL supported (and the last with PPOTrainer): the contract tests
#
#   bash scripts/test.sh [--fresh] [--fast] [arguments for pytest]
#
#   --fresh   make the environments anew (otherwise they are kept until setup.cfg, pyproject.toml or TORCH_SPEC change)
#   --fast    leave out the tests marked `slow`
#
# PYTHON names the interpreter (default python3). TORCH_SPEC is what pip is asked for as torch, e.g. another version or
# "torch --index-url <your mirror of CPU builds>".

set -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fresh=false
fast=false
pytest_args=()
for argument in "$@"; do
    case $argument in
        --fresh) fresh=true ;;
        --fast) fast=true ;;
        -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) pytest_args+=("$argument") ;;
    esac
done

PYTHON=${PYTHON:-python3}
# Installed first and by version: asked only for "torch>=2.6", pip passes over a local CPU build (--find-links) as soon
# as the registry has a newer torch, and that one brings gigabytes of CUDA libraries.
TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "scripts/test.sh: $PYTHON must be Python 3.11 or newer; name another with PYTHON=..." >&2
    exit 2
fi

export PIP_DISABLE_PIP_VERSION_CHECK=1
passed=()
failed=()

# step NAME COMMAND...: run it, remember how it went, go on.
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

# environment DIRECTORY REQUIREMENT...: a virtual environment with the checkout in it, editable.
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

# The wheel, built from the source distribution so that it holds only what that does, unpacked on its own and tried
# from a folder where the checkout cannot be seen.
try_wheel() {
    local python=$PWD/.venvs/trl-newest/bin/python folder status
    folder=$(mktemp -d) &&
        "$python" -m build --outdir "$folder/dist" . >"$folder/build.log" 2>&1 || {
        tail -n 20 "$folder/build.log"
        return 1
    }
    "$python" -m pip install --quiet --no-deps --target "$folder/site" "$folder"/dist/*.whl &&
        cp tests/conftest.py tests/test_package.py tests/cli/test_main.py "$folder" &&
        (
            # First on the path, hence before the editable checkout.
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

contract_tests=(tests/contracts tests/handoff
    tests/trainer/test_{reward_trainer,calibration,epistemic,metrics,crashes}.py
    tests/models/test_{prefix_sharing_training,distributed}.py
    tests/data/test_{preparation,samplers,judgements,hostile_inputs}.py
    tests/rewards/test_{disco_reward,reward_metrics,scalar_reward,best_of_n_function}.py)
mark=()
$fast && mark=(-m "not slow")

newest=.venvs/trl-newest
if step "environment: newest TRL" environment $newest -e '.[dev]'; then
    step "ruff check" $newest/bin/ruff check .
    step "ruff format" $newest/bin/ruff format --check .
    step "mypy" $newest/bin/mypy
    step "tests: newest TRL" $newest/bin/python -m pytest "${mark[@]}" "${pytest_args[@]}"
    step "wheel outside the checkout" try_wheel
fi
oldest=.venvs/trl-1.12
if step "environment: TRL 1.12" environment $oldest -e '.[test,ppo]'; then
    step "contract tests: TRL 1.12" \
        $oldest/bin/python -m pytest -m "not slow" "${pytest_args[@]}" "${contract_tests[@]}"
    # At the newest TRL there is no PPOTrainer to run it with.
    $fast || step "PPO example: TRL 1.12" $oldest/bin/python -m pytest "${pytest_args[@]}" tests/test_examples.py -k ppo
fi

printf '\n=== summary, %d:%02d minutes\n' $((SECONDS / 60)) $((SECONDS % 60))
((${#passed[@]})) && printf 'passed  %s\n' "${passed[@]}"
((${#failed[@]})) && printf 'FAILED  %s\n' "${failed[@]}"
exit $((${#failed[@]} > 0))
