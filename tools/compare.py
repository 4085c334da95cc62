"""Compare the runs of a sweep on one page: python tools/compare.py runs/SWEEP

Writes compare.html, which needs nothing else, and compare.csv with the same numbers.
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks` and `tools` are used from the checkout

from detr.cli.exit_codes import exit_codes
from detr.reporting import OutputFolder
from detr.reporting.pages import page_template
from tools.comparison import charts, cost, judge
from tools.comparison.runs import METRICS, Group, find_runs, group_runs
from tools.stored import add_allow_targets


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUNS_DIR", help="folders of runs, or with such folders")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write to; the first RUNS_DIR where not given"
    )
    parser.add_argument(
        "--baseline", metavar="LABEL", help="configuration to compare with; else the first without attention blocks"
    )
    add_allow_targets(parser)
    options = parser.parse_args(arguments)
    runs, left_out = find_runs(*options.runs)
    groups = group_runs(runs)
    baseline = judge.pick_baseline(groups, options.baseline)
    groups.sort(key=lambda group: (group is not baseline, -(judge.spread(group.values("AP"))[0] or 0)))
    for folder, reason in left_out.items():
        print(f"Left out: {folder}: {reason}")
    names = ["compare.csv", "compare.html"]
    output = OutputFolder(options.output or options.runs[0], names, overwrite=True, option="--output DIR")
    print(f"Runs: {len(runs)}, configurations: {len(groups)}. Measuring what each costs ...", flush=True)
    load = os.getloadavg()[0]  # before this process adds to it
    costs = cost.measure(groups, options.allow_targets)
    judgements = judge.judge(groups, baseline)
    summary = judge.summary(groups, judgements, baseline)
    rows = [
        _row(group, judgement, price, costs[0])
        for group, judgement, price in zip(groups, judgements, costs, strict=True)
    ]
    curve_of, curves = charts.curves(groups, judgements, baseline)
    template = page_template("comparison.html.j2", Path(__file__).parent / "comparison")
    page = template.render(
        folder=" and ".join(map(str, options.runs)),
        summary=summary,
        unseen=judge.smallest_visible(judgements),
        level=judge.LEVEL,
        baseline=baseline,
        rows=rows,
        options=list(groups[0].options),
        metrics=METRICS,
        signs=charts.SIGNS,
        charts={
            "ap": charts.ap_chart(groups, judgements, baseline),
            "curves": curves,
            "cost": charts.cost_chart(groups, judgements, costs),
        },
        curve_of=curve_of,
        sizes=sorted({f"{price.pixels} x {price.pixels}" for price in costs}),
        repeats=costs[0].repeats,
        left_out=left_out,
        machine={"torch": torch.__version__, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "load": load},
        today=date.today(),
    )
    output.write("compare.csv", _csv(rows))
    output.write("compare.html", page.encode())
    print(summary)
    print(f"Written: {output.folder / 'compare.html'} and {output.folder / 'compare.csv'}")


def _row(group: Group, judgement: judge.Judgement, price: cost.Cost, of_baseline: cost.Cost) -> dict[str, Any]:
    """A group's line of the table."""
    spreads = {name: judge.spread(group.values(name)) for name in METRICS}
    return {
        "group": group.label,
        "seeds": len(group.runs),
        **{f"{name}_{kind}": spreads[name][at] for name in METRICS for at, kind in enumerate(("mean", "std"))},
        "difference": judgement.difference,
        "ci_low": judgement.low,
        "ci_high": judgement.high,
        "p_value": judgement.p_value,
        "verdict": judgement.verdict,
        "parameters": price.parameters,
        "added_parameters": price.parameters - of_baseline.parameters,
        "flops": price.flops,
        "latency_ms": price.milliseconds,
        "memory_gb": group.memory(),
        "images_per_second": group.speed(),
        **group.options,
    }


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


if __name__ == "__main__":
    with exit_codes():
        main()
