"""Experiment trackers: Weights & Biases, MLflow, trackio. Each is a sink; its package is an extra of the same name.

They get the scalars and pictures of TensorBoard, under the same names and at the same steps, and the configuration. A
training that goes on goes on in the same run of the tracker, whose id is kept in the run's folder. Trackers cannot take
points back. So the points between the checkpoint and a kill stay as they were sent, and their repetition, which is the
same, is not sent again; what a tracker had not stored yet when a process was killed is missing there.
"""

import contextlib
import io
import json
import logging
import os
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import yaml
from PIL import Image

from detr.contents import check_content, flat, mapping, record, text, whole
from detr.errors import UserError
from detr.files import read_regular
from detr.reporting.sinks import shrunk

logger = logging.getLogger(__name__)
_MEMORY = record(run=text, steps=mapping(whole()))
_MOST = 2**16  # bytes of what is kept of a run
_PATIENCE = 300  # seconds that a training waits at its end for what is still to be sent


class Tracker(ABC):
    """What the trackers share. package: the extra that brings it. remedy: what to do where it cannot begin a run."""

    package: str
    remedy: str

    def start(self, run_dir: Path, step: int, total_steps: int) -> None:
        """Raises UserError where the package is missing or refuses to begin a run."""
        self._file = run_dir / f"{self.package}.json"
        run, self._steps = self._remembered()
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        try:
            self._run = self._begin(run_dir, run, config)
        except ImportError as error:
            raise UserError(
                f"logger.{self.package} needs the package {error.name}. Install it with pip install "
                f"'detr-framework[{self.package}]'."
            ) from error
        except Exception as error:
            again = f" If its run is gone, remove {self._file} to begin another one." if run else ""
            raise UserError(
                f"logger.{self.package}: no run can be begun: {_first_line(error)}. {self.remedy}{again}"
            ) from error
        self._remember()

    def advance(self, losses: Mapping[str, float]) -> None: ...  # noqa: B027 - they need no single steps

    def scalars(self, step: int, values: Mapping[str, float], group: str) -> None:
        self._send(step, group, lambda: self._scalars(step, {f"{group}/{name}": one for name, one in values.items()}))

    def pictures(self, step: int, pictures: Sequence[Image.Image]) -> None:
        named = {f"val/{index}": shrunk(picture) for index, picture in enumerate(pictures)}
        self._send(step, "pictures", lambda: self._pictures(step, named))

    def close(self) -> None:
        with _as_os_error(self.package):
            self._end(failed=sys.exc_info()[0] is not None)

    @abstractmethod
    def _begin(self, run_dir: Path, run: str | None, config: Mapping[str, Any]) -> str:
        """Begin a run, or go on with the one of this id; returns its id."""

    @abstractmethod
    def _scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    @abstractmethod
    def _pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None: ...

    @abstractmethod
    def _end(self, *, failed: bool) -> None: ...

    def _send(self, step: int, kind: str, send: Callable[[], None]) -> None:
        """Once for each step, also after a kill at any moment."""
        if step <= self._steps.get(kind, -1):
            return
        self._steps[kind] = step
        self._remember()
        with _as_os_error(self.package):
            send()

    def _remembered(self) -> tuple[str | None, dict[str, int]]:
        """The run that this training is, if it has begun one, and the last step that was sent of each kind."""
        if not self._file.exists():
            return None, {}
        try:
            content = json.loads(read_regular(self._file, _MOST))
        except ValueError as error:
            raise UserError(f"{self._file} is damaged: {error}. Remove it to begin another run.") from None
        check_content(content, _MEMORY, str(self._file))
        return content["run"], dict(content["steps"])

    def _remember(self) -> None:
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"run": self._run, "steps": self._steps}))
        temporary.replace(self._file)


class WandB(Tracker):
    """Weights & Biases.

    project, entity: where the run is, entity being a user or a team. name: of the run; None: that of the run's folder.
    mode: None: as WANDB_MODE says, or else online. Offline runs are in the folder's wandb/, for `wandb sync`; those of
    a training that went on have one id, and go into one run with `wandb sync --append`.
    """

    package = "wandb"
    remedy = "Log in with `wandb login`, or set logger.wandb.mode=offline and send the run later with `wandb sync`."

    def __init__(
        self,
        *,
        project: str = "detr",
        entity: str | None = None,
        name: str | None = None,
        mode: Literal["online", "offline"] | None = None,
    ) -> None:
        self._project, self._entity, self._name, self._mode = project, entity, name, mode

    def _begin(self, run_dir: Path, run: str | None, config: Mapping[str, Any]) -> str:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its errors need not go anywhere
        import wandb

        self._api = wandb
        self._current = wandb.init(
            project=self._project,
            entity=self._entity,
            name=self._name or run_dir.name,
            mode=self._mode,
            id=run,
            resume="allow",
            dir=run_dir,
            config=dict(config),
            allow_val_change=True,  # a training may go on with other options
            settings=wandb.Settings(
                console="off", silent=True, disable_code=True, disable_git=True, finish_timeout=_PATIENCE
            ),
        )
        place = run_dir / "wandb" if self._current.offline else self._current.url
        logger.info("Weights & Biases: run %s is in %s.", self._current.id, place)
        return self._current.id

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._current.log(dict(values), step=step)

    def _pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        images = {name: self._api.Image(picture, file_type="jpg") for name, picture in pictures.items()}
        self._current.log(images, step=step)

    def _end(self, *, failed: bool) -> None:
        self._current.finish(exit_code=int(failed))


