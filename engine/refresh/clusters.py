"""The shard function on engines people already run: Ray actors, Spark tasks.

The work is not dealt out by the engine: every actor and task takes units from the store's leases like a process of one
machine, so units do not depend on the engine's layout, and those of a dead one are taken over. The paths must be
readable, and the store's writable, from every machine of the cluster; for a store on S3, each needs the AWS variables.
"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pyarrow as pa

from alure.engine.errors import AlureError, InputError
from alure.engine.progress import say
from alure.engine.refresh.embedder import Work
from alure.engine.refresh.shard import Job, run_shard

SPARK_TYPES = {int: "long", float: "double"}
WORK_SCHEMA = ", ".join(f"{field.name} {SPARK_TYPES[field.type]}" for field in fields(Work))  # type: ignore[index]


def run_on_ray(job: Job, workers: int, check: Callable[[], None]) -> Work:
    """As many actors, each with a GPU where the cluster has GPUs, on the cluster that `ray.init()` finds or starts."""
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError('--engine ray: needs Ray; install it (pip install "alure[ray]")') from None
    if not ray.is_initialized():
        ray.init()
    on_gpus = ray.cluster_resources().get("GPU", 0) >= workers

    class Worker:
        def work(self) -> Work:
            return run_shard(job, "cuda" if on_gpus else "cpu")

    actor: Any = ray.remote(num_cpus=1, num_gpus=1 if on_gpus else 0)(Worker)
    actors = [actor.remote() for _ in range(workers)]
    waiting, done, died = [actor.work.remote() for actor in actors], Work(), 0
    while waiting:
        ready, waiting = ray.wait(waiting, timeout=1.0)
        check()
        for found in ready:
            try:
                done.add(ray.get(found))
            except ray.exceptions.RayActorError:
                died += 1
                say("refresh: a Ray actor died; the others take its unit over")
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, AlureError) else AlureError(f"refresh: {error}") from None
    if died == workers:
        raise AlureError(f"refresh: all {workers} Ray actors died; finished units are kept, run the same command again")
    return done


def run_on_spark(job: Job, workers: int) -> Work:
    """As many tasks of `mapInArrow` on the active Spark session, or a local one; Spark runs a failed task again."""
    try:
        from pyspark.sql import SparkSession
    except ModuleNotFoundError:
        raise InputError('--engine spark: needs Spark; install it (pip install "alure[spark]")') from None
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else Spark takes the first python3 of the path
    spark = SparkSession.builder.appName("alure refresh").getOrCreate()

    def shard(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            yield pa.RecordBatch.from_pylist([vars(run_shard(job, "cpu"))])

    tasks = spark.range(workers, numPartitions=workers)
    done = Work()
    for row in tasks.mapInArrow(shard, WORK_SCHEMA).collect():
        done.add(Work(**row.asDict()))
    return done
