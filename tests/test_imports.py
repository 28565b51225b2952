"""Imports go one way: a part of the package knows only parts that stand below it."""

import ast
from pathlib import Path

import luna_vision

# from the top downwards; parts of one line may know each other
PARTS = [
    ("cli",),
    ("loading",),
    ("export", "visualize"),
    ("downstream", "tasks"),  # tasks train the networks of downstream, whose probes read data
    ("data",),
    ("execution",),
    ("images",),
    ("models",),
    ("mixers",),
    ("layers",),
    ("functional",),
    ("utils",),
]
RANK = {part: rank for rank, parts in enumerate(PARTS) for part in parts}


def part_of(module: str) -> str | None:
    """The part that `luna_vision.a.b` belongs to; None for the package itself."""
    return module.split(".")[1] if module.startswith("luna_vision.") else None


def imports(path: Path, root: Path) -> list[str]:
    """The modules of the package that a file imports, wherever in it."""
    package = ["luna_vision", *path.relative_to(root).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.startswith("luna_vision.")]


def test_the_package_needs_no_experiment():
    for path in sorted(Path(luna_vision.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "experiments" for name in names), path


def test_every_file_has_its_room():
    root = Path(luna_vision.__file__).parent
    rooms = {path.relative_to(root).parts[0].removesuffix(".py") for path in root.rglob("*.py")} - {"__init__"}
    assert rooms == set(RANK)


def test_imports_go_downwards():
    root = Path(luna_vision.__file__).parent
    upward = []
    for path in sorted(root.rglob("*.py")):
        module = ".".join(["luna_vision", *path.relative_to(root).with_suffix("").parts])
        own = part_of(module)
        for name in imports(path, root):
            other = part_of(name)
            if own in RANK and other in RANK and RANK[other] < RANK[own]:
                upward.append(f"{module} imports {name}")
    assert not upward, "\n".join(upward)
