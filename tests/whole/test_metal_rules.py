"""The Metal rules of docs/architecture.md, checked by reading the source: no Mac runs the tests.

Metal has no float64; mx.linalg runs on the CPU alone; NumPy cannot read an MLX bfloat16 array.
"""

import ast

import pytest

from tests.support.places import ROOT

FILES = sorted(
    path for folder in ("abl_mlx", "convert", "examples") for path in (ROOT / folder).rglob("*.py")
)


# Annotations of what is NumPy's through and through.
NUMPYS = ("np.ndarray", "Grid", "TensorEntry")


def base(node):
    """The name that an expression such as ``raw.reshape(2)[:, 1] * 2`` begins with."""
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        elif isinstance(node, ast.Call):
            node = node.func
        elif isinstance(node, ast.BinOp):
            node = node.left
        else:
            return None
    return node.id


def numpys(tree):
    """For each function, the names that hold NumPy arrays: by annotation, or made from such."""
    known = {}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = {
            argument.arg
            for argument in [*function.args.args, *function.args.kwonlyargs]
            if argument.annotation and ast.unparse(argument.annotation) in NUMPYS
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and base(node.value) in {*names, "np"}:
                names |= {one.id for one in node.targets if isinstance(one, ast.Name)}
        for node in ast.walk(function):
            known.setdefault(id(node), set()).update(names)
    return known


def violations(source):
    """(line, rule) for everything in ``source`` that Metal would not do."""
    found = []
    tree = ast.parse(source)
    known = numpys(tree)
    meets_mlx = "mlx.core" in source  # elsewhere every array is NumPy's
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "mx.float64":
            found.append((node.lineno, "mx.float64 does not exist on Metal"))
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called.startswith("mx.linalg.") and "(" not in called:
            streams = [ast.unparse(k.value) for k in node.keywords if k.arg == "stream"]
            if streams != ["mx.cpu"]:
                found.append((node.lineno, f"{called} needs stream=mx.cpu"))
        if meets_mlx and called in (
            "np.array",
            "np.asarray",
            "np.ascontiguousarray",
            "numpy.array",
        ):
            typed = any(k.arg == "dtype" for k in node.keywords) or len(node.args) > 1
            argument = ast.unparse(node.args[0])
            # A dtype alone does not help: NumPy fails on the buffer. What helps is a cast or a
            # view before, or values that were NumPy's or Python's to begin with.
            cast = ".astype(" in argument or ".view(" in argument or argument.startswith("[")
            safe = base(node.args[0]) in known.get(id(node), ())
            if not (typed or cast or safe):
                found.append((node.lineno, f"{called}({argument}) may meet a bfloat16 array"))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_keeps_the_metal_rules(path):
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "x.astype(mx.float64)",
        "mx.linalg.norm(x)",
        "mx.linalg.qr(x, stream=mx.gpu)",
        "np.array(weights['w'])",
        "def f(x: mx.array, y: np.ndarray):\n    np.array(x)",
    ],
)
def test_the_rules_catch_what_they_forbid(line):
    assert violations(f"import mlx.core as mx\n{line}")


def test_numpys_own_arrays_are_no_matter():
    made = "def f(x: np.ndarray):\n    y = x.reshape(2)\n    np.array(y[0])"
    assert violations(f"import mlx.core as mx\n{made}") == []
    assert violations("import mlx.core as mx\ndef f(x: np.ndarray):\n    np.array(x.T)") == []


def test_converters_do_not_import_the_tool():
    for path in (ROOT / "convert").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not any(name.split(".")[0] == "abl_mlx" for name in names), path
