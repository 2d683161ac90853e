"""The training loop: data in, one DenseCL step after another, log lines and checkpoints out."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import sys
from pathlib import Path

import numpy as np
import paddle
from tqdm import tqdm

import ppdensecl
from ppdensecl import parallel
from ppdensecl.config import Config, build_config
from ppdensecl.data.loader import PairLoader
from ppdensecl.data.transforms import Augmentation
from ppdensecl.engine import checkpoint, device, run_folder
from ppdensecl.engine.building import build_model, build_source, check
from ppdensecl.engine.logging import LOGGER, LossSums, Meter, Scalars, format_line
from ppdensecl.engine.optimisation import build_optimizer, lasting_names, learning_rate, own_names
from ppdensecl.engine.stopping import StopRequest
from ppdensecl.errors import UserError
from ppdensecl.evaluation import correspondence
from ppdensecl.machine import to_device
from ppdensecl.visual.views import pair_sheet


def _code():
    """A digest of this library's sources: the same version number can be two states of a clone."""
    digest = hashlib.sha256()
    for path in sorted(Path(ppdensecl.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{ppdensecl.__version__} ({digest.hexdigest()[:12]})"


class Trainer:
    """One run, in the folder config.output_dir.

    Args:
        config: the whole run.
        resume: None, "auto" (the newest whole checkpoint of the folder; from the beginning where it has none yet) or a
            checkpoint's path.
        overwrite: delete the checkpoints of an earlier run in the folder instead of refusing.
    """

    def __init__(self, config: Config, resume=None, overwrite=False):
        self.config = config
        self.folder = Path(config.output_dir)
        self.loader, self.resumed = None, "nothing"
        where = device.select(config.device)
        parallel.start()
        try:
            with parallel.together(self._facts):
                self._prepare(where, resume, overwrite)
            with parallel.together():  # once all ranks can begin: an earlier run's checkpoints go
                if parallel.is_main():
                    run_folder.begin(self.folder, self.config, overwrite)
            self.wrapped, self.stepper = parallel.wrap(self.model, self.optimizer)
        except BaseException:
            if self.loader:
                self.loader.close()
            raise
        LOGGER.info(self.about)
        LOGGER.info(f"{len(self.loader.source)} pictures ({config.data.source}), {self.iters_per_epoch} iterations an epoch, "
                    f"{self.iterations} in all, {self._batch()} pictures in each")
        if config.model.loss_lambda == 1 and not config.model.lambda_warmup_iters:
            LOGGER.warning("model.loss_lambda is 1 without model.lambda_warmup_iters: the matches of an untrained backbone "
                           "are poor, and nothing else is learned; expect it to diverge or to stay random")

    def _prepare(self, where, resume, overwrite):
        """All that this process may find wrong on its own."""
        config = self.config
        if parallel.is_main():
            self.lock = run_folder.take(self.folder, resume, overwrite)
        workers = device.workers(where) if config.data.workers is None else config.data.workers
        check(config, where)
        source = build_source(config)
        batches = len(source) // (config.data.batch_size * parallel.world_size())
        self.iters_per_epoch = batches // config.optim.accumulate
        if batches and not self.iters_per_epoch:
            raise UserError(f"'optim.accumulate' is {config.optim.accumulate}, but an epoch has only {batches} batches; "
                            "use a smaller one")
        self.iterations = min(config.optim.epochs * self.iters_per_epoch, config.optim.max_iters or sys.maxsize)
        self.model = build_model(config)
        self.model.encoder_q.backbone.recompute = config.optim.recompute
        if config.optim.amp != "off":
            self.model.autocast = {"dtype": config.optim.amp, "level": config.optim.amp_level}
        if config.optim.to_static:
            for encoder in (self.model.encoder_q, self.model.encoder_k):
                paddle.jit.to_static(encoder.backbone, full_graph=True)
        self.optimizer = build_optimizer(config.optim, self.model)
        self.scaler = paddle.amp.GradScaler(init_loss_scaling=2.0**14) if config.optim.amp == "float16" else None
        # Last of what can fail: it starts the worker processes.
        self.loader = PairLoader(
            source, Augmentation(size=config.data.size), config.data.batch_size, config.seed, workers,
            parallel.rank(), parallel.world_size(), config.data.max_bad_fraction, self._warn_of_bad_picture)
        self.about = (f"ppdensecl {ppdensecl.__version__}, paddlepaddle {paddle.__version__}, device {where}, "
                      f"{parallel.world_size()} process(es), {device.threads()} CPU thread(s) and {workers} data worker(s) each")
        self.iteration = 0  # optimizer steps done
        if resume:
            self._resume(resume)

    def _facts(self):
        """What has to be the same on all ranks, {what: as text}. Paths, workers and logs may differ between machines."""
        shared = {"seed": self.config.seed, **{
            f"{section}.{key}": value for section in ("model", "optim", "data")
            for key, value in getattr(self.config, section).model_dump().items()
            if f"{section}.{key}" not in ("data.root", "data.list_file", "data.annotation", "data.workers")}}
        return {"version of ppdensecl": _code(), "version of paddlepaddle": paddle.__version__,
                **{f"'{key}'": str(value) for key, value in shared.items()},
                "number of pictures": str(len(self.loader.source)), "set of pictures": self.loader.source.fingerprint(),
                "checkpoint to resume from": self.resumed}

    def _warn_of_bad_picture(self, name, reason, count):
        LOGGER.warning(f"cannot decode {name} ({reason}); another picture stands in for it ({count} so far)")

    def _resume(self, resume):
        if resume == "auto":
            if not checkpoint.exists(self.folder):
                # The same command restarts a run whenever it ended, be it before its first checkpoint.
                LOGGER.warning(f"--resume: {self.folder} holds no checkpoint yet; starting from the beginning")
                return
            path, states, notes = checkpoint.newest(self.folder)
            for note in notes:
                LOGGER.warning(note)
        else:
            path, states = resume, checkpoint.verify(resume)
        saved = build_config(states["config"], name=f"{path}.pdstates")
        if None in (saved.model.hidden_dim, self.config.model.hidden_dim):  # the backbone's width: the weights' shapes decide
            same = saved.model.model_copy(update={"hidden_dim": self.config.model.hidden_dim})
            saved = saved.model_copy(update={"model": same})
        for section in ("model", "seed"):
            if getattr(saved, section) != getattr(self.config, section):
                raise UserError(f"{path} was trained with another '{section}' ({_difference(saved, self.config, section)}); "
                                "resume with the same one, or start a new run in another output_dir")
        checkpoint.set_weights(self.model, checkpoint.load_weights(path), path)
        self.optimizer.set_state_dict(own_names(self.model, checkpoint.load_optimizer(path)))
        if self.scaler and states["scaler"]:
            self.scaler.load_state_dict(states["scaler"])
        # A converted checkpoint knows neither the pictures nor, at times, how many iterations an epoch had: then None.
        if states["pictures"] not in (None, self.loader.source.fingerprint()):
            LOGGER.warning("the pictures are not those that the run had before; it goes on, but not as if never stopped")
        self.iteration, self.resumed = states["iteration"], f"iteration {states['iteration']}, {states['checksum']}"
        if states["world_size"] not in (None, parallel.world_size()):
            LOGGER.warning(f"the run had {states['world_size']} process(es), now it has {parallel.world_size()}: BatchNorm's "
                           f"statistics are those of {self.config.data.batch_size} pictures each, and shuffled between others")
        if states["iters_per_epoch"] not in (None, self.iters_per_epoch):  # another batch size, or another amount of data
            self.iteration = round(states["iteration"] / states["iters_per_epoch"] * self.iters_per_epoch)
            LOGGER.warning(f"an epoch has {self.iters_per_epoch} iterations now, {states['iters_per_epoch']} before: "
                           f"going on at the same part of the run, iteration {self.iteration}")
        LOGGER.info(f"resumed from {path} at iteration {self.iteration}")

    def _batch(self):
        return self.loader.global_batch * self.config.optim.accumulate

    def fit(self):
        """Trains to the end, or until SIGTERM or SIGINT comes: then writes a checkpoint and returns the signal's number, else 0.

        Raises UserError where the run cannot go on; the last good checkpoint stays.
        """
        with StopRequest() as request:
            return self._fit(request)

    def _fit(self, request):
        config, accumulate = self.config, self.config.optim.accumulate
        main = parallel.is_main()
        scalars = Scalars(self.folder / "vdl" if config.log.visualdl and main else None)
        bar = tqdm(total=self.iterations, initial=self.iteration, unit="it", disable=not (main and sys.stderr.isatty()))
        batches = self.loader.batches(self._batch_numbers())
        meter, losses, first = Meter(), LossSums(), self.iteration
        self.wrapped.train()
        try:
            if first == 0 and self.iterations >= (config.log.correspondence_interval or 0):  # or there is no curve to begin
                self._watch_correspondence(scalars, meter)
            while self.iteration < self.iterations:
                step = self.iteration
                watch = (step + 1) % config.log.interval == 0 or step + 1 == self.iterations or step == first
                lr = learning_rate(config.optim, step, self.iters_per_epoch)
                self.optimizer.set_lr(lr)
                self.model.update_key_encoder()
                outputs = []
                for micro in range(accumulate):
                    views = meter.waiting(batches)
                    if step == first and micro == 0:
                        scalars.add_picture("views", pair_sheet(views), step)
                    outputs.append(self._forward_backward(views, step, watch, last=micro == accumulate - 1))
                    losses.add(outputs[-1])
                self._optimizer_step()
                for output in outputs:
                    self.model.enqueue(output)
                self.iteration = step + 1
                meter.done()
                bar.update()
                if watch:
                    self._log(scalars, losses, outputs[-1], lr, meter)
                    losses = LossSums()
                self._watch_correspondence(scalars, meter)
                saved = self._save_if_due(losses)
                asked = request.agreed() if self.iteration < self.iterations else 0
                if asked:
                    self._stop(asked, saved, losses)
                    return asked
            return 0
        finally:
            bar.close()
            scalars.close()
            self.loader.close()
            if main:
                self.lock.close()

    def _stop(self, asked, saved, losses):
        if not saved:
            self.save(f"iter_{self.iteration}", losses)
        LOGGER.warning(f"stopped by {signal.Signals(asked).name} after iteration {self.iteration} of {self.iterations}, with a "
                       "checkpoint; go on with --resume")

    def _batch_numbers(self):
        """The loader's batches from where the run stands; what fills no whole iteration of an epoch is left out."""
        for iteration in range(self.iteration, self.iterations):
            epoch, position = divmod(iteration, self.iters_per_epoch)
            start = epoch * len(self.loader) + position * self.config.optim.accumulate
            yield from range(start, start + self.config.optim.accumulate)

    def _forward_backward(self, views, step, watch, last):
        # Gradients travel between the processes once per step, with the last of its backward passes.
        quiet = self.wrapped.no_sync() if parallel.world_size() > 1 and not last else contextlib.nullcontext()
        with quiet:
            output = self.wrapped(to_device(views[0]), to_device(views[1]), step=step, watch=watch)
            loss = output.loss / self.config.optim.accumulate
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        return output

    def _optimizer_step(self):
        if self.scaler:
            self.scaler.step(self.stepper)
            self.scaler.update()
        else:
            self.stepper.step()
        self.stepper.clear_grad(set_to_zero=False)

    def _log(self, scalars, losses, output, lr, meter):
        values = {**losses.means(), "lambda": output.loss_lambda,
                  **{name: float(value) for name, value in output.watched.items()}}
        values = dict(zip(values, parallel.mean(list(values.values()))))
        if not np.isfinite(values["loss"]):
            self._not_finite()
        times = meter.line(self._batch(), self.iterations - self.iteration)
        epoch, position = divmod(self.iteration - 1, self.iters_per_epoch)
        LOGGER.info(format_line(epoch + 1, self.config.optim.epochs, position + 1, self.iters_per_epoch, lr, values, times))
        scalars.add({**{f"train/{name}": value for name, value in values.items()}, "train/lr": lr,
                     "time/reader": times["avg_reader_cost"], "time/batch": times["avg_batch_cost"],
                     "time/ips": times["avg_ips"]}, self.iteration)

    def _watch_correspondence(self, scalars, meter):
        """If it is due: do the query backbone's matches find the right place? Nothing that trains is changed by the look."""
        log = self.config.log
        if not log.correspondence_interval or self.iteration % log.correspondence_interval:
            return
        backbone = self.model.encoder_q.backbone
        backbone.eval()
        with meter.aside():
            found = correspondence.matched_share(
                backbone, self.loader.source, correspondence.larger_views(self.config.data.size), self.config.seed + 1,
                log.correspondence_pictures)
        backbone.train()
        LOGGER.info(f"correspondence at iteration {self.iteration}/{self.iterations}: {found.right:.4f}, chance {found.chance:.4f}, "
                    f"own position {found.own:.4f}, where that is wrong {found.elsewhere:.4f}")
        scalars.add({"eval/correspondence": found.right, "eval/correspondence_chance": found.chance,
                     "eval/correspondence_own": found.own, "eval/correspondence_elsewhere": found.elsewhere}, self.iteration)

    def _save_if_due(self, losses):
        """Whether it was."""
        save = self.config.save
        epoch, rest = divmod(self.iteration, self.iters_per_epoch)
        end = self.iteration == self.iterations
        if rest == 0 and (epoch % save.interval_epochs == 0 or end):
            self.save(f"epoch_{epoch}", losses)
        elif end or (save.interval_iters and self.iteration % save.interval_iters == 0):
            self.save(f"iter_{self.iteration}", losses)
        else:
            return False
        return True

    def save(self, name, losses=None):
        """Writes checkpoint `name`, unless a loss since the last log line was not finite. Rank 0 writes, all ranks call it: what
        one of them finds wrong, as a full disk, ends all of them."""
        if losses is not None and parallel.mean([float(losses.finite())]) != [1.0]:
            self._not_finite()
        with parallel.together():
            if parallel.is_main():
                self._write(name)

    def _write(self, name):
        weights = {key: value.numpy() for key, value in self.model.state_dict().items()}
        if not all(np.isfinite(value).all() for value in weights.values()):
            self._not_finite()
        states = {"epoch": self.iteration // self.iters_per_epoch, "iteration": self.iteration,
                  "iters_per_epoch": self.iters_per_epoch, "global_batch": self._batch(),
                  "world_size": parallel.world_size(), "pictures": self.loader.source.fingerprint(),
                  "scaler": self._scaler_state(), "config": self.config.model_dump(),
                  "versions": {"ppdensecl": ppdensecl.__version__, "paddle": paddle.__version__}}
        checkpoint.save(self.folder, name, weights, lasting_names(self.model, self.optimizer.state_dict()), states)
        checkpoint.prune(self.folder, self.config.save.keep_last)
        LOGGER.info(f"saved {self.folder / name}")

    def _scaler_state(self):
        """What JSON can hold of the loss scaler; its `scale` is an array."""
        return self.scaler and {key: np.asarray(value).tolist() for key, value in self.scaler.state_dict().items()}

    def _not_finite(self):
        kept = "no checkpoint was written yet"
        if checkpoint.exists(self.folder):
            kept = f"the last good checkpoint is {self.folder / checkpoint.LATEST}"
        raise UserError(f"the loss is not finite at iteration {self.iteration}: the run ends here, {kept}; "
                        "try a smaller optim.lr, optim.clip_norm, or optim.amp=off")


def _difference(saved, now, section):
    a, b = getattr(saved, section), getattr(now, section)
    if section == "seed":
        return f"{a}, now {b}"
    return ", ".join(f"{section}.{key}: {getattr(a, key)}, now {getattr(b, key)}" for key in type(a).model_fields
                     if getattr(a, key) != getattr(b, key))
