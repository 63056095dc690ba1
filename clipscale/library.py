"""Gradient caching for encoders of one's own, in a training loop of one's own.

    cache = GradCache(image_encoder, text_encoder, image_chunk=256, text_chunk=1024)
    for images, texts in batches:                             # this rank's pairs: tensors, or tuples or dicts of them
        optimizer.zero_grad()
        result = cache.step(images, texts, log_scale.exp())   # every .grad, of the loss over all ranks' pairs
        optimizer.step()

The chunks, their two passes and the kept graphs are those of step/; what is here makes an encoder of a module,
and the gradients complete on every rank. That is one sum in flat buckets after pass 2, with or without DDP: a module
that DDP wraps is called without the wrapper, so that nothing is averaged, and no rank waits for another's chunk.

Shapes: N pairs of this rank; M of a chunk; D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

from clipscale.counter import fold
from clipscale.data.load.replay import handed_over
from clipscale.data.load.shape import spans
from clipscale.errors import require
from clipscale.loss import contrastive_grads_in_place
from clipscale.loss.link import Group, Link, open_link
from clipscale.loss.precision import accumulator_dtype, resolve_precision
from clipscale.optim import loss_scale
from clipscale.parallel import sum_in_buckets
from clipscale.step.costs import saved_bytes
from clipscale.step.gradcache import TwoPasses
from clipscale.step.places import Places
from clipscale.step.plan import GraphCost, TowerPlan
from clipscale.step.walks import Chunk
from clipscale.towers import refuse_batchnorm
from clipscale.words import counted

Batch = Tensor | tuple[Tensor, ...] | list[Tensor] | Mapping[str, Tensor]
"""Sample i is row i of each tensor. An encoder is called as `encoder(x)`, `encoder(*several)` or `encoder(**named)`."""

_WRAPPERS = "DistributedDataParallel", "FullyShardedDataParallel"


class CachedStep(NamedTuple):
    """The same on every rank."""

    loss: float  # mean over the pairs, in nats
    pairs: int  # of all ranks; 0: nothing was learned, and no gradient was set
    image_accuracy: float  # share of the pictures whose own text has the largest logit of all texts
    text_accuracy: float


class GradCache:
    """The contrastive loss of a batch of any size, and its gradients, in the memory of a chunk.

    Args:
        image_encoder, text_encoder: modules from inputs to [M, D], with the same weights on every rank; DDP may wrap
            them. They may be one module, and may share parameters.
        image_chunk, text_chunk: samples that go through an encoder at once.
        normalize: the encoders' outputs are divided by their norms; False: they are so already.
        autocast: bfloat16 or float16, for the encoders; None: what is in force where `step` is called.
        keep_bytes: what graphs may hold that are kept from pass 1, pictures first, so that their chunks run once.
        precision, engine, group: of the loss, as in `contrastive_grads`.

    Raises:
        UserError: settings out of range; an encoder that is no module, has BatchNorm or is sharded.
    """

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        *,
        image_chunk: int,
        text_chunk: int,
        normalize: bool = True,
        autocast: torch.dtype | None = None,
        keep_bytes: int = 0,
        precision: str = "auto",
        engine: str = "auto",
        group: Group = None,
    ) -> None:
        for name, value, least in (
            ("image_chunk", image_chunk, 1),
            ("text_chunk", text_chunk, 1),
            ("keep_bytes", keep_bytes, 0),
        ):
            fits = isinstance(value, int) and value >= least
            require(fits, f"{name} is {value}: it must be a whole number of at least {least}")
        require(
            autocast in (None, torch.bfloat16, torch.float16),
            f"autocast is {autocast}: it must be torch.bfloat16, torch.float16 or None",
        )
        self._sides = tuple(
            _OwnEncoder(name, encoder, normalize, autocast)
            for name, encoder in (("image", image_encoder), ("text", text_encoder))
        )
        self._chunks, self._keep_bytes = (image_chunk, text_chunk), keep_bytes
        self._precision, self._engine = precision, engine
        self._group = group
        self._same_weights = False  # on every rank, once looked at
        self._graph_bytes: dict[tuple, int] = {}  # of a chunk, by encoder and shapes

    @torch.enable_grad()
    def step(
        self, images: Batch, texts: Batch, logit_scale: Tensor | float, *, grad_scale: float | GradScaler = 1.0
    ) -> CachedStep:
        """Add the gradient of the mean loss over the pairs of all ranks to every `.grad`, complete. Collective.

        Every rank ends with the same gradients: a plain optimizer is right. Ranks may have different numbers of pairs;
        one without any passes tensors of no rows. Every chunk draws the same in both passes, by a key from torch's
        generator and the rank.

        Args:
            images, texts: this rank's pairs, on the CPU or on the encoders' device (moved chunk by chunk).
            logit_scale: the factor itself, CLIP's `logit_scale.exp()`, the same on every rank. Where it requires a
                gradient, that is passed on to what it was made of.
            grad_scale: factor on every gradient, or a `torch.amp.GradScaler` whose factor it is: its `unscale_`, `step`
                and `update` then follow as usual.

        Raises:
            UserError: inputs that do not fit together, encoders that differ between ranks or give no [M, D].
            ValueError: whatever `contrastive_grads` refuses, embeddings that are not finite for one.
        """
        link = open_link(self._group)
        counts = [_rows(batch, f"{side.name}s") for side, batch in zip(self._sides, (images, texts), strict=True)]
        require(counts[0] == counts[1], f"{counts[0]} images and {counts[1]} texts: pass as many, row i of each a pair")
        self._check_ranks(link)
        learned = logit_scale if isinstance(logit_scale, Tensor) and logit_scale.requires_grad else None
        factor = loss_scale(grad_scale, self._sides[0].device) if isinstance(grad_scale, GradScaler) else grad_scale
        with _complete_gradients(self._parameters(), link, self._sides[0].device):
            grads = self._towers_step((images, texts), logit_scale, link, factor, scale_grad=learned is not None)
        if learned is not None and grads.pairs > 0:
            learned.backward(grads.d_logit_scale.to(learned).expand_as(learned) * factor)
        return CachedStep(grads.loss.item(), grads.pairs, grads.image_accuracy, grads.text_accuracy)

    def _towers_step(self, batches: tuple[Batch, Batch], logit_scale, link: Link, factor: float, *, scale_grad: bool):
        """Both passes of both encoders; the parameters get this rank's share."""
        key = fold(int(torch.randint(2**62, ())), link.rank)
        passes, keep_bytes = [], self._keep_bytes
        for side, batch, chunk in zip(self._sides, batches, self._chunks, strict=True):
            plan = self._plan(side, batch, chunk, keep_bytes)
            passes.append(TwoPasses(side, _InOrder(batch, plan), key, by_chunk=True))
            keep_bytes -= int(plan.cost.of(passes[-1].walk.kept))
        image, text = passes
        image_ND, text_ND = image.embed(), text.embed()
        embedded = torch.promote_types(image_ND.dtype, text_ND.dtype)
        precision = resolve_precision(self._precision, image_ND.device, embedded)
        dtype = accumulator_dtype(precision)
        grads = contrastive_grads_in_place(
            image_ND.to(dtype),
            text_ND.to(dtype),
            logit_scale,
            group=link,
            precision=precision,
            engine=self._engine,
            image_grad=image.learns,
            text_grad=text.learns,
            scale_grad=scale_grad,
        )
        del image_ND, text_ND
        if grads.pairs > 0:
            places = Places(torch.ones(len(image.walk), dtype=torch.bool))
            for each, d_ND in ((image, grads.d_image_ND), (text, grads.d_text_ND)):
                if d_ND is not None:
                    each.replay(d_ND, places, factor)
        return grads

    def _plan(self, side: _OwnEncoder, batch: Batch, chunk: int, keep_bytes: int) -> TowerPlan:
        """What a chunk's graph holds is counted on the first chunk of these shapes."""
        if keep_bytes <= 0 or _size(batch) == 0:
            return TowerPlan(chunk)
        part = _each(batch, lambda tensor: tensor[:chunk])
        shapes = side.name, *(tuple(tensor.shape) for tensor in _tensors(part))
        if shapes not in self._graph_bytes:
            self._graph_bytes[shapes] = saved_bytes(side, _each(part, lambda tensor: handed_over(tensor, side.device)))
        cost = GraphCost(sample=self._graph_bytes[shapes] / _size(part))
        return TowerPlan(chunk, keep_bytes=keep_bytes, cost=cost)

    def _parameters(self) -> list[nn.Parameter]:
        """That learn, each once, in an order that is the same on every rank."""
        both = [parameter for side in self._sides for parameter in side.encoder.parameters()]
        return [parameter for parameter in dict.fromkeys(both) if parameter.requires_grad]

    def _check_ranks(self, link: Link) -> None:
        """Every step: DDP's ranks are the loss's. At the first: the weights are the same on all. Collective."""
        for side in self._sides:
            wrapped = link.size if side.ddp_group is None else dist.get_world_size(side.ddp_group)
            require(
                wrapped == link.size,
                f"the {side.name} encoder's DDP has {counted(wrapped, 'rank')} and the loss {link.size}: pass "
                "GradCache the group that DDP was given",
            )
        if link.size == 1 or self._same_weights:
            return
        sums = [_checksum(side.encoder) for side in self._sides]
        everyone = link.gather(torch.tensor(sums, device=self._sides[0].device)).tolist()
        for side, by_rank in zip(self._sides, zip(*everyone, strict=True), strict=True):
            other = [rank for rank, each in enumerate(by_rank) if each != by_rank[0]]
            require(
                not other,
                f"the {side.name} encoder's weights on ranks {other} are not those of rank 0: seed all ranks alike, "
                "load the same checkpoint, or wrap the encoder in DDP, which copies them",
            )
        self._same_weights = True


