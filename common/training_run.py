"""The life of a training run: epochs, steps, what is saved when, resume, stop.

Two files with different purposes: `<model>.pt`, the best epoch, which tests read, and
`<model>_last.pt`, the newest state, which only a resumed run reads.
"""

import contextlib
import dataclasses
import errno
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from copy import deepcopy

import torch
from tqdm import tqdm

from common.checkpoint import (
    FORMAT,
    MODEL_NAMES,
    content_digest,
    is_finite,
    load_checkpoint,
    save_checkpoint,
)
from common.config import UserError, first_line
from common.figures import plot_training_curves
from common.files import atomic_file, sha256
from common.optimizer import set_learning_rate
from common.parallel import agree, is_first, on_first, process_count
from common.tables import name_of, write_csv

SAVE_EVERY = 120  # seconds between two saves inside an epoch
LOG_EVERY = 20  # steps between two looks at the loss: on a GPU a look waits for all work before it
# Config fields that do not affect the result: neither stored nor compared on resume.
NOT_STORED = (
    "recipe",
    "data_dir",
    "checkpoint_dir",
    "device",
    "cuda_graphs",
    "resume",
    "overwrite",
)
# Fields that a resumed run may have otherwise. Of the files that a run starts from, the paths may
# change: their content is in the state, or compared apart.
MAY_CHANGE = ("epochs", "init_from", "split", "teacher")


