"""What the tests of several rooms ask of a prefix forest."""


def prefixes_by_place(forest) -> list[tuple[int, ...]]:
    """What stands on the path from a root to each place of the row, the place itself included."""
    prefixes: list[tuple[int, ...]] = []
    whole: list[tuple[int, ...]] = []  # up to the end of each node
    for length, parent in zip(forest.lengths, forest.parents, strict=True):
        prefix = whole[parent] if parent >= 0 else ()
        for _ in range(length):
            prefix = (*prefix, forest.tokens[len(prefixes)])
            prefixes.append(prefix)
        whole.append(prefix)
    return prefixes
