"""The nightly refresh as a step of a Spark job: two tasks share it, then Spark SQL reads what was published.

    python examples/refresh_on_spark.py MODEL EVENTS STORE

On a cluster the three paths are on a disk that every machine sees. With the package delta-spark Spark reads the table
STORE/embeddings by itself; here it is handed the generation as Arrow.
"""

import os
import sys

from pyspark.sql import SparkSession

from alure.engine import EmbeddingStore, RefreshJob


def main(model: str, events: str, store: str) -> None:
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    spark = SparkSession.builder.master("local[2,3]").config("spark.ui.enabled", "false").getOrCreate()
    report = RefreshJob(model, events, store, workers=2, engine="spark").run()
    rows = EmbeddingStore(store).read_embeddings(report.generation)
    spark.createDataFrame(rows).createOrReplaceTempView("embeddings")
    found = spark.sql("SELECT country, count(*) AS users FROM embeddings GROUP BY country ORDER BY country").collect()
    print(f"{report.generation}: {rows.num_rows} users, by country { {row.country: row.users for row in found} }")
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
