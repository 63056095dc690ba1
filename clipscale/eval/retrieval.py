"""Retrieval: pictures with one or several captions each, each found among all by the other (CLIP, arXiv 2103.00020).

    result = evaluate_retrieval(towers, source, tokenize, world, ...)
    result.text_to_image.recall[5]              # share of the captions whose picture is among the five nearest

A picture counts as found when one of its captions is among the K nearest. Among equals the one that comes first in the
set is nearer. Similarities stand block by block, so that a million pictures against as many captions need no more
memory than their embeddings.

Shapes: P pictures, T captions, D width; Q queries at once, G of what is searched at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from clipscale.data.source import Source
from clipscale.data.tokenize import Tokenize
from clipscale.dist import World
from clipscale.errors import SharedError
from clipscale.eval.mode import evaluating
from clipscale.eval.pictures import ShardPictures, batches
from clipscale.eval.view import View
from clipscale.towers import Towers
from clipscale.words import counted

RECALLS = (1, 5, 10)
_QUERIES, _GALLERY = 1024, 8192  # of a block


@dataclass(frozen=True)
class Found:
    """How near to its query what belongs to it is."""

    recall: dict[int, float]  # K -> share of the queries that find it among the K nearest
    median_rank: float  # of it, from 1

    @classmethod
    def at(cls, places: Tensor) -> Found:
        """places: of the first that belongs to it, from 0; int64 [queries]"""
        recall = {k: (places < k).double().mean().item() for k in RECALLS}
        return cls(recall, places.double().quantile(0.5).item() + 1)


@dataclass(frozen=True)
class RetrievalResult:
    image_to_text: Found
    text_to_image: Found
    pictures: int
    captions: int
    bad: int  # pictures that could not be decoded: left out with their captions


@torch.no_grad()
def evaluate_retrieval(
    towers: Towers,
    source: Source,
    tokenize: Tokenize,
    world: World,
    *,
    batch: int,
    text_chunk: int,
    view: View,
    threads: int,
    walk: Callable[[Iterable], Iterator] = iter,
) -> RetrievalResult:
    """Embed every picture and each line of its caption, each rank its share. Collective; the same on every rank.

    Args:
        source: its captions are whole (`captions: whole`): a line each.
        walk: passes each batch on.

    Raises:
        SharedError: what went wrong on any rank, or no picture that can be decoded.
    """
    pictures, device = ShardPictures(source), towers.image.device

    def embed() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This rank's: pictures [P, D] and their numbers [P], captions [T, D] and the numbers of their pictures [T]."""
        nothing = torch.zeros(0, towers.embed_dim)
        images, numbers, texts, owners = [nothing], [], [nothing], []
        mine = range(world.rank, len(pictures), world.size)
        found = batches(pictures, mine, batch=batch, view=view, threads=threads)
        for at, (pixels, notes, valid) in enumerate(walk(found)):
            there = [number for number, ok in zip(mine[at * batch :], valid, strict=False) if ok]
            captions = [note.decode().splitlines() for note, ok in zip(notes, valid, strict=True) if ok]
            if not there:
                continue
            images.append(towers.image(pixels[valid].to(device)).cpu())
            numbers += there
            lines = [line for its in captions for line in its if line.strip()]
            owners += [number for number, its in zip(there, captions, strict=True) for line in its if line.strip()]
            for start in range(0, len(lines), text_chunk):
                texts.append(towers.text(tokenize(lines[start : start + text_chunk]).to(device)).cpu())
        return torch.cat(images), torch.tensor(numbers).long(), torch.cat(texts), torch.tensor(owners).long()

    with evaluating(towers):
        image_PD, numbers_P, text_TD, owners_T = world.each(embed)
    image_PD, text_TD = (world.collect(own.flatten()) for own in (image_PD, text_TD))
    numbers_P, owners_T = world.collect(numbers_P), world.collect(owners_T)
    found = world.lead(partial(_search, image_PD, numbers_P, text_TD, owners_T, device), patient=True)
    if found is None:
        raise SharedError(
            f"retrieval: none of the {counted(len(pictures), 'picture')} of {source.name!r} can be decoded"
        )
    to_text, to_image, sizes = found
    return RetrievalResult(to_text, to_image, *sizes, bad=len(pictures) - sizes[0])


def _search(
    images: Tensor, numbers_P: Tensor, texts: Tensor, owners_T: Tensor, device: torch.device
) -> tuple[Found, Found, tuple[int, int]] | None:
    """Both directions, in the order of the set, whichever rank embedded what; None: there is nothing."""
    if not len(numbers_P):
        return None
    by_number, by_owner = numbers_P.argsort(), owners_T.argsort(stable=True)
    image_PD = images.view(len(numbers_P), -1)[by_number].to(device)
    text_TD = texts.view(len(owners_T), -1)[by_owner].to(device)
    owner_T = torch.searchsorted(numbers_P[by_number], owners_T[by_owner])  # the picture's place, from 0
    first_P = torch.searchsorted(owner_T, torch.arange(len(image_PD)))
    last_P = torch.searchsorted(owner_T, torch.arange(len(image_PD)), right=True)
    to_text = first_places(image_PD, text_TD, first_P, last_P)
    to_image = first_places(text_TD, image_PD, owner_T, owner_T + 1)
    return Found.at(to_text), Found.at(to_image), (len(image_PD), len(text_TD))


def first_places(query_ND: Tensor, gallery_MD: Tensor, first_N: Tensor, last_N: Tensor) -> Tensor:
    """For each query the place, from 0, of the nearest of gallery[first:last]; int64 [N] on the CPU.

    Blocks of similarities are made twice, alike: once to find the nearest of each query's own, and once to count what
    is nearer than it.
    """
    places = []
    for start in range(0, len(query_ND), _QUERIES):
        query_QD = query_ND[start : start + _QUERIES]
        first_Q, last_Q = (bound[start : start + _QUERIES, None].to(query_ND.device) for bound in (first_N, last_N))
        best_Q1 = torch.full((len(query_QD), 1), -torch.inf, device=query_ND.device)
        where_Q1 = torch.zeros_like(best_Q1, dtype=torch.int64)
        for number_G, similarity_QG in _blocks(query_QD, gallery_MD):
            own_QG = (number_G >= first_Q) & (number_G < last_Q)
            top_Q1, at_Q1 = similarity_QG.masked_fill(~own_QG, -torch.inf).max(1, keepdim=True)
            where_Q1 = torch.where(top_Q1 > best_Q1, number_G[at_Q1], where_Q1)
            best_Q1 = torch.maximum(top_Q1, best_Q1)
        nearer_Q = torch.zeros(len(query_QD), dtype=torch.int64, device=query_ND.device)
        for number_G, similarity_QG in _blocks(query_QD, gallery_MD):
            before_QG = (similarity_QG == best_Q1) & (number_G < where_Q1)
            nearer_Q += ((similarity_QG > best_Q1) | before_QG).sum(1)
        places.append(nearer_Q.cpu())
    return torch.cat(places)


def _blocks(query_QD: Tensor, gallery_MD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(numbers [G], similarities [Q, G]) for so many of the gallery at a time."""
    for start in range(0, len(gallery_MD), _GALLERY):
        gallery_GD = gallery_MD[start : start + _GALLERY]
        yield torch.arange(start, start + len(gallery_GD), device=query_QD.device), query_QD @ gallery_GD.T
