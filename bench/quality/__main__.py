"""Runs experiments that have no row yet, and writes the quality page from the rows."""

import argparse
import sys
from pathlib import Path

from alure.bench.quality import ablations, freshness, ml_1m, new_friends, scaling, similar_users, table1, table2
from alure.bench.quality.results import Results
from alure.engine.errors import AlureError

EXPERIMENTS = {
    module.EXPERIMENT: module
    for module in (table1, table2, ablations, scaling, freshness, ml_1m, similar_users, new_friends)
}
NEED_DATA = {module.EXPERIMENT for module in (ml_1m, similar_users, new_friends)}  # the others have the synthetic world
INTRODUCTION = """# How good the embeddings are

Every figure on this page was measured; `make tables DATA=…` runs what has no result yet and writes the page again from
`bench/results/quality/`. Settings are chosen on validation data; the rows keep the test figures of the others too.
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m alure.bench.quality",
        description="Measure the quality of the embeddings. Example: python -m alure.bench.quality ml-1m --data DIR",
    )
    parser.add_argument("experiment", choices=[*EXPERIMENTS, "all", "page"], help="page: only write it, from the rows")
    parser.add_argument("--data", type=Path, help="folder with the data sets, such as DIR/ml-1m/events.parquet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path("bench/results/quality"), help="folder of the rows")
    parser.add_argument("--page", type=Path, default=Path("docs/quality.md"))
    options = parser.parse_args()
    chosen = [] if options.experiment == "page" else list(EXPERIMENTS)
    chosen = [options.experiment] if options.experiment in EXPERIMENTS else chosen
    if options.data is None and NEED_DATA & set(chosen):
        if options.experiment != "all":
            print("quality: --data is missing: the folder with the data sets", file=sys.stderr)
            return 2
        print(f"quality: left out for want of --data: {', '.join(sorted(NEED_DATA))}", file=sys.stderr)
        chosen = [name for name in chosen if name not in NEED_DATA]
    try:
        for name in chosen:
            EXPERIMENTS[name].run(options.data, Results(options.results, name), tuple(options.seeds))
    except AlureError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    sections = [module.section(Results(options.results, name)) for name, module in EXPERIMENTS.items()]
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text("\n".join([INTRODUCTION, *sections]))
    scaling.draw(Results(options.results, scaling.EXPERIMENT), options.page.parent / scaling.FIGURE)
    print(f"quality: wrote {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
