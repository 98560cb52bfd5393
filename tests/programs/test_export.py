"""torch.export of the forward, with neighbor tensors among its inputs."""

import pytest
import torch
from torch.export import Dim, export

from ..support.retro_models import CHUNK, VOCAB, RowNeighbors, neighbor_tensors, small_model


def inputs(batch_size, length, seed):
    rng = torch.Generator().manual_seed(seed)
    attention_mask = torch.ones(batch_size, length, dtype=torch.long)
    attention_mask[0, :3] = 0
    rows = [RowNeighbors(length // CHUNK, seed + row, missing={row}).chunks for row in range(batch_size)]
    neighbor_ids, neighbor_attention_mask = neighbor_tensors(rows, length // CHUNK)
    return {
        "input_ids": torch.randint(0, VOCAB, (batch_size, length), generator=rng),
        "attention_mask": attention_mask,
        "neighbor_ids": neighbor_ids,
        "neighbor_attention_mask": neighbor_attention_mask,
    }


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_exported_model_gives_the_same_logits_at_any_batch_size_and_length(attention, strict, tmp_path):
    model = small_model(attn_implementation=attention, use_cache=False)
    example = inputs(3, 14, seed=0)
    # batch size and number of chunks vary; the number of neighbors and their length do not
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in example}
    program = export(model, (), example, dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "retro.pt2")
    exported = torch.export.load(tmp_path / "retro.pt2").module()
    for batch_size, length in ((3, 14), (2, 2 * CHUNK), (5, 40)):
        given = inputs(batch_size, length, seed=length)
        torch.testing.assert_close(exported(**given).logits, model(**given).logits, atol=1e-5, rtol=1e-5)