class _OwnEncoder:
    """A module as `TwoPasses` takes encoders."""

    def __init__(self, name: str, module: nn.Module, normalize: bool, autocast: torch.dtype | None) -> None:
        require(
            isinstance(module, nn.Module),
            f"the {name} encoder is a {type(module).__name__}: it must be an nn.Module, whose parameters are known; "
            "wrap a function or method in one that holds its model",
        )
        self.ddp_group = module.process_group if isinstance(module, DistributedDataParallel) else None
        self.name, self.encoder = name, module if self.ddp_group is None else module.module
        self._normalize, self._autocast = normalize, autocast
        refuse_batchnorm(self.encoder, f"the {name} encoder")
        for path, part in self.encoder.named_modules():
            require(
                type(part).__name__ not in _WRAPPERS,
                f"the {name} encoder holds a {type(part).__name__} ({path or 'itself'}): its own communication would "
                "run once a chunk; let the encoder hold what it wraps (.module)",
            )
        for path, parameter in self.encoder.named_parameters():
            require(
                not hasattr(parameter, "to_local"),
                f"the {name} encoder is sharded ({path} is a {type(parameter).__name__}): GradCache takes encoders "
                "that are whole on every rank",
            )
        require(
            next(self.encoder.parameters(), None) is not None,
            f"the {name} encoder has no parameters, which tell its device: register those it uses, frozen if need be",
        )

    def __call__(self, inputs: Batch, positions: None = None) -> Tensor:
        del positions  # draws are by chunk
        if isinstance(inputs, Mapping):
            features = self.encoder(**inputs)
        else:
            features = self.encoder(inputs) if isinstance(inputs, Tensor) else self.encoder(*inputs)
        rows = _size(inputs)
        found = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        require(
            isinstance(found, list) and len(found) == 2 and found[0] == rows,
            f"the {self.name} encoder made {found} of {counted(rows, 'sample')}: it must make a tensor of [samples, "
            "width]",
        )
        if features.dtype != torch.float64:
            features = features.float()
        return F.normalize(features, dim=-1) if self._normalize else features

    @contextmanager
    def shared_casts(self) -> Iterator[None]:
        """Within: one pass. `step` may be called under autocast, which would hand the weights' casts on from a pass
        without gradients, that have no way back to the weights, to one with them."""
        torch.clear_autocast_cache()
        try:
            with torch.autocast(self.device.type, self._autocast) if self._autocast else nullcontext():
                yield
        finally:
            torch.clear_autocast_cache()

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device


