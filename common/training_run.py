"""The life of a training run: epochs, progress, what is saved, curves, resume.

Two files with different purposes: `<model>.pt`, the best epoch, which tests read, and
`<model>_last.pt`, the newest state, which only a resumed run reads. Both are written at the end of
an epoch: whatever ends a run, it loses at most that one.
"""

import itertools
import math
import os
import time
from copy import deepcopy

import torch
from tqdm import tqdm

from common import UserError, first_line, script_command, shell_command
from common.checkpoint import FORMAT, is_finite, load_checkpoint, save_checkpoint
from common.figures import plot_training_curves
from common.files import require_file_name
from common.parallel import is_first, on_first
from common.tables import name_of, title_of, write_csv

LOG_EVERY = 20  # steps between two looks at the loss: on a GPU a look waits for all work before it
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy")  # of the CSV
# Config fields that do not affect the result: neither stored nor compared on resume.
NOT_STORED = "recipe data_dir checkpoint_dir device cuda_graphs resume overwrite test".split()
# Fields that may differ when resuming. These files may have moved: what came from them is in the
# state, or compared with it.
MAY_CHANGE = ("epochs", "init_from", "split")


class TrainingRun:
    """The state of one training run, kept on disk: weights, optimizer, random numbers, curves.

    With several processes the state is the same in all, and the first one reads and writes it.

    cfg: the script's Config; dataset, checkpoint_dir, epochs, steps_per_epoch, resume and overwrite
        are read here.
    model: names the files and the rows of a test. encoder, optimizer: trained in place.
    generator: draws episodes and augmentation; its state is saved.
    data: the TrainingData; its split, image size, normalisation and digest go into the checkpoints.
    extra_module: trained with the encoder and not used afterwards; only `_last.pt` carries it.

    Raises UserError where there is a run and neither resume nor overwrite is asked for, or where
    one cannot be resumed as asked.
    """

    def __init__(self, cfg, model, encoder, optimizer, generator, data, extra_module=None):
        self.cfg, self.model, self.encoder, self.optimizer = cfg, model, encoder, optimizer
        self.generator, self.extra_module, self.data = generator, extra_module, data
        require_file_name(model, "a MODEL")
        if model == "pixels" or model.endswith(("_last", "_finetuned")):
            raise UserError(f"{model} would be taken for something else in a test; rename MODEL")
        self.path = os.path.join(cfg.checkpoint_dir, cfg.dataset, model)  # and .pt, _last.pt, ...
        self.history = []  # one dict per finished epoch, the rows of the CSV
        self.best = None  # the checkpoint of the best epoch so far
        device = next(encoder.parameters()).device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # Over this epoch's steps: sum of losses, sum of accuracies, steps with a finite loss sum.
        self.sums = torch.zeros(3, device=device, dtype=dtype)
        if last := on_first(self._find_last):
            self._restore(last)
        else:  # a stop in the first epoch then finds something to resume
            self._save_last()

    def epochs(self):
        """Yield the numbers of the epochs still to do, from 0."""
        while len(self.history) < self.cfg.epochs:
            self.step, self.clock = 0, time.perf_counter()
            self.sums.zero_()
            yield len(self.history)

    def progress(self, batches):
        """Yield the batches of an epoch, cfg.steps_per_epoch at most, with a progress bar."""
        self.num_steps = min(len(batches), self.cfg.steps_per_epoch or len(batches))
        if self.cfg.steps_per_epoch > len(batches) and not self.history:
            found = f"but the images of an epoch are used up after {len(batches)}"
            print(f"steps_per_epoch is {self.cfg.steps_per_epoch}, {found}")
        name = f"epoch {len(self.history) + 1}/{self.cfg.epochs}"
        options = {"leave": False, "dynamic_ncols": True, "disable": not is_first()}
        batches = itertools.islice(batches, self.num_steps)
        for batch in (bar := tqdm(batches, name, self.num_steps, **options)):
            yield batch
            self.step += 1
            if self.step % LOG_EVERY == 0 or self.step == self.num_steps:
                loss, accuracy = self._means()
                bar.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.1%}")

    def track(self, loss, accuracy):
        """Add one step's loss and accuracy, tensors of one number, without reading them."""
        self.sums[:2] += torch.stack([loss.detach(), accuracy]).to(self.sums.dtype)
        self.sums[2] += torch.isfinite(self.sums[0])

    def end_epoch(self, lr, val_loss, val_accuracy, validated=None):
        """Record an epoch with its validation; write best, last and CSV; print one line.

        validated: the encoder that was validated, where it is not the one in training.
        """
        loss, accuracy = self._means()
        if not math.isfinite(val_loss) or not is_finite(self.encoder):
            raise UserError(self._diverged("the validation loss", self.step))
        epoch = len(self.history) + 1
        row = dict(zip(COLUMNS, (epoch, lr, loss, accuracy, val_loss, val_accuracy)))
        self.history.append(row)
        if is_best := self.best is None or val_accuracy > self.best["val_accuracy"]:
            self.best = deepcopy(self._contents(validated or self.encoder))
        if is_first():
            # `_last.pt` is written last: after a kill before it, the epoch is done again.
            if is_best:
                save_checkpoint(f"{self.path}.pt", self.best)
            write_csv(f"{self.path}.csv", COLUMNS, self.history)
        self._save_last()
        print(
            f"epoch {epoch}/{self.cfg.epochs} | lr {lr:.1e} | train loss {loss:.4f} acc "
            f"{accuracy:.2%} | val loss {val_loss:.4f} acc {val_accuracy:.2%}"
            f"{' (best)' if is_best else ''} | {time.perf_counter() - self.clock:.0f} s",
            flush=True,
        )

    def finish(self, train_task, val_task):
        """Draw the training curves and print the best epoch and the next command.

        train_task, val_task: what is classified in either, "5-way 4-shot" for example.
        """
        if not is_first():
            return
        dataset, best = self.cfg.dataset, self.best
        title = f"Training of {title_of(self.model)} on {name_of(dataset, self.cfg.split)}"
        tasks = f"training classes, {train_task}", f"validation classes, {val_task}"
        plot_training_curves(self.history, title, tasks, f"{self.path}_curves")
        print(f"best epoch {best['epoch']}, {val_task} validation {best['val_accuracy']:.2%}")
        command = ["evaluate.py", f"--dataset={dataset}", f"--models={self.path}.pt"]
        if self.cfg.data_dir != os.environ.get("PATH_DATASETS", "data"):
            command.append(f"--data_dir={self.cfg.data_dir}")
        fewest = torch.bincount(self.data.train.labels).min()
        if fewest <= 32:  # evaluate.py's largest k needs an image more
            command.append("--k_shots=" + ",".join(str(k) for k in (1, 2, 4, 8, 16) if k < fewest))
        print(f"wrote {self.path}.pt; next: {script_command(*command)}")

    def _find_last(self):
        """Return the state to go on from, if any; raise UserError where another run is there."""
        cfg, last_path = self.cfg, f"{self.path}_last.pt"
        there = [path for path in (last_path, f"{self.path}.pt") if os.path.exists(path)]
        asked = cfg.resume.lower()
        resume = asked == "true" or asked == "auto" and last_path in there
        for name in ("init_from", "teacher"):
            if os.path.abspath(getattr(cfg, name, "")) in map(os.path.abspath, there):
                raise UserError(f"this run would overwrite {name}; pass another --checkpoint_dir")
        goes_on = f"--resume={cfg.resume} goes on with {last_path}, but"
        if asked != "false" and cfg.overwrite:
            raise UserError(f"{goes_on} --overwrite=true discards it; pass --overwrite=false")
        if resume and last_path not in there:
            raise UserError(f"{goes_on} there is none")
        if there and not (resume or cfg.overwrite):
            go_on = "add --resume=true to go on with it, " if last_path in there else "pass "
            raise UserError(
                f"{there[0]} is there, of an earlier run; {go_on}--overwrite=true to discard it, "
                "or another --checkpoint_dir"
            )
        return load_checkpoint(last_path) if resume else None

    def _restore(self, last):
        """Take up a loaded `_last.pt`, after a check that it fits this run's config and data."""
        path, own = f"{self.path}_last.pt", self._contents(self.encoder)
        # Options added after the file was written had their defaults.
        before = {**_stored(vars(type(self.cfg)())), **last["config"]}
        wrong = [
            f"{name} was {before[name]!r} and is {new!r}"
            for name, new in own["config"].items()
            if name not in MAY_CHANGE and before[name] != new
        ]
        wrong += [f"there is no {name} any more" for name in last["config"].keys() - own["config"]]
        same = ("model", "data_digest", "class_split", "encoder")
        wrong += [f"{key} has changed" for key in same if last.get(key) != own[key]]
        if last["epoch"] > self.cfg.epochs:
            wrong.append(f"{last['epoch']} epochs are done and {self.cfg.epochs} asked for")
        if wrong:
            raise UserError(
                f"cannot resume {path}: {'; '.join(wrong)}; put that back, or discard the run with "
                "--overwrite=true"
            )
        try:
            self.encoder.load_state_dict(last["state_dict"])
            if self.extra_module:
                self.extra_module.load_state_dict(last["extra_module"])
            # How the optimizer works on the state (fused, recordable) is this device's affair, and
            # the learning rate follows from the epoch.
            own = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({**last["optimizer"], "param_groups": own})
            for weight, state in self.optimizer.state.items():  # stored otherwise on mps
                for name in state.keys() - {"step"}:
                    state[name] = torch.empty_like(weight).copy_(state[name])
            self.generator.set_state(last["generator"])
            torch.set_rng_state(last["torch_rng"])
            self.history, self.best = last["history"], last["best"]
        except Exception as error:  # a file that holds something else can raise anything here
            raise UserError(
                f"{path} cannot be resumed ({first_line(error)}); discard it with --overwrite=true"
            ) from error
        if self.best and is_first():  # its file may have been moved, or be another run's
            save_checkpoint(f"{self.path}.pt", self.best)
        print(f"resumed {path}: {last['epoch']} of {self.cfg.epochs} epochs done")

    def _contents(self, encoder):
        """Return what a checkpoint holds: what a test needs of the encoder and its training."""
        return {
            "format": FORMAT,
            "model": self.model,
            "dataset": self.cfg.dataset,
            "config": _stored(vars(self.cfg)),
            "epoch": len(self.history),
            "val_accuracy": self.history[-1]["val_accuracy"] if self.history else None,
            "encoder": encoder.arguments,
            # On the CPU, so that torch.load reads the file where there is no GPU.
            "state_dict": {name: tensor.cpu() for name, tensor in encoder.state_dict().items()},
            "class_split": self.data.split,
            "image_shape": list(self.data.train.images.shape[2:]),
            "mean": self.data.mean,
            "std": self.data.std,
            "data_digest": self.data.digest,
        }

    def _save_last(self):
        if not is_first():
            return
        state = {
            "extra_module": self.extra_module.state_dict() if self.extra_module else {},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "torch_rng": torch.get_rng_state(),
            "history": self.history,
            "best": self.best,
        }
        save_checkpoint(f"{self.path}_last.pt", {**self._contents(self.encoder), **state})

    def _means(self):
        """Return the mean loss and accuracy of this epoch's steps; raise UserError after a NaN."""
        loss, accuracy, finite_steps = self.sums.tolist()
        if finite_steps < self.step:
            raise UserError(self._diverged("the loss", int(finite_steps) + 1))
        return loss / max(self.step, 1), accuracy / max(self.step, 1)

    def _diverged(self, what, step):
        advice = "start again with a lower learning rate and --overwrite=true, or in another "
        advice += "--checkpoint_dir"
        if self.best and hasattr(self.cfg, "init_from"):
            start = shell_command(f"--init_from={self.path}.pt")
            advice = f"start from the best epoch before, {start}, in another --checkpoint_dir with "
            advice += "a lower learning rate"
        return (
            f"{what} became NaN or infinite in epoch {len(self.history) + 1}, step {step}; {advice}"
        )


def _stored(values):
    """Return the config's values that affect the result as a checkpoint returns them: lists."""
    stored = {name: value for name, value in values.items() if name not in NOT_STORED}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in stored.items()}
