"""Sweeps: several jobs by one command."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

from detr.cli.exit_codes import FAILED, USER_ERROR, release, report
from detr.config import JobCallback, take_failure

logger = logging.getLogger(__name__)


class Sweep(JobCallback):
    """Lets the other jobs of a sweep run where one fails, and names those that failed at its end.

    Jobs may run in processes or on machines of their own: .failed.jsonl, in the folder of the sweep, collects them.
    """

    def on_multirun_start(self, config: Any, **more: Any) -> None:
        _record(config).unlink(missing_ok=True)

    def on_job_end(self, config: Any, job_return: Any, **more: Any) -> None:
        if config.hydra.mode.name != "MULTIRUN" or (error := take_failure(job_return)) is None:
            return
        row = {
            "job": config.hydra.job.num,
            "overrides": list(config.hydra.overrides.task),
            "error": str(error).partition("\n")[0],
            "code": report(error),
        }
        with _record(config).open("a") as file:
            file.write(json.dumps(row) + "\n")
        release(error)

    def on_multirun_end(self, config: Any, **more: Any) -> None:
        if not _record(config).exists():
            return
        rows = [json.loads(line) for line in _record(config).read_text().splitlines()]
        common = list(config.hydra.overrides.task)
        own = [" ".join(option for option in row["overrides"] if option not in common) for row in rows]
        failed = "\n".join(f"  job {row['job']}, {text}: {row['error']}" for row, text in zip(rows, own, strict=True))
        logger.error("%d of the sweep's jobs failed; the others ran:\n%s", len(rows), failed)
        sys.exit(FAILED if any(row["code"] == FAILED for row in rows) else USER_ERROR)


def _record(config: Any) -> Path:
    return Path(config.hydra.sweep.dir) / ".failed.jsonl"
