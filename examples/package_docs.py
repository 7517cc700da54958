"""Write the docstrings of an installed package as a folder in BEIR's layout, without queries.

    python examples/package_docs.py networkx docs-networkx
    adaptive-margins train docs-networkx --output docs-encoder

``train`` then generates pseudo-queries from the texts.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

MIN_WORDS = 20


def documented(package: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a package's public objects, each docstring once."""
    root = importlib.import_module(package)
    names = [m.name for m in pkgutil.walk_packages(root.__path__, f"{package}.")]
    seen: set[str] = set()
    for name in [package, *sorted(n for n in names if "._" not in n and ".tests" not in n)]:
        try:
            module = importlib.import_module(name)
        except Exception:  # an optional dependency is missing, or whatever else an import may raise
            continue
        objects = [(name, module)]
        for key, value in sorted(vars(module).items()):
            if key.startswith("_") or getattr(value, "__module__", "") != name:
                continue
            objects.append((f"{name}.{key}", value))
            if inspect.isclass(value):
                methods = sorted(vars(value).items())
                objects += [(f"{name}.{key}.{k}", v) for k, v in methods if not k.startswith("_")]
        for qualified, value in objects:
            text = inspect.getdoc(value) or ""
            if len(text.split()) >= MIN_WORDS and text not in seen:
                seen.add(text)
                yield qualified, text


def main() -> None:
    """Write corpus.jsonl."""
    package, folder = sys.argv[1], Path(sys.argv[2])
    warnings.simplefilter("ignore")
    folder.mkdir(parents=True)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for name, text in documented(package):
            line = {"_id": name, "title": name.rpartition(".")[2].replace("_", " "), "text": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