class TrainingRun:
    """The state of one training run, kept on disk: weights, optimizer, random numbers, curves.

    With several processes the state is the same in all, and the first one reads and writes it.

    cfg: the script's Config; dataset, checkpoint_dir, epochs, steps_per_epoch, resume and overwrite
        are read here.
    model: a key of MODEL_NAMES. encoder, optimizer: trained in place by the script.
    generator: draws episodes and augmentation; a resumed run sets it back to the epoch's start.
    data: the TrainingData; its split, size of images, normalisation and digest go into the
        checkpoints.
    extra_module: trained with the encoder and not used afterwards; only `_last.pt` carries it.
    teacher: (encoder, prototypes) of the teacher, where there is one: a resumed run needs the same.

    Raises UserError where an unfinished run is found and neither resume nor overwrite is given, or
    where a run cannot be resumed as asked.
    """

    def __init__(
        self, cfg, model, encoder, optimizer, generator, data, extra_module=None, teacher=None
    ):
        self.cfg, self.model, self.encoder, self.optimizer = cfg, model, encoder, optimizer
        self.generator, self.extra_module = generator, extra_module
        self.facts = {
            "class_split": data.split,
            "image_shape": list(data.train.images.shape[2:]),
            "mean": data.mean,
            "std": data.std,
            "data_digest": data.digest,
            "teacher_digest": content_digest(teacher[0].state_dict()) if teacher else None,
        }
        self.folder = os.path.join(cfg.checkpoint_dir, cfg.dataset)
        self.best_path = os.path.join(self.folder, f"{model}.pt")
        self.last_path = os.path.join(self.folder, f"{model}_last.pt")
        self.epoch, self.step = 0, 0  # epochs done; steps done of the next one
        # Over this epoch's steps: sum of losses, sum of accuracies, steps with a finite loss sum.
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.history = []  # one dict per epoch, the rows of the CSV
        self.best = None  # the row of the best epoch so far
        self.best_contents = None  # its checkpoint, in the first process
        self.epoch_start = generator.get_state()
        self.signal = 0  # number of the signal that asked this process to stop
        last = on_first(self._begin)
        if last:
            self._restore(last)

    def epochs(self):
        """Yield the numbers of the epochs still to do, from 0; handle SIGINT and SIGTERM."""
        device = next(self.encoder.parameters()).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = self.sums.to(device=device, dtype=dtype)
        stops = (signal.SIGINT, signal.SIGTERM)
        handlers = {number: signal.signal(number, self._ask_to_stop) for number in stops}
        try:
            while self.epoch < self.cfg.epochs:
                self.epoch_start = self.generator.get_state()
                self.epoch_clock = time.perf_counter()
                yield self.epoch
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def steps(self, count):
        """Yield the numbers of the steps still to do of an epoch; save on the way.

        count: steps that the data gives; cfg.steps_per_epoch may ask for fewer. `num_steps` is how
        many the epoch has.
        """
        self.num_steps = min(count, self.cfg.steps_per_epoch or count)
        saved = time.monotonic()
        with tqdm(
            total=self.num_steps,
            initial=self.step,
            desc=f"epoch {self.epoch + 1}/{self.cfg.epochs}",
            leave=False,
            dynamic_ncols=True,
            disable=not is_first(),
        ) as bar:
            while self.step < self.num_steps:
                yield self.step
                self.step += 1
                bar.update()
                if self.step % LOG_EVERY == 0 or self.step == self.num_steps:
                    loss, accuracy = self._means()
                    bar.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.1%}")
                number, save_now = agree(self.signal, time.monotonic() - saved > SAVE_EVERY)
                if number or save_now:
                    self._save_last()
                    saved = time.monotonic()
                    self._leave_if_asked(number)

    def track(self, loss, accuracy):
        """Add one step's loss and accuracy, tensors of one number, without reading them."""
        self.sums[:2] += torch.stack([loss.detach(), accuracy]).to(self.sums.dtype)
        self.sums[2] += torch.isfinite(self.sums[0])

    def end_epoch(self, lr, val_loss, val_accuracy, validated=None):
        """Record an epoch with its validation; write best, last and CSV; print one line.

        validated: the encoder that was validated, where it is not the one in training.
        """
        train_loss, train_accuracy = self._means()
        if not math.isfinite(val_loss):
            raise UserError(
                f"the validation loss became {val_loss} after epoch {self.epoch + 1}, step "
                f"{self.step}; {self._advice()}"
            )
        row = {
            "epoch": self.epoch + 1,
            "lr": lr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
        }
        self.history.append(row)
        self.epoch, self.step = self.epoch + 1, 0
        self.sums.zero_()
        self.epoch_start = self.generator.get_state()
        # `_last.pt` is written last: a kill before it leaves the state before this epoch, and the
        # epoch is done again.
        if self.best is None or val_accuracy > self.best["val_accuracy"]:
            self.best = row
            if is_first():
                self.best_contents = deepcopy(self._contents(row, validated or self.encoder))
                save_checkpoint(self.best_path, self.best_contents)
        if is_first():
            path = os.path.join(self.folder, f"{self.model}.csv")
            write_csv(path, list(self.history[0]), self.history)
        self._save_last()
        print(
            f"epoch {row['epoch']}/{self.cfg.epochs} | lr {lr:.1e} | "
            f"train loss {train_loss:.4f} acc {train_accuracy:.2%} | "
            f"val loss {val_loss:.4f} acc {val_accuracy:.2%}"
            f"{' (best)' if self.best is row else ''} | "
            f"{time.perf_counter() - self.epoch_clock:.0f} s",
            flush=True,
        )
        self._leave_if_asked(*agree(self.signal))

    def finish(self, val_way):
        """Draw the training curves and print the best epoch; val_way: classes per episode."""
        if not is_first():
            return
        cfg, shot = self.cfg, f"{self.cfg.k_shot}-shot"
        if self.model == "classifier":
            learned = f"{len(self.facts['class_split']['train'])} at once"
        else:
            learned = f"{cfg.n_way}-way {shot}"
        plot_training_curves(
            self.history,
            f"Training of {MODEL_NAMES[self.model]} on {name_of(cfg.dataset, cfg.split)}",
            {
                "train": f"training classes, {learned}",
                "val": f"validation classes, {val_way}-way {shot}",
            },
            os.path.join(self.folder, f"{self.model}_curves"),
        )
        epoch, accuracy = self.best["epoch"], self.best["val_accuracy"]
        print(f"best epoch {epoch}, {val_way}-way validation accuracy {accuracy:.2%}")
        command = ["python", "evaluate.py", f"--dataset={cfg.dataset}"]
        # Not compared with Config's defaults, which may be edited.
        data_dir = os.environ.get("PATH_DATASETS", "data")
        for name, usual in (("data_dir", data_dir), ("checkpoint_dir", "checkpoints")):
            if getattr(cfg, name) != usual:
                command.append(f"--{name}={getattr(cfg, name)}")
        print(f"wrote {self.best_path}; next: {shlex.join(command)}")

    def _begin(self):
        """Look at what the folder holds, lock it, and return the state to go on from, if any."""
        last = None
        if os.path.exists(self.last_path) and not self.cfg.overwrite:
            try:
                last = load_checkpoint(self.last_path)
            except UserError as error:
                raise UserError(f"{error}; --overwrite=true discards it") from error
            _check_last(last, self.last_path)
        if self.cfg.resume and self.cfg.overwrite:
            raise UserError("resume continues a run and overwrite discards it: pass one of the two")
        if self.cfg.resume:
            if last is None:
                found = f"there is nothing to resume: found no {self.last_path}"
                raise UserError(f"{found}; start without --resume=true")
            self._check_fit(last)
            self._lock()
            self._restore_best(last)
            return last
        if last is not None:
            done, planned = last["epoch"], last["config"]["epochs"]
            if done < max(planned, self.cfg.epochs):
                raise UserError(
                    f"{self.last_path} holds a run that can go on ({done} of {planned} epochs "
                    f"done, {last['step']} steps of the next); add --resume=true to continue it or "
                    "--overwrite=true to discard it"
                )
        self._lock()
        if os.path.exists(self.best_path):
            print(f"the first epoch will replace {self.best_path}; its copy is {self._keep_best()}")
        # A stop within the first minutes then finds something to resume, and a folder that cannot
        # be written is noticed now.
        self._save_last()

    def _restore_best(self, last):
        """Let the file of the best epoch hold that of the run that goes on.

        It does not where `_last.pt` was moved without it, or where the run died between the two.
        """
        best, found = last.get("best"), None
        if not best:
            return
        if os.path.exists(self.best_path):
            with contextlib.suppress(UserError):
                found = load_checkpoint(self.best_path)
            if found and content_digest(found) == content_digest(best):
                return
            free = dict.fromkeys(MAY_CHANGE)
            if not found or {**found["config"], **free} != {**last["config"], **free}:
                copy = self._keep_best()
                print(f"{self.best_path} is not of the run that goes on; its copy is {copy}")
        save_checkpoint(self.best_path, best)

    def _keep_best(self):
        """Copy the best epoch of an earlier run and its curve, unless that was done.

        Returns the path of the copied checkpoint.
        """
        start = self.best_path.removesuffix(".pt") + "_previous"
        for number in itertools.count(1):
            path = f"{start}.pt" if number == 1 else f"{start}-{number}.pt"
            if not os.path.exists(path):
                for suffix in (".csv", ".pt"):
                    source = self.best_path.removesuffix(".pt") + suffix
                    if os.path.exists(source):
                        with atomic_file(path.removesuffix(".pt") + suffix) as temporary:
                            shutil.copyfile(source, temporary)
                return path
            if sha256(path) == sha256(self.best_path):
                return path

    def _lock(self):
        """Keep other processes from training the same model in the same folder meanwhile.

        The operating system gives the lock back when the process ends, however it ends. Raises
        UserError where another process holds it, or where the folder cannot be written.
        """
        path = os.path.join(self.folder, f".{self.model}.lock")
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.lock = open(path, "w")
            with contextlib.suppress(ImportError):  # Windows has no fcntl
                import fcntl

                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another run trains a {self.model} in {self.folder} right now; wait until it has "
                "ended or pass another --checkpoint_dir"
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                print(f"{self.folder} knows no locks: start no second run of this model there")
                return
            raise UserError(
                f"cannot write {path}: {error.strerror}; choose another folder, --checkpoint_dir"
            ) from error

    def _check_fit(self, last):
        """Raise UserError unless a loaded `_last.pt` can go on with this run's config and data."""
        # An option that is younger than the file had its default.
        defaults = {field.name: field.default for field in dataclasses.fields(self.cfg)}
        before = {**_stored(defaults), **last["config"]}
        differences = [
            f"{name} was {before[name]!r} and is {new!r}"
            for name, new in _stored(vars(self.cfg)).items()
            if name not in MAY_CHANGE and before[name] != new
        ]
        if last.get("teacher_digest") != self.facts["teacher_digest"]:
            differences.append("the teacher changed")
        if last["model"] != self.model:
            differences.append(f"the model was {last['model']!r} and is {self.model!r}")
        if last["data_digest"] != self.facts["data_digest"]:
            differences.append("the images of the data set changed")
        if last["class_split"] != self.facts["class_split"]:
            differences.append("the class split changed")
        arguments = self.encoder.arguments
        if any(last["encoder"].get(name, arguments[name]) != arguments[name] for name in arguments):
            differences.append("the encoder changed")
        if differences:
            raise UserError(
                f"cannot resume {self.last_path}: {'; '.join(differences)}; put that back or "
                "discard the run with --overwrite=true"
            )
        if last["epoch"] > self.cfg.epochs:
            raise UserError(
                f"cannot resume {self.last_path}: {last['epoch']} epochs are done, "
                f"--epochs={self.cfg.epochs} asks for fewer; pass at least --epochs={last['epoch']}"
            )

    def _restore(self, last):
        try:
            self._load_state(last)
        # What a damaged state holds is refused by whatever layer it reaches first.
        except Exception as error:
            raise UserError(
                f"{self.last_path} is damaged ({first_line(error)}); discard it with "
                "--overwrite=true"
            ) from error
        print(
            f"resumed {self.last_path}: {self.epoch} of {self.cfg.epochs} epochs done, step "
            f"{self.step} of the next"
        )

    def _load_state(self, last):
        self.encoder.load_state_dict(last["state_dict"])
        if self.extra_module:
            self.extra_module.load_state_dict(last["extra_module"])
        # The state comes from the file; how the optimizer works on it (fused or not) is this
        # device's affair.
        own = self.optimizer.state_dict()["param_groups"]
        saved = last["optimizer"]["param_groups"]
        groups = [
            {**group, "params": kept["params"]} for group, kept in zip(own, saved, strict=True)
        ]
        state = last["optimizer"]["state"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        set_learning_rate(self.optimizer, float(saved[0]["lr"]))
        self.generator.set_state(last["generator"])
        torch.set_rng_state(last["torch_rng"])
        self.epoch, self.step, self.sums = last["epoch"], last["step"], last["sums"]
        self.history = last["history"]
        self.best = self.history[last["best_epoch"] - 1] if last["best_epoch"] else None
        self.best_contents = last.get("best")

    def _contents(self, row, encoder):
        return {
            "format": FORMAT,
            "model": self.model,
            "dataset": self.cfg.dataset,
            "config": _stored(vars(self.cfg)),
            "epoch": self.epoch,
            "val_accuracy": row["val_accuracy"] if row else None,
            "encoder": encoder.arguments,
            # On the CPU, so that torch.load reads the file where there is no GPU.
            "state_dict": {name: tensor.cpu() for name, tensor in encoder.state_dict().items()},
            **self.facts,
        }

    def _save_last(self):
        # Both checks raise before a broken state replaces a good one.
        self._means()
        if not is_finite(self.encoder):
            raise UserError(
                f"the weights became NaN or infinite in epoch {self.epoch + 1}, by step "
                f"{self.step}; {self._advice()}"
            )
        if not is_first():
            return
        save_checkpoint(
            self.last_path,
            {
                **self._contents(self.best, self.encoder),
                "extra_module": self.extra_module.state_dict() if self.extra_module else {},
                "optimizer": self.optimizer.state_dict(),
                "generator": self.epoch_start,
                "torch_rng": torch.get_rng_state(),
                "step": self.step,
                "sums": self.sums.cpu(),
                "history": self.history,
                "best_epoch": self.best["epoch"] if self.best else 0,
                "best": self.best_contents,
            },
        )

    def _means(self):
        """Return the mean loss and accuracy of this epoch's steps; raise UserError after a NaN."""
        loss, accuracy, finite_steps = self.sums.tolist()
        if finite_steps < self.step:
            raise UserError(
                f"the loss became {loss} in epoch {self.epoch + 1}, step {int(finite_steps) + 1}; "
                f"{self._advice()}"
            )
        return loss / max(self.step, 1), accuracy / max(self.step, 1)

    def _advice(self):
        return (
            f"{self.last_path} still holds the last good state; start again with a lower learning "
            "rate and --overwrite=true"
        )

    def _ask_to_stop(self, number, frame):
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
        if is_first():
            hint = " (once more: at once)" if number == signal.SIGINT else ""
            tqdm.write(f"stopping after this step{hint}", file=sys.stderr)

    def _leave_if_asked(self, number):
        if number:
            agree(0)  # the others wait until the first process has saved
            command = re.sub(r" --(resume|overwrite)[ =]\w+", "", shlex.join(sys.argv))
            launcher = "python" if process_count() == 1 else "torchrun ..."
            print(
                f"saved {self.last_path}; go on with: {launcher} {command} --resume=true",
                flush=True,
            )
            raise SystemExit(128 + number)


def _stored(values):
    """Return what of a config's values affects the result, as a checkpoint returns it: lists."""
    kept = {name: value for name, value in values.items() if name not in NOT_STORED}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in kept.items()}


def _check_last(last, path):
    """Raise UserError unless a loaded `_last.pt` has what a resumed run reads."""
    kinds = {
        "optimizer": dict,
        "extra_module": dict,
        "generator": torch.Tensor,
        "torch_rng": torch.Tensor,
        "sums": torch.Tensor,
        "step": int,
        "history": list,
        "best_epoch": int,
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(last.get(name), kind)]
    if not isinstance(last["config"].get("epochs"), int):
        wrong.append("epochs")
    if not wrong and last["sums"].shape != (3,):
        wrong.append("sums")
    if not wrong and not 0 <= last["best_epoch"] <= last["epoch"] == len(last["history"]):
        wrong.append("history")
    if not isinstance(last.get("best"), (dict, type(None))):
        wrong.append("best")
    if wrong:
        raise UserError(
            f"{path} is damaged: its {wrong[0]!r} cannot be used; discard it with --overwrite=true"
        )
