import inspect

import pytest

from adaptive_margins.data.docstrings import mask_name, parse_docstring

NUMPYDOC = '''Return the widest gap between sorted values. Ties go to the left.

    The gap is the difference of two neighbours after sorting [1]_, see :func:`numpy.diff`.

    .. versionadded:: 1.2
       This is history.

    .. math:: g = x_1 - x_0

    Parameters
    ----------
    x : array_like, shape (n,)
        The values to look at.
    axis : int, optional
    **kwargs
        Passed to ``sort``.

    Returns
    -------
    gap : float
        Width of the gap.

    See Also
    --------
    narrow_gap, pkg.util.mid_gap : The others.
    :func:`~pkg.last_gap`
    plain_gap

    Notes
    -----
    It takes :math:`O(n \\log n)` steps:

    * sort the *values*;
    * scan them, as `the book <https://example.org/book>`_ says::

        this is code

    References
    ----------
    .. [1] Somebody, "A paper".

    Examples
    --------
    A short one:

    >>> wide_gap([1, 2, 5])
    3

    Done.
    '''  # fmt: skip


def test_a_numpydoc_docstring() -> None:
    assert parse_docstring(inspect.cleandoc(NUMPYDOC), "wide_gap", "function", 100) == (
        "Return the widest gap between sorted values",
        "Ties go to the left. The gap is the difference of two neighbours after sorting, see"
        " numpy.diff. Width of the gap. It takes O(n log n) steps: sort the values; scan them, as"
        " the book says: x: The values to look at. **kwargs: Passed to sort. A short one: Done.",
        ("narrow_gap", "pkg.util.mid_gap", "pkg.last_gap", "plain_gap"),
    )


def test_a_google_docstring_and_rest_fields() -> None:
    google = """Fold a long list of numbers into one.

The fold goes from left to right and stops early where it can.

Args:
    numbers (list of int): What is folded,
        in its order.
    start: Where to begin.

Returns:
    int: The folded number.

.. seealso:: :func:`unfold` and `refold`

.. note:: Empty lists give the start.
"""
    assert parse_docstring(google, "fold", "function", 60) == (
        "Fold a long list of numbers into one",
        "The fold goes from left to right and stops early where it can. The folded number."
        " numbers: What is folded, in its order. start: Where to begin.",
        ("unfold", "refold"),
    )
    rest = """Fold a long list of numbers into one.

:param numbers: What is folded from left to right, stopping early where
    it can be stopped.
:type numbers: list
:returns: The folded number, which is the start where the list is empty.
:rtype: int
"""
    parsed = parse_docstring(rest, "fold", "function", 60)
    assert parsed is not None
    assert parsed[1] == (
        "numbers: What is folded from left to right, stopping early where it can be stopped."
        " The folded number, which is the start where the list is empty."
    )


BODY = " ".join(f"word{i}" for i in range(30))


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Too short here.\n\n" + BODY, None),
        (" ".join(["long"] * 15 + ["sentence"] * 16) + ".\n\n" + BODY, None),
        (" ".join(["long"] * 15 + ["sentence"] * 15) + ".\n\n" + BODY, 30),
        ("A summary with a short body.\n\n" + " ".join(BODY.split()[:19]), None),
        ("A summary with a body.\n\n" + " ".join(BODY.split()[:20]), 20),
        ("A summary that has no body at all.", None),
        ("", None),
        # Nothing but lists of parameters and results answers nothing.
        ("Fit the model to data.\n\nParameters\n----------\nX : array\n    " + BODY, None),
        # What is left of the query but stop words and kinds?
        ("A function for the method of a class.\n\n" + BODY, None),
        ("foo(a, b=1) -> c\n\nThe summary comes second here.\n\n" + BODY, 30),
    ],
)
def test_lengths(docstring: str, expected: int | None) -> None:
    parsed = parse_docstring(docstring, "foo", "function", 40)
    assert (parsed and len(parsed[1].split())) == expected


def test_a_passage_is_cut() -> None:
    parsed = parse_docstring("A summary with a body.\n\n" + BODY, "f", "function", 25)
    assert parsed is not None
    assert parsed[1] == " ".join(BODY.split()[:25])


@pytest.mark.parametrize(
    ("paragraph", "query"),
    [
        ("Use a map, e.g. One like this. And more.", "Use a map, e.g. One like this"),
        ("Read version 1.2 of files. And more.", "Read version 1.2 of files"),
        ("Is this really a question? Yes.", "Is this really a question?"),
        ("Give one of these values:", "Give one of these values"),
        ("Call ``np.thing`` on *all* values.", "Call np.thing on all values"),
    ],
)
def test_the_summary_sentence(paragraph: str, query: str) -> None:
    parsed = parse_docstring(f"{paragraph}\n\n{BODY}", "f", "function", 60)
    assert parsed is not None
    assert parsed[0] == query


@pytest.mark.parametrize(
    ("text", "name", "masked"),
    [
        # An English word stays in prose and goes where it is code.
        ("Sort and sort.", "sort", "Sort and sort."),
        ("the sort of thing, sorted", "sort", "the sort of thing, sorted"),
        ("call `sort` or ``np.sort(a)``", "sort", "call `function` or ``function(a)``"),
        ("use :func:`~numpy.sort` now", "sort", "use :func:`~function` now"),
        ("numpy.sort and a.sort.", "sort", "function and function."),
        ("sort(a) gives sort.order", "sort", "function(a) gives function.order"),
        ("sort (a) is prose", "sort", "sort (a) is prose"),
        ("resort(a) and sort_all(a)", "sort", "resort(a) and sort_all(a)"),
        # What no English word looks like goes everywhere.
        ("max_clique finds a max clique", "max_clique", "function finds a max clique"),
        ("see nx.max_clique or max_cliques", "max_clique", "see function or max_cliques"),
        ("KMeans, MiniBatchKMeans", "KMeans", "function, MiniBatchKMeans"),
        ("log1p is log of 1 plus", "log1p", "function is log of 1 plus"),
        ("i0 of i01", "i0", "function of i01"),
        ("PCA is principal", "PCA", "PCA is principal"),
    ],
)
def test_the_name_gives_nothing_away(text: str, name: str, masked: str) -> None:
    assert mask_name(text, name, "function") == masked


def test_the_name_is_masked_in_query_and_passage() -> None:
    docstring = f"HermiteSeries objects hold one series.\n\nThe `HermiteSeries` class adds. {BODY}"
    parsed = parse_docstring(docstring, "HermiteSeries", "class", 60)
    assert parsed is not None
    assert parsed[:2] == ("class objects hold one series", f"The class adds. {BODY}")


def test_no_control_character_or_surrogate_survives() -> None:
    parsed = parse_docstring(
        f"A summary with \a bell.\n\n\x0b\ud800{BODY}\u2028\x85\tx", "f", "method", 60
    )
    assert parsed is not None
    assert parsed[:2] == ("A summary with bell", BODY + " x")
    "".join(parsed[:2]).encode("utf-8")
