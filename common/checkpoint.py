"""Checkpoints, and the state of a training run on disk: what is saved when, and how a run goes on after a stop.

Two files with different purposes: `<model>.pt`, the best epoch, which tests read; `<model>_last.pt`, the newest state,
which only a resumed run reads. Both appear whole or not at all.
"""

import csv
import dataclasses
import io
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
import warnings

import torch
from tqdm import tqdm

from common.config import UserError
from common.data import CIFAR100_MEAN, CIFAR100_STD
from common.encoder import LARGEST_DIM, make_encoder
from common.files import atomic_file, write_text
from common.inner_loop import BATCHNORMS, OUTPUT_INITS

FORMAT = "few-shot checkpoint, version 1"
SAVE_EVERY = 120  # seconds between two saves inside an epoch
LOG_EVERY = 20  # steps between two looks at the loss: on a GPU a look waits for all the work before it
MODEL_NAMES = {"protonet": "ProtoNet", "protomaml": "ProtoMAML", "maml": "MAML"}
# Of a run's config, what says where it ran, or how its values were named, but not what it did: a checkpoint does not carry it.
NOT_KEPT = ("recipe", "data_dir", "checkpoint_dir", "device", "resume", "overwrite")


def save_checkpoint(path, contents):
    """Write a dict of tensors and plain values to `path` in one piece. Raises UserError where that fails."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())


def load_checkpoint(path):
    """Return the checkpoint in `path`, on the CPU: the dict that a training run saved.

    The tutorial author's Lightning files are read as well, and completed with what they leave unsaid: the class split
    and the normalisation of CIFAR-100. Code inside a file is never run. Raises UserError where the file is missing,
    damaged, foreign or hostile.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}; train one first (python train_protonet.py --help) or pass another file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our line says it
            contents = torch.load(path, map_location="cpu", weights_only=True)
    # torch.load on foreign bytes raises whatever the layer raises that stumbles: pickle, zip, struct, unicode, ...
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint ({_first_line(error)}); it may be damaged or foreign: train again or pass another file") from error
    if isinstance(contents, dict) and "pytorch-lightning_version" in contents:
        contents = _from_lightning(contents, path)
    _check_contents(contents, path)
    return contents


