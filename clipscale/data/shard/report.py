"""What indexing found out about a source's shards, as lines for a person, and when it is too bad to train on.

for line in findings("cc3m", shards, copy_of): tell(line)        # damaged and changed shards, refused samples by cause
require_samples("cc3m", shards, "pairs", settings, copy_of)      # UserError: no usable sample; all that is known of why
require_few_bad("cc3m", shards, data)                          # UserError: above data.max_refused_fraction
require_captions("cc3m", shards)                               # UserError: one of several captions that no sample has

`copy_of(url)` says where the copy of a remote shard lies: '' or ' (its copy: /cache/x.tar)'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from clipscale.config.data import Data, SourceSettings
from clipscale.data.fetch.urls import masked
from clipscale.data.shard.index import Shard
from clipscale.data.shard.judge import APART, IMAGE_SUFFIXES, ON_PURPOSE
from clipscale.data.shard.select import Need
from clipscale.errors import UserError, require
from clipscale.words import counted

_LOST = "lost with the rest of a damaged shard"
_TOLD = 6  # kinds of members that are not read, in a message


def refused(shards: list[Shard]) -> Counter[str]:
    """Samples left out when the shards were indexed, by cause."""
    return sum((Counter(shard.refused) for shard in shards), Counter())


def not_read(shards: list[Shard]) -> Counter[str]:
    """Members that nothing looks at: by suffix, or why they belong to no sample."""
    return sum((Counter(shard.not_read) for shard in shards), Counter())


def changes(name: str, shards: list[Shard]) -> list[str]:
    """One line for each shard that holds other bytes than its index said until now."""
    return [
        f"source {name!r}: {masked(shard.url)} changed since it was indexed last: {shard.changed}"
        for shard in shards
        if shard.changed
    ]


def findings(name: str, shards: list[Shard], copy_of: Callable[[str], str]) -> Iterable[str]:
    """What a person should hear of the source `name` before it is trained on: a line each."""
    yield from changes(name, shards)
    for shard in shards:
        if shard.cut:
            about = f"source {name!r}: {masked(shard.url)}"
            usable = counted(shard.samples, "sample is usable", "samples are usable")
            yield f"{about} is damaged, {usable}: {damage(shard)}{copy_of(shard.url)}"
    causes = refused(shards)
    if causes:
        usable = counted(sum(shard.samples for shard in shards), "is usable", "are usable")
        yield f"source {name!r}: {counted(causes.total(), 'sample')} refused ({_table(causes)}); {usable}"
    yield from lacking(name, shards)


def lacking(name: str, shards: list[Shard]) -> Iterable[str]:
    """Which of several captions how many samples lack: a line each."""
    indexed = [shard for shard in shards if shard.captions]
    samples = sum(shard.samples for shard in indexed)
    for caption, count in having(indexed).items():
        if count < samples:
            lack = counted(samples - count, "sample lacks", "samples lack")
            yield f"source {name!r}: {lack} the caption {caption}, of {samples:,}; theirs is drawn from the others"


def having(shards: list[Shard]) -> dict[str, int]:
    """How many usable samples have each of several captions, as far as shards are indexed."""
    captions = dict.fromkeys(caption for shard in shards for caption in shard.captions)
    return {caption: sum(shard.captions.get(caption, 0) for shard in shards) for caption in captions}


def require_captions(name: str, shards: list[Shard]) -> None:
    """Raises UserError where all shards are indexed, and one of several captions is in no sample of them."""
    absent = [caption for caption, count in having(shards).items() if not count]
    require(
        not absent or not all(shard.sidecar for shard in shards),
        f"source {name!r}: none of its {sum(shard.samples for shard in shards):,} usable samples has the caption "
        f"{absent and absent[0]}; mend its name in data.sources.{name}.caption_weights (or extra.uid_field, by which "
        "extra captions are joined), or take it out",
    )


def damage(shard: Shard) -> str:
    """Where and why a damaged shard ends early, and how much is lost."""
    if shard.lost:
        known = shard.samples + sum(shard.refused.values()) + shard.lost
        return f"{shard.cut}; of {known} samples that are known of, {shard.lost} are lost"
    if shard.unread:
        return f"{shard.cut}; {shard.unread} of its {shard.bytes} bytes were not read, how many samples is not known"
    return f"{shard.cut}; how many samples are lost is not known"


def require_samples(
    name: str, shards: list[Shard], need: Need, source: SourceSettings, copy_of: Callable[[str], str]
) -> None:
    """Raises UserError where no sample is usable, with all that is known of why."""
    if sum(shard.samples for shard in shards):
        return
    names = source.caption_shares
    place = " or ".join(name if name.startswith("json:") else f".{name}" for name in names)
    urls = masked(source.urls)
    nowhere = (
        f"its shard ({urls}) holds no" if len(shards) == 1 else f"none of its {len(shards):,} shards ({urls}) holds a"
    )
    wanted = f"a caption ({place})" if need == "pairs" else "a label (.cls)"
    causes, unread = refused(shards), not_read(shards)
    found = [_table(causes), *(f"{masked(shard.url)} {shard.cut}{copy_of(shard.url)}" for shard in shards if shard.cut)]
    found = [what for what in found if what][:4]
    if unread:
        found.append(f"members that are not read: {_table(Counter(dict(unread.most_common(_TOLD))))}")
    seen = "; ".join([*found, *_hints(causes, unread)]) or "empty archives"
    raise UserError(f"source {name!r}: {nowhere} sample with a picture and {wanted}; found: {seen}")


def _hints(causes: Counter[str], unread: Counter[str]) -> Iterable[str]:
    """What to do about it."""
    if causes[APART]:
        yield "the members of a sample must follow each other: sort the tar (tar --sort=name -cf new.tar -C folder .)"
    read = tuple(f".{suffix}" for suffix in (*IMAGE_SUFFIXES, "txt", "json", "cls"))
    dotted = next((kind for kind in unread if kind.endswith(read)), None)
    if dotted is not None:
        yield f"a key ends at its name's first dot, so that {dotted!r} is one suffix: take the dots out of the names"
    if causes["no picture"] or causes["picture of another format"]:
        yield f"pictures are read from {' '.join(read[: len(IMAGE_SUFFIXES)])}"
    if causes["no caption"]:
        yield "data.sources.<name>.caption (--caption) names the suffix, or json:<field>, that holds the captions"


def require_few_bad(name: str, shards: list[Shard], data: Data) -> None:
    """What `select` or a uid list leaves out on purpose counts as a sample, and as no fault.

    Raises:
        UserError: too large a share of the source's samples was refused, or is known to be lost.
    """
    causes = refused(shards)
    lost = sum(shard.lost for shard in shards)
    samples = sum(shard.samples for shard in shards) + causes.total() + lost
    bad = Counter({cause: count for cause, count in causes.items() if cause not in ON_PURPOSE} | {_LOST: lost})
    bound = "data.max_bad_fraction" if data.max_refused_fraction is None else "data.max_refused_fraction"
    limit = data.max_bad_fraction if data.max_refused_fraction is None else data.max_refused_fraction
    require(
        bad.total() <= limit * samples,
        f"source {name!r}: {bad.total()} of its {samples} samples cannot be used ({_table(+bad)}), more than "
        f"{bound}={limit}; mend the shards (clipscale index --refused names the samples), or raise "
        "data.max_refused_fraction",
    )


def _table(counts: Counter[str]) -> str:
    """`what` may come from a hostile tar."""
    return ", ".join(f"{what if what.isprintable() else repr(what)}: {count}" for what, count in counts.most_common())
