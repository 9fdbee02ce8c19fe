"""The `disco-trl` command in this process."""

import pytest

from disco_trl.cli.main import main


def refusal(capsys, *words: str) -> str:
    """What `disco-trl` says of a command line that it refuses, by argparse's way out or by ours."""
    with pytest.raises(SystemExit) as exit_info:
        main(words)
    assert exit_info.value.code not in (0, None)
    return f"{capsys.readouterr().err}{exit_info.value}"