def encoder_of(checkpoint, path):
    """Return the encoder of a loaded checkpoint, on the CPU, in eval mode. Raises UserError where the weights do not fit."""
    arguments = checkpoint["encoder"]
    try:
        sizes = [size for value in arguments.values() for size in (value if isinstance(value, (list, tuple)) else [value])]
        if not all(isinstance(size, int) and size <= LARGEST_DIM for size in sizes) or sum(arguments.get("block_config", [])) > 1000:
            raise ValueError(f"no network is that large: {str(arguments)[:100]}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            encoder = make_encoder(**arguments)
        encoder.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{path}: the weights do not fit the encoder that it names ({_first_line(error)}); pass a checkpoint of this project or of the tutorial") from error
    if not _is_finite(encoder):
        raise UserError(f"{path}: the weights hold NaN or infinity; train again or pass another file")
    return encoder.eval()


def load_encoder(path, split):
    """Return the encoder in `path`, on the CPU, in eval mode, and the arguments that make_encoder needs to build it again.

    Raises UserError where its training classes are not those of this split: it may have seen the ones held out here.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint["class_split"] not in ({}, split):
        raise UserError(f"{path} was trained on other classes than this run; start from a checkpoint of the same data set")
    return encoder_of(checkpoint, path), checkpoint["encoder"]


class TrainingRun:
    """The state of one training run, kept on disk: weights, optimizer, random numbers, curves, best epoch.

    cfg: the script's Config (dataset, checkpoint_dir, epochs, resume and overwrite are read here).
    model: "protonet", "protomaml" or "maml". encoder, optimizer: trained in place by the script.
    generator: where episodes and augmentation are drawn from; put back to the epoch's start when a run goes on inside one.
    extras: what the checkpoints carry besides: encoder arguments, class split, mean, std, data digest.
    extra_module: a module that is trained with the encoder and of no use after; only `last` carries it.

    Raises UserError where an unfinished run is found and neither resume nor overwrite is given, or where a run cannot
    be resumed as asked.
    """

    def __init__(self, cfg, model, encoder, optimizer, generator, extras, extra_module=None):
        self.cfg, self.model, self.encoder, self.optimizer, self.generator = cfg, model, encoder, optimizer, generator
        self.extras, self.extra_module = extras, extra_module
        self.folder = os.path.join(cfg.checkpoint_dir, cfg.dataset)
        self.best_path = os.path.join(self.folder, f"{model}.pt")
        self.last_path = os.path.join(self.folder, f"{model}_last.pt")
        self.csv_path = os.path.join(self.folder, f"{model}.csv")
        self.epoch, self.step = 0, 0  # epochs done; steps done of the epoch after these
        # Over the steps of this epoch: sum of the losses, sum of the accuracies, steps until the first loss that is not finite.
        self.sums = torch.zeros(3, dtype=torch.float64)
        self.history = []  # one dict per epoch, the rows of the CSV
        self.best = None  # the row of the best epoch so far
        self.epoch_start = generator.get_state()
        self.signal = None  # number of the signal that asked the run to stop
        self._begin()

    def epochs(self):
        """Yield the numbers of the epochs still to do, from 0; SIGINT and SIGTERM are handled meanwhile."""
        device = next(self.encoder.parameters()).device
        self.sums = self.sums.to(device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        handlers = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.epoch < self.cfg.epochs:
                self.epoch_start = self.generator.get_state()
                self.epoch_clock = time.perf_counter()
                yield self.epoch
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def steps(self, count):
        """Yield the numbers of the steps still to do of an epoch of `count`, with a progress bar and saves on the way."""
        saved = time.monotonic()
        with tqdm(total=count, initial=self.step, desc=f"epoch {self.epoch + 1}/{self.cfg.epochs}", leave=False, dynamic_ncols=True) as bar:
            while self.step < count:
                yield self.step
                self.step += 1
                bar.update()
                if self.step % LOG_EVERY == 0 or self.step == count:
                    loss, accuracy = self._means()
                    bar.set_postfix(loss=f"{loss:.3f}", acc=f"{accuracy:.1%}")
                if self.signal or time.monotonic() - saved > SAVE_EVERY:
                    self._save_last()
                    saved = time.monotonic()
                    self._leave_if_asked()

    def track(self, loss, accuracy):
        """Add one step's loss and accuracy (tensors of one number; no look at their values)."""
        self.sums[:2] += torch.stack([loss.detach(), accuracy]).to(self.sums.dtype)
        self.sums[2] += torch.isfinite(self.sums[0])

    def end_epoch(self, lr, val_loss, val_accuracy, tested=None):
        """Record an epoch with its validation, write best, last and CSV, and print one line.

        tested: the encoder that was validated and may be the best, where that is not the one in training.
        """
        train_loss, train_accuracy = self._means()
        if not math.isfinite(val_loss):
            raise UserError(f"the validation loss became {val_loss} after epoch {self.epoch + 1}, step {self.step}; {self._advice()}")
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
        # `last` comes last: were the run killed before, it would still lie before this epoch, and the epoch be done again.
        if self.best is None or val_accuracy > self.best["val_accuracy"]:
            self.best = row
            save_checkpoint(self.best_path, self._contents(row, tested))
        self._write_csv()
        self._save_last()
        print(
            f"epoch {row['epoch']}/{self.cfg.epochs} | lr {lr:.1e} | train loss {train_loss:.4f} acc {train_accuracy:.2%} | "
            f"val loss {val_loss:.4f} acc {val_accuracy:.2%}{' (best)' if self.best is row else ''} | {time.perf_counter() - self.epoch_clock:.0f} s",
            flush=True,
        )
        self._leave_if_asked()

    def _begin(self):
        last = None
        if os.path.exists(self.last_path) and not self.cfg.overwrite:
            last = load_checkpoint(self.last_path)
            _check_last(last, self.last_path)
        if self.cfg.resume and self.cfg.overwrite:
            raise UserError("resume continues a run and overwrite discards it: pass one of the two")
        if self.cfg.resume:
            if last is None:
                raise UserError(f"there is nothing to resume: found no {self.last_path}; start without --resume=true")
            self._resume(last)
            return
        if last is not None and last["epoch"] < max(last["config"]["epochs"], self.cfg.epochs):
            state = f"{last['epoch']} of {last['config']['epochs']} epochs done, {last['step']} steps of the next"
            raise UserError(f"{self.last_path} holds a run that can go on ({state}); add --resume=true to continue it or --overwrite=true to discard it")
        if os.path.exists(self.best_path):
            earlier = os.path.join(self.folder, f"{self.model}_previous.pt")
            with atomic_file(earlier) as temporary:
                shutil.copyfile(self.best_path, temporary)
            print(f"the first epoch will replace {self.best_path}; kept a copy as {earlier}")
        # So that a stop within the first minutes finds something to resume; and a folder that cannot be written shows now.
        self._save_last()

    def _resume(self, last):
        differences = [
            f"{name} was {old!r} and is {new!r}"
            for name, new in self._config().items()
            if name != "epochs" and (old := last["config"].get(name)) != new
        ]
        for name, words in (("data_digest", "the images of the data set"), ("class_split", "the class split"), ("encoder", "the encoder")):
            if last.get(name) != self.extras[name]:
                differences.append(f"{words} changed")
        if differences:
            raise UserError(f"cannot resume {self.last_path}: {'; '.join(differences)}; put that back or discard the run with --overwrite=true")
        if last["epoch"] > self.cfg.epochs:
            raise UserError(f"cannot resume {self.last_path}: {last['epoch']} epochs are done, --epochs={self.cfg.epochs} asks for fewer; pass at least --epochs={last['epoch']}")
        try:
            self._restore(last)
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise UserError(f"{self.last_path} is damaged ({_first_line(error)}); discard it with --overwrite=true") from error
        print(f"resumed {self.last_path}: {self.epoch} of {self.cfg.epochs} epochs done, step {self.step} of the next")

    def _restore(self, last):
        self.encoder.load_state_dict(last["state_dict"])
        if self.extra_module:
            self.extra_module.load_state_dict(last["extra_module"])
        # The state comes from the file; how it is worked on (fused, in a graph) is this device's affair.
        own, saved = self.optimizer.state_dict()["param_groups"], last["optimizer"]["param_groups"]
        groups = [{**group, "params": old["params"]} for group, old in zip(own, saved, strict=True)]
        self.optimizer.load_state_dict({"state": last["optimizer"]["state"], "param_groups": groups})
        self.generator.set_state(last["generator"])
        torch.set_rng_state(last["torch_rng"])
        self.epoch, self.step, self.sums, self.history = last["epoch"], last["step"], last["sums"], last["history"]
        self.best = self.history[last["best_epoch"] - 1] if last["best_epoch"] else None

    def _config(self):
        values = {name: value for name, value in dataclasses.asdict(self.cfg).items() if name not in NOT_KEPT}
        # Lists, as a checkpoint gives them back.
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def _contents(self, row, encoder=None):
        return {
            "format": FORMAT,
            "model": self.model,
            "dataset": self.cfg.dataset,
            "config": self._config(),
            "epoch": self.epoch,
            "val_accuracy": row["val_accuracy"] if row else None,
            # On the CPU, so that torch.load reads the file where there is no GPU.
            "state_dict": {name: tensor.cpu() for name, tensor in (encoder or self.encoder).state_dict().items()},
            **self.extras,
        }

    def _save_last(self):
        # Both raise before a spoilt state replaces a good one.
        self._means()
        if not _is_finite(self.encoder):
            raise UserError(f"the weights became NaN or infinite in epoch {self.epoch + 1}, by step {self.step}; {self._advice()}")
        save_checkpoint(
            self.last_path,
            {
                **self._contents(self.best),
                "extra_module": self.extra_module.state_dict() if self.extra_module else {},
                "optimizer": self.optimizer.state_dict(),
                "generator": self.epoch_start,
                "torch_rng": torch.get_rng_state(),
                "step": self.step,
                "sums": self.sums.cpu(),
                "history": self.history,
                "best_epoch": self.best["epoch"] if self.best else 0,
            },
        )

    def _write_csv(self):
        text = io.StringIO()
        writer = csv.DictWriter(text, self.history[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_text(self.csv_path, text.getvalue())

    def _means(self):
        loss, accuracy, finite_steps = self.sums.tolist()
        if finite_steps < self.step:
            raise UserError(f"the loss became {loss} in epoch {self.epoch + 1}, step {int(finite_steps) + 1}; {self._advice()}")
        return loss / max(self.step, 1), accuracy / max(self.step, 1)

    def _advice(self):
        return f"{self.last_path} still holds the last good state; start again with a lower learning rate and --overwrite=true"

    def _ask_to_stop(self, number, frame):
        if self.signal == signal.SIGINT == number:
            raise KeyboardInterrupt
        self.signal = number
        tqdm.write("stopping after this step (once more: at once)", file=sys.stderr)

    def _leave_if_asked(self):
        if self.signal:
            command = re.sub(r" --(resume|overwrite)[ =]\w+", "", shlex.join(sys.argv))
            print(f"saved {self.last_path}; go on with: python {command} --resume=true", flush=True)
            raise SystemExit(128 + self.signal)


def _is_finite(encoder):
    # One look at the device for all tensors together.
    return torch.stack([tensor.isfinite().all() for tensor in encoder.state_dict().values()]).all().item()


def _first_line(error):
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _from_lightning(contents, path):
    hyperparameters = contents.get("hyper_parameters")
    weights = contents.get("state_dict")
    if not isinstance(hyperparameters, dict) or not isinstance(weights, dict):
        raise UserError(f"{path} is a Lightning file without hyper_parameters or state_dict; pass one of the tutorial's or of this project's")
    is_maml = "num_inner_steps" in hyperparameters
    inner_loop = {name: hyperparameters[name] for name in ("lr_inner", "lr_output", "num_inner_steps") if name in hyperparameters}
    return {
        "format": FORMAT,
        "model": "protomaml" if is_maml else "protonet",
        "dataset": "cifar100",
        "config": {**inner_loop, "output_init": "prototypes"} if is_maml else {},
        "encoder": {"proto_dim": hyperparameters.get("proto_dim", 64)},
        "state_dict": {str(name).removeprefix("model."): tensor for name, tensor in weights.items()},
        "class_split": {},  # the default split of the data set
        "mean": CIFAR100_MEAN,
        "std": CIFAR100_STD,
        "epoch": contents.get("epoch", 0),
        "val_accuracy": None,
        "data_digest": None,
    }


def _check_contents(contents, path):
    """Raise UserError unless `contents` has everything that a test reads, each of the right kind."""
    found = contents.get("format") if isinstance(contents, dict) else type(contents).__name__
    if found != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project (found {str(found)[:60]!r}, needed {FORMAT!r}); pass another file")
    kinds = {"model": str, "dataset": str, "config": dict, "encoder": dict, "state_dict": dict, "class_split": dict, "epoch": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(contents.get(name), kind)]
    wrong += [name for name in ("mean", "std") if not _is_numbers(contents.get(name), 3)]
    wrong += ["class_split"] if not wrong and contents["class_split"] and not _is_split(contents["class_split"]) else []
    wrong += ["std"] if not wrong and min(contents["std"]) <= 0 else []
    if not wrong and contents["model"] in ("protomaml", "maml"):
        inner_loop = contents["config"]
        wrong += [name for name in ("lr_inner", "lr_output") if not _is_numbers([inner_loop.get(name)], 1)]
        wrong += [name for name, allowed in (("output_init", OUTPUT_INITS), ("batchnorm", BATCHNORMS)) if inner_loop.get(name, allowed[0]) not in allowed]
    if wrong:
        raise UserError(f"{path} is damaged: its {wrong[0]!r} cannot be used; pass another file or train again")
    if contents["model"] not in MODEL_NAMES:
        raise UserError(f"{path} holds a model {contents['model'][:60]!r}, but one of {', '.join(MODEL_NAMES)} is needed; pass another file")


def _check_last(last, path):
    """Raise UserError unless a loaded `last` has what a resumed run reads, each of the right kind."""
    kinds = {"optimizer": dict, "extra_module": dict, "generator": torch.Tensor, "torch_rng": torch.Tensor, "sums": torch.Tensor, "step": int, "history": list, "best_epoch": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(last.get(name), kind)]
    wrong += ["epochs"] if not isinstance(last["config"].get("epochs"), int) else []
    wrong += ["sums"] if not wrong and last["sums"].shape != (3,) else []
    wrong += ["history"] if not wrong and (len(last["history"]) != last["epoch"] or not 0 <= last["best_epoch"] <= last["epoch"]) else []
    if wrong:
        raise UserError(f"{path} is damaged: its {wrong[0]!r} cannot be used; discard it with --overwrite=true")


def _is_numbers(values, count):
    return isinstance(values, (tuple, list)) and len(values) == count and all(isinstance(value, (int, float)) and abs(value) < 1e9 for value in values)


def _is_split(split):
    parts = [split.get(part) for part in ("train", "val", "test")]
    return all(isinstance(part, list) and part and all(isinstance(name, str) for name in part) for part in parts)
