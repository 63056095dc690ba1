"""What can be wrong with a command is found before torch is imported and before anything is written.

    notes = check_training(config)                     # what to tell at the run's beginning; or a UserError
    train(config, notes)

    found, config, names = check_evaluation("runs/a", "zeroshot", ["eval.zeroshot.folder=imagenet/val"])

Settings by themselves were checked when they were loaded (config/). Here is what takes a look outside: at files,
folders and open_clip's models. Where one process trains, shards are indexed here too, so that their number is known.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from clipscale.checkpoint import (
    find_start,
    refuse_held,
    saved_state,
)
from clipscale.checkpoint.mirror import fetch_from_mirror
from clipscale.config import EVALUATIONS, Config, Lock, Model, Optim, Wandb, ZeroShot
from clipscale.config.data import Data, SourceSettings
from clipscale.data.fetch.urls import expand_urls, is_local
from clipscale.data.pipeline import require_sources
from clipscale.data.shard.counts import read_counts
from clipscale.data.shard.uids import UidList
from clipscale.deterministic import prepare_cublas
from clipscale.errors import UserError, require
from clipscale.eval.classes import class_templates, find_classes
from clipscale.eval.wds import labelled_shards
from clipscale.launch import check_ranks, launched, told_once
from clipscale.preflight.prepare import prepare_files
from clipscale.preflight.sense import odd_pairs
from clipscale.upstream.open_clip_files import check_model
from clipscale.weights.find import Found, find_weights
from clipscale.weights.target import find_target

_NOTHING_TO_DO = {
    "validation": "no pairs to evaluate: add eval.validation.urls=...",
    "zeroshot": "no pictures to classify: add eval.zeroshot.wds=... (a set as CLIP_benchmark has it), or "
    "eval.zeroshot.urls=... (or eval.zeroshot.folder=...) with eval.zeroshot.classnames=... and .templates=...",
    "retrieval": "no pairs to retrieve: add eval.retrieval.urls=...",
}


def check_training(config: Config) -> list[str]:
    """Look at everything that a run needs; by every rank, before they meet.

    Returns:
        What to tell at the run's beginning: settings that make no sense together, shards that changed.

    Raises:
        UserError: what a person must mend first. On a node's further ranks a SharedError, for its first one tells.
    """
    place = launched()
    notes: list[str] = []
    with told_once():
        if config.train.deterministic and config.device != "cpu":
            prepare_cublas()
        check_ranks(config.train.global_batch, place.size)
        check_model(config.model)
        _check_wandb(config.wandb)
        _check_device(config.device)
        notes += _check_optimizer(config.optim)
        if place.rank == 0:
            _check_folder("run.dir", config.run.dir)
            refuse_held(config.run.dir)
            fetched = fetch_from_mirror(config.checkpoint.mirror, config.run.dir, config.resume)
            notes += [fetched] if fetched else []
            start = find_start(config.run.dir, config.resume, samples=config.train.samples)
            if start.kind == "new" and config.model.init is not None:
                _check_weights(config.model)
            if start.kind == "new":
                _check_lock(config)
            _check_named(config)
            if start.kind == "other" and config.model.init is not None:
                notes.append(f"warning: model.init={config.model.init} is not used: resume={config.resume} has weights")
        saved = saved_state(config.run.dir, config.resume)
        if saved.get("position", 0) >= config.train.samples:
            return notes  # complete: nothing will be read
        _check_data(config)
        return notes + odd_pairs(config) + (prepare_files(config, saved.get("order")) if place.size == 1 else [])


def check_evaluation(path: str, kind: str, words: list[str], *, ema: bool = False) -> tuple[Found, Config, list[str]]:
    """What is to be evaluated (weights/target.py: a run or any weights), verified, its config with `words` on top, and
    the names of its evaluations of this kind.

    What one of several lacks is told when it is opened, and keeps no other from being made.

    Raises:
        UserError: no weights there, a damaged checkpoint, or settings, classes or pictures that cannot be used, of
            every evaluation that is asked for. On a node's further ranks a SharedError.
    """
    with told_once():
        found, config = find_target(path, words, ema=ema)
        names = [name for name, its in config.eval.evaluations().items() if isinstance(its, EVALUATIONS[kind])]
        require(bool(names), _NOTHING_TO_DO[kind])
        _check_device(config.device)
        problems = []
        for name in names:
            try:
                _check_evaluation(name, config, replace(config.data, shapes=None))  # only a training draws them
            except UserError as error:
                problems.append(error)
        if len(problems) == len(names):
            raise problems[0]
        return found, config, names


def _check_wandb(settings: Wandb) -> None:
    require(
        settings.project is None or find_spec("wandb") is not None,
        f"wandb.project={settings.project!r} needs Weights & Biases: pip install 'clipscale[wandb]', or set it to null",
    )


def _check_optimizer(optim: Optim) -> list[str]:
    """AdamW's usual settings were checked when they were loaded; the rest is torch's and timm's to know."""
    if optim.kind == "adamw" and not optim.options and optim.update_clipping is None and optim.momentum is None:
        return []
    from clipscale.optim import check_optimizer

    return check_optimizer(optim)


