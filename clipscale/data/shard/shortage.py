"""Which samples of a shard are refused, by name: where more were declared than are usable, some slot stands for each.

    refused_samples(file, rules, most=2)          # [Lost('000017', 'empty caption'), Lost('000040', 'no picture')]

An index only counts them by cause.
"""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

from clipscale.data.shard.captions import CaptionRule
from clipscale.data.shard.judge import Judge
from clipscale.data.shard.select import Rules, group
from clipscale.data.shard.tar import list_members, mapped


class Lost(NamedTuple):
    key: str
    cause: str  # as it is counted when the shard is indexed


def refused_samples(file: int, rules: Rules, *, most: int) -> list[Lost]:
    """The first `most` refused samples of the tar open as `file`, in its order.

    Raises:
        OSError: it cannot be read.
        UserError: a uid file that cannot be used.
    """
    with mapped(file) as tar:
        listing = list_members(tar)
        caption = CaptionRule.of(rules.caption)
        judge = Judge(tar, listing, need=rules.need, caption=caption, select=rules.select, max_pixels=rules.max_pixels)
        judged = ((key, judge.first_fault(key, sample)) for key, sample in group(listing.names))
        return list(islice((Lost(key, fault.cause) for key, fault in judged if fault is not None), most))
