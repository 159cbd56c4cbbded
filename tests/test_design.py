"""The direction of imports, and what README shows, hold."""

import ast
import re
from pathlib import Path

import hf_prune
from hf_prune.methods import REGISTRY


ROOT = Path(__file__).parent.parent
LEVELS = [
    {"patterns", "statistics", "masks", "undo", "atomic", "blocks", "ranks"},
    {"methods", "perp", "structural"},
    {"calibration", "gradients", "report", "journal", "checkpoint", "weights", "sequential", "evaluation", "reconstruction",
     "distillation", "self_calibration"},
    {"config", "pruning", "shrinking"},
    {"compact", "serialization", "model_card", "callbacks", "peft_adapters", "sweep", "iterative", "pretraining", "conversion", "mixin",
     "streaming", "metric", "runtimes", "cli"},
]  # fmt: skip
WITHIN_LEVEL = {("callbacks", "model_card"), ("callbacks", "peft_adapters"), ("callbacks", "serialization"), ("checkpoint", "journal"), ("checkpoint", "report"), ("checkpoint", "weights"), ("cli", "conversion"), ("cli", "runtimes"), ("cli", "serialization"), ("cli", "streaming"), ("conversion", "compact"), ("conversion", "model_card"), ("conversion", "serialization"), ("evaluation", "calibration"), ("gradients", "blocks"), ("gradients", "calibration"), ("gradients", "journal"), ("iterative", "serialization"), ("journal", "report"), ("masks", "atomic"), ("mixin", "compact"), ("mixin", "model_card"), ("mixin", "serialization"), ("model_card", "serialization"), ("peft_adapters", "serialization"), ("pretraining", "callbacks"), ("pretraining", "serialization"), ("pruning", "config"), ("report", "evaluation"), ("runtimes", "serialization"), ("self_calibration", "calibration"), ("self_calibration", "checkpoint"), ("sequential", "gradients"), ("sequential", "journal"), ("sequential", "reconstruction"), ("sequential", "report"), ("serialization", "compact"), ("shrinking", "config"), ("shrinking", "pruning"), ("streaming", "model_card"), ("streaming", "serialization"), ("sweep", "serialization"), ("weights", "journal")}  # fmt: skip


def level(name):
    return next(i for i, names in enumerate(LEVELS) if name in names)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level == 1 and path.parent.name == "hf_prune":
                yield node.module.split(".")[0] if node.module else node.names[0].name
            elif node.level == 2 or (node.level == 0 and node.module.startswith("hf_prune.")):
                yield node.module.removeprefix("hf_prune.").split(".")[0]


def test_imports_point_down():
    for path in (ROOT / "hf_prune").rglob("*.py"):
        if path.name == "__init__.py" and path.parent.name == "hf_prune":
            continue
        name = path.parent.name if path.parent.name != "hf_prune" else path.stem
        for imported in imports_of(path):
            if imported != name and (name, imported) not in WITHIN_LEVEL:
                assert level(imported) < level(name), f"{path.name} imports {imported}"


def test_low_levels_know_no_transformers():
    for name in ("patterns", "statistics", "masks", "undo", "atomic", "ranks"):
        assert "transformers" not in (ROOT / "hf_prune" / f"{name}.py").read_text()
    for path in (ROOT / "hf_prune" / "methods").glob("*.py"):
        assert "transformers" not in path.read_text().lower().replace("hugging face transformers", "")


def test_import_is_light():
    import subprocess
    import sys

    code = "import sys, hf_prune; bad = {'optimum', 'evaluate', 'datasets', 'peft', 'onnx', 'openvino', 'hf_prune.runtimes'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_readme_tells_what_is_there():
    readme = (ROOT / "README.md").read_text()
    for name in REGISTRY:
        assert f"`{name}`" in readme, name
    for block in re.findall(r"```python\n(.*?)```", readme, re.S):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_prune":
                assert hasattr(hf_prune, node.attr), node.attr
    for name in re.findall(r"\bhf_prune\.(\w+)", readme):
        assert hasattr(hf_prune, name), name
    for name in hf_prune.__all__:
        assert hasattr(hf_prune, name)