def _check_named(config: Config) -> None:
    if config.train.lock != Lock() or config.optim.names_parameters:
        from clipscale.optim.named import check_named

        check_named(config)


def _check_weights(model: Model) -> None:
    try:
        find_weights(model.init, model.name, ema=model.init_ema)
    except UserError as error:
        raise UserError(f"model.init: {error}") from error


def _check_lock(config: Config) -> None:
    """A tower that keeps random weights is a mistake."""
    model = config.model
    for tower in config.train.lock.whole():
        require(
            model.init is not None and model.init_towers in ("both", tower),
            f"train.lock.{tower}=true keeps the {tower} tower's weights, and it would begin with random ones: set "
            f"model.init to weights of it (model.init_towers={model.init_towers}), or train.lock.{tower}=false",
        )


def _check_device(device: str) -> None:
    """Without NVIDIA's driver library, and AMD's device, torch finds no GPU; with one of them, it decides itself."""
    require(
        device != "cuda" or _has_driver(),
        "device=cuda, but there is no driver of a GPU here; use device=auto or cpu",
    )


def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return os.path.exists("/dev/kfd")
    return True


def _check_folder(setting: str, folder: str) -> None:
    """Raise UserError unless the folder can be written, or made."""
    path = Path(folder).absolute()
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    why = ""
    if not there.is_dir():
        why = f"{str(there)!r} is not a folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        why = f"{str(there)!r} is not writable for this user"
    what = "written" if there == path and there.is_dir() else "made"
    require(not why, f"{setting}={folder!r} cannot be {what}: {why}; choose a folder that can be written")


def _check_data(config: Config) -> None:
    """Files that settings name; whether there are such shards."""
    data = config.data
    require_sources(data)
    for name, source in data.sources.items():
        if source.weight > 0:
            try:
                _check_source(source, config)
            except UserError as error:
                raise UserError(f"source {name!r}: {error}") from error
    if data.shapes is not None and not os.path.isdir(data.shapes.dir):
        _check_folder("data.shapes.dir", data.shapes.dir)
    if config.replay.dir is not None:
        _check_folder("replay.dir", config.replay.dir)
    for name in config.eval.evaluations():
        _check_evaluation(name, config, data)
    _check_best(config)


def _check_source(source: SourceSettings, config: Config) -> None:
    urls = _expand(source.urls, config.data)
    if source.counts is not None:
        read_counts([url for url in urls if not is_local(url)], source.counts)
    if source.select.uids is not None:
        UidList.open(source.select.uids)


def _check_evaluation(name: str, config: Config, data: Data) -> None:
    its, key = config.eval.evaluations()[name], config.eval.key(name)
    urls = its.urls
    if isinstance(its, ZeroShot):
        if its.wds is not None and not is_local(its.wds) and launched().rank > 0:
            return  # one rank asks the server
        shards = labelled_shards(its, data, key)
        urls = shards.urls
        if not _drawn(its.classnames or "", data):
            find_classes(its, key, shards.names)
        if not _drawn(its.templates or "", data):
            class_templates(its, key, shards.templates)
    if urls is not None:
        _expand(urls, data)


def _check_best(config: Config) -> None:
    """Raise UserError unless checkpoint.best is a score of an evaluation that the run makes."""
    scores = config.judged_by()
    require(
        config.checkpoint.best is None or config.checkpoint.best in scores,
        f"checkpoint.best={config.checkpoint.best!r} is no score of this run's evaluations; "
        + (f"they have {', '.join(scores)}" if scores else "there are none: set eval.zeroshot or eval.validation"),
    )


def _expand(urls: str, data: Data) -> list[str]:
    """The shards, but for those that are not drawn yet."""
    there = [part for part in urls.split("::") if not _drawn(part.strip(), data)]
    return expand_urls("::".join(there), data.allow_pipe) if there else []


def _drawn(path: str, data: Data) -> bool:
    """Whether it lies in the shapes set, which the run draws if need be."""
    if data.shapes is None:
        return False
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(data.shapes.dir))
