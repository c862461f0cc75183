"""FSDP2 holds shards of gradients, also between the micro-batches of a step."""

import fsdp2_ranks
import pytest
import torch
import warm

pytestmark = pytest.mark.engines


def test_between_micro_batches_a_process_holds_its_shard_of_the_gradients_and_their_sum_is_right(tmp_path):
    assert warm.ranks(2, fsdp2_ranks.accumulate, str(tmp_path)) == [0, 0]
    saved = torch.load(tmp_path / "gradients.pt", weights_only=True)
    network = fsdp2_ranks.Network()
    numel = sum(p.numel() for p in network.parameters())
    assert all(numel / 2 <= held <= 0.6 * numel for held in saved["held"])
    for rank in range(2):
        for batch in fsdp2_ranks.batches(rank, fsdp2_ranks.BATCHES):
            (network(batch).mean() / fsdp2_ranks.BATCHES / 2).backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(saved["gradients"][name], parameter.grad)


def test_full_training_gathers_weights_in_16_bits_and_keeps_them_and_their_gradients_in_32(tmp_path):
    assert warm.ranks(2, fsdp2_ranks.gather, str(tmp_path)) == [0, 0]
    found = torch.load(tmp_path / "dtypes.pt", weights_only=True)
    assert found["full"] == [torch.bfloat16, torch.float32, torch.float32]
    assert found["adapter"][0] == torch.float32  # as they are
