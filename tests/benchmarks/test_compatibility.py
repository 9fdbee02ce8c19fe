"""The table of `benchmarks/compatibility.py`."""

from benchmarks.compatibility import PACKAGES, Outcome, table


def outcome(asked: str, python: str = "3.11.7", passed: int = 1234, failed: int = 0) -> Outcome:
    versions = dict.fromkeys(PACKAGES, "1.0") | dict(zip(("trl", "transformers"), asked.split("/"), strict=True))
    return Outcome(asked, {"python": python, **versions, "torch": "2.13.0+cpu"}, passed, failed, 2, [])


def test_newest_first_and_what_cannot_be_installed_is_said():
    rows = table(
        [
            outcome("1.12.0/5.24.0"),
            outcome("1.16.0/5.9.0", failed=3),
            Outcome("1.13.0/4.0.0", {}, 0, 0, 0, ["ERROR: ResolutionImpossible"]),
            outcome("1.16.0/5.24.0", python="3.13.5"),
            outcome("1.16.0/5.24.0"),
        ]
    ).splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert len({len(row) for row in cells}) == 1
    assert cells[0][:3] == ["Python", "trl", "transformers"]
    assert [row[:3] for row in cells[2:]] == [
        ["3.13.5", "1.16.0", "5.24.0"],
        ["3.11.7", "1.16.0", "5.24.0"],
        ["3.11.7", "1.16.0", "5.9.0"],
        ["", "1.13.0", "4.0.0"],
        ["3.11.7", "1.12.0", "5.24.0"],
    ]
    assert cells[2][3] == "2.13.0"
    assert cells[4][-3:] == ["1,234", "3", "2"]
    assert "cannot be installed" in rows[5]
