"""The process that mirrors a run's folder to Weights & Biases, and the only one that imports it.

A job starts it (``mirror.py``); ``python -m mnist.runs.tracking runs/NAME`` sends whatever W&B does
not hold of a complete run. Imports no torch.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from mnist.cli import InputError, exit_codes, read_yaml
from mnist.figures import compose_confusion, compose_grid, model_of_figure
from mnist.runs.metrics import parse_rows
from mnist.runs.mirror import Limits, WandbSettings, messages, one_line, say, send_again
from mnist.runs.reports import SPLITS, headline, lies_in_run, mapped_images, telling_predictions
from mnist.runs.wandb_files import (
    Logs,
    digest,
    is_offline,
    item_of,
    plain_name,
    read_json,
    settle_state,
    write_state,
)
from mnist.system import StopRequest, give_way, sha256

if TYPE_CHECKING:
    import wandb

_TABLE_ROWS = 200
_NICE = 5  # cannot be taken back: at 19, all was lost where something kept all cores busy
# All that a session imports, wandb.init alone for 0.4 s: done while the job imports torch, and not
# while it waits.
_IMPORTS = ("wandb", "wandb.sdk.launch", "requests", "PIL.PngImagePlugin")
_SAYS_LOST = "Fatal error while uploading data"  # in what W&B prints; finish() says nothing


class _Session:
    """One connection of W&B's client, opened when there is something to send.

    What it holds for certain is in ``wandb/run.json``; that decides which run this is. For one that
    W&B does not have yet, an agent of a sweep may have decided it, in the environment.
    """

    def __init__(
        self, folder: Path, settings: WandbSettings, limits: Limits, adopts: bool, out: IO[str]
    ) -> None:
        import wandb

        self.wandb, self.limits, self.out = wandb, limits, out
        self.folder = folder
        self.state, self.notes = settle_state(folder, settings.project, settings.entity, adopts)
        self.logs = Logs(folder, self.run_id, wandb.util.get_core_path())

        self.settings = settings
        self.warning: str | None = None
        wanted, mode = settings.mode, os.environ.pop("WANDB_MODE", None)
        if wanted == "auto" and mode in ("offline", "dryrun"):
            wanted = "offline"
        self.mode = "offline" if wanted == "offline" else "online"
        # Without a key, auto is offline as a matter of course.
        told = mode in ("online", "run")
        self.excused = "No API key" if wanted == "auto" and not told else None
        self.run: wandb.Run | None = None
        self.held = -1  # the last step that W&B has
        self.offset = 0  # into metrics.jsonl
        self.grids: dict[int, tuple[NDArray[Any], ...]] = {}
        self.items: list[str] = []
        self.lost: list[str] = []

    @property
    def run_id(self) -> str:
        """By which W&B knows the run."""
        assert self.state.id is not None
        return self.state.id

    def say(self, **facts: Any) -> None:
        say(self.out, **facts)

    def _say_where(self, directory: Path, url: str | None = None) -> None:
        # How much arrived of what was sent online and never confirmed is not known offline.
        unsure = [log for log in self.logs.unsynced() if not is_offline(log)]
        exact = all(self.logs.last_step(log) < 0 for log in unsure)
        self.say(mode=self.mode, directory=directory.name, url=url, exact=exact)

    def connect(self) -> "wandb.Run":
        """The run, open; online if that is wanted and works.

        A step that the server holds is never sent again; offline, one that any local log holds.
        """
        if self.run is not None:
            return self.run
        earlier = self.logs.all()
        self.logs.set_empty_aside()
        if self.mode == "online":
            try:
                self.run = self._init("online")
                self.held = self.run.starting_step - 1
            except Exception as error:
                self.mode = "offline"
                if not (self.excused and self.excused in str(error)):
                    self.warning = one_line(error)
                self.wandb.teardown()
        if self.run is None:
            self.run = self._init("offline")
            self.held = max(map(self.logs.last_step, earlier), default=-1)
            if summary := self.logs.summary(earlier):
                self.run.summary.update(summary)
        url = self.run.url if self.mode == "online" else None
        self._say_where(Path(self.run.dir).parent, url)
        for axis in ("step", "images", "epoch", "seconds"):
            self.run.define_metric(axis, hidden=True)
        self.run.define_metric("*", step_metric="step")
        return self.run

    def _init(self, mode: Literal["online", "offline"]) -> "wandb.Run":
        # A folder's name may be no text, and longer than W&B takes.
        name = self.folder.resolve().name.encode(errors="replace").decode()[:128]
        return self.wandb.init(
            id=self.run_id,
            project=self.state.project,
            entity=self.state.entity,
            name=os.getenv("WANDB_NAME") or name,
            group=self.settings.group,
            tags=self.settings.tags or None,
            config=self._config(),
            dir=self.folder,
            mode=mode,
            resume="allow",
            settings=self.wandb.Settings(
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_save_requirements=False,
                init_timeout=self.limits.init,
                finish_timeout=self.limits.finish,
                finish_timeout_raises=True,
                x_transaction_log_flush_interval=self.limits.flush,
                x_file_stream_transmit_interval=self.limits.transmit,
                x_stats_pid=os.getppid(),
                sweep_id=self.state.sweep,
            ),
        )

    def _config(self) -> dict[str, Any]:
        """The run's settings and environment; without those that cannot be read."""
        path = self.folder / "config.yaml"
        config: dict[str, Any] = {}
        try:
            found = read_yaml(path)
            if not isinstance(found, dict):
                raise InputError(f"{path} is damaged")
            config = json.loads(json.dumps(found, default=str))
        except (OSError, ValueError, RecursionError) as error:
            why = f"lacks the settings of this run: {one_line(error)}"
            if why not in self.notes:
                self.notes.append(why)
        return config | {"environment": read_json(self.folder / "environment.json")}

    def _has(self, item: str) -> bool:
        """Whether something was sent before, to where this session sends."""
        sent = self.state.sent.get(item)
        return sent == "online" or (
            bool(sent) and (self.mode == "offline" or not self.logs.unsynced())
        )

    def rows(self, length: int) -> None:
        if self._has("finished"):
            return
        run = self.connect()
        if length <= self.offset:
            return
        with (self.folder / "metrics.jsonl").open("rb") as file:
            file.seek(self.offset)
            rows = parse_rows(file.read(length - self.offset), {"step"})
        for row in rows:
            step = row["step"]
            grid = self.grids.pop(step, None)
            if step <= self.held:
                continue
            if grid:
                picture, wrong = compose_grid(*grid), int((grid[1] != grid[2]).sum())
                caption = f"step {step:,}: {wrong} of {len(grid[1])} wrong"
                row["validation/predictions"] = self.wandb.Image(picture, caption=caption)
            run.log(row, step=step, commit=True)
            self.held = step
        self.offset = length

    def grid(self, step: int, *grid: NDArray[Any]) -> None:
        self.grids[step] = grid

    def evaluated(self, split: str, folder: Path) -> None:
        report = json.loads((folder / "report.json").read_text())
        item = item_of(split, report)
        if self._has(item):
            return
        if split not in SPLITS and not lies_in_run(folder, self.folder):
            # Elsewhere, reports on several folders of one name have this name.
            split += f"-{digest(report['data']['images'])[:6]}"
        split = plain_name(split, 64)
        run, Image = self.connect(), self.wandb.Image
        named = {f"{split}/{name}": value for name, value in headline(report).items()}
        run.summary.update(named)
        pictures = mapped_images(Path(report["data"]["images"]))
        shown: dict[str, Any] = {}
        if report["confusion_matrix"]:
            confusion = np.array(report["confusion_matrix"])
            picture, caption = compose_confusion(confusion), "labels down, predictions across"
            shown[f"{split}/confusion_matrix"] = Image(picture, caption=caption)
        if report["mistakes"] and pictures is not None:
            mistakes = report["mistakes"]
            columns = ("label", "prediction", "confidence")
            values = [np.array([mistake[key] for mistake in mistakes]) for key in columns]
            images = pictures[[mistake["index"] for mistake in mistakes]]
            caption = f"the {len(mistakes)} most confident mistakes"
            shown[f"{split}/mistakes"] = Image(compose_grid(images, *values), caption=caption)
        self._log_last(shown)
        artifact = self.wandb.Artifact(plain_name(f"{split}-{self.run_id}"), type="evaluation")
        for name in ("report.json", "predictions.csv"):
            artifact.add_file(str(folder / name))
        run.log_artifact(artifact)
        table = self._table(folder / "predictions.csv", pictures)
        self._log_last({f"{split}/predictions": table})
        self.items.append(item)

    def _table(self, predictions: Path, pictures: NDArray[np.uint8] | None) -> "wandb.Table":
        """The most telling predictions, with their images where these are known."""
        from PIL import Image

        columns = ["index", "label", "prediction", "confidence"]
        table = self.wandb.Table(columns=["image", *columns])
        for row in telling_predictions(predictions, _TABLE_ROWS):
            image = None
            if pictures is not None:
                image = self.wandb.Image(Image.fromarray(255 - pictures[int(row["index"])]))
            label = int(row["label"]) if row["label"] else None
            prediction = int(row["prediction"]) if row["prediction"] else None
            confidence = float(row["confidence"]) if row["confidence"] else None
            table.add_data(image, int(row["index"]), label, prediction, confidence)
        return table

    def _log_last(self, shown: dict[str, Any]) -> None:
        """Show something at the last row's step, apart from the rows."""
        rows = parse_rows((self.folder / "metrics.jsonl").read_bytes(), {"step"})
        self.connect().log({"step": rows[-1]["step"] if rows else 0, **shown})

    def readings(self, folder: Path, pictures: bool) -> None:
        report = json.loads((folder / "readings.json").read_bytes())
        item = item_of(f"readings {report['subject']} {pictures}", report)
        if self._has(item):
            return
        name = f"readings/{plain_name(folder.name, 64)}"
        named = {f"{name}/{key}": value for key, value in headline(report).items()}
        self.connect().summary.update(named)
        if pictures:
            self._log_last({f"{name}/page": self.wandb.Html(str(folder / "readings.html"))})
        self.items.append(item)

    def finished(self) -> None:
        if self._has("finished"):
            return
        run = self.connect()
        figure = self.folder / "figures/loss_curves.png"  # drawn by another process
        model = sha256(self.folder / "model.safetensors")
        until = time.monotonic() + self.limits.figures
        while model_of_figure(figure) != model and time.monotonic() < until:
            time.sleep(0.05)
        if model_of_figure(figure) in (model, ""):
            self._log_last({"figures/loss_curves": self.wandb.Image(str(figure))})
        artifact = self.wandb.Artifact(plain_name(f"model-{self.run_id}"), type="model")
        artifact.add_file(str(self.folder / "model.safetensors"))
        run.log_artifact(artifact)
        self.items.append("finished")

    def close(self) -> None:
        """Send what is left, and record what W&B now holds."""
        if self.run is None:
            offline = list(filter(is_offline, self.logs.unsynced()))
            if offline:
                self.mode = "offline"
                self._say_where(offline[-1].parent)
        else:
            complete = (self.folder / "model.safetensors").exists()
            if not complete:
                self.run.mark_preempting()
            try:
                self.run.finish(exit_code=int(not complete))
            except Exception as error:
                self.lost.append(one_line(error))
            if _SAYS_LOST in (self.folder / "wandb/mirror.log").read_text(errors="replace"):
                self.lost.append("the server refused it")
            if not self.lost:
                self.state.sent.update(dict.fromkeys(self.items, self.mode))
                write_state(self.folder, self.state)
                if self.mode == "online" and set(self.state.sent.values()) <= {"online"}:
                    self.logs.mark_synced(self.held)
        note = "; ".join(self.notes)
        self.say(done=True, warning=self.warning, lost="; ".join(self.lost), note=note)