class _InOrder:
    """Inputs in the order they have, in chunks of `plan.chunk`."""

    def __init__(self, batch: Batch, plan: TowerPlan) -> None:
        self._batch, self._chunk, self._rows = batch, plan.chunk, _size(batch)
        self.kept = plan.kept_samples(self._rows)

    def __len__(self) -> int:
        return self._rows

    def first(self, device: torch.device) -> Iterator[Chunk]:
        if self._rows == 0:  # one sample of zeros tells the embeddings' width
            yield Chunk(slice(0, 0), _each(self._batch, lambda x: x.new_zeros(1, *x.shape[1:]).to(device)), False)
        yield from self._cut(0, self.kept, device, kept=True)
        yield from self.again(device)

    def again(self, device: torch.device) -> Iterator[Chunk]:
        return self._cut(self.kept, self._rows, device, kept=False)

    def _cut(self, first: int, last: int, device: torch.device, *, kept: bool) -> Iterator[Chunk]:
        for start, stop in spans(first, last, self._chunk):
            slots = slice(start, stop)
            yield Chunk(slots, _each(self._batch, lambda x, slots=slots: handed_over(x[slots], device)), kept)


def _size(batch: Batch) -> int:
    return len(_tensors(batch)[0])


def _tensors(batch: Batch) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    return list(batch.values() if isinstance(batch, Mapping) else batch)


