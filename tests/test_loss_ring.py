"""The loss round gloo ranks, against the dense loss of the whole batch in one process.

Shapes: N pairs on this rank, B pairs of all ranks, D width.
"""

import itertools
import time
import warnings
from collections import Counter

import interpreter  # noqa: F401 (mends Triton's, in the ranks)
import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from test_loss_tiles import LiveTensors, assert_close, dense_results, make_pairs, stable_dense_loss, tiled_results

from clipscale.loss import contrastive_grads, contrastive_grads_in_place, contrastive_loss, link, ring
from clipscale.loss.link import GroupLink, ring_order
from clipscale.loss.tiles import logsumexp_block

WIDTH, SCALE, TILE = 12, 14.3, 4
PAIRS_BY_RANK = {
    1: [(9,), (1,), (0,)],
    2: [(6, 6), (9, 4), (0, 5), (1, 0), (0, 0)],
    3: [(5, 5, 5), (1, 7, 0), (0, 0, 3)],
    4: [(4, 4, 4, 4), (3, 0, 9, 1)],
}
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float32}


def share(embeddings_BD, pairs_by_rank, rank):
    return embeddings_BD.split(pairs_by_rank)[rank].clone()


def every_case(rank, world):
    """This rank's results of every case: what the trainer's door gives, and what the autograd door gives."""
    warnings.filterwarnings("error", category=FutureWarning)  # a deprecation would be told by every rank
    results = {}
    for pairs_by_rank in PAIRS_BY_RANK[world]:
        batch = make_pairs(sum(pairs_by_rank), WIDTH)
        for precision, dtype in DTYPES.items():
            image_ND, text_ND = (share(side_BD.to(dtype), pairs_by_rank, rank) for side_BD in batch)
            grads = contrastive_grads(image_ND, text_ND, SCALE, precision=precision, tile=TILE)
            inputs = [image_ND.requires_grad_(), text_ND.requires_grad_(), torch.tensor([SCALE]).requires_grad_()]
            loss = contrastive_loss(*inputs, precision=precision, tile=TILE)
            with torch.no_grad():
                assert contrastive_loss(*inputs, precision=precision, tile=TILE).equal(loss)
            results[pairs_by_rank, precision] = grads, (loss.detach(), *torch.autograd.grad(loss, inputs))
    return results


def joined(results):
    """(loss, d image, d text, d scale) of all ranks: the first and last must be the same bits on each."""
    for loss, _, _, d_scale in results:
        assert loss.equal(results[0][0])
        assert d_scale.equal(results[0][3])
    d_image_BD, d_text_BD = (torch.cat([result[side] for result in results]).double() for side in (1, 2))
    return [results[0][0].double(), d_image_BD, d_text_BD, results[0][3].double().squeeze()]


@pytest.mark.parametrize("world", PAIRS_BY_RANK)
def test_ranks_give_the_loss_of_the_whole_batch(world):
    by_rank = run_ranks(every_case, world)
    for pairs_by_rank, precision in by_rank[0]:
        grads, autograd = zip(*(results[pairs_by_rank, precision] for results in by_rank), strict=True)
        pairs = sum(pairs_by_rank)
        assert {one.pairs for one in grads} == {pairs}
        assert len({(one.image_accuracy, one.text_accuracy) for one in grads}) == 1
        image_BD, text_BD = (side_BD.to(DTYPES[precision]).double() for side_BD in make_pairs(pairs, WIDTH))
        if precision == "fp16":
            references = tiled_results(image_BD, text_BD, SCALE, precision, TILE)
        elif pairs:
            references = dense_results(image_BD, text_BD, SCALE, loss_fn=stable_dense_loss)
        else:
            references = [torch.zeros(shape, dtype=torch.float64) for shape in ((), (0, WIDTH), (0, WIDTH), ())]
        relative, floor = {"fp64": (1e-10, 0), "fp32": (2e-6, 1e-8), "fp16": (1e-5, 1e-8)}[precision]
        assert_close(joined([one[:4] for one in grads]), references, relative, floor)

        # The autograd door: embedding gradients are times the world, the scale's (a float32 leaf) is complete.
        loss, d_image_BD, d_text_BD, d_scale = joined(autograd)
        scaled_back = [loss, d_image_BD / world, d_text_BD / world, d_scale]
        assert_close(scaled_back, references, max(relative, 1e-6), floor)


