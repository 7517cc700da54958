"""The command for runs of any system: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

from adaptive_margins.cli_corpus import Json, PerQuery, command, measure_names
from adaptive_margins.terminal import new_file, old_path, show, working

commands = typer.Typer()
_EXAMPLES = """\
compare --qrels qrels.txt bm25.run mine.run
compare --qrels qrels.txt --baseline a.run b.run c.run.gz
compare --qrels qrels.txt a.run b.run --format latex
compare --qrels qrels.txt a.run b.run --plot a_and_b.svg
"""
_STYLES = {"text": "plain", "markdown": "github", "latex": "latex_booktabs"}


@command(commands, _EXAMPLES)
def compare(
    runs: Annotated[
        list[Path], Argument(metavar="RUN", parser=old_path, help="TREC runs, two or more.")
    ],
    qrels: Annotated[
        Path, Option(parser=old_path, help="Judgements: TREC's four columns, or BEIR's three.")
    ],
    measure: Annotated[str, Option(help="A measure in ir_measures' notation.")] = "nDCG@10",
    margin: Annotated[float, Option(help="Bound of equivalence (TOST).")] = 0.05,
    plot: Annotated[
        Path | None, Option(parser=new_file, help="Draw differences per query: .png, .svg, .pdf.")
    ] = None,
    complete: Annotated[
        bool, Option("--complete", help="The runs have all hits that could be found.")
    ] = False,
    baseline: Annotated[
        Path | None, Option(metavar="RUN", parser=old_path, help="Compare only with this run.")
    ] = None,
    form: Annotated[
        Literal["text", "markdown", "latex"], Option("--format", help="Format of tables.")
    ] = "text",
    per_query: PerQuery = False,
    as_json: Json = False,
) -> None:
    """Compare runs pair by pair: equivalent, better, worse or undecided.

    By a paired t test and TOST (two one-sided tests, within ±margin) over all
    judged queries, corrected for the number of pairs (Bonferroni; with a
    baseline Holm). A judged query without hits counts 0.
    """
    with working():
        names = measure_names(measure, "--measure")
        if len(names) > 1:
            raise typer.BadParameter(f"expected 1 measure, got {measure!r}", param_hint="--measure")
        from adaptive_margins.corpus.compare import compare_files
        from adaptive_margins.evaluation.comparison import comparison_text

        result = compare_files(
            qrels, runs, names[0], margin, complete=complete, plot=plot, baseline=baseline
        )
    if not per_query:
        del result["per_query"]
    show(result, as_json, comparison_text(result, _STYLES[form]), plot)
