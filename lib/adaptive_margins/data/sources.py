"""Open a collection by name: a folder, installed packages (PyDocs), or an ir_datasets id."""

from __future__ import annotations

import os
from pathlib import Path

from adaptive_margins.data import ir_datasets, pydocs
from adaptive_margins.data.collection import Collection
from adaptive_margins.data.folder import EXPECTED, read_dataset, read_folder, standard_sets
from adaptive_margins.data.text import RECORDS, DataError
from adaptive_margins.profiles.config import PyDocsSettings
from adaptive_margins.profiles.load import load_profile
from adaptive_margins.progress import say

PYDOCS = "pydocs"
PYDOCS_SIZES = (150, 300)
"""Queries of the set "validation", and of each half of "test", of PyDocs."""
PYDOCS_SHARES = (10, 5)
"""The same for small collections: the number of queries divided by this."""
_EXPECTED = f"""\
a folder with one of these layouts
{EXPECTED}
"pydocs", or "pydocs:" and names of installed packages, e.g. pydocs:numpy,scipy
an id of ir_datasets (https://ir-datasets.com), e.g. beir/scifact"""


def open_collection(source: str | Path) -> Collection:
    """Read a collection with its sets "train", "validation" and "test".

    ``source`` is, in this order:

    - a folder: see `folder.read_folder`; or a file of rows of texts, ``NAME.jsonl`` or
      ``NAME.parquet``: see `folder.read_dataset`;
    - ``pydocs``, or ``pydocs:numpy,scipy``: built from the docstrings of installed packages, by
      default those of the profile "laptop". "validation" gets 150 queries and "test" 600, or of a
      small collection a tenth and two fifths;
    - an ir_datasets id: see `ir_datasets.read_collection`.

    Raises:
        DataError: the source is none of these; or the data are malformed.
        LicenceError, DownloadError: as `ir_datasets.read_collection`.
    """
    source, path = str(source), Path(os.path.expanduser(source))
    if source and (path.is_dir() or (path.is_symlink() and not path.exists())):
        return read_folder(path)
    if source.split(":")[0] == PYDOCS:
        return _pydocs(source)
    if path.is_file():
        if path.name.endswith(RECORDS) and not path.name.startswith(("corpus.", "queries.")):
            return read_dataset(path)
        raise DataError(f"{source} is a file; expected the folder it lies in:\n{EXPECTED}")
    try:
        known = ir_datasets.is_known(source)
    except OSError as error:  # it creates its folder when it is imported
        raise DataError(
            f"there is no collection {source!r}: it is not a folder, and ir_datasets cannot be used"
            f" because its folder cannot be created ({error.filename}: {error.strerror};"
            " IR_DATASETS_HOME names another)"
        ) from error
    if known:
        return ir_datasets.read_collection(source)
    hint = ir_datasets.similar(source)
    raise DataError(f"there is no collection {source!r}{hint}: expected\n{_EXPECTED}")


def _pydocs(source: str) -> Collection:
    settings = load_profile("laptop").collection
    assert isinstance(settings, PyDocsSettings)
    _, named, names = source.partition(":")
    packages = [name.strip() for name in names.split(",") if name.strip()]
    if named and not packages:
        raise DataError(f'{source!r} names no package; expected e.g. "pydocs:numpy,scipy"')

    say("building the collection from installed packages")
    validation, test = PYDOCS_SIZES
    collection = pydocs.build_pydocs(
        packages or settings.packages,
        seed=settings.seed,
        validation=validation,
        test=test,
        max_passages=None if packages else settings.max_passages,
        max_words=settings.max_words,
        shares=PYDOCS_SHARES,
    )
    return standard_sets(collection, source)
