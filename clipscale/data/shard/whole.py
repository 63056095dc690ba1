"""Whether a file that came over the network can be the shard: what the cache is given to check its copies.

    cache.open("https://host/x-00.tar", check=check_copy)

    check_copy(file, vouched=True)         # "it is no tar: it begins with b'<!DOCTYPE html>'"; '' for a tar
    check_copy(file, vouched=False)        # "cut short at byte 81920: no end-of-archive marker, and ..."

A tar whose server named its length came as it lies there: if it is damaged, it is used up to the damage like a local
one. Where no length was named, a body that was cut looks like one that has ended.
"""

from __future__ import annotations

import os

from clipscale.data.shard.tar import list_members, mapped

_BLOCK = 512
_SHOWN_BYTES = 48
_USTAR = slice(257, 262)


def check_copy(file: int, vouched: bool) -> str:
    """What is wrong with the file of this descriptor; empty: nothing that another download could mend."""
    head = os.pread(file, _BLOCK, 0)
    if not head:
        return "it is empty"
    if len(head) < _BLOCK or (head[_USTAR] != b"ustar" and "bad tar header at byte 0" in list_members(head).cut):
        return f"it is no tar: it begins with {head[:_SHOWN_BYTES]!r}"
    if not vouched:
        with mapped(file) as tar:
            cut = list_members(tar).cut
        if cut.startswith("cut short"):
            return f"{cut}, and no Content-Length says that this is all"
    return ""
