"""Private names of other libraries: all are in `training/private.py`, and all still exist."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import accelerate
import datasets
import peft
import pytest
import torch
import torch.distributed.checkpoint
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import BatchSampler, DataLoader

import holdfast
import tiny
from holdfast.training.private import PINNED

PACKAGE = Path(holdfast.__file__).parent
HOME = PACKAGE / "training" / "private.py"
ALLOWED = {
    ("machine/processes.py", "_exit"), ("study/job.py", "_exit"), ("data/sources.py", "_replace"), ("measuring/filtering.py", "_replace"),
}  # fmt: skip
"""`os._exit`, and `_replace` of named tuples, which Python documents."""
BASES = (
    transformers.Trainer, transformers.TrainerCallback, transformers.TrainingArguments,
    transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase, peft.PeftModel, torch.nn.Module,
    torch.optim.Optimizer, DataLoader, BatchSampler, accelerate.Accelerator, datasets.Dataset,
)  # fmt: skip


def private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None


def defined(tree: ast.AST) -> set[str]:
    """The private names that a file defines: functions, classes, variables, fields and attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign | ast.AugAssign) else []
        for part in (part for target in targets for part in ast.walk(target)):
            if isinstance(part, ast.Attribute):
                if ast.unparse(part.value) in ("self", "cls"):
                    found.add(part.attr)
            elif isinstance(part, ast.Name):
                found.add(part.id)
    return {name for name in found if private(name)}


def methods(tree: ast.AST) -> set[str]:
    """The private methods of a file's classes that have a base or are mixins: they may override a base's."""
    return {
        node.name
        for kind in ast.walk(tree)
        if isinstance(kind, ast.ClassDef) and (kind.bases or kind.name.endswith(("Mixin", "Slots")))
        for node in kind.body
        if isinstance(node, ast.FunctionDef) and private(node.name)
    }


def used(tree: ast.AST) -> set[tuple[str, str]]:
    """Private names by the object they are read from: as attributes, by `getattr` and similar, or imported."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add((ast.unparse(node.value), node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
            found |= {(ast.unparse(node.args[0]), name) for name in names}
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            if ast.unparse(node.value).startswith("vars("):
                found.add((ast.unparse(node.value), node.slice.value))
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module, a.name) for a in node.names if a.name != "_"}
            found |= {("import", part) for part in (node.module or "").split(".")}
    return {(owner, name) for owner, name in found if private(name)}


def foreign(trees: dict[str, ast.AST]) -> set[tuple[str, str]]:
    """The files and names of other libraries that these files use or override."""
    ours = set().union(*map(defined, trees.values()))
    theirs = {name for base in BASES for name in dir(base) if private(name)}
    found = set()
    for file, tree in trees.items():
        here = defined(tree)
        for owner, name in used(tree):
            mine = ours if owner in ("self", "cls", "super()") else here
            if name not in mine:
                found.add((file, name))
        found |= {(file, name) for name in methods(tree) if name in theirs}
    return found


def test_private_names_of_others_are_used_in_one_file():
    files = [path for path in PACKAGE.rglob("*.py") if path != HOME]
    trees = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in files}
    assert foreign(trees) == ALLOWED


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._foreach_add([], 1)",
        "def f(trainer): return trainer._train_batch_size",
        "class A:\n    def f(self): return self._train_batch_size",
        "class AMixin:\n    def _load_from_checkpoint(self, folder): ...",
        "class A(Trainer):\n    def _load_from_checkpoint(self, folder): ...",
        "class A:\n    def f(self): return super()._prepare_dataset()",
        "def f(model): return getattr(model, '_hf_hook', None)",
        "def f(trainer): return vars(trainer)['_metrics']",
        "from transformers.trainer import _is_peft_model",
        "from torch._dynamo import reset",
    ],
)
def test_the_search_finds(text):
    assert foreign({"file.py": ast.parse(text)})


@pytest.mark.parametrize(
    "text",
    [
        "def _help(): ...\n_help()",
        "class A:\n    def __init__(self): self._x = 1\n    def f(self): return self._x",
        "from a import b\nb.__name__",
    ],
)
def test_the_search_leaves_alone(text):
    assert not foreign({"file.py": ast.parse(text)})


def test_the_list_is_whole():
    tree = ast.parse(HOME.read_text())
    theirs = {name for base in BASES for name in dir(base)}
    touched = {name for _, name in used(tree)} | {name for name in methods(tree) if name in theirs}
    listed = {name for names in PINNED.values() for name in names}
    assert touched <= listed
    after = HOME.read_text().split("}  # fmt: skip", 1)[1]
    assert [name for name in listed if name not in after] == [], "listed, but used nowhere"


@pytest.fixture(scope="module")
def owners(tmp_path_factory):
    """The objects of `PINNED`, by name, which must have the private names."""
    folder = tmp_path_factory.mktemp("owners")
    model = tiny.llama(len(tiny.tokenizer()))
    model.gradient_checkpointing_enable()
    arguments = transformers.TrainingArguments(str(folder), use_cpu=True, report_to="none")
    return {
        "torch": torch,
        "torch.nn.Module": torch.nn.Linear(1, 1),
        "torch.compile": torch.compile(torch.nn.Linear(1, 1)),
        "torch checkpoint wrapper": checkpoint_wrapper(torch.nn.Linear(1, 1)),
        "transformers layer": model.model.layers[0],
        "transformers.Trainer": transformers.Trainer(model, arguments),
        "trl.SFTTrainer": lambda: sft(folder),
        "torch.distributed.checkpoint.filesystem": torch.distributed.checkpoint.filesystem,
        "torch.distributed.checkpoint.metadata": torch.distributed.checkpoint.metadata,
        "torch.serialization": torch.serialization,
    }


def sft(folder):
    trl = pytest.importorskip("trl")
    return trl.SFTTrainer(
        tiny.llama(len(tiny.tokenizer())),
        trl.SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}]),
        processing_class=tiny.tokenizer(),
    )


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner in PINNED for name in PINNED[owner]])
def test_the_name_is_still_there(owners, owner, name):
    thing = owners[owner]
    if inspect.isfunction(thing):
        thing = owners[owner] = thing()
    assert hasattr(thing, name)


@pytest.mark.parametrize("owner", ["torch.compile", "torch checkpoint wrapper"])
def test_the_wrappers_names_are_in_those_of_parameters(owners, owner):
    names = [name for name, _ in torch.nn.Sequential(owners[owner]).named_parameters()]
    (pinned,) = PINNED[owner]
    assert names == [f"0.{pinned}.weight", f"0.{pinned}.bias"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_load_best_model", ["self"]),
        ("_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        ("_save_optimizer_and_scheduler", ["self", "output_dir"]),
    ],
)
def test_what_is_overridden_has_the_same_parameters(name, parameters):
    assert list(inspect.signature(getattr(transformers.Trainer, name)).parameters) == parameters
