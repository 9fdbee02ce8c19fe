"""The plan of the package: which room may import which, and that no imports run in a circle."""

import ast
import re
from pathlib import Path

import disco_trl
from benchmarks.structure import circles_of, floors_of, imports_of, modules_of


PACKAGE = Path(disco_trl.__file__).parent
# What each room may import besides itself; `_version` imports nothing and is for all.
ROOMS: dict[str, set[str]] = {
    "distributions": set(),
    "data": set(),
    "models": {"distributions", "data"},
    "simulation": {"distributions"},
    "trainer": {"models", "data", "distributions"},
    "rewards": {"models", "data", "distributions"},
    "serving": {"rewards", "models", "data", "distributions"},
    "evaluation": {"trainer", "rewards", "models", "data", "distributions"},
}
ROOMS["cli"] = {*ROOMS}
MODULES = modules_of(PACKAGE)
IMPORTS = {module: imports_of(module, MODULES) for module in MODULES}


def room_of(module: str) -> str | None:
    """The room that a module is in; None for those beside the rooms."""
    _, *parts = module.split(".")
    return parts[0] if parts and parts[0] in ROOMS else None


def test_every_module_is_in_a_room():
    beside = {module for module in MODULES if room_of(module) is None}
    assert beside == {"disco_trl", "disco_trl.__main__", "disco_trl._version"}


def test_every_import_is_of_a_module_that_there_is():
    unknown = {module: names for module in MODULES if (names := IMPORTS[module] - MODULES.keys())}
    assert not unknown


def test_rooms_import_only_what_stands_below_them():
    forbidden = [
        f"{module} imports {name}"
        for module in MODULES
        if (room := room_of(module)) is not None
        for name in IMPORTS[module]
        if name != "disco_trl._version" and room_of(name) not in {room, *ROOMS[room]}
    ]
    assert not forbidden


def test_the_command_line_is_imported_by_nothing():
    users = {module for module in MODULES if any(room_of(name) == "cli" for name in IMPORTS[module])}
    assert {module for module in users if room_of(module) != "cli"} == {"disco_trl.__main__"}


def test_no_imports_run_in_a_circle():
    assert circles_of(IMPORTS) == []


def test_a_circle_would_be_seen():
    assert circles_of({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert floors_of({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}, "e": set()}) == {
        "b": 1,
        "c": 1,
        "a": 2,
        "d": 3,
        "e": 1,
    }


def test_files_of_tests_have_names_of_their_own():
    """The folders of tests are no packages, so that pytest imports each file by its name alone."""
    folder = PACKAGE.parent / "tests"
    names = [path.stem for path in folder.rglob("*.py") if "hostile" not in path.parts]
    assert {name for name in names if names.count(name) > 1} == set()


DOCUMENTS = [
    path
    for root in (PACKAGE.parent / "README.md", *(PACKAGE.parent / name for name in ("docs", "examples", "benchmarks")))
    for path in ([root] if root.is_file() else sorted(root.rglob("*")))
    if path.suffix in (".md", ".py")
]


def names_in(module: str) -> set[str]:
    """What a module defines or imports at its top."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    names = set(disco_trl.__all__) if module == "disco_trl" else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def test_documented_imports_resolve():
    """Statements in documents and docstrings, and dotted names in prose, are of modules and names that there are."""
    texts = {path: path.read_text(encoding="utf-8") for path in (*DOCUMENTS, *MODULES.values())}
    wrong = []
    for path, text in texts.items():
        for module, names in re.findall(r"from (disco_trl[\w.]*) import (\([^)]*\)|[\w, ]+)", text):
            for name in re.findall(r"\w+", re.sub(r" as \w+|#.*", "", names)):
                if f"{module}.{name}" not in MODULES and (module not in MODULES or name not in names_in(module)):
                    wrong.append(f"{path.name}: from {module} import {name}")
        for dotted in re.findall(r"(?<![\w/.])disco_trl(?:\.\w+)+", text):
            known = dotted
            while known not in MODULES:
                known = known.rpartition(".")[0]
            rest = dotted.removeprefix(known).lstrip(".").split(".")[0]
            is_attribute = rest.startswith("__") or rest in names_in(known) or rest == "py"
            if rest and not is_attribute:
                wrong.append(f"{path.name}: {dotted}")
    assert not wrong


def test_documented_files_exist():
    """Paths of the checkout that documents, docstrings and comments name."""
    root = PACKAGE.parent
    sources = [*DOCUMENTS, *MODULES.values(), *(root / "tests").rglob("*.py"), *(root / "scripts").glob("*")]
    missing = {
        f"{source.relative_to(root)}: {path}"
        for source in sources
        for path in re.findall(
            r"(?<![\w/.])(?:tests|docs|examples|scripts|benchmarks)/[\w/]+\.(?:py|md|sh|yaml|json)\b",
            source.read_text(encoding="utf-8"),
        )
        if not (root / path).is_file()
    }
    assert not missing