def subgroup_case(rank, world):
    """Ranks 1 and 2 evaluate on a group of their own; rank 0, outside, is told so. A rank's grads, or its error."""
    group = dist.new_group([1, 2])
    image_ND, text_ND = (share(side_BD, (0, 5, 2), rank) for side_BD in make_pairs(7, WIDTH))
    try:
        return contrastive_grads(image_ND, text_ND, SCALE, group=group, tile=TILE)
    except ValueError as error:
        return str(error)


def broken_inputs(rank, world):
    """This rank's errors: for a NaN in rank 1's text, an overflow of fp16 on rank 0, unequal widths and types, a text
    of rank 1 that is too long for fp16, a gradient that only rank 0 wants. Then the loss of a good batch, for which
    the ring must still work."""
    messages = []
    image_ND, text_ND = make_pairs(4, WIDTH)
    nan_ND, huge_ND, long_ND = text_ND.clone(), image_ND.clone(), text_ND.clone()
    nan_ND[2:, 3] = float("nan")
    huge_ND[1, 2] = 1e6
    long_ND[3] *= 3
    for arguments in (
        {"image_ND": image_ND, "text_ND": nan_ND if rank == 1 else text_ND},
        {"image_ND": huge_ND if rank == 0 else image_ND, "text_ND": text_ND, "precision": "fp16"},
        {"image_ND": image_ND[:, rank:], "text_ND": text_ND[:, rank:]},
        {"image_ND": image_ND.float() if rank else image_ND, "text_ND": text_ND.float() if rank else text_ND},
        {"image_ND": image_ND, "text_ND": long_ND if rank == 1 else text_ND, "precision": "fp16"},
        {"image_ND": image_ND, "text_ND": text_ND, "text_grad": rank == 0},
    ):
        with pytest.raises(ValueError) as caught:
            contrastive_grads(logit_scale=SCALE, **arguments)
        messages.append(str(caught.value))
    return messages, contrastive_grads(image_ND, text_ND, SCALE).loss


def test_a_group_that_is_not_the_whole_world():
    outside, *inside = run_ranks(subgroup_case, 3)
    assert "not in the group" in outside
    references = dense_results(*make_pairs(7, WIDTH), SCALE)
    assert_close(joined([grads[:4] for grads in inside]), references, relative=1e-10)


def test_every_rank_raises_on_one_ranks_bad_embeddings():
    (nan_0, huge_0, width_0, type_0, long_0, lock_0), loss_0 = (by_rank := run_ranks(broken_inputs, 2))[0]
    (nan_1, huge_1, width_1, type_1, long_1, lock_1), loss_1 = by_rank[1]
    assert "text embedding 2 of rank 1 holds nan" in nan_1
    assert "rank 0's 4 pairs are in precision fp64: see the errors of the other ranks" in nan_0
    assert "image embedding 1 of rank 0 holds 1000000.0, not finite in the working precision fp16" in huge_0
    assert "rank 1's 4 pairs are in precision fp16" in huge_1
    assert width_0 == width_1
    assert "differ in width [12, 11]" in width_0
    assert type_0 == type_1
    assert "precision ['fp64', 'fp32']" in type_0
    assert long_0 == long_1
    assert "text embedding 3 of rank 1 has norm 3: precision 'fp16' takes" in long_0
    assert lock_0 == lock_1
    assert "want the gradient of text: [True, False]; lock the same towers on every rank" in lock_0
    assert loss_0.equal(loss_1)