def _log_failure() -> None:
    with contextlib.suppress(OSError):  # the disk that the log is on may be full
        traceback.print_exc()


def _mirror() -> None:
    for stop in StopRequest.SIGNALS:  # they are for the job, which then ends this
        signal.signal(stop, signal.SIG_IGN)
    os.nice(_NICE)
    give_way(19)
    # Nothing of W&B's can ask on this process's input, or be taken for what this process says.
    trained = threading.Event()
    inbox = messages(os.fdopen(os.dup(0), "rb"), trained)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    gc.disable()  # as in exit_codes
    with contextlib.suppress(Exception):  # said when it is used
        for name in _IMPORTS:
            importlib.import_module(name)
    gc.freeze()
    gc.enable()

    first = next(inbox, None)
    if first is None:  # the job has ended without a run
        return
    folder, settings, limits, adopts = first
    home = folder / "wandb"
    try:
        home.mkdir(parents=True, exist_ok=True)
        how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        log = os.open(home / "mirror.log", how, 0o666)
    except FileExistsError:
        return say(out, blocked=f"{home} is not a folder", done=True)
    except OSError as error:
        return say(out, blocked=f"{error.filename} cannot be written ({error.strerror})", done=True)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in ("data", "cache", "artifact"):
        os.environ[f"WANDB_{name.upper()}_DIR"] = str(home.resolve() / name)
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    os.environ.pop("WANDB_SILENT", None)  # see _SAYS_LOST; all that is printed goes to a file
    try:
        session = _Session(folder, settings, limits, adopts, out)
        with contextlib.suppress(Exception):  # said when it is used
            session.wandb.setup()  # starts W&B's service: 0.2 s of wandb.init
        trained.wait(limits.patience)
        if not (folder / "model.safetensors").exists():  # rows will come
            session.connect()
        for name, *arguments in inbox:
            try:
                getattr(session, name)(*arguments)
            except Exception as error:
                _log_failure()
                session.lost.append(one_line(error))
        session.close()
    except Exception as error:
        _log_failure()
        if isinstance(error, OSError):  # of the file system: W&B's client raises its own
            say(out, blocked=f"{home}: {error.strerror or one_line(error)}", done=True)
        else:
            say(out, lost=one_line(error), done=True)


def main() -> None:
    """With a run's folder, send what W&B does not hold of it; else be the mirror of a job."""
    if len(sys.argv) > 1:
        with exit_codes("mnist.runs.tracking"):
            send_again(Path(sys.argv[1]))
    try:
        _mirror()
    except Exception:
        _log_failure()
        os._exit(1)
    os._exit(0)  # W&B's own teardown would wait for a server that has gone


if __name__ == "__main__":
    # As part of the package, so that what arrives and what it is compared with are of one class.
    from mnist.runs.tracking import main as main_of_package

    main_of_package()
