"""
Count the structure of a package: files, floors and circles of imports, functions and comments.

    python -m benchmarks.structure                   # this checkout's disco_trl
    python -m benchmarks.structure OTHER/disco_trl   # that of another checkout

A module that imports nothing of the package is on floor 1. Every other module is one floor above the highest module
that it imports, and modules of a circle share a floor. Imports inside functions and under `TYPE_CHECKING` count.
"""

import argparse
import ast
import io
import tokenize
from pathlib import Path


def modules_of(package: Path) -> dict[str, Path]:
    """Modules by their dotted names."""
    return {
        ".".join((package.name, *path.relative_to(package).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in sorted(package.rglob("*.py"))
    }


def imports_of(module: str, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, wherever in it."""
    package = module if modules[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(modules[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                # `from .room import module` names a module, `from .module import name` does not.
                found.add(f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in modules else origin)
    return {name for name in found - {module} if name.split(".")[0] == module.split(".")[0]}


def reach_of(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """What each module imports, directly or through others (S. Warshall, 1962)."""
    reach = {module: set(names) for module, names in imports.items()}
    for through in reach:
        for names in reach.values():
            if through in names:
                names |= reach[through]
    return reach


def floors_of(imports: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each module, from 1."""
    reach = reach_of(imports)
    floors: dict[str, int] = {}
    # A module reaches more than those below it, and modules of a circle reach the same ones.
    for module in sorted(imports, key=lambda module: len(reach[module] | {module})):
        circle = {other for other in reach[module] if module in reach[other]} | {module}
        below = set().union(*(imports[other] for other in circle)) - circle
        floors |= dict.fromkeys(circle, 1 + max((floors[other] for other in below), default=0))
    return floors


def circles_of(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    reach = reach_of(imports)
    circles = {
        tuple(sorted({other for other in reach[module] if module in reach[other]} | {module}))
        for module in imports
        if module in reach[module]
    }
    return [list(circle) for circle in sorted(circles)]


def lines_of(path: Path) -> tuple[int, int, list[int]]:
    """Lines of a file without blanks and docstrings; comments among them; and lines of each function."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    strings = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    documented = {line for node in strings for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    kept = [n for n, line in enumerate(text.splitlines(), start=1) if line.strip() and n not in documented]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    sizes = [sum(node.lineno <= n <= (node.end_lineno or 0) for n in kept) for node in functions]
    return len(kept), len(comments & set(kept)), sizes


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.structure", description="Count files, floors, circles, functions and comments."
    )
    parser.add_argument("package", nargs="?", type=Path, default=Path(__file__).parents[1] / "disco_trl")
    package = parser.parse_args().package.resolve()
    modules = modules_of(package)
    imports = {module: imports_of(module, modules) & modules.keys() for module in modules}
    floors, circles = floors_of(imports), circles_of(imports)
    counted = [lines_of(path) for path in modules.values()]
    lines, comments = sum(count[0] for count in counted), sum(count[1] for count in counted)
    sizes = sorted(size for count in counted for size in count[2])
    longest = max(modules.values(), key=lambda path: len(path.read_text(encoding="utf-8").splitlines()))
    print(f"files                        {len(modules)}")
    print(f"floors                       {max(floors.values())}")
    print(f"circles                      {len(circles)} {[len(circle) for circle in circles]}")
    print(f"lines (no docs, no blanks)   {lines}")
    print(f"comment lines                {comments / lines:.1%}")
    print(f"functions per 1,000 lines    {1000 * len(sizes) / lines:.0f}")
    print(f"99th percentile of a function's lines  {sizes[int(0.99 * len(sizes))]}")
    print(
        f"longest file                 {longest.relative_to(package)}, {len(longest.read_text().splitlines())} lines"
    )
    for room in sorted(path for path in package.iterdir() if (path / "__init__.py").is_file()):
        inside = [module for module in modules if room in modules[module].parents]
        print(f"  {room.name:14} {len(inside):3} files, floors {min(floors[m] for m in inside)} to "
              f"{max(floors[m] for m in inside)}")  # fmt: skip


if __name__ == "__main__":
    main()