def peak_blocks(rank, world):
    """Most bytes alive at a time beyond the inputs, in [N, D] blocks: of the ring; of gathering all texts; and of the
    ring that consumes its inputs."""
    image_ND, text_ND = (share(side_BD, [64] * world, rank) for side_BD in make_pairs(64 * world, 512))
    with LiveTensors(image_ND, text_ND) as tiled:
        contrastive_grads(image_ND, text_ND, SCALE, tile=32)
    with LiveTensors(image_ND, text_ND) as gathered:
        texts = [torch.empty_like(text_ND) for _ in range(world)]
        dist.all_gather(texts, text_ND)
        logsumexp_block(image_ND, torch.cat(texts), SCALE, diagonal=False, precision="fp64", tile=32)
    with LiveTensors(image_ND, text_ND) as consuming:
        contrastive_grads_in_place(image_ND, text_ND, SCALE, tile=32)
    return [live.peak_bytes / text_ND.nbytes for live in (tiled, gathered, consuming)]


def test_memory_per_rank_does_not_grow_with_the_ranks():
    """Two text blocks, this rank's image gradient and three text gradients, one of each kind in flight. Where inputs
    are consumed: a copy of the images, since they are an operand too, in place of the images' gradient; of two ranks
    no block is in the middle of its way, and the last one's gradient has memory already."""
    two, five = (run_ranks(peak_blocks, world) for world in (2, 5))
    for (tiled_two, gathered_two, consuming_two), (tiled_five, gathered_five, consuming_five) in zip(
        two, five[:2], strict=True
    ):
        assert 6 <= tiled_two < 6.2
        assert abs(tiled_five - tiled_two) < 0.1
        assert 5 <= consuming_two < 5.2
        assert 6 <= consuming_five < 6.2
        assert abs(gathered_five - gathered_two) > 0.1, "the check sees the gathered texts"


def by_kernels(rank, world):
    image_ND, text_ND = (share(side_BD.float(), (70, 0, 30), rank) for side_BD in make_pairs(100, WIDTH))
    return contrastive_grads(image_ND, text_ND, SCALE, precision="fp32", engine="triton", tile=64)


