"""What is planned for: a run's settings, its towers' costs, the ranks and the device.

    job = make_job(config, ranks=8, device=find_gpu("h100"), tokens=20.0)
    job.slots, job.image.parameters          # pairs of a rank; ...

Shapes: N slots of a rank, W ranks, D width of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

from clipscale.config import Config, GradCache
from clipscale.data.load.shape import StepShape
from clipscale.errors import require
from clipscale.forecast.hardware import Device
from clipscale.forecast.towers import TowerFacts, plain_towers
from clipscale.launch import check_ranks
from clipscale.upstream.open_clip_files import check_model, model_fields
from clipscale.words import counted

TOKENS = 20.0  # a caption, cut and rounded up: 19.9 where captions have 13.5 on the average (bench step)


@dataclass(frozen=True)
class Job:
    config: Config
    ranks: int
    device: Device
    image: TowerFacts
    text: TowerFacts
    width: int
    """D."""
    side: int
    """Pixels of a picture."""
    tokens: float
    """Of a caption, as the text tower runs it."""

    @property
    def slots(self) -> int:
        """N."""
        return self.config.train.global_batch // self.ranks

    @property
    def parameters(self) -> int:
        return self.image.parameters + self.text.parameters + 1

    @property
    def locked(self) -> tuple[bool, bool]:
        """Of image and text tower, whether nothing in it learns. One that learns in part counts as one that learns."""
        lock = self.config.train.lock
        image, text = (name in lock.whole() and not lock.learn for name in ("image", "text"))
        return image, text

    @property
    def learned(self) -> tuple[int, int]:
        """Parameters of image and text tower that learn."""
        image, text = self.locked
        return self.image.parameters * (not image), self.text.parameters * (not text)

    @property
    def half(self) -> bool:
        return is_half(self.config, self.device)

    @property
    def chunks(self) -> tuple[int, int]:
        """Pictures, and captions of full length, at once; of `auto`, the defaults."""
        settings, usual = self.config.gradcache, GradCache()
        image, text = (
            chosen if chosen != "auto" else default
            for chosen, default in (
                (settings.image_chunk, usual.image_chunk),
                (settings.text_chunk, usual.text_chunk),
            )
        )
        return min(image, self.slots), text

    @property
    def text_chunk_tokens(self) -> float:
        """Of the largest chunk of captions: as many as `text_chunk` of full length have, where there are so many."""
        return min(self.chunks[1] * self.text.tokens, self.slots * self.tokens)

    @property
    def loss_precision(self) -> str:
        chosen = self.config.loss.precision
        return chosen if chosen != "auto" else "fp16" if self.device.on_gpu else "fp32"

    def shape(self, kept: int = 0) -> StepShape:
        """Of the loader, as the trainer cuts a step."""
        data = self.config.data
        return StepShape.fit(
            self.slots,
            chunk=self.chunks[0],
            side=self.side,
            ahead_steps=data.prefetch_steps,
            ahead_bytes=data.prefetch_bytes,
            kept=kept,
        )


def is_half(config: Config, device: Device) -> bool:
    """Whether the towers' products are in half precision."""
    return config.train.precision in ("bf16", "fp16") or (config.train.precision == "auto" and device.on_gpu)


def make_job(config: Config, *, ranks: int, device: Device, tokens: float | None = None) -> Job:
    """Towers that no formula knows are built without memory, which loads torch.

    Raises:
        UserError: a model that is none, ranks that do not divide the batch, captions longer than the tower takes.
    """
    require(ranks >= 1, f"--ranks={ranks} must be at least 1")
    check_ranks(config.train.global_batch, ranks)
    check_model(config.model)
    fields, half = model_fields(config.model), is_half(config, device)
    image, text = plain_towers(config.model, config.towers, half=half)
    if image is None or text is None:
        from clipscale.forecast.built import built_towers  # torch, for these alone

        built_image, built_text = built_towers(config.model, config.towers, half=half)
        image, text = image or built_image, text or built_text
    require(
        tokens is None or 1 <= tokens <= text.tokens,
        f"--tokens={tokens}: a caption of this model has 1 to {counted(text.tokens, 'token')}",
    )
    if tokens is None or not text.cuttable:
        tokens = min(TOKENS, text.tokens) if text.cuttable else text.tokens
    side = fields["vision_cfg"].get("image_size", 224)
    return Job(config, ranks, device, image, text, fields["embed_dim"], side, tokens)
