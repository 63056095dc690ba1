"""What open_clip's training flags are called here, or why there is none: one table for error messages and the docs.

explain("--batch-size")    # "open_clip's --batch-size is train.global_batch here: ..."
explain("batch_size")      # the same: a word in a config may have been meant so
markdown_table()           # docs/from_open_clip.md holds it
"""

from __future__ import annotations

from typing import NamedTuple


class Flag(NamedTuple):
    keys: str  # ours, several separated by commas; empty: there is none
    note: str  # how it differs, or why there is none


_BATCHNORM = Flag("", "towers with BatchNorm are refused: embedding in chunks would change their statistics")
_ONE_LOSS = Flag("", "the loss is that of CLIP over the whole batch, in tiles")
_PRETRAINED = Flag("model.init", "a tag, a file, a folder, or a run of clipscale's")
_IN_SHARDS = Flag("", "`clipscale shards make` packs a list (its --image-key, --caption-key) into shards first")
_RANKS = Flag("", "torchrun and srun say which ranks there are; gloo on CPUs, nccl on GPUs")
_WHOLE_MODELS = Flag("", "the towers run as PyTorch runs them")
_MIRRORED = Flag("checkpoint.mirror", "checkpoints alone, each as it is published; its scheme is the protocol")

FLAGS: dict[str, Flag] = {
    "--train-data": Flag("data.sources.<name>.urls", "braces, globs and `::` as there; each source has a name"),
    "--train-data-upsampling-factors": Flag("data.sources.<name>.weight", "the share of the samples, of each source"),
    "--val-data": Flag("eval.validation.urls", ""),
    "--train-num-samples": Flag("train.samples", "samples in all, not of an epoch: theirs times --epochs"),
    "--val-num-samples": Flag("eval.validation.samples", ""),
    "--dataset-type": Flag("", "data are WebDataset shards; `clipscale shards make` packs lists and folders"),
    "--dataset-resampled": Flag("data.sampling", "data.sampling=resampled"),
    "--csv-separator": _IN_SHARDS,
    "--csv-img-key": _IN_SHARDS,
    "--csv-caption-key": _IN_SHARDS,
    "--imagenet-val": Flag("eval.zeroshot.folder", "the same folder of class folders"),
    "--imagenet-v2": Flag("eval.zeroshot_sets.<name>.folder", "any number of sets, each with a name"),
    "--cache-dir": Flag("data.cache_dir", "of shards; that of tokenizers is Hugging Face's own HF_HOME"),
    "--logs": Flag("run.dir", "<logs>/<name> in one"),
    "--log-local": Flag("", "other ranks' lines begin with their rank, in the same log"),
    "--name": Flag("run.dir", "<logs>/<name> in one; the same folder again resumes the run"),
    "--workers": Flag("data.threads", "threads of one loader process a rank, not processes"),
    "--batch-size": Flag("train.global_batch", "theirs is per GPU, ours over all: theirs x GPUs x --accum-freq"),
    "--epochs": Flag("train.samples", "in samples: epochs x samples of the set"),
    "--epochs-cooldown": Flag("optim.cooldown_samples", "in samples: epochs x samples of the set"),
    "--lr": Flag("optim.lr", "the same number for the same global batch"),
    "--beta1": Flag("optim.betas", "the first of optim.betas=[0.9,0.98]"),
    "--beta2": Flag("optim.betas", "the second of optim.betas=[0.9,0.98]; 0.999 is theirs for a ResNet"),
    "--eps": Flag("optim.eps", ""),
    "--wd": Flag("optim.weight_decay", ""),
    "--momentum": Flag("optim.momentum", "of the kinds that have one"),
    "--warmup": Flag("optim.warmup_steps, optim.warmup_samples", "theirs is in steps; in samples it fits any batch"),
    "--opt": Flag("optim.kind", "timm/lamb is lamb; adamw and sgd are torch's"),
    "--use-bn-sync": _BATCHNORM,
    "--skip-scheduler": Flag("optim.schedule", "constant, without a warm-up"),
    "--lr-scheduler": Flag(
        "optim.schedule", "cosine; const is constant; const-cooldown is constant with optim.cooldown_samples"
    ),
    "--lr-cooldown-end": Flag("optim.final_lr", ""),
    "--lr-cooldown-power": Flag("optim.cooldown_power", ""),
    "--save-frequency": Flag("checkpoint.every_steps", "theirs is in epochs: a multiple of samples / global batch"),
    "--save-most-recent": Flag("checkpoint.keep", "the newest checkpoints stay, the newest of them always"),
    "--zeroshot-frequency": Flag("eval.zeroshot.every_steps", "theirs is in epochs; 0: at the end only"),
    "--val-frequency": Flag("eval.validation.every_steps", "theirs is in epochs; 0: at the end only"),
    "--resume": Flag(
        "resume",
        "auto, the default, goes on from run.dir's newest good one; a path of its own goes back there, once; another "
        "run's starts a new run.dir from there",
    ),
    "--precision": Flag("train.precision", "amp is fp16, amp_bf16 is bf16; weights stay float32; loss.precision apart"),
    "--model": Flag("model.name", "the same names; model.vision and model.text describe one of your own"),
    "--pretrained": _PRETRAINED,
    "--pretrained-image": Flag(
        "model.init, model.init_towers", "weights of a timm backbone from a file; model.init_towers=image"
    ),
    "--lock-image": Flag("train.lock.image", "the same parameters; model.init brings their weights"),
    "--lock-image-unlocked-groups": Flag("train.lock.image_groups", "the same parameters"),
    "--lock-image-freeze-bn-stats": _BATCHNORM,
    "--image-mean": Flag("model.preprocess.mean", "training and evaluation"),
    "--image-std": Flag("model.preprocess.std", "training and evaluation"),
    "--image-interpolation": Flag("model.preprocess.interpolation", "evaluation; training is bicubic, as theirs"),
    "--image-resize-mode": Flag("model.preprocess.resize_mode", "evaluation; training crops"),
    "--aug-cfg": Flag("data.crop_scale, data.crop_ratio, data.augment", "scale, ratio; color_jitter, gray_scale_prob"),
    "--grad-checkpointing": Flag(
        "towers.checkpoint_blocks", "activations are those of a chunk (gradcache.image_chunk): seldom needed"
    ),
    "--local-loss": Flag("", "no rank ever holds the similarities of the whole batch"),
    "--gather-with-grad": Flag("", "the gradient is always that of the whole batch, on any number of ranks"),
    "--force-context-length": Flag("model.context_length", "of any model"),
    "--force-image-size": Flag("model.image_size", "of any model"),
    "--force-quick-gelu": Flag("model.quick_gelu", "of a model of your own; a name with -quickgelu has it"),
    "--force-patch-dropout": Flag("model.vision", "patch_dropout of a model of your own"),
    "--force-custom-text": Flag("model.text", "towers are always separate"),
    "--torchscript": _WHOLE_MODELS,
    "--torchcompile": Flag("towers.compile", "block by block; evaluations run as they come"),
    "--trace": _WHOLE_MODELS,
    "--accum-freq": Flag("train.global_batch", "not needed: chunks (gradcache.*_chunk) bound the memory of any batch"),
    "--device": Flag("device", "auto, cpu or cuda"),
    "--dist-url": _RANKS,
    "--dist-backend": _RANKS,
    "--report-to": Flag("wandb.project", "set: W&B too; TensorBoard and metrics.jsonl are always written, in run.dir"),
    "--wandb-notes": Flag("", "W&B's own WANDB_NOTES has them"),
    "--wandb-project-name": Flag("wandb.project", ""),
    "--debug": Flag("", "there is one level of log lines"),
    "--copy-codebase": Flag("", "the resolved config lies in run.dir and every checkpoint; note the commit yourself"),
    "--horovod": _RANKS,
    "--ddp-static-graph": Flag("", "gradients are summed once a step, without DDP"),
    "--no-set-device-rank": Flag("", "under srun a task that sees one GPU takes it"),
    "--seed": Flag("seed", ""),
    "--grad-clip-norm": Flag("train.grad_clip_norm", "1.0 by default, theirs is off; null switches it off"),
    "--lock-text": Flag("train.lock.text", "the same parameters; model.init brings their weights"),
    "--lock-text-unlocked-layers": Flag("train.lock.text_groups", "the same parameters"),
    "--lock-text-freeze-layer-norm": Flag("train.lock.learn", "train.lock.learn=[norms] where norms are to learn"),
    "--log-every-n-steps": Flag("run.log_every_steps", ""),
    "--coca-caption-loss-weight": _ONE_LOSS,
    "--coca-contrastive-loss-weight": _ONE_LOSS,
    "--remote-sync": _MIRRORED,
    "--remote-sync-frequency": _MIRRORED,
    "--remote-sync-protocol": _MIRRORED,
    "--delete-previous-checkpoint": Flag("checkpoint.keep", "checkpoint.keep=1"),
    "--distill-model": _ONE_LOSS,
    "--distill-pretrained": _ONE_LOSS,
    "--use-bnb-linear": _WHOLE_MODELS,
    "--siglip": _ONE_LOSS,
    "--loss-dist-impl": Flag("loss.engine", "blocks of texts travel round the ranks; this says by which kernels"),
}


def explain(word: str) -> str:
    """What an open_clip flag is here, in a sentence; '' for a word that is none. Dashes and underscores are alike."""
    name = "--" + word.partition("=")[0].lstrip("-").replace("_", "-")
    if name not in FLAGS:
        return ""
    keys, note = FLAGS[name]
    if not keys:
        return f"open_clip's {name} has no setting here: {note}"
    return f"open_clip's {name} is {' or '.join(keys.split(', '))} here" + (f": {note}" if note else "")


def markdown_table() -> str:
    """A row a flag."""
    rows = [f"| `{name}` | {_code(flag.keys)} | {flag.note} |" for name, flag in FLAGS.items()]
    return "\n".join(["| open_clip | clipscale | |", "| --- | --- | --- |", *rows])


def _code(keys: str) -> str:
    return ", ".join(f"`{key}`" for key in keys.split(", ")) if keys else "-"