class MLflow(Tracker):
    """MLflow.

    experiment: which the run is part of. name: of the run; None: that of the run's folder.
    tracking_uri: a server or a store; None: MLFLOW_TRACKING_URI, or else mlruns/ in the run's folder, which
    `MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri RUN/mlruns` shows.

    Metrics have a dot for each slash but the first of TensorBoard's names, such as train/grad_norm.encoder: a store of
    files has no metric inside of another.
    """

    package = "mlflow"
    remedy = "Check logger.mlflow.tracking_uri, or leave it out to log to the run's folder."

    def __init__(self, *, experiment: str = "detr", name: str | None = None, tracking_uri: str | None = None) -> None:
        self._experiment, self._name, self._uri = experiment, name, tracking_uri

    def _begin(self, run_dir: Path, run: str | None, config: Mapping[str, Any]) -> str:
        # No telemetry; stores of files, which are asked for; and a server that is gone is soon given up.
        wanted = {"DISABLE_TELEMETRY": "true", "ALLOW_FILE_STORE": "true", "HTTP_REQUEST_MAX_RETRIES": "2"}
        for name, value in wanted.items():
            os.environ.setdefault(f"MLFLOW_{name}", value)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        uri = self._uri or os.environ.get("MLFLOW_TRACKING_URI") or (run_dir / "mlruns").absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        if run is None:
            known = self._client.get_experiment_by_name(self._experiment)
            experiment = known.experiment_id if known else self._client.create_experiment(self._experiment)
            run = self._client.create_run(experiment, run_name=self._name or run_dir.name).info.run_id
            options = [Param(name[:250], value[:500]) for name, value in flat(config)]
            for start in range(0, len(options), 100):  # which is as many as a call takes
                self._client.log_batch(run, params=options[start : start + 100])
        else:
            self._client.update_run(run, status="RUNNING")
        self._client.log_text(run, (run_dir / "config.yaml").read_text(), "config.yaml")
        logger.info("MLflow: run %s is in %s.", run, uri)
        return run

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        allowed = {_metric_name(name): value for name, value in values.items()}
        self._client.log_batch(
            self._run, metrics=[self._metric(name, float(value), now, step) for name, value in allowed.items()]
        )

    def _pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        for name, picture in pictures.items():
            self._client.log_image(self._run, picture, artifact_file=f"{name}/step_{step}.jpg")

    def _end(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class Trackio(Tracker):
    """trackio, whose local store `trackio show` shows. Where a token of Hugging Face is stored, it looks up its user.

    project: where the run is. name: of the run; None: that of the run's folder, made unique.
    space_id: a Space of Hugging Face to log to; None: TRACKIO_SPACE_ID, or else the local store (TRACKIO_DIR).
    """

    package = "trackio"
    remedy = "Check logger.trackio.space_id and `hf auth login`, or leave it out to log to the local store."

    def __init__(self, *, project: str = "detr", name: str | None = None, space_id: str | None = None) -> None:
        self._project, self._name, self._space = project, name, space_id

    def _begin(self, run_dir: Path, run: str | None, config: Mapping[str, Any]) -> str:
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "false")
        import trackio

        self._api = trackio
        name = run or f"{self._name or run_dir.name}-{uuid4().hex[:6]}"  # a run is found again by its name
        with contextlib.redirect_stdout(io.StringIO()):
            self._current = trackio.init(
                self._project,
                name=name,
                space_id=self._space,
                config=dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        logger.info("trackio: run %s; `trackio show --project %s` shows it.", name, self._project)
        return name

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._current.log(dict(values), step=step)

    def _pictures(self, step: int, pictures: Mapping[str, Image.Image]) -> None:
        self._current.log({name: self._api.Image(picture) for name, picture in pictures.items()}, step=step)

    def _end(self, *, failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._api.finish()


@contextlib.contextmanager
def _as_os_error(package: str) -> Iterator[None]:
    """Whatever a tracker raises, as the error that a sink may raise."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a training must not end by its log
        raise OSError(f"{package}: {_first_line(error)}") from None


def _metric_name(name: str) -> str:
    """As MLflow takes it."""
    group, _, rest = name.partition("/")
    return re.sub(r"[^\w\-. :/]", "_", f"{group}/{rest.replace('/', '.')}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