def _each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """`change` of every tensor, in a batch of the same kind."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: change(tensor) for name, tensor in batch.items()}
    return tuple(change(tensor) for tensor in batch)


def _rows(batch: Batch, what: str) -> int:
    """`_size` of what a caller gave; UserError unless it is a batch."""
    known = isinstance(batch, Tensor | tuple | list | Mapping)
    tensors = _tensors(batch) if known else []
    require(
        bool(tensors) and all(isinstance(tensor, Tensor) and tensor.dim() > 0 for tensor in tensors),
        f"{what} are a {type(batch).__name__}: pass a tensor, or a tuple or dict of tensors, of one row a sample",
    )
    rows = {len(tensor) for tensor in tensors}
    require(len(rows) == 1, f"{what} hold tensors of {sorted(rows)} rows: all must have one row a sample")
    return rows.pop()


def _checksum(module: nn.Module) -> int:
    """Of its parameters' bytes: the same numbers, the same sum."""
    sums = [
        parameter.detach().contiguous().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)
        for parameter in module.parameters()
    ]
    return fold(*torch.stack(sums).tolist()) >> 1


@contextmanager
def _complete_gradients(parameters: list[nn.Parameter], link: Link, device: torch.device) -> Iterator[None]:
    """What is added to `.grad` within is summed over the ranks; what was there before is the same on all, and stays."""
    if link.size == 1:
        yield
        return
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
        used = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int64, device=device)
        anywhere = link.sum(used).tolist()
        sum_in_buckets([each for each, ranks in zip(parameters, anywhere, strict=True) if ranks], link.sum)
    finally:
        for parameter, old in zip(parameters, before, strict=True):
            if old is not None:
                parameter.grad = old if parameter.grad is None else old.add_(parameter.grad)