def test_the_kernels_round_a_ring(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # on a GPU machine too: the ranks are processes of their own
    by_rank = run_ranks(by_kernels, 3)
    references = dense_results(*(side_BD.float().double() for side_BD in make_pairs(100, WIDTH)), SCALE)
    assert_close(joined([grads[:4] for grads in by_rank]), references, relative=5e-6)


NODES = (0, 1, 0, 1)
CASE = (4, 3, 5, 2)


class RecordingLink(GroupLink):
    """Notes to whom this rank sends in each exchange."""

    def __init__(self):
        super().__init__(dist.group.WORLD)
        self.sent_to = []

    def exchange(self, outgoing, to, incoming, source):
        self.sent_to.append(to)
        return super().exchange(outgoing, to, incoming, source)


def on_pretended_nodes(rank, world):
    """Results, and this rank's sends, in the ring's own order and in that of the ranks."""
    ring.node_identity = lambda: NODES[rank]
    image_ND, text_ND = (share(side_BD, CASE, rank) for side_BD in make_pairs(sum(CASE), WIDTH))
    outcomes = []
    for order in (ring_order, lambda nodes: list(range(len(nodes)))):
        ring.ring_order = order
        recording = RecordingLink()
        grads = contrastive_grads(image_ND, text_ND, SCALE, tile=TILE, group=recording)
        outcomes.append((grads[:4], recording.sent_to))
    return outcomes


def test_a_hop_crosses_the_network_once_for_each_node():
    references = dense_results(*make_pairs(sum(CASE), WIDTH), SCALE)
    for order, outcomes in zip(
        ("by nodes", "by ranks"), zip(*run_ranks(on_pretended_nodes, 4), strict=True), strict=True
    ):
        results, sent_to = zip(*outcomes, strict=True)
        assert_close(joined(results), references, relative=1e-10)
        hops = list(zip(*sent_to, strict=True))
        assert len(hops) == 2 * 2 * 3 + 1, "two passes, three hops, what travels ahead and what lags behind; 1 - p_ii"
        for receivers in hops:
            crossings = Counter(
                (NODES[rank], NODES[to]) for rank, to in enumerate(receivers) if NODES[rank] != NODES[to]
            )
            assert crossings == ({(0, 1): 1, (1, 0): 1} if order == "by nodes" else {(0, 1): 2, (1, 0): 2})


def with_locked_sides(rank, world):
    """Results and the number of exchanges, by which gradients are wanted."""
    image_ND, text_ND = (share(side_BD, (4, 0, 5), rank) for side_BD in make_pairs(9, WIDTH))
    outcomes = {}
    for wanted in itertools.product([True, False], repeat=3):
        recording = RecordingLink()
        sides = dict(zip(("image_grad", "text_grad", "scale_grad"), wanted, strict=True))
        grads = contrastive_grads(image_ND, text_ND, SCALE, tile=TILE, group=recording, **sides)
        consumed = image_ND.clone(), text_ND.clone()
        in_place = contrastive_grads_in_place(*consumed, SCALE, tile=TILE, **sides)
        outcomes[wanted] = grads, len(recording.sent_to)
        for found, full, memory, input_ND in zip(
            in_place[1:3], grads[1:3], consumed[::-1], (text_ND, image_ND), strict=True
        ):
            assert memory.equal(input_ND if full is None else full), "its memory, if it is wanted"
            assert found is None if full is None else found.data_ptr() == memory.data_ptr()
        assert in_place.loss.equal(grads.loss)
    return outcomes


def test_a_locked_side_neither_computes_nor_travels():
    for outcomes in run_ranks(with_locked_sides, 3):
        every, _ = outcomes[True, True, True]
        for wanted, (grads, exchanges) in outcomes.items():
            for found, full, wants in zip(grads[1:4], every[1:4], wanted, strict=True):
                assert found.equal(full) if wants else found is None
            assert grads.loss.equal(every.loss)
            home, ahead, behind = any(wanted[:2]), 2 * any(wanted), 2 * wanted[1]
            assert exchanges == 2 + 2 + home + ahead + behind, "texts and statistics; 1 - p_ii; texts; their gradients"


def alone_among_others(rank, world):
    """What group="self" gives where there are others."""
    return contrastive_grads(*make_pairs(5 + rank, WIDTH), SCALE, group="self")[:4]


def test_self_is_this_process_even_among_others():
    for rank, grads in enumerate(run_ranks(alone_among_others, 2)):
        assert all(
            a.equal(b) for a, b in zip(grads, contrastive_grads(*make_pairs(5 + rank, WIDTH), SCALE)[:4], strict=True)
        )


@pytest.mark.parametrize(
    ("nodes", "order"),
    [
        ([7], [0]),
        ([5, 5, 5], [0, 1, 2]),
        ([5, -3, 5, -3], [0, 2, 1, 3]),
        ([9, 1, 1, 4, 9, 4], [0, 4, 1, 2, 3, 5]),
    ],
)
def test_the_ring_goes_node_by_node(nodes, order):
    assert ring_order(nodes) == order


def test_processes_of_one_machine_share_its_identity(monkeypatch, tmp_path):
    node_identity = link.node_identity.__wrapped__
    assert node_identity() == node_identity() == link.node_identity()
    assert -(2**63) <= node_identity() < 2**63
    identities = {node_identity()}
    monkeypatch.setattr(link, "_BOOT_ID", tmp_path / "nowhere")
    for host in ("a", "b"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        identities.add(node_identity())
    assert len(identities) == 3


def fails_on_rank_1(rank, world):
    if rank == 1:
        raise ArithmeticError("rank 1 has had enough")
    time.sleep(3600)


def test_a_failing_rank_ends_the_run_and_is_heard():
    with pytest.raises(RuntimeError, match=r"(?s)\[None, 1\].*ArithmeticError: rank 1 has had enough"):
        run_ranks(fails_on_rank_1, 2)
