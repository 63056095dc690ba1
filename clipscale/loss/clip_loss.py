"""A drop-in for open_clip's `ClipLoss`: the same module, without its logits."""

from torch import Tensor, nn

from clipscale.loss.contrastive import contrastive_loss
from clipscale.loss.link import Group, Link, open_link


class ClipLoss(nn.Module):
    """`contrastive_loss` behind the constructor and the call of open_clip 3.3's `ClipLoss`.

        loss_fn = ClipLoss(rank=rank, world_size=world_size)
        loss_fn(image_features, text_features, model.logit_scale.exp()).backward()

    Value and gradients are always those that open_clip gives for `local_loss=False, gather_with_grad=True`: of the loss
    over the pairs of all ranks, exact once DDP has averaged over the ranks. The flags are taken and change nothing.
    With open_clip, under DDP:

        local_loss  gather_with_grad  value: a mean over      gradients of the towers
        False       True              the pairs of all ranks  exact
        True        True              this rank's pairs       exact
        False       False             the pairs of all ranks  world_size times too small
        True        False             this rank's pairs       without what embeddings owe as candidates for others

    and that of `logit_scale` is exact throughout.

    `cache_labels` changes nothing either: there are no labels. Ranks may hold different numbers of pairs here.

    Args:
        rank, world_size: this process's and that of its group. 1 (the default) is this process's pairs only, without
            communication, also where torch.distributed is initialised.
        use_horovod: must be False.
        group, precision, engine, tile: as in `contrastive_grads`; `group` None is the default process group
            where `world_size` is above 1.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: Group = None,
        precision: str = "auto",
        engine: str = "auto",
        tile: int | None = None,
    ) -> None:
        super().__init__()
        del local_loss, gather_with_grad, cache_labels
        if use_horovod:
            raise ValueError("use_horovod=True: this loss speaks torch.distributed only; use open_clip's ClipLoss")
        self.rank, self.world_size = rank, world_size
        self.group = "self" if group is None and world_size == 1 else group
        self.options = {"precision": precision, "engine": engine, "tile": tile}

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, [], or {"contrastive_loss": loss}. Collective. Errors are those of `contrastive_loss`.

        ValueError, too, for a `logit_bias`, and where rank and world size are not the group's.
        """
        if logit_bias is not None:
            raise ValueError(
                "a logit_bias belongs to the sigmoid loss, which is not offered here: use open_clip's SigLipLoss, or a "
                "model without one (init_logit_bias=None)"
            )
        loss = contrastive_loss(image_features, text_features, logit_scale, self._link(), **self.options)
        return {"contrastive_loss": loss} if output_dict else loss

    def _link(self) -> Link:
        link = open_link(self.group)
        if (link.rank, link.size) != (self.rank, self.world_size):
            raise ValueError(
                f"ClipLoss was made for rank={self.rank}, world_size={self.world_size}, and this process is rank "
                f"{link.rank} of {link.size}: pass torch.distributed.get_rank() and get_world_size() of its group, "
                "after init_process_group"
            )
        return link
