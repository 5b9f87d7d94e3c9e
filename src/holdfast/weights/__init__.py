"""Weights and adapters as files: find, name, read and write them one tensor at a time, without torch."""

__all__ = [
    "adapter",
    "adapter_folder",
    "averaging",
    "card",
    "chains",
    "combine",
    "files",
    "floats",
    "folders",
    "matching",
    "merge",
    "orthogonal",
    "own_tokenizer",
    "patterns",
    "pushing",
    "reader",
    "serving",
    "writer",
]
